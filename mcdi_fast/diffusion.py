"""Every formula of the diffusion, float64-capable: the schedule's tables, noising, the loss's ingredients, the sampler's step.

Time runs from noise (t = 0) to weights (t = T), the paper's convention and the reverse of DDPM's. The tables are float64 and built once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import prod, sqrt
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcdi_fast.config import DiffusionConfig
from mcdi_fast.denoiser import Parameters
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
        carry: [T + 1], what the sampler multiplies x by on arriving at t: 1, but where carry is scaled, sqrt(abar^{i+1}_{e_i}) at e_i, i < k.
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
        return torch.bucketize(
            torch.arange(self.num_steps, device="cpu"), torch.tensor(self.ends, device="cpu"), right=True
        )


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
        beta = torch.tensor([beta_start], dtype=torch.float64, device="cpu")
    else:
        beta = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64, device="cpu")
    alpha = 1 - beta
    ends = tuple(round(Fraction(i * num_steps, num_segments)) for i in range(1, num_segments + 1))
    abar_segment = torch.ones(num_segments, num_steps + 1, dtype=torch.float64, device="cpu")
    for i, end in enumerate(ends):
        abar_segment[i, :end] = alpha[:end].flip(0).cumprod(0).flip(0)
    carry = torch.ones(num_steps + 1, dtype=torch.float64, device="cpu")
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
        starts: int64 [k], see ends.
        skip, scale: [T] float64, f is predicted as `skip_t x_t + scale_t net` (`residual_tables`).
    """

    name: str
    targets: tuple[int, ...]
    ends: Tensor
    signal: Tensor
    noise: Tensor
    f_weight: Tensor
    eps_weight: Tensor
    starts: Tensor
    skip: Tensor
    scale: Tensor


def residual_tables(schedule: Schedule, name: str, residual: str = "scaled") -> tuple[Tensor, Tensor]:
    """skip [T] and scale [T] of f = skip_t x_t + scale_t net, for unit-variance targets.

    A chain that heads for the target reached at e has f = sqrt(1-abar_t) (x_t - sqrt(a) theta) / (1-a), with a = prod_{j=t}^{e-1} alpha_j.
    With skip = sqrt(1-abar_t) what is left has the deviation sqrt((1-abar_t) a / (1-a)): that is the scale, so that the network's own
    target is of order one. Mc-Di heads for the end of its segment. Mv-Di and Tw-Di head for T from everywhere: a = abar, scale = sqrt(abar_t).

    residual: "scaled"; "target", the network predicts the target itself: f = sqrt(1-abar_t) (x - sqrt(a) net) / (1-a); "unscaled", scale = 1;
    "none", skip = 0 and scale the deviation of f itself (docs/choices.md: when which; the last two are worse).
    """
    whole = 1 - schedule.abar[:-1]
    a = schedule.abar[:-1]
    if name == "local-consistency":
        a = schedule.abar_segment[schedule.next_segment(), torch.arange(schedule.num_steps, device="cpu")]
    if residual == "none":
        return torch.zeros_like(whole), (whole / (1 - a)).sqrt()
    if residual == "unscaled":
        return whole.sqrt(), torch.ones_like(whole)
    if residual == "target":
        return whole.sqrt() / (1 - a), -(whole * a).sqrt() / (1 - a)
    if residual != "scaled":
        raise McdiError(f"residual {residual!r}: expected scaled, unscaled, target or none")
    return whole.sqrt(), (whole * a / (1 - a)).sqrt()


