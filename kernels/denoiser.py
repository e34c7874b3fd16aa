"""The denoiser's linear maps over all tasks, forward and backward, in the two forms of inner.py.

Low rank: all tasks share W, and task b adds -eta * sum_{r'} (rows_b A_{r'b}^T) G_{r'b} over the rows of its earlier inner steps.
Stacked: every task has its own weights. The backward of either is the same product with A and G swapped and W transposed, so one
kernel does all four. What follows the product is fused: a residual, rows broadcast over samples or tokens, silu or its derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_precision, check_runs
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import (
    BLOCK_COLUMNS,
    check_rank,
    check_tensor,
    dot,
    on_device,
    output,
    row_block,
    stages,
    sum_block,
)

ACTIVATIONS = ("none", "silu", "silu_backward")


@dataclass(frozen=True)
class Broadcast:
    """Rows added to a product: row i of a task gets `scale * rows[b, (i // divide) % rows.shape[1]]`.

    divide = tokens for a row a sample, 1 for a row a token (rows of a task are [S, N]).
    """

    rows: Tensor
    divide: int = 1
    scale: float = 1.0


def task_linear_ref(
    rows: Tensor,
    weight: Tensor,
    earlier: tuple[Tensor, Tensor] | None = None,
    inner_lr: float = 0.0,
    *,
    add_to: Tensor | None = None,
    broadcast: Broadcast | None = None,
    activation: str = "none",
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `task_linear`, in any dtype."""
    out = rows @ weight
    for keys, values in zip(*(earlier or ((), ())), strict=True):
        out = out - inner_lr * (rows @ keys.mT) @ values
    if add_to is not None:
        out = out + add_to
    if broadcast is not None:
        index = torch.arange(rows.shape[1], device=rows.device) // broadcast.divide % broadcast.rows.shape[1]
        out = out + broadcast.scale * broadcast.rows[:, index]
    if activation == "silu":
        return F.silu(out), out
    if activation == "silu_backward" and before is not None:
        sigmoid = torch.sigmoid(before)
        return out * sigmoid * (1 + before * (1 - sigmoid)), None
    return out, None


