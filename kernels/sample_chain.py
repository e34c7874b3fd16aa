"""The whole noise-free sampling chain in one launch: a program carries a few tasks through all steps while the weights stream past.

The hidden rows live in registers as h^T [H, rows]. A product sums over H in small blocks, which registers cannot be cut into, so each
layer writes h and its mean over tokens to a scratch page of the program (L1) and reads them back block by block, behind a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.denoiser import Parameters, denoise, depth_of
from mcdi_fast.diffusion import sampler_coefficients, sampling_steps
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import (
    BLOCK_COLUMNS,
    BLOCK_SUM,
    FLOATS,
    check_precision,
    check_rank,
    check_runs,
    check_tensor,
    dot,
    on_device,
    output,
)
from mcdi_fast.schedule import Schedule

MAX_STATE = 16384
"""Padded H x rows of a program: 64 kB of registers for h^T."""

_ONE_WAVE = 132  # multiprocessors of an H100 or H200; more programs than that would wait for each other


@dataclass(frozen=True)
class ChainWeights:
    """phi with the layers of a kind in one tensor. token, out: [L, H, H]. sample: [L, H + T, H]. Build once, by `pack_weights`."""

    into: Tensor
    condition: Tensor
    token: Tensor
    sample: Tensor
    out: Tensor
    last: Tensor


def pack_weights(phi: Parameters, dtype: torch.dtype = torch.float32) -> ChainWeights:
    """Copy phi, as float32 or bfloat16 (half the bytes to stream; pair it with precision="bf16")."""
    if dtype not in FLOATS:
        raise McdiError(f"dtype: {dtype}, expected {' or '.join(map(str, FLOATS))}")
    depth = depth_of(phi)
    stacks = (torch.stack([phi[f"block{i}.{kind}"] for i in range(depth)]) for kind in ("token", "sample", "out"))
    parts = (phi["in.token"], phi["in.condition"], *stacks, phi["out.token"])
    return ChainWeights(*(part.detach().to(dtype).contiguous() for part in parts))


def chain_table(
    schedule: Schedule, ends: Tensor | tuple[int, ...] | None = None, num_steps: int | None = None
) -> tuple[Tensor, Tensor]:
    """The chain's steps int64 [J] and, for each, float64 [J, 2]: x' = keep x + move net. Same arguments as diffusion.sample_chain."""
    steps = sampling_steps(schedule, schedule.ends if ends is None else ends, num_steps)
    a, b, _ = sampler_coefficients(schedule, steps).unbind(1)
    now = torch.tensor(steps[:-1])
    return now, torch.stack([a + b * schedule.skip()[now], b * schedule.scale()[now]], 1)


def sample_chain_ref(phi: Parameters, x: Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor) -> Tensor:
    """As `sample_chain`, in any dtype, from unpacked parameters."""
    for t, (keep, move) in zip(steps, coefficients.tolist(), strict=True):
        net = denoise(phi, x.unsqueeze(-3), t.view(1), condition).squeeze(-3)
        x = keep * x + move * net
    return x


@triton.jit
def sample_chain_kernel(
    condition, steps, coefficients, w_in, w_condition, w_token, w_sample, w_out, w_last, scratch, x,
    num_tasks, tokens, width, condition_width, hidden, sample_rows, depth, num_steps,
    PRECISION: tl.constexpr, TASKS: tl.constexpr, TOKENS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Columns of every block are the program's rows: TASKS tasks of TOKENS tokens, both padded to powers of two."""
    ROWS: tl.constexpr = TASKS * TOKENS
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, ROWS)
    task, token = program * TASKS + local // TOKENS, local % TOKENS
    inside = (task < num_tasks) & (token < tokens)
    row = task * tokens + token
    h_index, k_index, o_index = tl.arange(0, HIDDEN), tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_OUT)
    h_inside = h_index < hidden
    page = (program * 3 * ROWS + local) * hidden  # three pages a program: h, its mean over tokens, what the condition adds
    h_page, mean_page, base_page = scratch + page, scratch + page + ROWS * hidden, scratch + page + 2 * ROWS * hidden

    h = tl.zeros([HIDDEN, ROWS], tl.float32)
    for first in range(0, condition_width, BLOCK_IN):
        k = first + k_index
        w = tl.load(
            w_condition + k[None, :] * hidden + h_index[:, None], mask=h_inside[:, None] & (k < condition_width)[None, :], other=0.0
        )
        c = tl.load(
            condition + row[None, :] * condition_width + k[:, None], mask=inside[None, :] & (k < condition_width)[:, None], other=0.0
        )
        h = dot(w, c, h, PRECISION)
    tl.store(base_page[None, :] + h_index[:, None], h, mask=h_inside[:, None])

    for j in range(0, num_steps):
        t = tl.load(steps + j)
        tl.debug_barrier()  # x of the step before, and the base
        h = tl.load(base_page[None, :] + h_index[:, None], mask=h_inside[:, None], other=0.0)
        for first in range(0, width, BLOCK_IN):
            k = first + k_index
            w = tl.load(w_in + k[None, :] * hidden + h_index[:, None], mask=h_inside[:, None] & (k < width)[None, :], other=0.0)
            xt = tl.load(x + row[None, :] * width + k[:, None], mask=inside[None, :] & (k < width)[:, None], other=0.0)
            h = dot(w, xt, h, PRECISION)
        for layer in range(0, depth):
            square = layer * hidden * hidden  # below 2^31: at most 16384 x 16384 by MAX_STATE
            my_token, my_out = w_token + square, w_out + square
            my_sample = w_sample + (square + layer * (sample_rows - hidden) * hidden)
            # a padded row is masked, not multiplied by zero: its value must not reach a task, be it NaN
            summed = tl.sum(tl.reshape(tl.where(inside[None, :], h, 0.0), [HIDDEN, TASKS, TOKENS]), 2) / tokens
            mean = tl.reshape(tl.broadcast_to(summed[:, :, None], [HIDDEN, TASKS, TOKENS]), [HIDDEN, ROWS])
            tl.debug_barrier()  # everyone has read the pages of the layer before
            tl.store(h_page[None, :] + h_index[:, None], h, mask=h_inside[:, None])
            tl.store(mean_page[None, :] + h_index[:, None], mean, mask=h_inside[:, None])
            tl.debug_barrier()
            for first_out in range(0, hidden, BLOCK_OUT):
                o = first_out + o_index
                o_inside = o < hidden
                of_step = tl.load(my_sample + (hidden + t) * hidden + o, mask=o_inside, other=0.0).to(tl.float32)
                a = tl.zeros([BLOCK_OUT, ROWS], tl.float32) + of_step[:, None]
                for first in range(0, hidden, BLOCK_IN):
                    k = first + k_index
                    at, w_mask = k[None, :] * hidden + o[:, None], o_inside[:, None] & (k < hidden)[None, :]
                    k_mask = (k < hidden)[:, None]
                    a = dot(
                        tl.load(my_token + at, mask=w_mask, other=0.0),
                        tl.load(h_page[None, :] + k[:, None], mask=k_mask, other=0.0), a, PRECISION,
                    )  # fmt: skip
                    a = dot(
                        tl.load(my_sample + at, mask=w_mask, other=0.0),
                        tl.load(mean_page[None, :] + k[:, None], mask=k_mask, other=0.0), a, PRECISION,
                    )  # fmt: skip
                u = a / (1 + tl.exp(-a))
                w = tl.load(
                    my_out + o[None, :] * hidden + h_index[:, None], mask=o_inside[None, :] & h_inside[:, None], other=0.0
                )
                h = dot(w, u, h, PRECISION)
        tl.debug_barrier()
        tl.store(h_page[None, :] + h_index[:, None], h, mask=h_inside[:, None])
        tl.debug_barrier()
        keep, move = tl.load(coefficients + 2 * j), tl.load(coefficients + 2 * j + 1)
        for first_out in range(0, width, BLOCK_OUT):
            o = first_out + o_index
            net = tl.zeros([BLOCK_OUT, ROWS], tl.float32)
            for first in range(0, hidden, BLOCK_IN):
                k = first + k_index
                w = tl.load(w_last + k[None, :] * width + o[:, None], mask=(o < width)[:, None] & (k < hidden)[None, :], other=0.0)
                hk = tl.load(h_page[None, :] + k[:, None], mask=(k < hidden)[:, None], other=0.0)
                net = dot(w, hk, net, PRECISION)
            at, x_mask = x + row[None, :] * width + o[:, None], inside[None, :] & (o < width)[:, None]
            tl.store(at, keep * tl.load(at, mask=x_mask, other=0.0) + move * net, mask=x_mask)