def make_objective(schedule: Schedule, name: str, window: str = "whole", residual: str = "scaled") -> Objective:
    """Tables of one of the paper's three objectives.

    - `local-consistency` (Mc-Di): target i is reached at e_i; f weighted by sqrt(1 - abar^i_t), eps by sqrt(1 - abar_t).
    - `vanilla` (Mv-Di): the last target only, reached at T; both weights 1.
    - `naive-local` (Tw-Di): all k targets, every chain ends at T; both weights 1.

    residual: of `residual_tables`. window: "segment" trains
    target i of `local-consistency` in its own segment only, e_{i-1} <= t < e_i; the other two have no segments.

    Raises:
        McdiError: another name or window.
    """
    if window not in ("whole", "segment"):
        raise McdiError(f"window {window!r}: expected whole or segment")
    k, steps = schedule.num_segments, schedule.num_steps
    if name == "local-consistency":
        ends, a = torch.tensor(schedule.ends, device="cpu"), schedule.abar_segment[:, :-1]
        weights = (1 - a).sqrt(), (1 - schedule.abar[:-1]).sqrt().expand(k, -1)
    elif name in ("vanilla", "naive-local"):
        ends, a = torch.full((k,), steps, device="cpu"), schedule.abar[:-1].expand(k, -1)
        weights = torch.ones_like(a), torch.ones_like(a)
    else:
        raise McdiError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    targets = (k - 1,) if name == "vanilla" else tuple(range(k))
    starts = torch.zeros_like(ends)
    if window == "segment" and name == "local-consistency":
        starts[1:] = ends[:-1]
    tables = residual_tables(schedule, name, residual)
    return Objective(name, targets, ends, a.sqrt(), (1 - a).sqrt(), *weights, starts, *tables)


def diffusion_tables(diffusion: DiffusionConfig) -> tuple[Schedule, Objective]:
    """Both of a configuration."""
    d = diffusion
    if d.carry not in ("full", "scaled"):
        raise McdiError(f"carry {d.carry!r}: expected full or scaled")
    scaled = d.carry == "scaled" and d.objective == "local-consistency"
    schedule = make_schedule(d.steps, d.segments, d.beta_start, d.beta_end, scaled)
    return schedule, make_objective(schedule, d.objective, d.window, d.residual)


class Draws(NamedTuple):
    """The random choices of a meta-step, int64 on the CPU.

    task, segment: [B], task of the bank and local target of each base learner. step: [B, K, S]. streams: [B], of the noise.
    """

    task: Tensor
    segment: Tensor
    step: Tensor
    streams: Tensor


@dataclass(frozen=True)
class InnerBatch:
    """What B base learners see in K inner steps of S noised samples each (`diffusion.make_inner_batch` builds it).

    The loss of task b in step r is `mean_{s,n,d} (gain * net(x, step, condition) - target)^2`, `net` as `denoiser.denoise`.
    The mean is over real entries only.

    Attributes:
        x: [B, K, S, N, D] noised weights. step: int64 [B, K, S].
        condition: [B, N, C], all that the network is told of each token (`denoiser.token_condition`).
        gain: [B, K, S]. target: [B, K, S, N, D].
        mask: [N, D], 1 for real entries and 0 for padding; None where there is no padding.
    """

    x: Tensor
    step: Tensor
    condition: Tensor
    gain: Tensor
    target: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device) -> InnerBatch:
        """The same on another device."""
        present = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return InnerBatch(**present)

    def check(self, phi: Parameters) -> None:
        """Raise McdiError, naming the tensor, what was found and what was expected, unless shapes, dtypes and (on a CPU) steps fit phi."""
        if self.x.ndim != 5 or 0 in self.x.shape:
            raise McdiError(
                f"inner batch x: shape {tuple(self.x.shape)}, expected [B, K, S, N, D] with no empty dimension"
            )
        b, k, s, n, d = self.x.shape
        width, dtype, device = len(phi["in.condition"]), phi["in.token"].dtype, phi["in.token"].device
        expected = {
            "x": (b, k, s, n, len(phi["in.token"])),
            "step": (b, k, s),
            "condition": (b, n, width),
            "gain": (b, k, s),
            "target": (b, k, s, n, d),
        }
        if self.mask is not None:
            expected["mask"] = (n, d)
        for name, shape in expected.items():
            tensor, want = getattr(self, name), torch.int64 if name == "step" else dtype
            if tuple(tensor.shape) != shape:
                raise McdiError(f"inner batch {name}: shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.dtype != want or tensor.device != device:
                raise McdiError(f"inner batch {name}: {tensor.dtype} on {tensor.device}, expected {want} on {device}")
        steps = len(phi["block0.sample"]) - len(phi["block0.token"])
        if device.type == "cpu" and not 0 <= int(self.step.min()) <= int(self.step.max()) < steps:
            raise McdiError(
                f"inner batch step: {int(self.step.min())} to {int(self.step.max())}, expected 0 to {steps - 1}"
            )


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
    objective: Objective,
    target: Tensor,
    condition: Tensor,
    segment: Tensor,
    step: Tensor,
    eps: Tensor,
    mask: Tensor | None = None,
) -> InnerBatch:
    """Turn the loss in f into the loss in the network's output: f = skip x + scale net, so f_weight f - eps_weight eps = gain net - target.

    Args:
        target: [B, N, D], the normalised local target of each task. condition: [B, N, C]. segment: int64 [B].
        step: int64 [B, K, S]. eps: [B, K, S, N, D]. mask: of `InnerBatch`.
    """
    b, k, s = step.shape
    segments = segment[:, None, None].expand(b, k, s)
    x = noising(objective, target[:, None, None], segments, step, eps)
    f_weight = objective.f_weight[segments, step]
    target_weight = _pick(objective.eps_weight, segments, step, eps)
    skip = (f_weight * objective.skip[step]).to(eps.dtype)[..., None, None]
    gain = (f_weight * objective.scale[step]).to(eps.dtype)
    return InnerBatch(x, step, condition, gain, target_weight * eps - skip * x, mask)


