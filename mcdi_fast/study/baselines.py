"""What Mc-Di is compared with: Reptile on the head and on the whole network, and single-level diffusion in the manner of OCD.

docs/baselines.md says what was taken from each publication and what was left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.backbone import FEATURE_WIDTH, conv4, to_float
from mcdi_fast.backend import Backend
from mcdi_fast.bounds import Range
from mcdi_fast.config import AtLeastOne, Positive, PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.heads import prototype_head, support_condition
from mcdi_fast.noise import REPTILE, draw_generator
from mcdi_fast.store import load_tensors, save_tensors
from mcdi_fast.tasks import Data, TaskBatch, TaskFamily
from mcdi_fast.tasks.drawings import DrawingOptions, FewShotData
from mcdi_fast.tasks.heads import HeadFamily, draw_episodes
from mcdi_fast.tasks.modules import ModuleFamily

_BETA2 = 0.999  # of an Adam without momentum, as published: momentum would carry a step of one task into the next


@dataclass(frozen=True)
class ReptileConfig:
    """Reptile (Nichol et al., 2018): the published Omniglot recipe, with a budget of its own."""

    head_steps: AtLeastOne = 1000
    """Outer steps of the head version, alike to the diffusion rows (ours)."""
    head_batch: AtLeastOne = 32
    """Tasks an outer step of the head version, as many as the diffusion rows have base learners (ours; published: 3 to 5)."""
    head_lrs: tuple[Positive, ...] = (0.003, 0.01, 0.03)
    """Inner Adam rates tried for the head version. Validation tasks choose."""
    net_steps: AtLeastOne = 100
    """Outer steps of the whole-network version, from the trained backbone (published: 100000 from scratch). None is tried too."""
    net_batch: AtLeastOne = 5
    """Tasks an outer step of the whole-network version (published: 3 to 5)."""
    net_lrs: tuple[Positive, ...] = (0.0001, 0.0003)
    """Inner Adam rates tried for the whole network. Validation tasks choose (published: 0.0004 to 0.0015)."""
    inner_steps: AtLeastOne = 5
    """Inner steps on a training task (published: 5 to 12)."""
    inner_batch: AtLeastOne = 10
    """Images an inner step (published: 5 to 15)."""
    train_shots: AtLeastOne = 10
    """Images a class of a training task, more than a test task has (published: 9 to 12)."""
    outer_lr: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Outer step at the start. It falls linearly to 0 (published: 0.7 to 1)."""
    test_steps: tuple[AtLeastOne, ...] = (5, 10, 20, 50, 100)
    """Numbers of gradient steps on a new task that are tried. Validation tasks choose (published: 86 to 100)."""
    net_test_steps: tuple[AtLeastOne, ...] = (2, 5, 10)
    """The same for the whole network, where a step costs a hundred times more."""
    net_validation_tasks: AtLeastOne = 100
    """Validation tasks that choose for the whole network (at most --evaluate.validation-tasks)."""
    checkpoint_every: AtLeastOne = 50
    """Outer steps between checkpoints of the whole-network version."""


