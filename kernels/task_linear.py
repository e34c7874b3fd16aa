"""The denoiser's linear maps over all tasks, forward and backward, in the two forms of inner.py: `task_linear_ref` below.

Low rank: all tasks share W, and task b adds -inner_lr * sum_{r'} (rows_b A_{r'b}^T) G_{r'b} over the rows of its earlier inner steps.
Stacked: every task has its own weights. The backward of either is the same product with A and G swapped and W transposed, so one
kernel does all four. What follows the product is fused: a residual, silu or its derivative, means over the tokens of a sample, the loss.
"""

from __future__ import annotations

from typing import NamedTuple

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
    all_registers,
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


MAX_TOKENS = 64
"""Of a mean: a program holds all tokens of a sample."""


class Residual(NamedTuple):
    """The loss of a product `net` of a task's rows, a sample's N tokens one behind the other: the mean over real entries of (gain net - target)^2.

    gain: float32 [B, S]. target: float32 [B, S, N, D]. mask: float32 [N, D], 1 at real entries; None: all are. real: how many ones it has, for
    counting them here would wait for the GPU. parts: float32 [B, `loss_parts`], written: their sum is a task's loss; None: made.
    """

    gain: Tensor
    target: Tensor
    mask: Tensor | None = None
    real: int | None = None
    parts: Tensor | None = None

    @property
    def share(self) -> float:
        """Of a real entry in the mean."""
        return 1 / (self.target.shape[1] * (self.real or self.target[0, 0].numel()))


def residual_loss_ref(net: Tensor, residual: Residual) -> tuple[Tensor, Tensor]:
    """The loss [B] of net [B, R, D or more] and its gradient, 2 gain (gain net - target) share, in any dtype; columns behind D are padding."""
    gain, target, mask, *_ = residual
    shape = *target.shape[:3], net.shape[-1]
    error = gain[..., None, None] * net.view(shape)[..., : target.shape[-1]] - target
    if mask is not None:
        error = error * mask
    gradient = F.pad(2 * residual.share * gain[..., None, None] * error, (0, shape[-1] - target.shape[-1]))
    return error.square().sum((1, 2, 3)) * residual.share, gradient.view_as(net)


def loss_parts(rows: int, columns: int) -> int:
    """Programs that share a task's loss."""
    return triton.cdiv(rows, row_block(rows)) * triton.cdiv(columns, BLOCK_COLUMNS)


def _mean_ref(rows: Tensor, tokens: int) -> Tensor:
    """To every row the mean of its sample's `tokens` rows."""
    per_token = rows.unflatten(1, (-1, tokens))
    return per_token.mean(2, keepdim=True).expand_as(per_token).flatten(1, 2)


