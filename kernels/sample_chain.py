"""The whole noise-free sampling chain in one launch: a program carries a few tasks through all steps while the weights stream past.

A product sums over H in small blocks, which a register tile cannot be cut into. So the hidden rows live on four scratch pages of the
program, 16 to 64 rows of H each, which its multiprocessor's L1 holds, with a barrier between writing and reading them.
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
from mcdi_fast.impl import check_precision, check_runs
from mcdi_fast.kernels.launch import (
    BLOCK_COLUMNS,
    FLOATS,
    all_registers,
    check_rank,
    check_tensor,
    dot,
    on_device,
    output,
    sum_block,
)
from mcdi_fast.schedule import Schedule

MAX_TOKENS = 64
"""A program carries whole tasks, and 64 rows at most: more accumulators would spill."""

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
    """The chain's steps int64 [J] and, for each, float64 [J, 3]: a, b skip, b scale of x' = a x + b (skip x + scale net).

    Arguments as diffusion.sample_chain's.
    """
    steps = sampling_steps(schedule, schedule.ends if ends is None else ends, num_steps)
    a, b, _ = sampler_coefficients(schedule, steps).unbind(1)
    now = torch.tensor(steps[:-1])
    return now, torch.stack([a, b * schedule.skip()[now], b * schedule.scale()[now]], 1)


def sample_chain_ref(
    phi: Parameters, x: Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor, mask: Tensor | None = None
) -> Tensor:
    """As `sample_chain`, in any dtype, from unpacked parameters."""
    for t, (keep_x, keep_f, move) in zip(steps, coefficients.tolist(), strict=True):
        net = denoise(phi, x.unsqueeze(-3), t.view(1), condition).squeeze(-3)
        f = keep_f * x + move * net
        x = keep_x * x + (f if mask is None else f * mask)
    return x


@triton.jit
def _product(
    acc, weight, out_stride, rows_at, o, width_in, width_out, inside, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr
):
    """acc [BLOCK_OUT, ROWS] + (weight^T rows^T)[o]; weight [width_in, width_out], rows_at: where each row starts, read where `inside`."""
    for first in range(0, width_in, BLOCK_IN):
        k = first + tl.arange(0, BLOCK_IN)
        w = tl.load(
            weight + k[None, :] * out_stride + o[:, None],
            mask=(o < width_out)[:, None] & (k < width_in)[None, :],
            other=0.0,
        )
        x = tl.load(rows_at[None, :] + k[:, None], mask=inside[None, :] & (k < width_in)[:, None], other=0.0)
        acc = dot(w, x, acc, PRECISION)
    return acc


@triton.jit
def _store_with_mean(h, h_page, mean_page, o, hidden, inside, tokens, TASKS: tl.constexpr, TOKENS: tl.constexpr):
    """Write a block of h^T and, to every row, the mean of the row's task."""
    # rows of the padding are 0 here, for whatever made them was loaded under `inside`
    summed = tl.sum(tl.reshape(h, [h.shape[0], TASKS, TOKENS]), 2) / tokens
    mean = tl.reshape(tl.broadcast_to(summed[:, :, None], [h.shape[0], TASKS, TOKENS]), [h.shape[0], TASKS * TOKENS])
    write = inside[None, :] & (o < hidden)[:, None]
    tl.store(h_page[None, :] + o[:, None], h, mask=write)
    tl.store(mean_page[None, :] + o[:, None], mean, mask=write)


