"""Products of inputs and output gradients: the Reptile delta of a layer, and the SGD step of stacked weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_precision, check_runs
from mcdi_fast.kernels.launch import BLOCK_COLUMNS, check_rank, check_tensor, dot, on_device, output, sum_block


def reptile_delta_ref(inputs: Tensor, gradients: Tensor, inner_lr: float) -> Tensor:
    """As `reptile_delta`, in any dtype."""
    a, g = inputs.flatten(0, 2), gradients.flatten(0, 2)
    return (-inner_lr / inputs.shape[1]) * (a.T @ g)


def sgd_step_ref(weights: Tensor, inputs: Tensor, gradients: Tensor, inner_lr: float) -> Tensor:
    """As `sgd_step_`, but not in place, in any dtype."""
    return weights - inner_lr * inputs.mT @ gradients


@triton.jit
def outer_kernel(
    inputs, gradients, out, scale, total_rows, chunk, width_in, width_out,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (chunk c, block, block): out[c] (+)= scale * inputs^T gradients over rows c * chunk … (c + 1) * chunk - 1."""
    c = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_inside, o_inside = i < width_in, o < width_out
    start = c * chunk
    result = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
    for first in range(0, chunk, BLOCK_ROWS):
        within = first + tl.arange(0, BLOCK_ROWS)
        row = start + within
        row_inside = (within < chunk) & (row < total_rows)
        a = tl.load(
            inputs + row[None, :] * width_in + i[:, None], mask=row_inside[None, :] & i_inside[:, None], other=0.0
        )
        g = tl.load(
            gradients + row[:, None] * width_out + o[None, :], mask=row_inside[:, None] & o_inside[None, :], other=0.0
        )
        result = dot(a, g, result, PRECISION)
    at = out + (c * width_in + i[:, None]) * width_out + o[None, :]
    inside = i_inside[:, None] & o_inside[None, :]
    result *= scale
    if ADD:
        result += tl.load(at, mask=inside, other=0.0)
    tl.store(at, result, mask=inside)


def _launch(
    inputs: Tensor, gradients: Tensor, out: Tensor, scale: float, chunk: int, add: bool, precision: str
) -> None:
    width_in, width_out = inputs.shape[-1], gradients.shape[-1]
    grid = (len(out), triton.cdiv(width_in, BLOCK_COLUMNS), triton.cdiv(width_out, BLOCK_COLUMNS))
    with on_device(out.device):
        outer_kernel[grid](
            inputs, gradients, out, scale, inputs.numel() // width_in, chunk, width_in, width_out,
            add, precision, BLOCK_COLUMNS, BLOCK_COLUMNS, sum_block(precision),
        )  # fmt: skip


def delta_chunks(total_rows: int) -> int:
    """Into how many chunks the rows are split, so that a layer of 256 x 256 (16 blocks) fills a chip of about 130 multiprocessors."""
    return max(1, min(8, total_rows // 128))


def reptile_delta(
    inputs: Tensor, gradients: Tensor, inner_lr: float, *, out: Tensor | None = None, precision: str = "ieee"
) -> Tensor:
    """Mean over tasks of W_b - W after the K steps: -inner_lr / B * sum over all rows of input^T gradient.

    The chunks of rows are added by a second pass in a fixed order: no atomics, the same bits every time.

    Args:
        inputs: [K, B, R, I], what went into the layer. gradients: [K, B, R, O], of what came out. float32 or bfloat16.

    Returns:
        float32 [I, O]

    Raises:
        McdiError: naming the tensor.
    """
    k, b, r, i = check_rank("inputs", inputs, "KBRI")
    _, _, _, o = check_rank("gradients", gradients, "KBRO")
    check_tensor("inputs", inputs, (k, b, r, i))
    check_tensor("gradients", gradients, (k, b, r, o), device=inputs.device)
    check_precision(precision)
    out = output("out", out, (i, o), inputs.device)
    check_runs(inputs.device, "reptile_delta")
    chunks = delta_chunks(k * b * r)
    partial = out.unsqueeze(0) if chunks == 1 else out.new_empty(chunks, i, o)
    _launch(inputs, gradients, partial, -inner_lr / b, triton.cdiv(k * b * r, chunks), False, precision)
    return out if chunks == 1 else torch.sum(partial, 0, out=out)


def sgd_step_(weights: Tensor, inputs: Tensor, gradients: Tensor, inner_lr: float, *, precision: str = "ieee") -> None:
    """weights_b -= inner_lr * inputs_b^T gradients_b, in place.

    Args:
        weights: float32 [B, I, O]. inputs: [B, R, I]. gradients: [B, R, O].

    Raises:
        McdiError: naming the tensor.
    """
    b, i, o = check_rank("weights", weights, "BIO")
    _, r, _ = check_rank("inputs", inputs, "BRI")
    check_tensor("weights", weights, (b, i, o), (torch.float32,))
    check_tensor("inputs", inputs, (b, r, i), device=weights.device)
    check_tensor("gradients", gradients, (b, r, o), device=weights.device)
    check_precision(precision)
    check_runs(weights.device, "sgd_step_")
    _launch(inputs, gradients, weights, -inner_lr, r, True, precision)