def chain_blocks(num_tasks: int, tokens: int) -> tuple[int, int]:
    """TASKS, TOKENS: at least 16 rows a program (a dot's least), then more while that still leaves a program a multiprocessor; 64 at most.

    Every program streams all the weights in every step, so rows share that cost; fewer programs than multiprocessors leave chips idle.
    """
    padded = triton.next_power_of_2(tokens)
    tasks = max(1, 16 // padded)
    while 2 * tasks * padded <= 64 and triton.cdiv(num_tasks, tasks) > _ONE_WAVE:
        tasks *= 2
    return tasks, padded


def chain_warps(hidden: int, rows: int) -> int:
    """4 warps, one group of Hopper's tensor cores; 8 where h^T alone would take more than 64 registers a thread."""
    return 4 if hidden * rows <= 8192 else 8


def sample_chain(
    weights: ChainWeights,
    x: Tensor,
    condition: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    *,
    out: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Noise-free chain from noise to normalised weights: diffusion.sample_chain with f = skip x + scale denoise(x, t, condition).

    Args:
        weights: of `pack_weights`. x: float32 [B, N, D], the start. condition: [B, N, C], normalised.
        steps: int64 [J]. coefficients: float32 [J, 2], both of `chain_table`, on the device.

    Returns:
        float32 [B, N, D], in `out` where given (x itself is allowed).

    Raises:
        McdiError: naming the tensor.
    """
    b, n, d = check_rank("x", x, "BND")
    c, hidden = check_rank("weights.condition", weights.condition, "CH")
    depth, sample_rows, _ = check_rank("weights.sample", weights.sample, "LRH")
    device, dtype = x.device, (weights.into.dtype,)
    check_tensor("x", x, (b, n, d), (torch.float32,))
    check_tensor("condition", condition, (b, n, c), device=device)
    check_tensor("steps", steps, (len(steps),), (torch.int64,), device)
    check_tensor("coefficients", coefficients, (len(steps), 2), (torch.float32,), device)
    check_tensor("weights.into", weights.into, (d, hidden), device=device)
    check_tensor("weights.condition", weights.condition, (c, hidden), dtype, device)
    for name, shape in {
        "token": (depth, hidden, hidden), "sample": (depth, max(sample_rows, hidden + 1), hidden),
        "out": (depth, hidden, hidden), "last": (hidden, d),
    }.items():  # fmt: skip
        check_tensor(f"weights.{name}", getattr(weights, name), shape, dtype, device)
    check_precision(precision)
    tasks, padded_tokens = chain_blocks(b, n)
    rows, padded_hidden = tasks * padded_tokens, max(16, triton.next_power_of_2(hidden))
    if rows * padded_hidden > MAX_STATE:
        raise McdiError(
            f"x: {n} tokens and hidden width {hidden}: a program holds {rows} x {padded_hidden} numbers, expected at most {MAX_STATE}; "
            "use diffusion.sample_chain"
        )
    out = output("out", out, (b, n, d), device)
    check_runs(device, "sample_chain")
    if out is not x:
        out.copy_(x)
    programs = triton.cdiv(b, tasks)
    scratch = torch.empty(programs, 3, rows, hidden, device=device)
    with on_device(device):
        sample_chain_kernel[(programs,)](
            condition, steps, coefficients, weights.into, weights.condition, weights.token, weights.sample, weights.out, weights.last,
            scratch, out, b, n, d, c, hidden, sample_rows, depth, len(steps),
            precision, tasks, padded_tokens, padded_hidden, BLOCK_COLUMNS, BLOCK_SUM,
            num_warps=chain_warps(padded_hidden, rows),
        )  # fmt: skip
    return out
