"""Waves: whole networks for few-shot regression, y = A sin(x + phase) (Finn et al., MAML, 2017). Needs no data.

A network sees a few points and must draw the wave. Every layer of it is generated. The generator is told what the points say of the whole
wave, given what training waves are like: the posterior mean of a Gaussian process with their mean and covariance.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.align import align
from mcdi_fast.bounds import Range
from mcdi_fast.config import AtLeastOne, EvaluateConfig, NotNegative, PrepareConfig, TrainConfig
from mcdi_fast.figures import new_figure, png
from mcdi_fast.tasks import Data, Metric, Setup, TaskBatch, register
from mcdi_fast.tasks.modules import ModuleFamily

LOW, HIGH = -5.0, 5.0  # of x (protocol)
QUERY = 100  # points that score a network; evenly spaced points that a target is trained on
_EVERY = 4  # of those, the ones at which the condition tells the wave
_PRIOR_TASKS = 1000  # training tasks that the prior is made of
_JITTER = 1e-3  # least variance of a seen y: interpolation of x costs that
_SPLITS = ("train", "val", "test")
_OWN_SEED = 2**31  # of the tasks of start, reference and prior: no run has it
_REFERENCE_TASKS, _REFERENCE_ROUNDS = 64, 5  # of what gaussian starts are aligned to
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
    """Where trajectories start. reptile: meta-learned weights. random: one random network for all tasks. gaussian: another one for every task."""
    align: bool = True
    """Whether networks of gaussian starts get their units permuted, and signs changed, onto those of a common reference (`mcdi_fast.align`)."""
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


class Prior:
    """A Gaussian process with the mean and the covariance of training waves on a grid of x. Computes in float64."""

    def __init__(self, grid: Tensor, waves: Tensor, noise: float):
        """grid: [G], evenly spaced. waves: [tasks, G], their y. noise: std of a seen y."""
        self.grid, waves = grid.double(), waves.double()
        self.mean, self.variance = waves.mean(0), noise**2 + _JITTER
        self.covariance = (waves - self.mean).T @ (waves - self.mean) / len(waves)

    def posterior(self, x: Tensor, y: Tensor) -> Tensor:
        """The expected wave [B, G] given points x, y [B, n]: mean + C S' (S C S' + variance)^-1 (y - S mean), S: interpolation to x."""
        x, y, grid = x.double(), y.double(), self.grid
        place = (x - grid[0]) / (grid[1] - grid[0])
        left = place.floor().clamp(0, len(grid) - 2).long().unsqueeze(-1)
        share = place.unsqueeze(-1) - left
        at = torch.zeros(*x.shape, len(grid), dtype=torch.float64)
        at.scatter_(2, left, 1 - share).scatter_(2, left + 1, share)
        cross = at @ self.covariance  # [B, n, G]
        seen = cross @ at.mT + self.variance * torch.eye(x.shape[1], dtype=torch.float64)
        return self.mean + (torch.linalg.solve(seen, y - at @ self.mean).unsqueeze(1) @ cross).squeeze(1)


def draw(options: WaveOptions, split: str, start: int, count: int, seed: int) -> tuple[Data, Data, Data]:
    """Support, query and train of tasks: A in [0.1, 5], phase in [0, pi], x in [-5, 5].

    Trajectories train on a grid: points drawn at random would leave chance in a target that no condition can predict.
    """
    keys = [np.random.SeedSequence((_SPLITS.index(split), seed, number)) for number in range(start, start + count)]
    u = torch.from_numpy(np.stack([np.random.default_rng(key).random(4 + 2 * QUERY) for key in keys])).float()
    amplitude, phase = 0.1 + 4.9 * u[:, :2], math.pi * u[:, 2:4]
    x = LOW + (HIGH - LOW) * u[:, 4:].unflatten(1, (2, QUERY))
    grid = torch.linspace(LOW, HIGH, QUERY).expand(count, -1)

    def points(x: Tensor) -> Data:
        y = amplitude[:, :1] * torch.sin(x + phase[:, :1])
        if options.frequencies == 2:
            y = y + amplitude[:, 1:] * torch.sin(2 * x + phase[:, 1:])
        return {"x": x.unsqueeze(-1), "y": y.unsqueeze(-1)}

    support, query, train = (points(at) for at in (x[:, 0, : options.points], x[:, 1], grid))
    if options.noise:
        more = [np.random.default_rng(key.spawn(1)[0]).standard_normal((options.points, 1)) for key in keys]
        support["y"] = support["y"] + options.noise * torch.from_numpy(np.stack(more)).float()
    return support, query, train


class WaveFamily(ModuleFamily):
    """Networks [1, width, …, 1] that draw waves."""

    metric = Metric("mean squared error")

    def __init__(self, options: WaveOptions):
        """Start from the network's own weights; `waves` may replace them by meta-learned ones."""
        super().__init__(network(options), self._draw, _mse, metric=self.metric, fingerprint=str(asdict(options)))
        self.options = options
        known = draw(options, "train", 0, _PRIOR_TASKS, _OWN_SEED)[2]
        self.prior = Prior(known["x"][0, :, 0], known["y"][..., 0], options.noise)
        self._reference: Tensor | None = None

    def _draw(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        support, query, train = draw(self.options, split, start, count, seed)
        expected = self.prior.posterior(support["x"][..., 0], support["y"][..., 0])
        return TaskBatch(expected[:, None, ::_EVERY].float(), support, query, train)

    def start(self, count: int, config: PrepareConfig, generator: torch.Generator) -> Tensor:
        """The common start, or a random network for each task."""
        if self.options.start != "gaussian":
            return super().start(count, config, generator)
        shapes, fan_in = self.layout.shapes, 1
        noise = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
        for name, shape in shapes.items():  # a weight, then its bias
            fan_in = shape[1] if len(shape) > 1 else fan_in
            noise[name] = noise[name] / fan_in**0.5
        return self.layout.pack_batch(noise)

    def trajectories(self, data: Data, config: PrepareConfig, segments: int, *others: Any, **more: Any) -> Tensor:
        """With units aligned where starts differ."""
        points = super().trajectories(data, config, segments, *others, **more)
        return points if self._reference is None else align(points, self.layout, self._reference, odd=True)

    def find_reference(self, config: PrepareConfig) -> None:
        """What networks are aligned to: the mean of some, aligned to the first, then to their own mean."""
        data = draw(self.options, "train", 0, _REFERENCE_TASKS, _OWN_SEED)[2]
        points = self.trajectories(data, config, 1, torch.Generator().manual_seed(0))
        self._reference = points[0, -1]
        for _ in range(_REFERENCE_ROUNDS):
            self._reference = align(points, self.layout, self._reference, odd=True)[:, -1].mean(0)

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """y [B, n, 1] of all tasks' networks at x [B, n, 1], by batched products: five times faster than vmap."""
        weights, h = list(self.layout.unpack(theta).values()), x
        for layer in range(0, len(weights), 2):
            h = torch.baddbmm(weights[layer + 1].unsqueeze(1), h, weights[layer].mT)
            h = h.tanh() if layer + 2 < len(weights) else h
        return h

    def losses(self, theta: Tensor, data: Data) -> Tensor:
        """Of all tasks, [B, N, D] -> [B]."""
        return (self.outputs(theta, data["x"]) - data["y"]).square().mean((1, 2))

    def gradient(self, theta: Tensor, data: Data, step: int = 0) -> Tensor:
        """Of each task's loss."""
        with torch.enable_grad():
            leaf = theta.detach().requires_grad_()
            return torch.autograd.grad(self.losses(leaf, data).sum(), leaf)[0]

    @torch.no_grad()
    def scores(self, theta: Tensor, data: Data) -> Tensor:
        """Mean squared errors."""
        return self.losses(theta, data)

    def figures(
        self, tasks: TaskBatch, drawn: dict[str, Tensor], chain: list[tuple[int, Tensor]]
    ) -> dict[str, tuple[str, bytes]]:
        """Waves of several tasks, and the networks along their chains."""
        x = torch.linspace(LOW, HIGH, QUERY)
        every = x.expand(len(tasks), -1).unsqueeze(-1)
        generated = next(iter(drawn))  # evaluate's own method comes first
        lines = {"truth": tasks.train["y"]} | {
            name: self.outputs(drawn[name], every) for name in (generated, "finetune")
        }
        waves, tops = new_figure(len(tasks))
        along, bottoms = new_figure(len(tasks))
        for task, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
            for (name, y), style in zip(lines.items(), ("k-", "C0-", "C1--"), strict=True):
                top.plot(x, y[task, :, 0], style, lw=1.2, label="generated" if name == generated else name)
            for t, theta in chain:
                shade = t / max(chain[-1][0], 1)
                bottom.plot(x, self.outputs(theta, every)[task, :, 0], color=(1 - shade, 0.3, shade), lw=0.7)
            for ax in (top, bottom):
                ax.plot(tasks.support["x"][task, :, 0], tasks.support["y"][task, :, 0], "k.", ms=7)
                reach = 1.3 * float(tasks.train["y"][task].abs().max()) + 0.3
                ax.set(xlabel="x", ylim=(-reach, reach))
        tops[0].legend(frameon=False)
        return {
            "waves.png": (
                "Test tasks: the points seen, the truth, the generated and the fine-tuned network",
                png(waves),
            ),
            "networks.png": (
                "The network of each step of the chain, from noise (red) to the weights (blue)",
                png(along),
            ),
        }

    def meta_learn(self, setup: Setup) -> None:
        """Replace the start by a meta-learned one."""

        def data(start: int, count: int) -> Data:
            return draw(self.options, "train", start, count, _OWN_SEED)[2]

        self._reptile(data, _START_LR, _START_TASKS, self.options.start_steps, setup)


def _mse(net: object, data: Data) -> Tensor:
    return F.mse_loss(net(data["x"]), data["y"])  # type: ignore[operator]


_PREPARE = PrepareConfig(tasks=2000, steps=360, learning_rate=0.01, rho=0.0, weight_decay=0.0, start_std=0.0)


def _defaults(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        prepare=_PREPARE,
        diffusion=replace(config.diffusion, residual="target", steps=5, beta_start=0.9, beta_end=0.3),
        meta=replace(config.meta, steps=6000, meta_batch=64, inner_steps=1, samples=1, checkpoint_every=1000),
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
    elif options.start == "gaussian" and options.align:
        family.find_reference(_PREPARE)
    return family
