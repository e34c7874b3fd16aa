"""Weight preparation in one launch, all M steps of Adam + SAM of N linear heads: `heads.head_trajectory`.

One program a task, and only the local targets are written. A task's features are read again every step and stay in the multiprocessor's L1
(100 rows x 64 are 26 kB a copy); heads, moments and gradients stay in registers for the whole training. Heads that are too large for that stay in
the L2, and a program goes over them in tiles of features (`tiled_trajectory_kernel`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast import heads
from mcdi_fast.backend import check_precision
from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import across, all_registers, check_rank, check_tensor, chip, dot, launch, output
from mcdi_fast.kernels.sam_adam import ADAM, adam_update
from mcdi_fast.optim import SAM_TINY, adam_scalars

MAX_STATE = 8192
"""Padded ways x features a program can keep: 6 such float32 arrays (head, ascent, gradient, moments, sum) in 256 kB of registers."""
MAX_WAYS = 128
"""Of a softmax, which a program has whole."""


head_trajectory_ref = heads.head_trajectory


@triton.jit
def _versions(pick, at, inside, copy_stride):
    """Where in the features the rows `at` of a step are, counted in rows."""
    if pick is not None:
        source = tl.load(pick + at, mask=inside, other=0).to(tl.int64) * copy_stride + at
    else:
        source = at
    return source


@triton.jit
def _errors(logits, way, ways, labels, sample_weight, at, row, rows, inside):
    """[rows, WAYS]: the gradient of the mean cross-entropy with respect to the logits."""
    label = tl.load(labels + at, mask=inside, other=-1)
    logits = tl.where((way < ways)[None, :], logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None] - tl.where(way[None, :] == label[:, None], 1.0, 0.0)
    if sample_weight is not None:
        share = tl.load(sample_weight + row, mask=inside, other=0.0)
    else:
        share = tl.where(inside, 1.0 / rows, 0.0)
    return tl.where(inside[:, None], p * share[:, None], 0.0)


@triton.jit
def head_gradient_block(
    weight, bias, features, labels, pick, sample_weight, task, num_tasks, rows, width, ways, weight_decay,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, WAYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the mean cross-entropy of one head: weight [WAYS, WIDTH], bias [WAYS]. Where used: pick, this step's [B, R]; sample_weight [R]."""
    column, way = tl.arange(0, WIDTH), tl.arange(0, WAYS)
    to_weight, to_bias = tl.zeros([WAYS, WIDTH], tl.float32), tl.zeros([WAYS], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        at = task * rows + row
        source = _versions(pick, at, inside, num_tasks * rows)
        x = tl.load(
            features + source[:, None] * width + column[None, :],
            mask=inside[:, None] & (column < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        logits = dot(x, tl.trans(weight), tl.zeros([BLOCK_ROWS, WAYS], tl.float32), PRECISION) + bias[None, :]
        p = _errors(logits, way, ways, labels, sample_weight, at, row, rows, inside)
        to_weight = dot(tl.trans(p), x, to_weight, PRECISION)
        to_bias += tl.sum(p, 0)
    return to_weight + weight_decay * weight, to_bias + weight_decay * bias


@triton.jit
def head_trajectory_kernel(
    start, features, labels, pick, sample_weight, scalars, out,
    rho, weight_decay, keep_first, keep_second, eps, num_tasks, rows, width, ways, segments, per_segment,
    SAM: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WAYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a task; WAYS, WIDTH: ways and features padded to powers of two. The padding's gradient and thus its head stay 0."""
    task = tl.program_id(0).to(tl.int64)
    column, way = tl.arange(0, WIDTH), tl.arange(0, WAYS)
    weight_inside = (way < ways)[:, None] & (column < width)[None, :]
    weight_at = way[:, None] * (width + 1) + column[None, :]
    bias_at = way * (width + 1) + width
    head = ways * (width + 1)
    w = tl.load(start + task * head + weight_at, mask=weight_inside, other=0.0)
    b = tl.load(start + task * head + bias_at, mask=way < ways, other=0.0)
    w_avg, w_avg_sq = tl.zeros_like(w), tl.zeros_like(w)
    b_avg, b_avg_sq = tl.zeros_like(b), tl.zeros_like(b)
    for segment in range(0, segments):  # `pick` walks along, a step at a time
        for step in range(segment * per_segment, (segment + 1) * per_segment):
            gw, gb = head_gradient_block(
                w, b, features, labels, pick, sample_weight, task, num_tasks, rows, width, ways, weight_decay,
                PRECISION, BLOCK_ROWS, WAYS, WIDTH,
            )  # fmt: skip
            if SAM:
                norm = tl.sqrt(tl.sum(tl.sum(gw * gw, 1), 0) + tl.sum(gb * gb, 0))
                factor = rho / tl.maximum(norm, TINY)
                gw, gb = head_gradient_block(
                    w + factor * gw, b + factor * gb, features, labels, pick, sample_weight, task, num_tasks, rows, width, ways, weight_decay,
                    PRECISION, BLOCK_ROWS, WAYS, WIDTH,
                )  # fmt: skip
            rate, root = tl.load(scalars + 2 * step), tl.load(scalars + 2 * step + 1)
            w, w_avg, w_avg_sq = adam_update(w, gw, w_avg, w_avg_sq, rate, root, keep_first, keep_second, eps)
            b, b_avg, b_avg_sq = adam_update(b, gb, b_avg, b_avg_sq, rate, root, keep_first, keep_second, eps)
            if pick is not None:
                pick += num_tasks * rows
        kept = out + (task * segments + segment) * head
        tl.store(kept + weight_at, w, mask=weight_inside)
        tl.store(kept + bias_at, b, mask=way < ways)


@triton.jit
def _tiled_gradient(
    weight, bias, gradient, bias_gradient, factor, errors, features, labels, pick, sample_weight,
    task, num_tasks, rows, high, width, wide, ways, weight_decay,
    ASCENDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, WAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `head_gradient_block`, to where `gradient` and `bias_gradient` point; returns the sum of its squares.

    ASCENDED: at the head weight + factor gradient, with the gradient that stands there. errors: [WAYS, high], what is on the way.
    """
    way = tl.arange(0, WAYS)
    b = tl.load(bias + way)
    if ASCENDED:
        b += factor * tl.load(bias_gradient + way)
    to_bias = weight_decay * b
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        at = task * rows + row
        x_at = features + _versions(pick, at, inside, num_tasks * rows) * width
        logits = tl.zeros([BLOCK_ROWS, WAYS], tl.float32)
        for left in range(0, width, TILE):
            column = left + tl.arange(0, TILE)
            x = tl.load(x_at[:, None] + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0)
            head_at = way[None, :] * wide + column[:, None]
            w = tl.load(weight + head_at, mask=(way < ways)[None, :], other=0.0)
            if ASCENDED:
                w += factor * tl.load(gradient + head_at, mask=(way < ways)[None, :], other=0.0)
            logits = dot(x, w, logits, PRECISION)
        p = _errors(logits + b[None, :], way, ways, labels, sample_weight, at, row, rows, inside)
        tl.store(errors + way[None, :] * high + row[:, None], p)
        to_bias += tl.sum(p, 0)
    tl.debug_barrier()
    tl.store(bias_gradient + way, to_bias)
    squares = tl.sum(to_bias * to_bias, 0)
    for left in range(0, width, TILE):  # features are the M of the product, and errors lie along its sum
        column = left + tl.arange(0, TILE)
        to_weight = tl.zeros([TILE, WAYS], tl.float32)
        for first in range(0, rows, BLOCK_ROWS):
            row = first + tl.arange(0, BLOCK_ROWS)
            inside = row < rows
            x_at = features + _versions(pick, task * rows + row, inside, num_tasks * rows) * width
            x = tl.load(x_at[None, :] + column[:, None], mask=inside[None, :] & (column < width)[:, None], other=0.0)
            p = tl.load(errors + way[None, :] * high + row[:, None])
            to_weight = dot(across(x, PRECISION), p, to_weight, PRECISION)
        head_at, there = way[None, :] * wide + column[:, None], (way < ways)[None, :]
        w = tl.load(weight + head_at, mask=there, other=0.0)
        if ASCENDED:
            w += factor * tl.load(gradient + head_at, mask=there, other=0.0)
        to_weight += weight_decay * w
        squares += tl.sum(tl.sum(to_weight * to_weight, 1), 0)
        tl.store(gradient + head_at, to_weight, mask=there)
    tl.debug_barrier()
    return squares


@triton.jit
def tiled_trajectory_kernel(
    start, features, labels, pick, sample_weight, scalars, state, errors, out,
    rho, weight_decay, keep_first, keep_second, eps, num_tasks, rows, high, width, wide, ways, page, segments, per_segment,
    SAM: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, WAYS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a task; head, moments and gradient are pages of `state`: [ways, wide] numbers, then [WAYS] biases.

    wide, high: features and rows, padded to multiples of their tiles. A barrier stands between writing and reading a page. The padding's
    gradient and thus its head stay 0.
    """
    task = tl.program_id(0).to(tl.int64)
    head, bias_page = ways * (width + 1), ways * wide
    errors += task * high * WAYS
    weight = state + task * 4 * page
    first_moment, second_moment, gradient = weight + page, weight + 2 * page, weight + 3 * page
    flat = tl.arange(0, BLOCK)
    for first in range(0, page, BLOCK):
        at = first + flat
        way, column = at // wide, at % wide
        way, column = tl.where(at < bias_page, way, at - bias_page), tl.where(at < bias_page, column, width)
        inside = (way < ways) & (column <= width) & ((column < width) | (at >= bias_page))
        w = tl.load(start + task * head + way * (width + 1) + column, mask=inside, other=0.0)
        tl.store(weight + at, w, mask=at < page)
        tl.store(first_moment + at, tl.zeros_like(w), mask=at < page)
        tl.store(second_moment + at, tl.zeros_like(w), mask=at < page)
    tl.debug_barrier()
    for segment in range(0, segments):  # `pick` walks along, a step at a time
        for step in range(segment * per_segment, (segment + 1) * per_segment):
            factor = 0.0
            if SAM:
                squares = _tiled_gradient(
                    weight, weight + bias_page, gradient, gradient + bias_page, factor, errors, features, labels, pick, sample_weight,
                    task, num_tasks, rows, high, width, wide, ways, weight_decay, False, PRECISION, BLOCK_ROWS, WAYS, TILE,
                )  # fmt: skip
                factor = rho / tl.maximum(tl.sqrt(squares), TINY)
            _tiled_gradient(
                weight, weight + bias_page, gradient, gradient + bias_page, factor, errors, features, labels, pick, sample_weight,
                task, num_tasks, rows, high, width, wide, ways, weight_decay, SAM, PRECISION, BLOCK_ROWS, WAYS, TILE,
            )  # fmt: skip
            rate, root = tl.load(scalars + 2 * step), tl.load(scalars + 2 * step + 1)
            for first in range(0, page, BLOCK):
                at = first + flat
                w, g = tl.load(weight + at, mask=at < page), tl.load(gradient + at, mask=at < page)
                m, v = tl.load(first_moment + at, mask=at < page), tl.load(second_moment + at, mask=at < page)
                w, m, v = adam_update(w, g, m, v, rate, root, keep_first, keep_second, eps)
                tl.store(weight + at, w, mask=at < page)
                tl.store(first_moment + at, m, mask=at < page)
                tl.store(second_moment + at, v, mask=at < page)
            tl.debug_barrier()
            if pick is not None:
                pick += num_tasks * rows
        kept = out + (task * segments + segment) * head
        for first in range(0, head, BLOCK):
            at = first + flat
            way, column = at // (width + 1), at % (width + 1)
            source = tl.where(column < width, way * wide + column, bias_page + way)
            tl.store(kept + at, tl.load(weight + source, mask=at < head), mask=at < head)


def head_blocks(rows: int, ways: int, width: int) -> tuple[int, int, int]:
    """BLOCK_ROWS, WAYS, WIDTH: 16 is the least a dot takes; 64 rows at a time leave registers for the state."""
    return (
        min(64, max(16, triton.next_power_of_2(rows))),
        max(16, triton.next_power_of_2(ways)),
        max(16, triton.next_power_of_2(width)),
    )


def fits(ways: int) -> bool:
    """Whether there is a kernel for heads of so many classes, of any number of features."""
    return ways <= MAX_WAYS


def tiles(padded_ways: int, rows: int, device: torch.device, precision: str) -> tuple[int, int, dict[str, int]]:
    """Rows and features at a time, and launch options: the most that do not spill (inspect.py)."""
    nvidia, exact = chip(device).capability > 0, precision == "ieee"
    few = padded_ways <= (32 if nvidia else 16)
    most = 64 if few and not exact else 32
    if not few and (exact or not nvidia):
        most = 16
    options = {"num_warps": 8, "num_stages": 1 if exact and not few else 2, **all_registers(device)}
    return min(most, head_blocks(rows, 1, 1)[0]), 64 if few and not exact else 32, options


def head_options(device: torch.device, precision: str) -> dict[str, int]:
    """One stage: features come from the L1. On Hopper's tensor cores 4 warps of 168 registers, so that three programs share a multiprocessor."""
    if precision == "ieee" or chip(device).capability < 90:
        return {"num_warps": 8, "num_stages": 1, **all_registers(device)}
    return {"num_warps": 4, "num_stages": 1, "maxnreg": 168}


@lru_cache(maxsize=8)
def _scalars(steps: int, learning_rate: float, device: torch.device) -> Tensor:
    """Adam's scalars of every step, float32 [M, 2]. They stay on the device: a CUDA graph of the launch reads them at every replay."""
    return torch.tensor([adam_scalars(step, learning_rate) for step in range(1, steps + 1)]).to(device)


def head_trajectory(
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    segments: int = 1,
    pick: Tensor | None = None,
    sample_weight: Tensor | None = None,
    *,
    out: Tensor | None = None,
    tiled: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """Train the heads of B tasks and keep theta_d … theta_M: heads.head_trajectory in one launch.

    Args:
        start: float32 [B, ways, F + 1], the Gaussian theta_0. features: [A, B, R, F], float32 or bfloat16. labels: int64 [B, R].
        config: steps M, learning rate, rho, weight decay. segments: k, a divisor of M.
        pick: int32 or int64 [M, B, R] in [0, A), the version of every row in every step; None: version 0.
        sample_weight: float32 [R], the share of each row in the loss; None: 1 / R.
        tiled: in tiles of features even where a program could keep the heads.

    Labels and picks are not range-checked: that would wait for the GPU.

    Returns:
        float32 [B, k, ways, F + 1]

    Raises:
        McdiError: naming the argument.
    """
    b, ways, _ = check_rank("start", start, "BWF")
    copies, _, rows, width = check_rank("features", features, "ABRF")
    device = start.device
    check_tensor("features", features, (copies, b, rows, width), device=device)
    check_tensor("start", start, (b, ways, width + 1), (torch.float32,))
    check_tensor("labels", labels, (b, rows), (torch.int64,), device)
    if segments < 1 or config.steps < 1 or config.steps % segments:
        raise McdiError(
            f"preparation steps M = {config.steps}: expected a positive multiple of the segments k = {segments}"
        )
    if pick is not None:
        check_tensor("pick", pick, (config.steps, b, rows), (torch.int32, torch.int64), device)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, (rows,), (torch.float32,), device)
    check_precision(precision)
    if not fits(ways):
        raise McdiError(f"start: heads of {ways} classes, expected at most {MAX_WAYS}; use heads.head_trajectory")
    block_rows, padded_ways, padded_width = head_blocks(rows, ways, width)
    out = output("out", out, (b, segments, ways, width + 1), device)
    given: dict[str, Any] = dict(
        start=start, features=features, labels=labels, pick=pick, sample_weight=sample_weight,
        scalars=_scalars(config.steps, config.learning_rate, device), out=out,
        **ADAM, rho=config.rho, weight_decay=config.weight_decay, num_tasks=b, rows=rows, width=width, ways=ways,
        segments=segments, per_segment=config.steps // segments,
        SAM=config.rho > 0, TINY=SAM_TINY, PRECISION=precision, BLOCK_ROWS=block_rows, WAYS=padded_ways,
    )  # fmt: skip
    if padded_ways * padded_width <= MAX_STATE and not tiled:
        options = head_options(device, precision)
        launch("head_trajectory", head_trajectory_kernel, (b,), device, options, WIDTH=padded_width, **given)
        return out
    block_rows, tile, options = tiles(padded_ways, rows, device, precision)
    wide, high = tile * triton.cdiv(width, tile), block_rows * triton.cdiv(rows, block_rows)
    page = ways * wide + padded_ways
    scratch = {"state": start.new_empty(b, 4, page), "errors": start.new_empty(b, padded_ways, high)}
    given |= {"wide": wide, "high": high, "page": page, "BLOCK_ROWS": block_rows, "TILE": tile, "BLOCK": 1024}
    launch("head_trajectory", tiled_trajectory_kernel, (b,), device, options, **scratch, **given)
    return out
