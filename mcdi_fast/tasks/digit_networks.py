"""Whole networks of digits: two classes of one domain, told apart by a small convolutional network, every layer of which is generated.

Tasks for training are pairs of digits in two of the domains mnist, mnist_m and usps. Test tasks are other pairs, in the third.

What is generated is the difference from a base: the meta-learned start, whose last layer is a ridge regression on the support.

The norms are group norms. A batch norm would carry running statistics of the data that its weights were trained on, and a generated network has seen
none; `WeightLayout.from_module(buffers=True)` generates them where a network needs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mcdi_fast.bounds import Range
from mcdi_fast.config import AtLeastOne, EvaluateConfig, PrepareConfig, TrainConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.optim import trajectory
from mcdi_fast.tasks import Data, Metric, Setup, TaskBatch, TaskFamily, register
from mcdi_fast.tasks.images import LabelledRows, load
from mcdi_fast.tasks.modules import ModuleFamily, Net

SIDE = 16  # of an image as the network sees it
_QUERIES = 15  # images of a class that score a network (protocol)
_OTHERS = 20  # that trajectories see beside the support
_PAIRS = {"train": slice(0, 27), "val": slice(27, 36), "test": slice(36, 45)}  # of the 45, in a fixed random order
_PENALTY = 0.1  # of the ridge head, in mean squared features (validation: 0.01 to 1 alike)
_GAIN = 2.0  # what makes margins of it (validation: the least loss of 1, 2, 4, 8, 16)
_START_LR, _START_TASKS = 0.003, 16  # of Reptile's inner Adam; tasks an outer step


@dataclass(frozen=True)
class NetworkOptions:
    """Two digits, told apart by a network of one's own."""

    target: Literal["mnist", "mnist_m", "usps"] = "usps"
    """The domain of the test tasks; training tasks are from the other two."""
    shots: Annotated[int, Range(ge=1, le=30)] = 5
    """Images of a class that are seen."""
    width: AtLeastOne = 8
    """Channels of the first convolution; the second has twice as many."""
    start_steps: AtLeastOne = 300
    """Outer steps of Reptile, which makes the common start of all trajectories."""