@triton.jit
def task_linear_kernel(
    rows, weight, keys, values, add_to, broadcast, before, out,
    inner_lr, broadcast_scale, num_tasks, num_rows, num_keys, width_in, width_out,
    weight_task, weight_in, weight_out, divide, modulo,
    HAS_ADD: tl.constexpr, HAS_BROADCAST: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (task, block of rows, block of columns) computes out^T = W^T rows^T: the weights' columns are the M of the product."""
    task = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    along_in = tl.arange(0, BLOCK_IN)
    row_inside, column_inside = row < num_rows, column < width_out
    # int64 for where a task's rows start, int32 within them (the launcher checks that they fit): half the registers for addresses
    my_rows, my_weight = rows + task * num_rows * width_in, weight + task * weight_task
    row_at, column_at = (row * width_in)[None, :], (column * weight_out)[:, None]

    result = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for first in range(0, width_in, BLOCK_IN):
        i = first + along_in
        i_inside = i < width_in
        w = tl.load(
            my_weight + (column_at + (i * weight_in)[None, :]),
            mask=column_inside[:, None] & i_inside[None, :],
            other=0.0,
        )
        x = tl.load(my_rows + (row_at + i[:, None]), mask=row_inside[None, :] & i_inside[:, None], other=0.0)
        result = dot(w, x, result, PRECISION)

    # scores^T = keys rows^T, a block of keys at a time, never stored; num_keys = earlier steps * num_rows
    for first_key in range(0, num_keys, BLOCK_KEYS):
        key = first_key + tl.arange(0, BLOCK_KEYS)
        key_inside = key < num_keys
        stored_row = ((key // num_rows).to(tl.int64) * num_tasks + task) * num_rows + key % num_rows
        scores = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], tl.float32)
        for first in range(0, width_in, BLOCK_IN):
            i = first + along_in
            k = tl.load(
                keys + stored_row[:, None] * width_in + i[None, :],
                mask=key_inside[:, None] & (i < width_in)[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(my_rows + (row_at + i[:, None]), mask=row_inside[None, :] & (i < width_in)[:, None], other=0.0)
            scores = dot(k, x, scores, PRECISION)
        v = tl.load(
            values + stored_row[None, :] * width_out + column[:, None],
            mask=key_inside[None, :] & column_inside[:, None], other=0.0,
        )  # fmt: skip
        result = dot(v, -inner_lr * scores, result, PRECISION)

    inside = column_inside[:, None] & row_inside[None, :]
    at = row[None, :] * width_out + column[:, None]
    before += task * num_rows * width_out
    if HAS_ADD:
        result += tl.load(add_to + task * num_rows * width_out + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BROADCAST:
        source = (row // divide % modulo)[None, :] * width_out + column[:, None]
        more = tl.load(broadcast + task * modulo * width_out + source, mask=inside, other=0.0)
        result += broadcast_scale * more.to(tl.float32)
    if ACTIVATION == "silu":
        tl.store(before + at, result, mask=inside)
        result = result / (1 + tl.exp(-result))
    elif ACTIVATION == "silu_backward":
        a = tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-a))
        result = result * sigmoid * (1 + a * (1 - sigmoid))
    tl.store(out + task * num_rows * width_out + at, result, mask=inside)


def task_linear(
    rows: Tensor,
    weight: Tensor,
    earlier: tuple[Tensor, Tensor] | None = None,
    inner_lr: float = 0.0,
    *,
    add_to: Tensor | None = None,
    broadcast: Broadcast | None = None,
    activation: str = "none",
    before: Tensor | None = None,
    out: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Each task's rows times its weights, and what is fused behind it, in this order: + add_to, + broadcast, activation.

    Args:
        rows: [B, R, I]. weight: [I, O] for all tasks, or [B, I, O]; any strides, so a transposed view serves the backward.
        earlier: (keys [r, B, R, I], values [r, B, R, O]), the term -inner_lr * sum (rows keys^T) values; None or r = 0: none.
        add_to: [B, R, O]; `out` itself is allowed. broadcast: rows [B, modulo, O].
        activation: "silu" also returns what was before it; "silu_backward" multiplies by silu'(before).
        before: [B, R, O], read by "silu_backward", written by "silu".
        precision: of the products' operands: "ieee", "tf32" or "bf16". Sums are float32.

    Returns:
        out: float32 [B, R, O]. before: float32 [B, R, O] for "silu", else None.

    Raises:
        McdiError: naming the argument.
    """
    b, r, i = check_rank("rows", rows, "BRI")
    if weight.ndim not in (2, 3):
        raise McdiError(f"weight: shape {tuple(weight.shape)}, expected [I, O] or [B, I, O]")
    o, device = weight.shape[-1], rows.device
    check_tensor("rows", rows, (b, r, i))
    check_tensor("weight", weight, (i, o) if weight.ndim == 2 else (b, i, o), device=device, contiguous=False)
    check_precision(precision)
    if activation not in ACTIVATIONS:
        raise McdiError(f"activation = {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if max(r * i, r * o, i * o) >= 2**31:
        raise McdiError(
            f"rows, weight: {r} rows a task of {i} -> {o}, expected fewer than 2^31 numbers a task and a weight"
        )
    num_keys, keys, values = 0, rows, rows
    if earlier is not None and len(earlier[0]):
        keys, values = earlier
        check_tensor("keys", keys, (len(keys), b, r, i), device=device)
        check_tensor("values", values, (len(keys), b, r, o), device=device)
        num_keys = len(keys) * r
    if add_to is not None:
        check_tensor("add_to", add_to, (b, r, o), device=device)
    modulo = 1
    if broadcast is not None:
        _, modulo, _ = check_rank("broadcast", broadcast.rows, "BmO")
        check_tensor("broadcast", broadcast.rows, (b, modulo, o), device=device)
    if activation == "silu_backward":
        if before is None:
            raise McdiError("before: None, expected what the forward's silu was given")
        check_tensor("before", before, (b, r, o), device=device)
    elif activation == "silu":
        before = output("before", before, (b, r, o), device)
    out = output("out", out, (b, r, o), device)
    check_runs(device, "task_linear")
    block_rows = row_block(r)
    grid = (b, triton.cdiv(r, block_rows), triton.cdiv(o, BLOCK_COLUMNS))
    with on_device(device):
        task_linear_kernel[grid](
            rows, weight, keys, values, out if add_to is None else add_to, out if broadcast is None else broadcast.rows,
            out if before is None else before, out,
            inner_lr, broadcast.scale if broadcast else 1.0, b, r, num_keys, i, o,
            weight.stride(0) if weight.ndim == 3 else 0, weight.stride(-2), weight.stride(-1),
            broadcast.divide if broadcast else 1, modulo,
            add_to is not None, broadcast is not None, activation, precision,
            BLOCK_COLUMNS, block_rows, BLOCK_COLUMNS, sum_block(precision), num_stages=stages(precision),
        )  # fmt: skip
    return out, before if activation == "silu" else None
