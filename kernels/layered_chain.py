"""The sampling chain of many tokens or large matrices, a launch a layer: `chain_weights.run_chain_ref`.

Every launch spreads over the whole chip in blocks of a task's rows and of columns, and streams each matrix once a block of rows. What all tokens
have to say to each other, the means of the columns [x u_0 …], is kept in parts: a program writes the sums over its own rows, the next launch
multiplies each of them and adds up the products, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.chain_weights import ChainWeights, check_chain
from mcdi_fast.kernels.launch import (
    BLOCK_COLUMNS,
    across,
    all_registers,
    dot,
    launch,
    output,
    padded,
    row_block,
    stages,
    sum_block,
)

MAX_TOKENS = 4096
"""64 blocks of rows: a program holds a tile of the sums of each."""


@triton.jit
def _store(value, columns, parts, program, row, o, inside, width, page_width):
    """A block [columns, rows] and its sums over rows."""
    write = inside[None, :] & (o < width)[:, None]
    tl.store(columns + row[None, :] * page_width + o[:, None], value, mask=write)
    tl.store(parts + program * page_width + o, tl.sum(tl.where(inside[None, :], value, 0.0), 1), mask=o < width)


@triton.jit
def start_kernel(
    rows, columns, parts, tokens, row_blocks, width, wide, page_width, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr
):
    """Program (task and block of rows, block of columns) copies rows of `width` numbers, then zeros up to `wide`."""
    program = tl.program_id(0).to(tl.int64)
    token, o = (
        program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS),
        tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT),
    )
    row, inside = program // row_blocks * tokens + token, token < tokens
    value = tl.load(rows + row[None, :] * width + o[:, None], mask=inside[None, :] & (o < width)[:, None], other=0.0)
    _store(value.to(tl.float32), columns, parts, program, row, o, inside, wide, page_width)


@triton.jit(do_not_specialize=["j"])
def layer_kernel(
    columns, parts, weight, sample, step_rows, cond_bias, steps, coefficients, mask, new_columns, new_parts, out,
    j, tokens, row_blocks, seen, width_out, sample_width, page_width, bias_width, bias_at, width,
    MODE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (task and block of rows, block of columns): the first `seen` columns times `weight` and, where given, their means times `sample`.

    MODE "condition": into cond_bias. "hidden": u_l, behind the columns seen. "last": the next x, into `new_columns` (others still read the old
    one) and `out`. PARTS: row_blocks, padded to what a dot takes.
    """
    program = tl.program_id(0).to(tl.int64)
    token, o = (
        program % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS),
        tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT),
    )
    row, inside = program // row_blocks * tokens + token, token < tokens
    write = inside[None, :] & (o < width_out)[:, None]
    part = tl.arange(0, PARTS)
    parts_at = parts + (program // row_blocks * row_blocks + part) * page_width
    rows_at = columns + row * page_width
    acc, by_part = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32), tl.zeros([BLOCK_OUT, PARTS], tl.float32)
    for first in range(0, seen, BLOCK_IN):
        k = first + tl.arange(0, BLOCK_IN)
        w = tl.load(weight + k[None, :] * width_out + o[:, None], mask=(o < width_out)[:, None], other=0.0)
        x = tl.load(rows_at[None, :] + k[:, None], mask=inside[None, :], other=0.0)
        acc = dot(across(w, PRECISION), x, acc, PRECISION)
        if sample is not None:
            s = tl.load(sample + k[None, :] * sample_width + o[:, None], mask=(o < sample_width)[:, None], other=0.0)
            p = tl.load(parts_at[None, :] + k[:, None], mask=(part < row_blocks)[None, :], other=0.0)
            by_part = dot(across(s, PRECISION), p, by_part, PRECISION)
    if sample is not None:
        acc += (tl.sum(by_part, 1) / tokens)[:, None]
    bias_at = cond_bias + row[None, :] * bias_width + bias_at + o[:, None]
    if MODE == "condition":
        tl.store(bias_at, acc, mask=write)
    else:
        acc += tl.load(bias_at, mask=write, other=0.0)
    if MODE == "hidden":
        acc += tl.load(step_rows + tl.load(steps + j) * width_out + o, mask=o < width_out, other=0.0).to(tl.float32)[
            :, None
        ]
        _store(acc / (1 + tl.exp(-acc)), columns + seen, parts + seen, program, row, o, inside, width_out, page_width)
    if MODE == "last":
        keep_x, keep_f = tl.load(coefficients + 3 * j), tl.load(coefficients + 3 * j + 1)
        old = tl.load(rows_at[None, :] + o[:, None], mask=write, other=0.0)
        f = keep_f * old + tl.load(coefficients + 3 * j + 2) * acc
        real = inside[None, :] & (o < width)[:, None]
        if mask is not None:
            f *= tl.load(mask + token[None, :] * width + o[:, None], mask=real, other=0.0)
        new = keep_x * old + f
        _store(new, new_columns, new_parts, program, row, o, inside, width_out, page_width)
        tl.store(out + row[None, :] * width + o[:, None], new, mask=real)