def network(width: int) -> nn.Sequential:
    """Two convolutions of stride 2 with group norms, means of the four quarters, a linear layer; a fixed seed. [B, 1, 16, 16] -> [B, 2]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(1, width, 3, 2, 1), nn.GroupNorm(1, width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GroupNorm(1, 2 * width), nn.ReLU()),
            *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 2)),
        )


class DigitFamily(ModuleFamily):
    """Networks for pairs of digits, as differences from a base; data also have "base" [B, N, D]."""

    def __init__(self, data: LabelledRows, options: NetworkOptions):
        """data: the ten digits in all three domains, as `images.load` gives them."""
        metric = Metric("accuracy", "%", True, 100.0)
        super().__init__(network(options.width), self._draw, _cross_entropy, score=_accuracy, metric=metric)
        self.options, self.fingerprint = options, f"{data.fingerprint} {asdict(options)}"
        self._domains = [data.domain_names.index(name) for name in data.domain_names if name != options.target]
        self._domains.append(data.domain_names.index(options.target))
        gray = data.rows.float().mean(-1).unsqueeze(1) / 127.5 - 1
        small = F.adaptive_avg_pool2d(gray, SIDE)
        each = int(data.cells.min())
        need = options.shots + _QUERIES + _OTHERS
        if each < need:
            raise McdiError(
                f"digits: {each} images of a digit in a domain, expected {need} at least; lower --task.shots"
            )
        cells = small.split(data.cells.flatten().tolist())
        # [digit, domain, each, 1, SIDE, SIDE]
        self._images = torch.stack([cell[:each] for cell in cells]).unflatten(0, data.cells.shape)
        pairs = np.array(list(itertools.combinations(range(10), 2)))
        self._pairs = np.random.default_rng(0).permutation(pairs)

    def _draw(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        pairs, each, shots = self._pairs[_PAIRS[split]], self._images.shape[2], self.options.shots
        domains = self._domains[2:] if split == "test" else self._domains[:2]
        images = []
        for number in range(start, start + count):
            draw = np.random.default_rng(np.random.SeedSequence((list(_PAIRS).index(split), seed, number)))
            pair = draw.permutation(pairs[draw.integers(len(pairs))])
            domain = domains[draw.integers(len(domains))]
            images.append(torch.stack([self._images[digit, domain, draw.permutation(each)] for digit in pair]))
        x = torch.stack(images)  # [B, 2, each, 1, SIDE, SIDE]

        def part(first: int, last: int) -> dict[str, Tensor]:
            chosen = x[:, :, first:last]
            labels = torch.arange(2).repeat_interleave(chosen.shape[2]).expand(len(x), -1)
            return {"x": chosen.flatten(1, 2), "y": labels}

        seen, query = part(0, shots), part(shots, shots + _QUERIES)
        others = part(shots + _QUERIES, shots + _QUERIES + _OTHERS)
        train = {name: torch.cat([value, others[name]], 1) for name, value in seen.items()}
        condition, base = self._told(x[:, :, :shots])
        return TaskBatch(condition, *({**data, "base": base} for data in (seen, query, train)))

    def _told(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """What a support [B, 2, shots, 1, SIDE, SIDE] says: the condition [B, 1, 2 F + 1] and the base [B, N, D].

        F features of the start's last layer. A ridge regression on them makes the base's last layer, in the place of the start's own. The condition
        is that regression, of length 1, and the direction of the mean feature.
        """
        count, ways, shots = support.shape[:3]
        body = nn.Sequential(*list(self.module.children())[:-1])
        names = dict(body.named_parameters())
        initial = self.layout.unpack(self._initial)
        weights = {name: tensor for name, tensor in initial.items() if name in names}
        with torch.no_grad():
            features = functional_call(body, weights, (support.flatten(0, 2),)).view(count, ways * shots, -1)
        rows = F.pad(features, (0, 1), value=1.0)
        label = features.new_ones(count, ways * shots, 1)
        label[:, shots:] = -1
        eye = torch.eye(ways * shots, dtype=features.dtype)
        penalty = _PENALTY * features.square().sum(-1).mean(1)[:, None, None] * eye
        # [B, 1, F + 1], above 0 for the first class
        ridge = (rows.mT @ torch.linalg.solve(rows @ rows.mT + penalty, label)).mT
        last = _GAIN * torch.cat([ridge, -ridge], 1)  # [B, 2, F + 1]
        start = {name: tensor.expand(count, *tensor.shape) for name, tensor in initial.items()}
        *_, weight, bias = start
        base = self.layout.pack_batch(start | {weight: last[..., :-1], bias: last[..., -1]})
        told = F.normalize(ridge, dim=2), F.normalize(features.mean(1, keepdim=True), dim=2)
        return torch.cat(told, 2), base

    def loss(self, theta: Tensor, data: Data) -> Tensor:
        """Cross entropy of base + theta."""
        return super().loss(data["base"] + theta, data)

    def score(self, theta: Tensor, data: Data) -> Tensor:
        """Accuracy of base + theta."""
        return super().score(data["base"] + theta, data)

    def start(self, count: int, config: PrepareConfig, generator: torch.Generator) -> Tensor:
        """No difference, plus Gaussian noise of `start_std`."""
        return TaskFamily.start(self, count, config, generator)

    def baselines(self) -> dict[str, Callable[[TaskBatch], Tensor]]:
        """The base alone; and Adam on the support from the meta-learned start itself (rate and steps chosen on validation tasks)."""

        def from_start(tasks: TaskBatch) -> Tensor:
            recipe = PrepareConfig(steps=10, learning_rate=0.001, rho=0.0, weight_decay=0.0)
            away = self._initial - tasks.support["base"]
            return trajectory(away, lambda theta, _: self.gradient(theta, tasks.support), recipe, 1)[:, -1]

        return {"ridge-head": lambda tasks: torch.zeros_like(tasks.support["base"]), "start-finetune": from_start}

    def meta_learn(self, setup: Setup) -> None:
        """Replace the start by a meta-learned one."""

        def data(start: int, count: int) -> Data:
            base = torch.zeros(count, 1, 1, dtype=torch.float32)
            return self._draw("train", start, count, 2**31).train | {"base": base}

        self._reptile(data, _START_LR, _START_TASKS, self.options.start_steps, setup)


def _cross_entropy(net: Net, data: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(net(data["x"]), data["y"])


def _accuracy(net: Net, data: dict[str, Tensor]) -> Tensor:
    return (net(data["x"]).argmax(-1) == data["y"]).float().mean()


def _defaults(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        prepare=PrepareConfig(tasks=1000, steps=60, learning_rate=0.001, rho=0.0, weight_decay=0.0, start_std=0.0),
        meta=replace(config.meta, steps=600, samples=2, checkpoint_every=150),
        denoiser=replace(config.denoiser, width=128, depth=2),
        evaluate=EvaluateConfig(
            tasks=300,
            validation_tasks=100,
            finetune_steps=(10, 60),
            finetune_lrs=(0.001, 0.003, 0.01),
            finetune_decays=(0.001, 0.01),
        ),
    )


@register(_defaults)
def digit_networks(options: NetworkOptions, setup: Setup) -> DigitFamily:
    """Whole convolutional networks for pairs of digits; unseen pairs and an unseen domain."""
    family = DigitFamily(load("digits", data_dir=setup.data_dir, stage=setup.stage)["all"], options)
    setup.begin()
    family.meta_learn(setup)
    return family
