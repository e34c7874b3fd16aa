"""Waves: whole networks for few-shot regression, y = A sin(x + phase) (Finn et al., MAML, 2017). Needs no data.

A network sees a few points and must draw the wave. Every layer of it is generated. What the generator is told is what the points say:
the points themselves, in order, and a smooth of them on a grid.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.bounds import Range
from mcdi_fast.config import AtLeastOne, EvaluateConfig, NotNegative, PrepareConfig, TrainConfig
from mcdi_fast.optim import trajectory
from mcdi_fast.tasks import Data, Metric, Setup, TaskBatch, register
from mcdi_fast.tasks.modules import ModuleFamily

LOW, HIGH = -5.0, 5.0  # of x (protocol)
QUERY = 100  # points that score a network, and that a target is trained on
GRID = 24  # of the smooth
_SPLITS = ("train", "val", "test")
_START_LR, _START_TASKS = 0.01, 32  # of Reptile's inner Adam; tasks an outer step


@dataclass(frozen=True)
class WaveOptions:
    """A few-shot regression task."""

    points: Annotated[int, Range(ge=1, le=QUERY)] = 10
    """Points of the wave that are seen (protocol; 5 is the harder setting of MAML's paper)."""
    width: AtLeastOne = 32
    """Units of a hidden layer."""
    depth: AtLeastOne = 1
    """Hidden layers."""
    frequencies: Annotated[int, Range(ge=1, le=2)] = 1
    """Sines in a wave. The second has twice the frequency, and an amplitude and a phase of its own."""
    noise: NotNegative = 0.0
    """Std of the noise on the y of the points that are seen."""
    start: Literal["reptile", "random", "gaussian"] = "reptile"
    """Where trajectories start. reptile: meta-learned weights. random: one random network for all tasks. gaussian: another one for every task;
    units are then permuted against each other, and networks have no mean."""
    start_steps: AtLeastOne = 500
    """Outer steps of Reptile."""


def network(options: WaveOptions) -> nn.Sequential:
    """Linear layers with tanh between them; weights of a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(1, options.width), nn.Tanh()]
        for _ in range(options.depth - 1):
            layers += [nn.Linear(options.width, options.width), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(options.width, 1))


def smooth(x: Tensor, y: Tensor) -> Tensor:
    """What points x, y [B, n] say on a grid: [B, 2 GRID], how many lie near each place, and their mean there (0 where none does)."""
    grid = torch.linspace(LOW, HIGH, GRID)
    near = torch.exp(-0.5 * ((x.unsqueeze(-1) - grid) / 0.5).square())  # [B, n, GRID]
    total = near.sum(1)
    return torch.cat([total, (near * y.unsqueeze(-1)).sum(1) / (total + 0.1)], 1)


class WaveFamily(ModuleFamily):
    """Networks [1, width, …, 1] that draw waves."""

    metric = Metric("mean squared error")

    def __init__(self, options: WaveOptions):
        """Start from the network's own weights; `waves` may replace them by meta-learned ones."""
        super().__init__(network(options), self._draw, _mse, metric=self.metric, fingerprint=str(asdict(options)))
        self.options = options

    def _draw(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        """A in [0.1, 5], phase in [0, pi], x in [-5, 5]. Trajectories train on QUERY points, which are not those that score."""
        o, numbers = self.options, range(start, start + count)
        keys = [np.random.SeedSequence((_SPLITS.index(split), seed, number)) for number in numbers]
        u = torch.from_numpy(np.stack([np.random.default_rng(key).random(4 + 3 * QUERY) for key in keys])).float()
        amplitude, phase = 0.1 + 4.9 * u[:, :2], math.pi * u[:, 2:4]
        x = LOW + (HIGH - LOW) * u[:, 4:].unflatten(1, (3, QUERY))

        def wave(x: Tensor) -> Tensor:
            y = amplitude[:, :1] * torch.sin(x + phase[:, :1])
            return y + amplitude[:, 1:] * torch.sin(2 * x + phase[:, 1:]) if o.frequencies == 2 else y

        seen = x[:, 0, : o.points].sort(1).values
        y = wave(seen)
        if o.noise:
            more = [np.random.default_rng(key.spawn(1)[0]).standard_normal(o.points) for key in keys]
            y = y + o.noise * torch.from_numpy(np.stack(more)).float()
        condition = torch.cat([seen, y, smooth(seen, y)], 1)

        def data(x: Tensor, y: Tensor) -> Data:
            return {"x": x.unsqueeze(-1), "y": y.unsqueeze(-1)}

        return TaskBatch(
            condition.unsqueeze(1), data(seen, y), data(x[:, 1], wave(x[:, 1])), data(x[:, 2], wave(x[:, 2]))
        )

    def start(self, count: int, config: PrepareConfig, generator: torch.Generator) -> Tensor:
        """The common start, or a random network for each task."""
        if self.options.start != "gaussian":
            return super().start(count, config, generator)
        fan_in = self.layout.mask.sum(1, keepdim=True) - 1  # of each unit: its token less the bias
        noise = torch.randn(count, *self.layout.mask.shape, generator=generator) * self.layout.mask
        return noise / fan_in.clamp_min(1).sqrt()

    def _losses(self, theta: Tensor, data: Data) -> Tensor:
        """Of all tasks, [B, N, D] -> [B], by batched products: five times faster than vmap."""
        weights = list(self.layout.unpack(theta).values())
        h = data["x"]
        for layer in range(0, len(weights), 2):
            h = torch.baddbmm(weights[layer + 1].unsqueeze(1), h, weights[layer].mT)
            h = h.tanh() if layer + 2 < len(weights) else h
        return (h - data["y"]).square().mean((1, 2))

    def gradient(self, theta: Tensor, data: Data, step: int = 0) -> Tensor:
        """Of each task's loss."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            return torch.autograd.grad(self._losses(leaf, data).sum(), leaf)[0]

    @torch.no_grad()
    def scores(self, theta: Tensor, data: Data) -> Tensor:
        """Mean squared errors."""
        return self._losses(theta, data)

    def meta_learn(self, setup: Setup) -> None:
        """Reptile (Nichol et al., 2018) over the start: all tasks of an outer step at once, ten steps of Adam each."""
        recipe = PrepareConfig(steps=10, learning_rate=_START_LR, rho=0.0, weight_decay=0.0)
        total = self.options.start_steps
        with setup.stage("start", total, "steps") as bar:
            for step in range(total):
                data = self._draw("train", step * _START_TASKS, _START_TASKS, 2**31).train
                theta = self._initial.expand(_START_TASKS, -1, -1)
                end = trajectory(theta, lambda at, _, data=data: self.gradient(at, data), recipe, 1)[:, -1]  # type: ignore[misc]
                self._initial = self._initial + (1 - step / total) * (end.mean(0) - self._initial)
                bar.update()


def _mse(net: object, data: Data) -> Tensor:
    return F.mse_loss(net(data["x"]), data["y"])  # type: ignore[operator]


def _defaults(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        prepare=PrepareConfig(tasks=2000, steps=90, learning_rate=0.01, rho=0.0, weight_decay=0.0, start_std=0.0),
        meta=replace(config.meta, steps=1500, samples=2, checkpoint_every=250),
        denoiser=replace(config.denoiser, width=128),
        evaluate=EvaluateConfig(
            tasks=400,
            validation_tasks=100,
            finetune_steps=(10, 100, 300),
            finetune_lrs=(0.001, 0.003, 0.01, 0.03),
            finetune_decays=(0.001, 0.01),
        ),
    )


@register(_defaults)
def waves(options: WaveOptions, setup: Setup) -> WaveFamily:
    """Whole networks that draw a wave through a few points."""
    setup.begin()
    family = WaveFamily(options)
    if options.start == "reptile":
        family.meta_learn(setup)
    return family
