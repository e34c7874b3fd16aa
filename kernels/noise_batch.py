"""Noised weights and everything their loss needs, from the targets and a seed: `diffusion.make_inner_batch` with eps drawn in the kernel,
never stored."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.diffusion import Objective
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import Turn, check_rank, check_tensor, element_block, launch, turn_arguments
from mcdi_fast.kernels.normal_noise import noise_options, philox_normal_block
from mcdi_fast.noise import philox_normal


def noise_tables(objective: Objective) -> Tensor:
    """float64 [k, T, 5]: signal, noise, eps_weight, f_weight * skip, f_weight * scale (gain). Build once, then `.float().to(device)`."""
    k = len(objective.f_weight)
    skip, scale = objective.skip.expand(k, -1), objective.scale.expand(k, -1)
    f = objective.f_weight
    return torch.stack([objective.signal, objective.noise, objective.eps_weight, f * skip, f * scale], -1)


def noise_batch_ref(
    target: Tensor, segment: Tensor, step: Tensor, seed: int, streams: Tensor, tables: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `noise_batch`, in any dtype; the noise itself is float32 on every path."""
    shape = (*step.shape, *target.shape[1:])
    eps = philox_normal([seed] * len(target), math.prod(shape[1:]), streams.tolist()).view(shape).to(target)
    if mask is not None:
        eps = eps * mask
    picked = tables[segment[:, None, None], step].to(target.dtype)
    signal, noise, eps_weight, skip, gain = picked.unbind(-1)
    x = signal[..., None, None] * target[:, None, None] + noise[..., None, None] * eps
    return x, eps_weight[..., None, None] * eps - skip[..., None, None] * x, gain


@triton.jit(do_not_specialize=["seed"])
def noise_batch_kernel(
    target, segment, step, streams, turn, tables, mask, x, loss_target, gain,
    seed, pitch, rows, per_row, width, samples, num_steps, blocks, x_task, x_step, x_pitch, target_task, target_step, gain_task, gain_step,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program task * blocks + block: BLOCK normals of the task, BLOCK / 8 calls of Philox."""
    task, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    if turn is not None:
        at_row = tl.load(turn) * pitch
        segment += at_row
        step += at_row
        streams += at_row
    count = rows * per_row
    first = block * BLOCK
    flat = first + tl.arange(0, BLOCK)
    inside = flat < count
    row, entry = flat // per_row, flat % per_row
    eps = philox_normal_block(seed, tl.load(streams + task), first, BLOCK)
    if mask is not None:
        eps *= tl.load(mask + entry, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(step + task * rows + row, mask=inside, other=0)
    at = tables + (tl.load(segment + task) * num_steps + t) * 5
    theta = tl.load(target + task * per_row + entry, mask=inside, other=0.0).to(tl.float32)
    signal, noise = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    eps_weight, skip = tl.load(at + 2, mask=inside, other=0.0), tl.load(at + 3, mask=inside, other=0.0)
    noised = signal * theta + noise * eps
    k, sample = (row // samples).to(tl.int64), row % samples
    x_at = x + task * x_task + k * x_step + (sample * (per_row // width) + entry // width) * x_pitch + entry % width
    tl.store(x_at, noised, mask=inside)
    target_at = loss_target + task * target_task + k * target_step + sample * per_row + entry
    tl.store(target_at, eps_weight * eps - skip * noised, mask=inside)
    gain_at = gain + task * gain_task + k * gain_step + sample
    tl.store(gain_at, tl.load(at + 4, mask=inside, other=0.0), mask=inside & (entry == 0))


def _strided(name: str, given: Tensor | None, shape: tuple[int, ...], device: torch.device, pitched: int = 0) -> Tensor:
    """As `output`, but tasks and inner steps may lie anywhere; so may the rows of dimension `pitched`, at equal distances."""
    if given is None:
        return torch.empty(shape, device=device)
    check_tensor(name, given, shape, (torch.float32,), device, contiguous=False)
    strides = (*given.stride(), 0)
    expected = [shape[i + 1] * strides[i + 1] if i + 1 < len(shape) else 1 for i in range(len(shape))]
    if any(strides[i] != expected[i] for i in range(2, len(shape)) if i != pitched):
        raise McdiError(f"{name}: strides {given.stride()}, expected the numbers of an inner step one behind the other")
    return given


def noise_batch(
    target: Tensor,
    segment: Tensor,
    step: Tensor,
    seed: int,
    streams: Tensor,
    tables: Tensor,
    mask: Tensor | None = None,
    *,
    turn: Turn | None = None,
    x: Tensor | None = None,
    loss_target: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the loss's target and its gain (diffusion.make_inner_batch) for K inner steps of S samples of each task.

    Args:
        target: [B, N, D], normalised local targets, float32 or bfloat16. segment: int64 [B]. step: int64 [B, K, S].
        seed: in [0, 2^63). streams: int64 [B], not negative: eps of task b is `philox_normal([seed], K S N D, streams[b])`.
        tables: float32 [k, T, 5] of `noise_tables`. mask: [N, D], 0 at padding, whose noise is 0 then.
        turn: of segment, step and streams.

    Segments and steps are not range-checked: that would wait for the GPU.

    Returns:
        x, loss_target: float32 [B, K, S, N, D]. gain: float32 [B, K, S]. The caller's may be views whose task and inner step lie anywhere, and of
        x also the rows' pitch.

    Raises:
        McdiError: naming the tensor.
    """
    b, n, d = check_rank("target", target, "BND")
    _, k, s = check_rank("step", step, "BKS")
    segments, steps, _ = check_rank("tables", tables, "kT5")
    device, integer = target.device, (torch.int64,)
    check_tensor("target", target, (b, n, d))
    check_tensor("segment", segment, (b,), integer, device)
    check_tensor("step", step, (b, k, s), integer, device)
    check_tensor("streams", streams, (b,), integer, device)
    check_tensor("tables", tables, (segments, steps, 5), (torch.float32,), device)
    if mask is not None:
        check_tensor("mask", mask, (n, d), device=device)
    table = turn_arguments(turn, device)
    if not 0 <= seed < 2**63:
        raise McdiError(f"seed = {seed}: expected an integer in [0, 2^63)")
    if k * s * n * d >= 2**31:
        raise McdiError(f"step, target: {k * s * n * d} numbers a task, expected fewer than 2^31")
    x = _strided("x", x, (b, k, s, n, d), device, pitched=3)
    loss_target = _strided("loss_target", loss_target, (b, k, s, n, d), device)
    gain = _strided("gain", gain, (b, k, s), device)
    block = element_block(k * s * n * d)
    blocks = triton.cdiv(k * s * n * d, block)
    launch(
        "noise_batch", noise_batch_kernel, (b * blocks,), device, noise_options(block),
        target=target, segment=segment, step=step, streams=streams, **table, tables=tables, mask=mask,
        x=x, loss_target=loss_target, gain=gain, seed=seed,
        rows=k * s, per_row=n * d, width=d, samples=s, num_steps=steps, blocks=blocks, x_task=x.stride(0), x_step=x.stride(1),
        x_pitch=x.stride(3), target_task=loss_target.stride(0), target_step=loss_target.stride(1), gain_task=gain.stride(0),
        gain_step=gain.stride(1), BLOCK=block,
    )  # fmt: skip
    return x, loss_target, gain