def layered_chain(
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
    """As `run_chain.run_chain`, for up to 4096 tokens: 3 launches, then one a layer and one for x in every step."""
    check_chain(weights, x, condition, steps, coefficients, mask, precision)
    (b, n, d), (depth, _, h), (condition_wide, every) = x.shape, weights.step.shape, weights.condition.shape
    if n > MAX_TOKENS:
        raise McdiError(f"x: {n} tokens, expected at most {MAX_TOKENS}; use diffusion.sample_chain")
    out = output("out", out, (b, n, d), x.device)
    wide, page, rows = padded(d), padded(d) + depth * h, row_block(n)
    row_blocks = triton.cdiv(n, rows)
    new = x.new_empty
    pages, parts, cond_bias = new(2, b, n, page), new(2, b, row_blocks, page), new(b, n, every)
    told, told_parts = new(b, n, condition_wide), new(b, row_blocks, condition_wide)
    for given, width, columns, sums in ((condition, condition.shape[-1], told, told_parts), (x, d, pages[0], parts[0])):
        launch(
            "layered_chain", start_kernel, (b * row_blocks, triton.cdiv(padded(width), BLOCK_COLUMNS)), x.device, None,
            rows=given, columns=columns, parts=sums, tokens=n, row_blocks=row_blocks, width=width, wide=padded(width),
            page_width=columns.shape[-1], BLOCK_OUT=BLOCK_COLUMNS, BLOCK_ROWS=rows,
        )  # fmt: skip

    def layer(
        mode: str, weight: Tensor, sample: Tensor | None, columns: Tensor, sums: Tensor, j: int = 0, **more
    ) -> None:
        width_out = weight.shape[1]
        last = mode == "last"
        launch(
            "layered_chain", layer_kernel, (b * row_blocks, triton.cdiv(width_out, BLOCK_COLUMNS)), x.device,
            {"num_stages": stages(precision), **all_registers(x.device)},
            columns=columns, parts=sums, weight=weight, sample=sample, step_rows=more.get("step_rows"), cond_bias=cond_bias, steps=steps,
            coefficients=coefficients, mask=mask if last else None, new_columns=pages[(j + 1) % 2] if last else None,
            new_parts=parts[(j + 1) % 2] if last else None, out=out if last else None,
            j=j, tokens=n, row_blocks=row_blocks, seen=len(weight), width_out=width_out, sample_width=1 if sample is None else sample.shape[1],
            page_width=columns.shape[-1], bias_width=every, bias_at=more.get("bias_at", 0), width=d,
            MODE=mode, PRECISION=precision, PARTS=max(16, triton.next_power_of_2(row_blocks)),
            BLOCK_OUT=BLOCK_COLUMNS, BLOCK_ROWS=rows, BLOCK_IN=sum_block(precision),
        )  # fmt: skip

    layer("condition", weights.condition, weights.condition_mean, told, told_parts)
    sizes = [wide + number * h for number in range(depth)]
    matrices = list(zip(weights.token.split(sizes), weights.sample.split(sizes), weights.step, strict=True))
    for j in range(len(steps)):
        now = pages[j % 2], parts[j % 2]
        for number, (token, sample, step_rows) in enumerate(matrices):
            layer("hidden", token, sample, *now, j, step_rows=step_rows, bias_at=number * h)
        layer("last", weights.last, None, *now, j, bias_at=depth * h)
    return out
