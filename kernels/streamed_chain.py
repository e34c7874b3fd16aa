"""The whole noise-free sampling chain of many tasks in one launch: `chain_weights.run_chain_ref`.

A program carries a few tasks through all steps while the weights stream past. What bounds it is the bytes of matrices that one multiprocessor
reads in a step; the folded matrices are 45 % fewer bytes than phi's own. A product sums over its columns in small blocks, which a register tile
cannot be cut into. So the columns [x u_0 … u_{L-1}] and their means over tokens live on scratch pages of the program, with a barrier between
writing and reading them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.chain_weights import ChainWeights, check_chain
from mcdi_fast.kernels.launch import (
    across,
    all_registers,
    chip,
    dot,
    launch,
    output,
    padded,
    sum_block,
)

MAX_TOKENS = 64
"""A program carries whole tasks, and 64 rows at most: more accumulators would spill."""


@triton.jit
def _product(
    acc, weight, out_stride, rows_at, o, width_in, width_out, inside, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr
):
    """acc [BLOCK_OUT, ROWS] + (weight^T rows^T)[o]; weight [width_in, width_out], rows_at: where each row starts, read where `inside`."""
    for first in range(0, width_in, BLOCK_IN):
        k = first + tl.arange(0, BLOCK_IN)
        w = tl.load(weight + k[None, :] * out_stride + o[:, None], mask=(o < width_out)[:, None], other=0.0)
        x = tl.load(rows_at[None, :] + k[:, None], mask=inside[None, :], other=0.0)
        acc = dot(across(w, PRECISION), x, acc, PRECISION)
    return acc


@triton.jit
def _store_with_mean(value, columns_at, means_at, o, width, inside, tokens, TASKS: tl.constexpr, TOKENS: tl.constexpr):
    """Write a block of columns and, to every row, the mean of the row's task."""
    value = tl.where(inside[None, :], value, 0.0)
    summed = tl.sum(tl.reshape(value, [value.shape[0], TASKS, TOKENS]), 2) / tokens
    mean = tl.broadcast_to(summed[:, :, None], [value.shape[0], TASKS, TOKENS])
    write = inside[None, :] & (o < width)[:, None]
    tl.store(columns_at[None, :] + o[:, None], value, mask=write)
    tl.store(means_at[None, :] + o[:, None], tl.reshape(mean, [value.shape[0], TASKS * TOKENS]), mask=write)


@triton.jit
def _copy_with_mean(
    rows_at, columns_at, means_at, width, wide, inside, tokens,
    TASKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`width` numbers of each row, then zeros up to `wide`."""
    for first in range(0, wide, BLOCK):
        o = first + tl.arange(0, BLOCK)
        value = tl.load(rows_at[None, :] + o[:, None], mask=inside[None, :] & (o < width)[:, None], other=0.0)
        _store_with_mean(value.to(tl.float32), columns_at, means_at, o, wide, inside, tokens, TASKS, TOKENS)


@triton.jit
def streamed_chain_kernel(
    condition, steps, coefficients, mask, w_token, w_sample, w_step, w_last, w_condition, w_condition_mean, scratch, x,
    num_tasks, tokens, width, condition_width, wide, condition_wide, hidden, num_rows, depth, num_steps, page_width,
    PRECISION: tl.constexpr, TASKS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Columns of every block are the program's rows: TASKS tasks of TOKENS tokens, both padded to powers of two.

    wide, condition_wide, hidden: D', C', H', padded to multiples of launch.PAD, whose numbers are 0 everywhere.
    """
    ROWS: tl.constexpr = TASKS * TOKENS
    program = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, ROWS)
    task, token = program * TASKS + local // TOKENS, local % TOKENS
    inside = (task < num_tasks) & (token < tokens)
    row = task * tokens + token
    x_at = x + row * width
    # three pages a program: columns [x u_0 …], their means over tokens, and what the condition adds to every u_l and to net
    columns_at = scratch + (program * 3 * ROWS + local) * page_width
    means_at, cond_bias_at = columns_at + ROWS * page_width, columns_at + 2 * ROWS * page_width
    block = tl.arange(0, BLOCK_OUT)

    _copy_with_mean(
        condition + row * condition_width, columns_at, means_at, condition_width, condition_wide, inside, tokens,
        TASKS, TOKENS, BLOCK_OUT,
    )  # fmt: skip
    tl.debug_barrier()
    all_hidden = depth * hidden
    for first in range(0, all_hidden + wide, BLOCK_OUT):
        o = first + block
        cond_bias = _product(
            tl.zeros([BLOCK_OUT, ROWS], tl.float32), w_condition, all_hidden + wide, columns_at, o,
            condition_wide, all_hidden + wide, inside, BLOCK_IN, PRECISION,
        )  # fmt: skip
        cond_bias = _product(
            cond_bias, w_condition_mean, all_hidden, means_at, o, condition_wide, all_hidden, inside, BLOCK_IN, PRECISION
        )  # fmt: skip
        tl.store(cond_bias_at[None, :] + o[:, None], cond_bias, mask=inside[None, :] & (o < all_hidden + wide)[:, None])
    tl.debug_barrier()
    _copy_with_mean(x_at, columns_at, means_at, width, wide, inside, tokens, TASKS, TOKENS, BLOCK_OUT)
    tl.debug_barrier()

    # a barrier behind every loop that writes what the next one reads, or reads what the next one writes
    for j in range(0, num_steps):
        t = tl.load(steps + j)
        my_token, my_sample, my_step, seen = w_token, w_sample, w_step + t * hidden, wide
        for layer in range(0, depth):
            for first in range(0, hidden, BLOCK_OUT):
                o = first + block
                a = tl.load(
                    cond_bias_at[None, :] + layer * hidden + o[:, None],
                    mask=inside[None, :] & (o < hidden)[:, None],
                    other=0.0,
                )
                a += tl.load(my_step + o, mask=o < hidden, other=0.0).to(tl.float32)[:, None]
                a = _product(a, my_token, hidden, columns_at, o, seen, hidden, inside, BLOCK_IN, PRECISION)
                a = _product(a, my_sample, hidden, means_at, o, seen, hidden, inside, BLOCK_IN, PRECISION)
                u = a / (1 + tl.exp(-a))
                _store_with_mean(u, columns_at + seen, means_at + seen, o, hidden, inside, tokens, TASKS, TOKENS)
            tl.debug_barrier()
            my_token += seen * hidden
            my_sample += seen * hidden
            my_step += num_rows * hidden
            seen += hidden
        keep_x, keep_f, move = (
            tl.load(coefficients + 3 * j), tl.load(coefficients + 3 * j + 1), tl.load(coefficients + 3 * j + 2)
        )  # fmt: skip
        for first in range(0, wide, BLOCK_OUT):
            o = first + block
            read, write = inside[None, :] & (o < wide)[:, None], inside[None, :] & (o < width)[:, None]
            net = tl.load(cond_bias_at[None, :] + all_hidden + o[:, None], mask=read, other=0.0)
            net = _product(net, w_last, wide, columns_at, o, seen, wide, inside, BLOCK_IN, PRECISION)
            old = tl.load(columns_at[None, :] + o[:, None], mask=read, other=0.0)
            step = keep_f * old + move * net
            if mask is not None:
                step *= tl.load(mask + token[None, :] * width + o[:, None], mask=write, other=0.0)
            tl.store(x_at[None, :] + o[:, None], keep_x * old + step, mask=write)  # the page's x is still being read
        tl.debug_barrier()
        _copy_with_mean(x_at, columns_at, means_at, width, wide, inside, tokens, TASKS, TOKENS, BLOCK_OUT)
        tl.debug_barrier()


