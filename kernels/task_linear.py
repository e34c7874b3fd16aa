"""The denoiser's linear maps over all tasks, forward and backward, in the two forms of inner.py: `task_linear_ref` below.

Low rank: all tasks share W, and task b adds -inner_lr * sum_{r'} (rows_b A_{r'b}^T) G_{r'b} over the rows of its earlier inner steps.
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

from mcdi_fast.backend import check_precision
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import (
    BLOCK_COLUMNS,
    across,
    check_rank,
    check_tensor,
    dot,
    launch,
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
    pre_activation: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `task_linear`, in any dtype."""
    width_in, width_out = weight.shape[-2:]
    out = rows[..., :width_in] @ weight
    for keys, values in zip(*(earlier or ((), ())), strict=True):
        out = out - inner_lr * (rows @ keys.mT) @ values[..., :width_out]
    if add_to is not None:
        out = out + add_to
    if broadcast is not None:
        index = torch.arange(rows.shape[1], device=rows.device) // broadcast.divide % broadcast.rows.shape[1]
        out = out + broadcast.scale * broadcast.rows[:, index]
    if activation == "silu":
        return F.silu(out), out
    if activation == "silu_backward" and pre_activation is not None:
        sigmoid = torch.sigmoid(pre_activation)
        return out * sigmoid * (1 + pre_activation * (1 - sigmoid)), None
    return out, None


@triton.jit
def _rows_block(pointer, row_at, i, row_inside, width, EVEN: tl.constexpr):
    """[sum, rows]: entries i of rows that lie along the sum; unmasked along it where their width is EVEN."""
    if EVEN:
        return tl.load(pointer + (row_at + i[:, None]), mask=row_inside, other=0.0)
    return tl.load(pointer + (row_at + i[:, None]), mask=row_inside & (i < width)[:, None], other=0.0)


