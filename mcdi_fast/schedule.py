"""The noise schedule as tables, built once in float64.

Time runs from noise (t = 0) to weights (t = T), the paper's convention and the reverse of DDPM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from mcdi_fast.config import DiffusionConfig
from mcdi_fast.errors import McdiError

MAX_TABLE = 2**20  # steps times segments: some tables of 8 bytes each are built
OBJECTIVES = ("local-consistency", "vanilla", "naive-local")


@dataclass(frozen=True)
class Schedule:
    """Tables of the local consistency diffusion (paper, section 3; T steps, k segments). All float64, on the CPU.

    Attributes:
        alpha: [T], alpha_0 < … < alpha_{T-1}, all in (0, 1).
        ends: e_1 < … < e_k = T, the step at which local target i must be reached, `round(i * T / k)`.
        abar: [T + 1], abar_t = prod_{j=t}^{T-1} alpha_j; abar_T = 1 (empty product).
        abar_segment: [k, T + 1], abar^i_t = prod_{j=t}^{e_i - 1} alpha_j for t <= e_i; 1 behind e_i, where it means nothing.
        carry: [T + 1], what the sampler multiplies x by on arriving at t: 1, but where a chain may be told so, sqrt(abar^{i+1}_{e_i}) at e_i, i < k.
    """

    alpha: Tensor
    ends: tuple[int, ...]
    abar: Tensor
    abar_segment: Tensor
    carry: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.alpha)

    @property
    def num_segments(self) -> int:
        """k."""
        return len(self.ends)

    def next_segment(self) -> Tensor:
        """int64 [T]: the segment a chain is in at step t, that is the first i with t < e_i (0-based)."""
        return torch.bucketize(torch.arange(self.num_steps), torch.tensor(self.ends), right=True)

    def skip(self) -> Tensor:
        """[T], sqrt(1 - abar_t): f is predicted as `skip_t * x_t + scale_t * net`."""
        return (1 - self.abar[:-1]).sqrt()

    def scale(self) -> Tensor:
        """[T], the deviation of `f - skip * x` for unit-variance targets, so that the network's own target is of order one.

        For a chain heading for target i, f = sqrt(1-abar_t) (x_t - sqrt(a) theta) / (1-a) with a = abar^i_t, hence
        f - skip x_t = sqrt((1-abar_t) a / (1-a)) * v with v = sqrt(a) eps - sqrt(1-a) theta of unit variance.
        """
        a = self.abar_segment[self.next_segment(), torch.arange(self.num_steps)]
        return ((1 - self.abar[:-1]) * a / (1 - a)).sqrt()


def make_schedule(
    num_steps: int, num_segments: int, beta_start: float = 0.8, beta_end: float = 0.01, carry_scaled: bool = False
) -> Schedule:
    """Build the tables: 1 - alpha falls linearly from `beta_start` at t = 0 to `beta_end` at t = T - 1.

    The paper gives no values. 0.8 to 0.01 makes abar^1_0 about 0.0003 at T = 20, k = 3, so that a chain starts from noise
    (measured: a first experiment on Omniglot heads). T / k need not be an integer; e_i rounds to even on ties, as Python does.

    carry_scaled: a chain that has reached target i goes on from sqrt(abar^{i+1}) times it. Training shows the next segment x_t =
    sqrt(abar^{i+1}) theta + noise there; arriving with all of theta, the chain overshoots the later targets.

    Raises:
        McdiError: k < 1, k > T, T k above `MAX_TABLE`, or betas outside 0 < beta_end < beta_start < 1.
    """
    if num_segments < 1:
        raise McdiError(f"segments k = {num_segments}: expected at least 1")
    if num_steps < num_segments:
        raise McdiError(
            f"segments k = {num_segments} exceed the steps T = {num_steps}: each segment needs a step; raise T or lower k"
        )
    if num_steps * num_segments > MAX_TABLE:
        raise McdiError(
            f"steps T = {num_steps} times segments k = {num_segments}: expected at most {MAX_TABLE}; lower T (20 is usual)"
        )
    if not 0 < beta_end < beta_start < 1:
        raise McdiError(f"beta_start = {beta_start}, beta_end = {beta_end}: expected 0 < beta_end < beta_start < 1")
    if num_steps == 1:
        beta = torch.tensor([beta_start], dtype=torch.float64)
    else:
        beta = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    alpha = 1 - beta
    ends = tuple(round(Fraction(i * num_steps, num_segments)) for i in range(1, num_segments + 1))
    abar_segment = torch.ones(num_segments, num_steps + 1, dtype=torch.float64)
    for i, end in enumerate(ends):
        abar_segment[i, :end] = alpha[:end].flip(0).cumprod(0).flip(0)
    carry = torch.ones(num_steps + 1, dtype=torch.float64)
    if carry_scaled:
        for i, end in enumerate(ends[:-1]):
            carry[end] = abar_segment[i + 1, end].sqrt()
    return Schedule(alpha, ends, abar_segment[-1].clone(), abar_segment, carry)


@dataclass(frozen=True)
class Objective:
    """What training asks for at (target i, step t): `|| f_weight * f(x_t) - eps_weight * eps ||^2`, x_t = signal * theta + noise * eps.

    Attributes:
        name: one of `OBJECTIVES`.
        targets: the local targets it trains on, 0-based.
        ends: int64 [k], t is drawn from starts[i] <= t < ends[i].
        signal, noise, f_weight, eps_weight: [k, T] float64; entries with t >= ends[i] mean nothing.
    """

    name: str
    targets: tuple[int, ...]
    ends: Tensor
    signal: Tensor
    noise: Tensor
    f_weight: Tensor
    eps_weight: Tensor
    starts: Tensor


def make_objective(schedule: Schedule, name: str, window: str = "whole") -> Objective:
    """Tables of one of the paper's three objectives.

    - `local-consistency` (Mc-Di): target i is reached at e_i; f weighted by sqrt(1 - abar^i_t), eps by sqrt(1 - abar_t).
    - `vanilla` (Mv-Di): the last target only, reached at T; both weights 1.
    - `naive-local` (Tw-Di): all k targets, every chain ends at T; both weights 1.

    window: "segment" trains target i of `local-consistency` in its own segment only, e_{i-1} <= t < e_i; the other two have no segments.

    Raises:
        McdiError: another name or window.
    """
    if window not in ("whole", "segment"):
        raise McdiError(f"window {window!r}: expected whole or segment")
    k, steps = schedule.num_segments, schedule.num_steps
    if name == "local-consistency":
        ends, a = torch.tensor(schedule.ends), schedule.abar_segment[:, :-1]
        weights = (1 - a).sqrt(), (1 - schedule.abar[:-1]).sqrt().expand(k, -1)
    elif name in ("vanilla", "naive-local"):
        ends, a = torch.full((k,), steps), schedule.abar[:-1].expand(k, -1)
        weights = torch.ones_like(a), torch.ones_like(a)
    else:
        raise McdiError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    targets = (k - 1,) if name == "vanilla" else tuple(range(k))
    starts = torch.zeros_like(ends)
    if window == "segment" and name == "local-consistency":
        starts[1:] = ends[:-1]
    return Objective(name, targets, ends, a.sqrt(), (1 - a).sqrt(), *weights, starts)


def diffusion_tables(diffusion: DiffusionConfig) -> tuple[Schedule, Objective]:
    """Both of a configuration."""
    d = diffusion
    if d.carry not in ("full", "scaled"):
        raise McdiError(f"carry {d.carry!r}: expected full or scaled")
    scaled = d.carry == "scaled" and d.objective == "local-consistency"
    schedule = make_schedule(d.steps, d.segments, d.beta_start, d.beta_end, scaled)
    return schedule, make_objective(schedule, d.objective, d.window)