def chain_blocks(num_tasks: int, tokens: int, one_wave: int) -> tuple[int, int]:
    """TASKS, TOKENS: at least 16 rows a program (a dot's least), then more while that still leaves a program a multiprocessor; 32 at most,
    64 for a task of more than 32 tokens.

    Every program streams all the weights in every step, so rows share that cost; fewer programs than multiprocessors leave chips idle.
    """
    padded_tokens = triton.next_power_of_2(tokens)
    tasks = max(1, 16 // padded_tokens)
    while 2 * tasks * padded_tokens <= 32 and triton.cdiv(num_tasks, tasks) > one_wave:
        tasks *= 2
    return tasks, padded_tokens


def chain_columns(rows: int, precision: str) -> int:
    """Columns of a product at a time: the most that do not spill (inspect.py); 64 rows on gfx942 still do."""
    if rows <= 16:
        return 64 if precision == "ieee" else 128
    return 32 if precision == "ieee" or rows > 32 else 64


def chain_options(rows: int, precision: str, device: torch.device) -> dict[str, int]:
    """Twice the warps where there are more rows or columns; a shorter pipeline from 32 rows on: likewise."""
    return {
        "num_warps": 4 if rows <= 16 and precision == "ieee" else 8,
        "num_stages": 2 if rows > 16 else 3,
        **all_registers(device),
    }


def streamed_chain(
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
    """As `run_chain.run_chain`, for any number of tasks."""
    check_chain(weights, x, condition, steps, coefficients, mask, precision)
    (b, n, d), (depth, num_rows, h), device = x.shape, weights.step.shape, x.device
    if n > MAX_TOKENS:
        raise McdiError(f"x: {n} tokens, expected at most {MAX_TOKENS}; use run_chain")
    tasks, tokens = chain_blocks(b, n, chip(device).multiprocessors)
    rows = tasks * tokens
    out = output("out", out, (b, n, d), device)
    if out is not x:
        out.copy_(x)
    programs, wide, condition_wide = triton.cdiv(b, tasks), padded(d), weights.condition.shape[0]
    page_width = max(wide + depth * h, condition_wide)
    scratch = torch.empty(programs, 3, rows, page_width, device=device)
    launch(
        "streamed_chain", streamed_chain_kernel, (programs,), device, chain_options(rows, precision, device),
        condition=condition, steps=steps, coefficients=coefficients, mask=mask, w_token=weights.token, w_sample=weights.sample,
        w_step=weights.step, w_last=weights.last, w_condition=weights.condition, w_condition_mean=weights.condition_mean,
        scratch=scratch, x=out, num_tasks=b, tokens=n, width=d, condition_width=condition.shape[-1], wide=wide,
        condition_wide=condition_wide, hidden=h, num_rows=num_rows, depth=depth, num_steps=len(steps), page_width=page_width,
        PRECISION=precision, TASKS=tasks, TOKENS=tokens, BLOCK_OUT=chain_columns(rows, precision), BLOCK_IN=sum_block(precision),
    )  # fmt: skip
    return out