@triton.jit
def task_linear_kernel(
    rows, weight, keys, values, add_to, broadcast, pre_activation, out,
    inner_lr, broadcast_scale, num_tasks, num_rows, num_keys, width_in, width_out, row_width, value_width,
    weight_task, weight_in, weight_out, divide, modulo,
    ALONG: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (task, block of rows, block of columns) computes out^T = W^T rows^T: the weights' columns are the M of the product.

    ALONG: the weights lie along the sum. EVEN: row_width is a multiple of BLOCK_IN.
    """
    task = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    along_in = tl.arange(0, BLOCK_IN)
    row_inside, column_inside = row < num_rows, column < width_out
    # int64 for where a task's rows start, int32 within them (the launcher checks that they fit): half the registers for addresses
    my_rows, my_weight = rows + task * num_rows * row_width, weight + task * weight_task
    row_at, column_at = (row * row_width)[None, :], (column * weight_out)[:, None]

    result = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for first in range(0, row_width, BLOCK_IN):
        i = first + along_in
        w_at = my_weight + (column_at + (i * weight_in)[None, :])
        if ALONG and EVEN:  # the launcher has seen that the weights are as wide as the rows
            w = tl.load(w_at, mask=column_inside[:, None], other=0.0)
        else:
            w = tl.load(w_at, mask=column_inside[:, None] & (i < width_in)[None, :], other=0.0)
        if not ALONG:
            w = across(w, PRECISION)
        result = dot(w, _rows_block(my_rows, row_at, i, row_inside[None, :], row_width, EVEN), result, PRECISION)

    # scores^T = keys rows^T, a block of keys at a time, never stored; num_keys = earlier steps * num_rows
    if keys is not None:
        for first_key in range(0, num_keys, BLOCK_KEYS):
            key = first_key + tl.arange(0, BLOCK_KEYS)
            key_inside = key < num_keys
            stored_row = ((key // num_rows).to(tl.int64) * num_tasks + task) * num_rows + key % num_rows
            scores = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], tl.float32)
            for first in range(0, row_width, BLOCK_IN):
                i = first + along_in
                k_at = keys + stored_row[:, None] * row_width + i[None, :]
                if EVEN:
                    k = tl.load(k_at, mask=key_inside[:, None], other=0.0)
                else:
                    k = tl.load(k_at, mask=key_inside[:, None] & (i < row_width)[None, :], other=0.0)
                scores = dot(
                    k, _rows_block(my_rows, row_at, i, row_inside[None, :], row_width, EVEN), scores, PRECISION
                )
            v = tl.load(
                values + stored_row[None, :] * value_width + column[:, None],
                mask=key_inside[None, :] & column_inside[:, None], other=0.0,
            )  # fmt: skip
            result = dot(across(v, PRECISION), -inner_lr * scores, result, PRECISION)

    inside = column_inside[:, None] & row_inside[None, :]
    at = row[None, :] * width_out + column[:, None]
    if add_to is not None:
        result += tl.load(add_to + task * num_rows * width_out + at, mask=inside, other=0.0).to(tl.float32)
    if broadcast is not None:
        source = (row // divide % modulo)[None, :] * width_out + column[:, None]
        more = tl.load(broadcast + task * modulo * width_out + source, mask=inside, other=0.0)
        result += broadcast_scale * more.to(tl.float32)
    if ACTIVATION == "silu":
        tl.store(pre_activation + task * num_rows * width_out + at, result, mask=inside)
        result = result / (1 + tl.exp(-result))
    elif ACTIVATION == "silu_backward":
        a = tl.load(pre_activation + task * num_rows * width_out + at, mask=inside, other=0.0).to(tl.float32)
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
    pre_activation: Tensor | None = None,
    out: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Each task's rows times its weights, and what is fused behind it, in this order: + add_to, + broadcast, activation.

    Args:
        rows: [B, R, I or more]; columns behind I must be 0 (launch.PAD: then no copy needs a mask along the sum).
        weight: [I, O] for all tasks, or [B, I, O]; any strides, so a transposed view serves the backward.
        earlier: (keys [r, B, R, as rows], values [r, B, R, O or more]), the term -inner_lr * sum (rows keys^T) values; None or r = 0: none.
        add_to: [B, R, O]; `out` itself is allowed. broadcast: rows [B, modulo, O].
        activation: "silu" also returns what was before it; "silu_backward" multiplies by silu'(pre_activation).
        pre_activation: [B, R, O], read by "silu_backward", written by "silu".
        precision: of the products' operands: "ieee", "tf32" or "bf16". Sums are float32.

    Returns:
        out: float32 [B, R, O]. pre_activation: float32 [B, R, O] for "silu", else None.

    Raises:
        McdiError: naming the argument.
    """
    b, r, row_width = check_rank("rows", rows, "BRI")
    if weight.ndim not in (2, 3):
        raise McdiError(f"weight: shape {tuple(weight.shape)}, expected [I, O] or [B, I, O]")
    i, o = weight.shape[-2:]
    device = rows.device
    check_tensor("rows", rows, (b, r, max(row_width, i)))
    check_tensor("weight", weight, (i, o) if weight.ndim == 2 else (b, i, o), device=device, contiguous=False)
    check_precision(precision)
    if activation not in ACTIVATIONS:
        raise McdiError(f"activation = {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    if max(r * row_width, r * o, i * o) >= 2**31:
        raise McdiError(
            f"rows, weight: {r} rows a task of {i} -> {o}, expected fewer than 2^31 numbers a task and a weight"
        )
    keys = values = None
    num_keys = 0
    if earlier is not None and len(earlier[0]):
        keys, values = earlier
        check_tensor("keys", keys, (len(keys), b, r, row_width), device=device)
        check_tensor("values", values, (len(keys), b, r, max(o, values.shape[-1])), device=device)
        num_keys = len(keys) * r
    if add_to is not None:
        check_tensor("add_to", add_to, (b, r, o), device=device)
    modulo = 1
    if broadcast is not None:
        _, modulo, _ = check_rank("broadcast", broadcast.rows, "BmO")
        check_tensor("broadcast", broadcast.rows, (b, modulo, o), device=device)
    if activation == "silu_backward":
        if pre_activation is None:
            raise McdiError("pre_activation: None, expected what the forward's silu was given")
        check_tensor("pre_activation", pre_activation, (b, r, o), device=device)
    elif activation == "silu":
        pre_activation = output("pre_activation", pre_activation, (b, r, o), device)
    out = output("out", out, (b, r, o), device)
    block_rows, block_in = row_block(r), sum_block(precision)
    even = row_width % block_in == 0
    launch(
        "task_linear", task_linear_kernel, (b, triton.cdiv(r, block_rows), triton.cdiv(o, BLOCK_COLUMNS)), device,
        {"num_stages": stages(precision)},
        rows=rows, weight=weight, keys=keys, values=values, add_to=add_to, broadcast=broadcast.rows if broadcast else None,
        pre_activation=pre_activation if activation != "none" else None, out=out,
        inner_lr=inner_lr, broadcast_scale=broadcast.scale if broadcast else 1.0, num_tasks=b, num_rows=r, num_keys=num_keys,
        width_in=i, width_out=o, row_width=row_width, value_width=o if values is None else values.shape[-1],
        weight_task=weight.stride(0) if weight.ndim == 3 else 0, weight_in=weight.stride(-2), weight_out=weight.stride(-1),
        divide=broadcast.divide if broadcast else 1, modulo=modulo,
        ALONG=weight.stride(-2) == 1 and (i == row_width or not even), EVEN=even, ACTIVATION=activation, PRECISION=precision,
        BLOCK_OUT=BLOCK_COLUMNS, BLOCK_ROWS=block_rows, BLOCK_KEYS=BLOCK_COLUMNS, BLOCK_IN=block_in,
    )  # fmt: skip
    return out, pre_activation if activation == "silu" else None
