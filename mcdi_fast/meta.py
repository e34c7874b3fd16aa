"""Stage 2, meta-training: Reptile over the denoiser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.checkpoint import optimizer_tensors, restore_optimizer
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.diffusion import draw_steps, make_inner_batch
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.inner import InnerBatch, inner_loop
from mcdi_fast.schedule import make_objective, make_schedule
from mcdi_fast.store import load_tensors, save_tensors
from mcdi_fast.weights import Normalizer

_FLOOR = (
    0.1  # of Normalizer.fit: without it the inner loop diverged on Omniglot, where entries of 130 deviations came up
)
_FIT_TASKS = (
    4096  # tasks the normalisers are fitted on: enough for two digits of a column's deviation, and little memory
)


class MetaTrainer:
    """State and one outer step of meta-training. Everything random is a function of (seed, step), so a resumed run needs no RNG state.

    Attributes:
        phi: the parameters being trained. average: their EMA, what `generator()` uses. step: outer steps done.
    """

    def __init__(
        self,
        bank: TrajectoryBank,
        meta: MetaConfig | None = None,
        diffusion: DiffusionConfig | None = None,
        denoiser: DenoiserConfig | None = None,
        seed: int = 0,
        impl: str = "auto",
    ):
        """Fit the normalisers on the bank and draw phi. impl: of the inner loop (inner.py)."""
        self.bank, self.seed, self.impl = bank, seed, impl
        self.meta, self.diffusion, self.denoiser = (
            meta or MetaConfig(),
            diffusion or DiffusionConfig(),
            denoiser or DenoiserConfig(),
        )
        check_meta(self.meta)
        if len(bank) == 0:
            raise McdiError(f"bank {bank.folder}: holds no task; append trajectories first")
        if bank.num_segments != self.diffusion.segments:
            raise McdiError(
                f"segments k = {self.diffusion.segments}, but the bank {bank.folder} holds {bank.num_segments} local targets a task; set k to that"
            )
        d = self.diffusion
        self.schedule = make_schedule(d.steps, d.segments, d.beta_start, d.beta_end)
        self.objective = make_objective(self.schedule, d.objective)
        every = torch.linspace(0, len(bank) - 1, min(len(bank), _FIT_TASKS), dtype=torch.float64).long()
        targets, condition = bank.gather(every)
        mask = bank.layout.mask
        self.normalizer = Normalizer.fit(targets, mask, _FLOOR)
        self.condition_normalizer = Normalizer.fit(
            condition.unsqueeze(1), torch.ones(condition.shape[1:], dtype=torch.bool), _FLOOR
        )
        self.phi = init_parameters(
            bank.layout.width, bank.condition_width, d.steps, self.denoiser.width, self.denoiser.depth, seed
        )
        self.average = {name: value.clone() for name, value in self.phi.items()}
        self.optimizer = torch.optim.Adam(self.phi.values(), lr=self.meta.outer_rate)
        self.step = 0
        self._noise_mask = None if mask.all() else mask.float()

    def batch(self, step: int) -> InnerBatch:
        """The meta-batch of an outer step, a function of (seed, step)."""
        m, layout = self.meta, self.bank.layout
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        index = torch.randint(len(self.bank), (m.meta_batch,), generator=generator)
        choices = torch.tensor(self.objective.targets)
        segment = choices[torch.randint(len(choices), (m.meta_batch,), generator=generator)]
        targets, condition = self.bank.gather(index)
        target = self.normalizer.normalize(targets[torch.arange(m.meta_batch), segment])
        steps = draw_steps(self.objective, segment, m.inner_steps, m.samples, generator)
        eps = torch.randn(m.meta_batch, m.inner_steps, m.samples, layout.num_tokens, layout.width, generator=generator)
        if self._noise_mask is not None:  # padding stays exactly 0 in x, eps and target
            eps *= self._noise_mask
        condition = self.condition_normalizer.normalize(condition)
        return make_inner_batch(self.schedule, self.objective, target, condition, segment, steps, eps)

    def outer_rate(self, step: int) -> float:
        """Warm-up over the first 1 % of the steps, then linearly to 0."""
        warm_up = min(1.0, (step + 1) / (0.01 * self.meta.steps))
        return self.meta.outer_rate * warm_up * (1 - step / self.meta.steps)

    def outer_step(self) -> float:
        """One meta-step; returns the mean loss of the base learners before their first inner step.

        Raises:
            McdiError: a loss that is not finite, naming the step; phi is still the last good one.
        """
        delta, losses = inner_loop(self.phi, self.batch(self.step), self.meta.inner_rate, self.impl)
        # one number decides: a NaN anywhere in the inner loop reaches the last loss or the delta
        if not (losses.isfinite().all() and all(bool(value.isfinite().all()) for value in delta.values())):
            bad = (~losses.isfinite()).any(1).nonzero().flatten().tolist()
            raise McdiError(
                f"meta-training: loss not finite at outer step {self.step}, base learner {bad[0] if bad else 'unknown'}; lower --meta.inner-rate "
                f"(now {self.meta.inner_rate}) or --meta.outer-rate (now {self.meta.outer_rate}); the last checkpoint is kept"
            )
        rate = self.outer_rate(self.step)
        if self.meta.outer == "reptile":
            for name, value in self.phi.items():
                value.add_(delta[name], alpha=rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            for name, value in self.phi.items():
                value.grad = delta[name].div_(-self.meta.inner_rate)
            self.optimizer.step()
        self.step += 1
        # the average of the first steps would otherwise remember the initialisation
        decay = min(self.meta.ema, self.step / (10 + self.step)) if self.meta.ema else 0.0
        torch._foreach_lerp_(list(self.average.values()), list(self.phi.values()), 1 - decay)
        return float(losses[:, 0].mean())

    def checkpoint_due(self) -> bool:
        """Whether the step just done is one after which a checkpoint is written."""
        return self.step % self.meta.checkpoint_every == 0 or self.step == self.meta.steps

    def generator(self, provenance: dict[str, Any] | None = None) -> WeightGenerator:
        """A weight generator from the averaged parameters."""
        phi = {name: value.detach().clone() for name, value in self.average.items()}
        return WeightGenerator(
            phi, self.bank.layout, self.normalizer, self.condition_normalizer, self.diffusion, provenance or {}
        )

    def identity(self) -> str:
        """16 hex digits of what a checkpoint must agree with: configuration, seed, bank."""
        parts = [
            asdict(self.meta) | {"checkpoint_every": 0},
            asdict(self.diffusion),
            asdict(self.denoiser),
            self.seed,
            len(self.bank),
        ]
        parts += [self.bank.layout.to_dict(), self.bank.meta]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: one safetensors file."""
        tensors: dict[str, Tensor] = {f"phi.{name}": value for name, value in self.phi.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()} | optimizer_tensors(
            self.optimizer
        )
        save_tensors(path, tensors, {"step": self.step, "identity": self.identity()}, "meta-checkpoint")

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            McdiError: naming the file, when it is damaged or belongs to another configuration, seed or bank.
        """
        tensors, found = load_tensors(path, "meta-checkpoint")
        if found.get("identity") != self.identity():
            raise McdiError(
                f"{path}: made with another configuration, seed or bank ({found.get('identity')!r:.20}, expected "
                f"{self.identity()!r}); give the same options as before, or another --run-dir"
            )
        restore_optimizer(self.optimizer, tensors)
        with torch.no_grad():
            for part, values in (("phi", self.phi), ("average", self.average)):
                for name, value in values.items():
                    value.copy_(tensors[f"{part}.{name}"])
        self.step = int(found["step"])


def check_meta(meta: MetaConfig) -> None:
    """Raise McdiError, naming the option, for a value out of range."""
    for name in ("steps", "meta_batch", "inner_steps", "samples", "checkpoint_every"):
        if getattr(meta, name) < 1:
            raise McdiError(f"--meta.{name.replace('_', '-')} = {getattr(meta, name)}: expected at least 1")
    for name in ("inner_rate", "outer_rate"):
        if not 0 < getattr(meta, name) < float("inf"):
            raise McdiError(f"--meta.{name.replace('_', '-')} = {getattr(meta, name)}: expected a positive number")
    if not 0 <= meta.ema < 1:
        raise McdiError(f"--meta.ema = {meta.ema}: expected 0 <= ema < 1")
    if meta.outer not in ("adam", "reptile"):
        raise McdiError(f"--meta.outer = {meta.outer!r}: expected adam or reptile")


def fit(
    bank: TrajectoryBank,
    meta: MetaConfig | None = None,
    diffusion: DiffusionConfig | None = None,
    denoiser: DenoiserConfig | None = None,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_step: Callable[[MetaTrainer, float], None] | None = None,
    on_start: Callable[[MetaTrainer], None] | None = None,
    provenance: dict[str, Any] | None = None,
) -> WeightGenerator:
    """Train a weight generator from a bank.

    Args:
        checkpoint: a file; where it exists training goes on from it, bit for bit as if it had not stopped.
        on_start: called once with the trainer (its `step` says where it starts). on_step: called after each outer step with its loss.

    Raises:
        McdiError: NaN in the bank (naming the shard), bad configuration, a checkpoint that does not belong, a loss that is not finite.
    """
    bank.check_finite()
    trainer = MetaTrainer(bank, meta, diffusion, denoiser, seed)
    if checkpoint is not None and checkpoint.exists():
        trainer.restore(checkpoint)
    if on_start:
        on_start(trainer)
    while trainer.step < trainer.meta.steps:
        loss = trainer.outer_step()
        if on_step:  # before the checkpoint: what it writes must not lack a step that the checkpoint has
            on_step(trainer, loss)
        if checkpoint is not None and trainer.checkpoint_due():
            trainer.save(checkpoint)
    return trainer.generator(provenance)
