"""Noising, the loss's ingredients and the sampler's step: pure functions over the tables of `schedule.py`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod, sqrt

import torch
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.inner import InnerBatch
from mcdi_fast.schedule import Objective, Schedule


def noising(objective: Objective, target: Tensor, segment: Tensor, step: Tensor, eps: Tensor) -> Tensor:
    """x_t = sqrt(abar^i_t) theta_{id} + sqrt(1 - abar^i_t) eps (method, section 2).

    Args:
        target: [..., N, D], broadcastable to eps. segment, step: int64 [...], i (0-based) and t < objective.ends[i]. eps: [..., N, D].
    """
    return _pick(objective.signal, segment, step, eps) * target + _pick(objective.noise, segment, step, eps) * eps


def consistency_loss(objective: Objective, f: Tensor, segment: Tensor, step: Tensor, eps: Tensor) -> Tensor:
    """The loss each (i, t, eps) contributes, `mean || f_weight f - eps_weight eps ||^2` over N and D: [..., N, D] -> [...].

    The mean, not the sum of the paper's norm: it keeps the inner rate's meaning when the generated module grows.
    """
    error = _pick(objective.f_weight, segment, step, eps) * f - _pick(objective.eps_weight, segment, step, eps) * eps
    return error.square().mean((-2, -1))


def make_inner_batch(
    schedule: Schedule,
    objective: Objective,
    target: Tensor,
    condition: Tensor,
    segment: Tensor,
    step: Tensor,
    eps: Tensor,
) -> InnerBatch:
    """Turn the loss in f into the loss in the network's output: f = skip x + scale net, so f_weight f - eps_weight eps = gain net - target.

    Args:
        target: [B, N, D], the normalised local target of each task. condition: [B, N, C]. segment: int64 [B].
        step: int64 [B, K, S]. eps: [B, K, S, N, D].
    """
    b, k, s = step.shape
    segments = segment[:, None, None].expand(b, k, s)
    x = noising(objective, target[:, None, None], segments, step, eps)
    f_weight = objective.f_weight[segments, step]
    target_weight = _pick(objective.eps_weight, segments, step, eps)
    skip = (f_weight * schedule.skip()[step]).to(eps.dtype)[..., None, None]
    gain = (f_weight * schedule.scale()[step]).to(eps.dtype)
    return InnerBatch(x, step, condition, gain, target_weight * eps - skip * x)


def _pick(table: Tensor, segment: Tensor, step: Tensor, like: Tensor) -> Tensor:
    return table[segment, step].to(like.dtype)[..., None, None]


def draw_steps(
    objective: Objective, segment: Tensor, inner_steps: int, samples: int, generator: torch.Generator
) -> Tensor:
    """t uniform in [starts[segment], ends[segment]): int64 [B, inner_steps, samples]."""
    uniform = torch.rand(len(segment), inner_steps, samples, generator=generator, dtype=torch.float64)
    first, end = objective.starts[segment][:, None, None], objective.ends[segment][:, None, None]
    return first + (uniform * (end - first)).long()


def sampling_steps(schedule: Schedule, ends: Tensor | tuple[int, ...], num_steps: int | None = None) -> list[int]:
    """Which steps t_0 = 0 < t_1 < … < T a shorter chain visits, with T appended. Every end is among them.

    A jump over several steps is the vanilla step with the product of their alphas; as long as it stays inside a segment it is the exact
    composition of the single noise-free steps for a fixed target, so the ends are kept and the rest is spread evenly.

    Raises:
        McdiError: num_steps outside [number of distinct ends, T].
    """
    total = schedule.num_steps
    stops = sorted({int(end) for end in ends})
    count = total if num_steps is None else num_steps
    if not len(stops) <= count <= total:
        raise McdiError(f"sampling steps = {count}: expected {len(stops)} (one a segment) to T = {total}")
    # cumulative shares, at least one step a segment
    shares = [round(end * count / total) for end in stops]
    for i in range(len(shares)):
        low = (shares[i - 1] if i else 0) + 1
        shares[i] = min(max(shares[i], low), count - (len(shares) - 1 - i))
    kept, start, done = [], 0, 0
    for end, share in zip(stops, shares, strict=True):
        n = share - done
        kept += [start + j * (end - start) // n for j in range(n)]
        start, done = end, share
    return [*kept, total]


def sampler_coefficients(schedule: Schedule, steps: list[int]) -> Tensor:
    """float64 [len(steps) - 1, 3]: x' = a x + b f + eta_noise * sigma * z for the jump from steps[j] to steps[j + 1] (method, section 2)."""
    alphas, abar, carry = schedule.alpha.tolist(), schedule.abar.tolist(), schedule.carry.tolist()
    rows = []
    for now, then in pairwise(steps):  # in Python: as tensors these few numbers cost as much as two steps of a chain
        alpha = prod(alphas[now:then])  # not abar_now / abar_then: that ratio underflows for long harsh schedules
        a = carry[then] / sqrt(alpha)
        sigma = carry[then] * sqrt((1 - alpha) * (1 - abar[then]) / (1 - abar[now]))
        rows.append((a, -(1 - alpha) / sqrt(1 - abar[now]) * a, sigma))
    return torch.tensor(rows, dtype=torch.float64)