def task_linear_ref(
    rows: Tensor,
    weight: Tensor,
    earlier: tuple[Tensor, Tensor] | None = None,
    inner_lr: float = 0.0,
    *,
    add_to: Tensor | None = None,
    activation: str = "none",
    pre_activation: Tensor | None = None,
    tokens: int = 0,
    fold: bool = False,
    mean_at: int = 0,
    residual: Residual | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `task_linear`, in any dtype; the loss in one part."""
    width_in, width_out = weight.shape[-2:]
    out = rows[..., :width_in] @ weight
    for keys, values in zip(*(earlier or ((), ())), strict=True):
        out = out - inner_lr * (rows @ keys.mT) @ values[..., :width_out]
    if fold:
        direct, of_means = out.chunk(2, -1)
        out = direct + _mean_ref(of_means, tokens)
    if add_to is not None:
        out = out + add_to[..., : out.shape[-1]]
    pre, out = out, F.silu(out) if activation == "silu" else out
    if activation == "silu_backward" and pre_activation is not None:
        sigmoid = torch.sigmoid(pre_activation)
        out = out * sigmoid * (1 + pre_activation * (1 - sigmoid))
    if mean_at:
        space = out.new_zeros(*out.shape[:-1], mean_at - out.shape[-1])
        out = torch.cat([out, space, _mean_ref(out, tokens)], -1)
    if residual is not None:
        loss, gradient = residual_loss_ref(out, residual)
        return gradient, loss[:, None]
    return out, pre if activation == "silu" else None


@triton.jit
def _rows_block(pointer, row_at, i, row_inside, width, EVEN: tl.constexpr):
    """[sum, rows]: entries i of rows that lie along the sum; unmasked along it where their width is EVEN."""
    if EVEN:
        return tl.load(pointer + (row_at + i[:, None]), mask=row_inside, other=0.0)
    return tl.load(pointer + (row_at + i[:, None]), mask=row_inside & (i < width)[:, None], other=0.0)


@triton.jit
def _product(
    rows, weight, keys, values, inner_lr, task, num_tasks, num_rows, num_keys, width_in, row_width, value_width,
    row_at, column_at, column, row_inside, column_inside, weight_in,
    ALONG: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_OUT, BLOCK_ROWS] = (W - inner_lr sum keys^T values)^T rows^T; rows, weight: where the task's begin."""
    along_in = tl.arange(0, BLOCK_IN)
    result = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    for first in range(0, row_width, BLOCK_IN):
        i = first + along_in
        w_at = weight + (column_at + (i * weight_in)[None, :])
        if ALONG and EVEN:  # the launcher has seen that the weights are as wide as the rows
            w = tl.load(w_at, mask=column_inside[:, None], other=0.0)
        else:
            w = tl.load(w_at, mask=column_inside[:, None] & (i < width_in)[None, :], other=0.0)
        if not ALONG:
            w = across(w, PRECISION)
        result = dot(w, _rows_block(rows, row_at, i, row_inside[None, :], row_width, EVEN), result, PRECISION)

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
                scores = dot(k, _rows_block(rows, row_at, i, row_inside[None, :], row_width, EVEN), scores, PRECISION)
            v = tl.load(
                values + stored_row[None, :] * value_width + column[:, None],
                mask=key_inside[None, :] & column_inside[:, None], other=0.0,
            )  # fmt: skip
            result = dot(across(v, PRECISION), -inner_lr * scores, result, PRECISION)
    return result


@triton.jit
def _means(value, tokens, rows):
    """To every column of `rows` the mean of its sample's `tokens` columns."""
    local = tl.arange(0, value.shape[1])
    found = tl.zeros_like(value)
    for first in range(0, rows, tokens):
        sample = ((local >= first) & (local < first + tokens))[None, :]
        found = tl.where(sample, (tl.sum(tl.where(sample, value, 0.0), 1) / tokens)[:, None], found)
    return found


@triton.jit
def task_linear_kernel(
    rows, weight, keys, values, add_to, pre_activation, gain, target, mask, loss, out,
    inner_lr, num_tasks, num_rows, num_keys, width_in, width_out, row_width, value_width, add_width, pre_width, out_width,
    weight_task, weight_in, weight_out, tokens, rows_a_program, mean_at, target_width, share,
    FOLD: tl.constexpr, MEANS: tl.constexpr, ALONG: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (task, block of rows, block of columns) computes out^T = W^T rows^T: the weights' columns are the M of the product.

    ALONG: the weights lie along the sum. EVEN: row_width is a multiple of BLOCK_IN. FOLD, MEANS: `rows_a_program` are whole samples.
    """
    task = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BLOCK_ROWS)
    row = tl.program_id(1) * rows_a_program + local
    column = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_inside, column_inside = (row < num_rows) & (local < rows_a_program), column < width_out
    # int64 for where a task's rows start, int32 within them (the launcher checks that they fit): half the registers for addresses
    my_rows, my_weight = rows + task * num_rows * row_width, weight + task * weight_task
    row_at, column_at = (row * row_width)[None, :], (column * weight_out)[:, None]
    if FOLD:
        result = _product(
            my_rows, my_weight + width_out * weight_out, keys, values + width_out if values is not None else None, inner_lr, task, num_tasks,
            num_rows, num_keys, width_in, row_width, value_width, row_at, column_at, column, row_inside, column_inside, weight_in,
            ALONG, EVEN, PRECISION, BLOCK_OUT, BLOCK_ROWS, BLOCK_KEYS, BLOCK_IN,
        )  # fmt: skip
        folded = _means(result, tokens, rows_a_program)
    result = _product(
        my_rows, my_weight, keys, values, inner_lr, task, num_tasks,
        num_rows, num_keys, width_in, row_width, value_width, row_at, column_at, column, row_inside, column_inside, weight_in,
        ALONG, EVEN, PRECISION, BLOCK_OUT, BLOCK_ROWS, BLOCK_KEYS, BLOCK_IN,
    )  # fmt: skip
    if FOLD:
        result += folded

    inside = column_inside[:, None] & row_inside[None, :]
    row = task * num_rows + row
    if add_to is not None:
        result += tl.load(add_to + row[None, :] * add_width + column[:, None], mask=inside, other=0.0).to(tl.float32)
    pre_at = row[None, :] * pre_width + column[:, None]
    if ACTIVATION == "silu":
        tl.store(pre_activation + pre_at, result, mask=inside)
        result = result / (1 + tl.exp(-result))
    elif ACTIVATION == "silu_backward":
        a = tl.load(pre_activation + pre_at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-a))
        result = result * sigmoid * (1 + a * (1 - sigmoid))
    if gain is not None:  # no atomics: a task's loss is the same to the bit whatever stands beside it
        real = inside & (column < target_width)[:, None]
        weight = tl.load(gain + row // tokens, mask=row_inside, other=0.0)[None, :]
        entry = row[None, :] * target_width + column[:, None]
        error = tl.where(real, weight * result - tl.load(target + entry, mask=real, other=0.0), 0.0)
        if mask is not None:
            error *= tl.load(mask + (row % tokens)[None, :] * target_width + column[:, None], mask=real, other=0.0)
        part = (task * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
        tl.store(loss + part, tl.sum(tl.sum(error * error, 1), 0) * share)
        result = 2.0 * share * weight * error
    at = out + row[None, :] * out_width + column[:, None]
    tl.store(at, result, mask=inside)
    if MEANS:
        tl.store(at + mean_at, _means(result, tokens, rows_a_program), mask=inside)


def task_linear(
    rows: Tensor,
    weight: Tensor,
    earlier: tuple[Tensor, Tensor] | None = None,
    inner_lr: float = 0.0,
    *,
    add_to: Tensor | None = None,
    activation: str = "none",
    pre_activation: Tensor | None = None,
    tokens: int = 0,
    fold: bool = False,
    mean_at: int = 0,
    residual: Residual | None = None,
    out: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor | None]:
    """Each task's rows times its weights, and what is fused behind it, in this order: fold, + add_to, activation, means or the loss.

    Args:
        rows: [B, R, I or more]; columns behind I must be 0 (launch.PAD: then no copy needs a mask along the sum).
        weight: [I, O] for all tasks, or [B, I, O]; any strides, so a transposed view serves the backward.
        earlier: (keys [r, B, R, as rows], values [r, B, R, O or more]), the term -inner_lr * sum (rows keys^T) values; None or r = 0: none.
        add_to: [B, R, O or more]; `out` itself is allowed.
        activation: "silu" also returns what was before it; "silu_backward" multiplies by silu'(pre_activation).
        pre_activation: [B, R, O or more], read by "silu_backward", written by "silu".
        tokens: rows of a sample, which fold and mean_at ask for; 64 at most, a divisor of R.
        fold: the weight has 2 O columns, and the second half of the product counts by its mean over the tokens of a sample.
        mean_at: where in `out` the means over the tokens of a sample begin, O at least; 0: none are written.
        residual: the product is a network's output: `out` is the gradient of its loss.
        precision: of the products' operands: "ieee", "tf32" or "bf16". Sums are float32.

    Returns:
        out: float32 [B, R, O or more]; columns that nothing is written to are 0, or as they were in the caller's. pre_activation: likewise for
            "silu"; with `residual` the parts of the loss instead; else None.

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
    if max(r * row_width, i * o) >= 2**31:
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
    wide = fold or mean_at > 0
    o //= 1 + fold
    if wide and (not 0 < tokens <= MAX_TOKENS or r % tokens or 0 < mean_at < o):
        raise McdiError(
            f"tokens = {tokens}, mean_at = {mean_at}: expected a divisor of {r} rows, at most {MAX_TOKENS}, and at least {o}"
        )

    def check(name: str, given: Tensor | None, width: int) -> Tensor:
        if given is None:
            return torch.zeros(b, r, width, device=device)
        check_tensor(name, given, (b, r, max(width, given.shape[-1])), device=device)
        return given

    if add_to is not None:
        check("add_to", add_to, o)
    if activation == "silu_backward" and pre_activation is None:
        raise McdiError("pre_activation: None, expected what the forward's silu was given")
    if activation != "none":
        pre_activation = check("pre_activation", pre_activation, o)
    if residual is not None:
        assert activation == "none" and not fold and not mean_at, "task_linear: a loss stands behind a plain product"  # noqa: PT018
        _, samples, tokens, target_width = check_rank("target", residual.target, "BSND")
        floats, real = (torch.float32,), residual.mask is None or residual.real
        check_tensor("target", residual.target, (b, samples, tokens, min(o, target_width)), floats, device)
        if samples * tokens != r:
            raise McdiError(f"target: {samples} x {tokens} rows a task, expected {r}")
        check_tensor("gain", residual.gain, (b, samples), floats, device)
        if residual.mask is not None:
            check_tensor("mask", residual.mask, (tokens, target_width), floats, device)
        assert real, "task_linear: a mask without its number of ones"
        residual = residual._replace(parts=output("parts", residual.parts, (b, loss_parts(r, o)), device))
    out = check("out", out, mean_at + o if mean_at else o)
    block_rows, block_in = row_block(r), sum_block(precision)
    rows_a_program = block_rows // tokens * tokens if wide else block_rows
    even = row_width % block_in == 0
    launch(
        "task_linear", task_linear_kernel, (b, triton.cdiv(r, rows_a_program), triton.cdiv(o, BLOCK_COLUMNS)), device,
        {"num_stages": stages(precision)} | (all_registers(device) if (wide or residual is not None) and precision == "ieee" else {}),
        rows=rows, weight=weight, keys=keys, values=values, add_to=add_to,
        pre_activation=pre_activation if activation != "none" else None, out=out,
        gain=residual and residual.gain, target=residual and residual.target, mask=residual and residual.mask,
        loss=residual and residual.parts, target_width=residual.target.shape[-1] if residual else 1, share=residual.share if residual else 1.0,
        inner_lr=inner_lr, num_tasks=b, num_rows=r, num_keys=num_keys,
        width_in=i, width_out=o, row_width=row_width, value_width=o if values is None else values.shape[-1],
        weight_task=weight.stride(0) if weight.ndim == 3 else 0, weight_in=weight.stride(-2), weight_out=weight.stride(-1),
        add_width=1 if add_to is None else add_to.shape[-1], out_width=out.shape[-1],
        pre_width=pre_activation.shape[-1] if pre_activation is not None and activation != "none" else 1,
        tokens=max(1, tokens), rows_a_program=rows_a_program, mean_at=mean_at, FOLD=fold, MEANS=mean_at > 0,
        ALONG=weight.stride(-2) == 1 and (i == row_width or not even), EVEN=even, ACTIVATION=activation, PRECISION=precision,
        BLOCK_OUT=BLOCK_COLUMNS, BLOCK_ROWS=block_rows, BLOCK_KEYS=BLOCK_COLUMNS, BLOCK_IN=block_in,
    )  # fmt: skip
    if residual is not None:
        return out, residual.parts
    return out, pre_activation if activation == "silu" else None