@triton.jit
def sample_chain_kernel(
    condition, steps, coefficients, mask, w_in, w_condition, w_token, w_sample, w_out, w_last, scratch, x,
    num_tasks, tokens, width, condition_width, hidden, sample_rows, depth, num_steps,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, TASKS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Columns of every block are the program's rows: TASKS tasks of TOKENS tokens, both padded to powers of two."""
    ROWS: tl.constexpr = TASKS * TOKENS
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, ROWS)
    task, token = program * TASKS + local // TOKENS, local % TOKENS
    inside = (task < num_tasks) & (token < tokens)
    row = task * tokens + token
    x_at = x + row * width
    # four pages a program: h, its mean over tokens, u, and what the condition adds to h
    page = scratch + (program * 4 * ROWS + local) * hidden
    h_page, mean_page, u_page, base_page = (
        page,
        page + ROWS * hidden,
        page + 2 * ROWS * hidden,
        page + 3 * ROWS * hidden,
    )
    block = tl.arange(0, BLOCK_OUT)

    for first in range(0, hidden, BLOCK_OUT):
        o = first + block
        base = _product(
            tl.zeros([BLOCK_OUT, ROWS], tl.float32), w_condition, hidden, condition + row * condition_width, o,
            condition_width, hidden, inside, BLOCK_IN, PRECISION,
        )  # fmt: skip
        tl.store(base_page[None, :] + o[:, None], base, mask=inside[None, :] & (o < hidden)[:, None])
    tl.debug_barrier()

    # a barrier behind every loop that writes what the next one reads, or reads what the next one writes
    for j in range(0, num_steps):
        t = tl.load(steps + j)
        for first in range(0, hidden, BLOCK_OUT):
            o = first + block
            h = tl.load(base_page[None, :] + o[:, None], mask=inside[None, :] & (o < hidden)[:, None], other=0.0)
            h = _product(h, w_in, hidden, x_at, o, width, hidden, inside, BLOCK_IN, PRECISION)
            _store_with_mean(h, h_page, mean_page, o, hidden, inside, tokens, TASKS, TOKENS)
        tl.debug_barrier()
        my_token, my_sample, my_out = w_token, w_sample, w_out
        for _ in range(0, depth):
            for first in range(0, hidden, BLOCK_OUT):
                o = first + block
                of_step = tl.load(my_sample + (hidden + t) * hidden + o, mask=o < hidden, other=0.0).to(tl.float32)
                a = tl.zeros([BLOCK_OUT, ROWS], tl.float32) + of_step[:, None]
                a = _product(a, my_token, hidden, h_page, o, hidden, hidden, inside, BLOCK_IN, PRECISION)
                a = _product(a, my_sample, hidden, mean_page, o, hidden, hidden, inside, BLOCK_IN, PRECISION)
                tl.store(
                    u_page[None, :] + o[:, None], a / (1 + tl.exp(-a)), mask=inside[None, :] & (o < hidden)[:, None]
                )
            tl.debug_barrier()
            for first in range(0, hidden, BLOCK_OUT):
                o = first + block
                h = tl.load(h_page[None, :] + o[:, None], mask=inside[None, :] & (o < hidden)[:, None], other=0.0)
                h = _product(h, my_out, hidden, u_page, o, hidden, hidden, inside, BLOCK_IN, PRECISION)
                tl.debug_barrier()  # the thread that writes an entry of h need not be the one that read it
                _store_with_mean(h, h_page, mean_page, o, hidden, inside, tokens, TASKS, TOKENS)
            tl.debug_barrier()
            my_token += hidden * hidden
            my_sample += sample_rows * hidden
            my_out += hidden * hidden
        keep_x, keep_f, move = (
            tl.load(coefficients + 3 * j), tl.load(coefficients + 3 * j + 1), tl.load(coefficients + 3 * j + 2)
        )  # fmt: skip
        for first in range(0, width, BLOCK_OUT):
            o = first + block
            net = _product(
                tl.zeros([BLOCK_OUT, ROWS], tl.float32),
                w_last,
                width,
                h_page,
                o,
                hidden,
                width,
                inside,
                BLOCK_IN,
                PRECISION,
            )
            write = inside[None, :] & (o < width)[:, None]
            old = tl.load(x_at[None, :] + o[:, None], mask=write, other=0.0)
            step = keep_f * old + move * net
            if HAS_MASK:
                step *= tl.load(mask + token[None, :] * width + o[:, None], mask=write, other=0.0)
            tl.debug_barrier()  # as above
            tl.store(x_at[None, :] + o[:, None], keep_x * old + step, mask=write)
        tl.debug_barrier()


def chain_blocks(num_tasks: int, tokens: int) -> tuple[int, int]:
    """TASKS, TOKENS: at least 16 rows a program (a dot's least), then more while that still leaves a program a multiprocessor; 64 at most.

    Every program streams all the weights in every step, so rows share that cost; fewer programs than multiprocessors leave chips idle.
    """
    padded = triton.next_power_of_2(tokens)
    tasks = max(1, 16 // padded)
    while 2 * tasks * padded <= 64 and triton.cdiv(num_tasks, tasks) > _ONE_WAVE:
        tasks *= 2
    return tasks, padded


def chain_options(rows: int) -> dict[str, int]:
    """Twice the warps and a shorter pipeline for 64 rows: the sums and the tiles of the mean spilled otherwise (inspect.py)."""
    return {"num_warps": 8 if rows > 32 else 4, "num_stages": 2 if rows > 32 else 3, **all_registers()}


def sample_chain(
    weights: ChainWeights,
    x: Tensor,
    condition: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Noise-free chain from noise to normalised weights: diffusion.sample_chain with f = skip x + scale denoise(x, t, condition).

    Args:
        weights: of `pack_weights`. x: float32 [B, N, D], the start. condition: [B, N, C], normalised.
        steps: int64 [J]. coefficients: float32 [J, 3], both of `chain_table`, on the device.
        mask: float32 [N, D], 0 at padding, where f is taken as 0 (sampler.py).

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
    check_tensor("coefficients", coefficients, (len(steps), 3), (torch.float32,), device)
    if mask is not None:
        check_tensor("mask", mask, (n, d), (torch.float32,), device)
    check_tensor("weights.into", weights.into, (d, hidden), device=device)
    check_tensor("weights.condition", weights.condition, (c, hidden), dtype, device)
    for name, shape in {
        "token": (depth, hidden, hidden), "sample": (depth, max(sample_rows, hidden + 1), hidden),
        "out": (depth, hidden, hidden), "last": (hidden, d),
    }.items():  # fmt: skip
        check_tensor(f"weights.{name}", getattr(weights, name), shape, dtype, device)
    check_precision(precision)
    tasks, padded_tokens = chain_blocks(b, n)
    if n > MAX_TOKENS:
        raise McdiError(f"x: {n} tokens, expected at most {MAX_TOKENS}; use diffusion.sample_chain")
    out = output("out", out, (b, n, d), device)
    check_runs(device, "sample_chain")
    if out is not x:
        out.copy_(x)
    programs = triton.cdiv(b, tasks)
    scratch = torch.empty(programs, 4, tasks * padded_tokens, hidden, device=device)
    with on_device(device):
        sample_chain_kernel[(programs,)](
            condition, steps, coefficients, x if mask is None else mask,
            weights.into, weights.condition, weights.token, weights.sample, weights.out, weights.last,
            scratch, out, b, n, d, c, hidden, sample_rows, depth, len(steps),
            mask is not None, precision, tasks, padded_tokens, BLOCK_COLUMNS, sum_block(precision),
            **chain_options(tasks * padded_tokens),
        )  # fmt: skip
    return out
