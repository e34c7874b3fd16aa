"""The outer step of Reptile: what the difference of the inner loops does to phi, its moments and its average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mcdi_fast.config import MetaConfig
from mcdi_fast.denoiser import Parameters
from mcdi_fast.optim import adam_scalars, adam_step


class OuterScalars(NamedTuple):
    """What changes from one outer step to the next: `outer_scalars` computes it, on the host and in double precision."""

    rate: float
    """Of the step: for Adam divided by 1 - beta1^t, its first bias correction."""
    root: float
    """sqrt(1 - beta2^t), Adam's second bias correction."""
    gain: float
    """Adam's gradient is gain * delta."""
    mix: float
    """1 - the decay of the average: average += mix * (phi - average)."""


def outer_scalars(meta: MetaConfig, step: int) -> OuterScalars:
    """For the outer step number `step`, from 0: the rate warms up over the first 1 % of the steps, then falls linearly to 0."""
    count = step + 1
    rate = meta.outer_lr * min(1.0, count / (0.01 * meta.steps)) * (1 - step / meta.steps)
    # the average of the first steps would otherwise remember the initialisation
    mix = 1 - (min(meta.ema, count / (10 + count)) if meta.ema else 0.0)
    if meta.outer == "reptile":
        return OuterScalars(rate, 1.0, 1.0, mix)
    return OuterScalars(*adam_scalars(count, rate), -1 / meta.inner_lr, mix)


@dataclass(frozen=True)
class OuterState:
    """What meta-training carries from step to step, each one flat float32 [P] of phi's matrices in a row, for one pass over all of them.

    Attributes:
        phi: the parameters being trained. average: their running average. exp_avg, exp_avg_sq: Adam's moments.
    """

    phi: Tensor
    average: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def start(cls, phi: Parameters, device: torch.device) -> OuterState:
        """Copies of phi, and zero moments."""
        flat = flattened(phi).to(device, copy=True)
        return cls(flat, flat.clone(), torch.zeros_like(flat), torch.zeros_like(flat))


def named_views(flat: Tensor, shapes: dict[str, tuple[int, int]]) -> Parameters:
    """The matrices of a flat [P] by name: views."""
    parts = flat.split([rows * columns for rows, columns in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def flattened(matrices: Parameters) -> Tensor:
    """Their numbers in a row, [P]: of `named_views` what they are views of, without a copy."""
    values = list(matrices.values())
    first, size = values[0], 0
    for value in values:
        same = value.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and value.is_contiguous() and value.storage_offset() == first.storage_offset() + size):
            return torch.cat([value.flatten() for value in values])
        size += value.numel()
    return first.as_strided((size,), (1,))


def finite(delta: Tensor) -> bool:
    """Whether every entry is."""
    return bool(delta.isfinite().all())


def outer_update(state: OuterState, delta: Tensor, scalars: OuterScalars, outer: str) -> None:
    """One outer step in place.

    Args:
        delta: [P], the Reptile difference, used up by "adam". outer: "adam" takes it as a gradient, "reptile" adds it (paper, algorithm 1).
    """
    if outer == "reptile":
        state.phi.add_(delta, alpha=scalars.rate)
    else:
        adam_step(state.phi, delta.mul_(scalars.gain), state.exp_avg, state.exp_avg_sq, scalars.rate, scalars.root)
    state.average.lerp_(state.phi, scalars.mix)
