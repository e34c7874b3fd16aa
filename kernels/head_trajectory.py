"""Weight preparation in one launch, all M steps of Adam + SAM of N linear heads: `heads.head_trajectory`.

One program a task, and only the local targets are written. A task's features are read again every step and stay in the multiprocessor's L1
(100 rows x 64 are 26 kB a copy); heads, moments and gradients stay in registers for the whole training.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast import heads
from mcdi_fast.backend import check_precision
from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import all_registers, check_rank, check_tensor, chip, dot, launch, output
from mcdi_fast.kernels.sam_adam import adam_update
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS, SAM_TINY, adam_scalars

MAX_STATE = 8192
"""Padded ways x features a program can keep: 6 such float32 arrays (head, ascent, gradient, moments, sum) in 256 kB of registers."""


head_trajectory_ref = heads.head_trajectory


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
        label = tl.load(labels + at, mask=inside, other=-1)
        if pick is not None:
            copy = tl.load(pick + at, mask=inside, other=0).to(tl.int64)
            source = copy * num_tasks * rows + at
        else:
            source = at
        x = tl.load(
            features + source[:, None] * width + column[None, :],
            mask=inside[:, None] & (column < width)[None, :],
            other=0.0,
        ).to(tl.float32)
        logits = dot(x, tl.trans(weight), tl.zeros([BLOCK_ROWS, WAYS], tl.float32), PRECISION) + bias[None, :]
        logits = tl.where((way < ways)[None, :], logits, float("-inf"))
        p = tl.exp(logits - tl.max(logits, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None] - tl.where(way[None, :] == label[:, None], 1.0, 0.0)
        if sample_weight is not None:
            share = tl.load(sample_weight + row, mask=inside, other=0.0)
        else:
            share = tl.where(inside, 1.0 / rows, 0.0)
        p = tl.where(inside[:, None], p * share[:, None], 0.0)
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


def head_blocks(rows: int, ways: int, width: int) -> tuple[int, int, int]:
    """BLOCK_ROWS, WAYS, WIDTH: 16 is the least a dot takes; 64 rows at a time leave registers for the state."""
    return (
        min(64, max(16, triton.next_power_of_2(rows))),
        max(16, triton.next_power_of_2(ways)),
        max(16, triton.next_power_of_2(width)),
    )


def fits(ways: int, columns: int) -> bool:
    """Whether a program can hold heads of [ways, columns], columns = F + 1."""
    _, padded_ways, padded_width = head_blocks(1, ways, columns - 1)
    return padded_ways * padded_width <= MAX_STATE


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
    precision: str = "ieee",
) -> Tensor:
    """Train the heads of B tasks and keep theta_d … theta_M: heads.head_trajectory in one launch.

    Args:
        start: float32 [B, ways, F + 1], the Gaussian theta_0. features: [A, B, R, F], float32 or bfloat16. labels: int64 [B, R].
        config: steps M, learning rate, rho, weight decay. segments: k, a divisor of M.
        pick: int32 or int64 [M, B, R] in [0, A), the version of every row in every step; None: version 0.
        sample_weight: float32 [R], the share of each row in the loss; None: 1 / R.

    Labels and picks are not range-checked: that would wait for the GPU.

    Returns:
        float32 [B, k, ways, F + 1]

    Raises:
        McdiError: naming the argument.
    """
    b, ways, columns = check_rank("start", start, "BWF")
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
    block_rows, padded_ways, padded_width = head_blocks(rows, ways, width)
    if not fits(ways, columns):
        raise McdiError(
            f"start: heads of {ways} x {columns} (padded {padded_ways} x {padded_width}), expected at most {MAX_STATE} numbers, "
            "which a program can hold; use prepare.head_trajectory"
        )
    out = output("out", out, (b, segments, ways, width + 1), device)
    launch(
        "head_trajectory", head_trajectory_kernel, (b,), device, head_options(device, precision),
        start=start, features=features, labels=labels, pick=pick, sample_weight=sample_weight,
        scalars=_scalars(config.steps, config.learning_rate, device), out=out,
        rho=config.rho, weight_decay=config.weight_decay, keep_first=1 - ADAM_BETAS[0], keep_second=1 - ADAM_BETAS[1], eps=ADAM_EPS,
        num_tasks=b, rows=rows, width=width, ways=ways, segments=segments, per_segment=config.steps // segments,
        SAM=config.rho > 0, TINY=SAM_TINY, PRECISION=precision, BLOCK_ROWS=block_rows, WAYS=padded_ways, WIDTH=padded_width,
    )  # fmt: skip
    return out