def _pick(table: Tensor, segment: Tensor, step: Tensor, like: Tensor) -> Tensor:
    return table[segment, step].to(like.dtype)[..., None, None]


def draw_steps(
    objective: Objective, segment: Tensor, inner_steps: int, samples: int, generator: torch.Generator
) -> Tensor:
    """t uniform in [starts[segment], ends[segment]): int64 [B, inner_steps, samples]."""
    uniform = torch.rand(len(segment), inner_steps, samples, generator=generator, dtype=torch.float64, device="cpu")
    first, end = objective.starts[segment][:, None, None], objective.ends[segment][:, None, None]
    return first + (uniform * (end - first)).long()


def sampling_steps(schedule: Schedule, ends: Tensor | tuple[int, ...], num_steps: int | None = None) -> list[int]:
    """Which steps t_0 = 0 < t_1 < … < T a shorter chain visits, with T appended. Every end is among them.

    A jump over several steps is the vanilla step with the product of their alphas; as long as it stays inside a segment it is the exact
    composition of the single noise-free steps for a fixed target, so the ends are kept and the rest is spread evenly.

    Raises:
        McdiError: num_steps that is no integer, or outside [number of distinct ends, T].
    """
    num_steps = check_num_steps(num_steps)
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


def check_num_steps(num_steps: Any) -> int | None:
    """The number of steps as an int; None stays None. Raises McdiError, naming the value, for text, fractions and the like."""
    try:
        return None if num_steps is None else operator.index(num_steps)
    except TypeError as error:
        raise McdiError(f"sampling steps = {num_steps!r:.40}: expected an integer, or None for all of them") from error


def sampler_coefficients(schedule: Schedule, steps: list[int]) -> Tensor:
    """float64 [len(steps) - 1, 3]: x' = a x + b f + eta_noise * sigma * z for the jump from steps[j] to steps[j + 1] (method, section 2)."""
    alphas, abar, carry = schedule.alpha.tolist(), schedule.abar.tolist(), schedule.carry.tolist()
    rows = []
    for now, then in pairwise(steps):  # in Python: as tensors these few numbers cost as much as two steps of a chain
        alpha = prod(alphas[now:then])  # not abar_now / abar_then: that ratio underflows for long harsh schedules
        a = carry[then] / sqrt(alpha)
        sigma = carry[then] * sqrt((1 - alpha) * (1 - abar[then]) / (1 - abar[now]))
        rows.append((a, -(1 - alpha) / sqrt(1 - abar[now]) * a, sigma))
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def chain_table(schedule: Schedule, objective: Objective, num_steps: int | None = None) -> tuple[Tensor, Tensor]:
    """The chain's steps int64 [J] and, for each, float64 [J, 3]: a, b skip, b scale of x' = a x + b (skip x + scale net).

    num_steps: as of `sample_chain`, over the objective's ends.
    """
    steps = sampling_steps(schedule, objective.ends, num_steps)
    a, b, _ = sampler_coefficients(schedule, steps).unbind(1)
    now = torch.tensor(steps[:-1], device="cpu")
    return now, torch.stack([a, b * objective.skip[now], b * objective.scale[now]], 1)


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
    if not isinstance(eta_noise, Real) or not 0 <= eta_noise <= 1:
        raise McdiError(f"eta_noise = {eta_noise!r:.40}: expected 0 (noise-free) to 1 (full noise)")
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