def chain_table(
    schedule: Schedule, ends: Tensor | tuple[int, ...] | None = None, num_steps: int | None = None
) -> tuple[Tensor, Tensor]:
    """The chain's steps int64 [J] and, for each, float64 [J, 3]: a, b skip, b scale of x' = a x + b (skip x + scale net).

    Arguments as `sample_chain`'s.
    """
    steps = sampling_steps(schedule, schedule.ends if ends is None else ends, num_steps)
    a, b, _ = sampler_coefficients(schedule, steps).unbind(1)
    now = torch.tensor(steps[:-1])
    return now, torch.stack([a, b * schedule.skip()[now], b * schedule.scale()[now]], 1)


def sample_chain(
    f: Callable[[Tensor, int], Tensor],
    x: Tensor,
    schedule: Schedule,
    *,
    ends: Tensor | tuple[int, ...] | None = None,
    num_steps: int | None = None,
    eta_noise: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run the chain from noise to weights.

    Args:
        f: called as f(x, t), any callable that predicts f(x_t, t, c); the condition is its own business. Where it has a method
            `advance(x, t, a, b)` giving a x + b f(x, t) (`denoiser.ChainDenoiser`), that is called instead.
        x: the start, standard normal, any shape. ends: segment ends a shortened chain must visit, `schedule.ends` by default.
        num_steps: a shorter chain (`sampling_steps`); T by default.
        eta_noise: 0 the noise-free mean step (the one Theorem 1 is about), 1 the full posterior noise.
        noise: noise(t) -> z like x, needed when eta_noise > 0.
        callback: called as callback(t, x_t) before each step and once with (T, x_T).

    Raises:
        McdiError: eta_noise outside [0, 1], or positive without `noise`; a bad num_steps.
    """
    if not 0 <= eta_noise <= 1:
        raise McdiError(f"eta_noise = {eta_noise}: expected 0 (noise-free) to 1 (full noise)")
    if eta_noise > 0 and noise is None:
        raise McdiError(f"eta_noise = {eta_noise} needs noise: pass noise=lambda t: torch.randn_like(x)")
    steps = sampling_steps(schedule, schedule.ends if ends is None else ends, num_steps)
    advance = getattr(f, "advance", None)
    for t, (a, b, sigma) in zip(steps, sampler_coefficients(schedule, steps).tolist(), strict=False):
        if callback is not None:
            callback(t, x)
        x = advance(x, t, a, b) if advance is not None else torch.add(a * x, f(x, t), alpha=b)
        if noise is not None and eta_noise > 0:
            x = x + eta_noise * sigma * noise(t)
    if callback is not None:
        callback(schedule.num_steps, x)
    return x