def minibatches(rows: int, batch: int, steps: int, count: int, generator: torch.Generator) -> Tensor:
    """Which rows each inner step sees: int64 [steps, count, min(batch, rows)]; no row twice before all have been seen."""
    batch = min(batch, rows)
    passes = -(-steps * batch // rows)
    order = torch.rand(count, passes, rows, generator=generator).argsort(-1).flatten(1)
    return order[:, : steps * batch].view(count, steps, batch).transpose(0, 1)


# ---------------------------------------------------------------------- Reptile, of any family


@dataclass
class Start:
    """What Reptile learns: a start that a few gradient steps adapt.

    Attributes:
        theta: [N, D]. exp_avg_sq: Adam's second moment there, carried from task to task. steps: Adam steps behind it. lr: of the inner Adam.
    """

    theta: Tensor
    exp_avg_sq: Tensor
    steps: int
    lr: float

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        tensors = {"theta": self.theta, "exp_avg_sq": self.exp_avg_sq}
        save_tensors(path, tensors, {"steps": self.steps, "lr": self.lr}, "reptile-checkpoint")

    @classmethod
    def load(cls, path: Path) -> Start:
        """Of a checkpoint."""
        tensors, meta = load_tensors(path, "reptile-checkpoint")
        return cls(**tensors, steps=meta["steps"], lr=meta["lr"])


def momentumless_adam(theta: Tensor, gradient: Tensor, exp_avg_sq: Tensor, step: int, lr: float) -> None:
    """One step of Adam with beta1 = 0, in place; `step` counts from 1."""
    exp_avg_sq.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    theta.addcdiv_(gradient, exp_avg_sq.sqrt().div_((1 - _BETA2**step) ** 0.5).add_(1e-8), value=-lr)


def reptile_step(
    family: TaskFamily, start: Start, config: ReptileConfig, outer: int, batch: int, steps: int, seed: int
) -> None:
    """Outer step number `outer` of `steps`, in place: towards the mean of where `batch` training tasks end.

    The published loop has one task after another and lets Adam's second moment run through. Here the tasks of an outer step start from the
    same one and leave their mean.
    """
    support = family.tasks("train", outer * batch, batch, seed).support
    theta, second = (value.expand(batch, -1, -1).clone() for value in (start.theta, start.exp_avg_sq))
    every = torch.arange(batch).unsqueeze(1)
    generator = draw_generator(seed, REPTILE, outer)
    for pick in minibatches(support["label"].shape[1], config.inner_batch, config.inner_steps, batch, generator):
        start.steps += 1
        part = {name: value[every, pick] for name, value in support.items()}
        momentumless_adam(theta, family.gradient(theta, part).detach(), second, start.steps, start.lr)
    if not theta.isfinite().all():
        raise McdiError(f"Reptile: weights not finite at outer step {outer}; lower --reptile.…-lrs (now {start.lr})")
    start.exp_avg_sq = second.mean(0)
    start.theta = start.theta + config.outer_lr * (1 - outer / steps) * (theta.mean(0) - start.theta)


def adapt(family: TaskFamily, start: Start, support: Data, steps: Sequence[int]) -> list[Tensor]:
    """Adam from the learned start on the whole support: [B, N, D] after each of `steps` (rising) steps."""
    count, kept = len(support["label"]), []
    theta, second = (value.expand(count, -1, -1).clone() for value in (start.theta, start.exp_avg_sq))
    for step in range(1, steps[-1] + 1):
        momentumless_adam(theta, family.gradient(theta, support).detach(), second, start.steps + step, start.lr)
        if step in steps:
            kept.append(theta.clone())
    return kept


def whole_network(backbone: nn.Module, data: FewShotData, options: DrawingOptions, train_shots: int) -> ModuleFamily:
    """The family of whole networks: the backbone and a head of zeros are the common start.

    Batch norm keeps the backbone's running statistics, in training and on new tasks: nothing of a query image ever reaches another
    (the "no transduction" of the publication), and its affine part is learned. Training tasks have `train_shots` images a class.
    """
    body, head = conv4(), nn.Linear(FEATURE_WIDTH, options.ways)
    body.load_state_dict(backbone.state_dict())
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    net = nn.Sequential(body, head).to(next(backbone.parameters()).device).eval()
    images = {name: torch.from_numpy(getattr(data, name).images) for name in ("train", "val", "test")}

    def draw(split: str, start: int, count: int, seed: int) -> TaskBatch:
        parts = (train_shots, 1) if split == "train" else (options.shots, options.queries)
        sizes = torch.full(images[split].shape[:1], images[split].shape[1])
        rows = draw_episodes(sizes, options.ways, sum(parts), seed, start, count).split(parts, 2)
        label = torch.arange(options.ways)
        support, query = (
            {"image": images[split].flatten(0, 1)[r.flatten(1)], "label": label.repeat_interleave(n).expand(count, -1)}
            for r, n in zip(rows, parts, strict=True)
        )
        return TaskBatch(torch.zeros(count, 1, 1), support, query, support)

    def logits(net: Callable[[Tensor], Tensor], data: Data) -> Tensor:
        return net(to_float(data["image"]))

    return ModuleFamily(
        net,
        draw,
        lambda net, data: F.cross_entropy(logits(net, data), data["label"]),
        score=lambda net, data: (logits(net, data).argmax(-1) == data["label"]).float().mean(),
    )


# ---------------------------------------------------------------------- families of tasks with something else to learn


class ChangedHeads(HeadFamily):
    """Heads whose generator is told something else, or whose targets are differences to the nearest-prototype head.

    Attributes:
        what: prototypes: the condition without the squared norm. spread: with the deviation within each class. support: with all features.
            residual: targets minus the prototype head. difference: the same, and trajectories start there, as OCD has them.
    """

    what = ""

    def condition(self, support: Tensor) -> Tensor:
        """[B, ways, shots, F] -> [B, ways, C]."""
        usual = support_condition(support)
        if self.what == "prototypes":
            return support.mean(-2)
        if self.what == "spread":
            return torch.cat([usual, support.std(-2, unbiased=False)], -1)
        return torch.cat([usual, support.flatten(-2)], -1) if self.what == "support" else usual

    def base(self, tasks: TaskBatch) -> Tensor | float:
        """What the generated weights are added to: [B, ways, F + 1], or 0."""
        return prototype_head(self.support_features(tasks)) if self.what in ("residual", "difference") else 0.0

    def trajectories(
        self,
        data: Data,
        config: PrepareConfig,
        segments: int,
        generator: torch.Generator,
        backend: Backend = Backend(),  # noqa: B008 (a constant)
    ) -> Tensor:
        """Minus the prototype head of the support, whose images come first in each class."""
        if self.what not in ("residual", "difference"):
            return super().trajectories(data, config, segments, generator, backend)
        images = self.features(data).unflatten(1, (self.options.ways, -1))
        self._base = prototype_head(images[:, :, : self.options.shots])
        return super().trajectories(data, config, segments, generator, backend) - self._base.unsqueeze(1)

    def start(self, count: int, config: PrepareConfig, generator: torch.Generator) -> Tensor:
        """The prototype head where that is the start, without noise."""
        if self.what != "difference":
            return super().start(count, config, generator)
        return super().start(count, replace(config, start_std=0.0), generator) + self._base.cpu()
