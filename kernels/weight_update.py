"""Products of inputs and output gradients, `weight_grad` summed over rows: the Reptile delta of all layers, the SGD step of stacked weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_precision
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import (
    PAD,
    across,
    check_apart,
    check_rank,
    check_tensor,
    check_together,
    dot,
    launch,
    stages,
    sum_block,
)

BLOCK_IN, BLOCK_OUT = 32, 64
"""32 rows: with 64 Hopper's wgmma would be chosen, which reads tf32 along the sum alone; mma.sync takes both operands as they lie."""


def reptile_delta_ref(layers: Sequence[tuple[Tensor, Tensor, Tensor]], inner_lr: float) -> None:
    """As `reptile_delta_`, in any dtype."""
    for inputs, gradients, out in layers:
        a, g = (rows.flatten(0, -2)[:, :width] for rows, width in ((inputs, len(out)), (gradients, out.shape[1])))
        torch.mul(a.T @ g, -inner_lr / inputs.shape[1], out=out)


def sgd_step_ref(weights: Tensor, inputs: Tensor, gradients: Tensor, inner_lr: float) -> None:
    """As `sgd_step_`, in any dtype."""
    i, o = weights.shape[1:]
    weights.baddbmm_(inputs[..., :i].mT, gradients[..., :o], alpha=-inner_lr)


@triton.jit
def _weight_grad(
    inputs, gradients, out, scale, num_rows, first_in, first_out, width_in, width_out, input_width, gradient_width,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out[block] (+)= scale * inputs^T gradients over num_rows rows."""
    i, o = first_in + tl.arange(0, BLOCK_IN), first_out + tl.arange(0, BLOCK_OUT)
    result = tl.zeros([BLOCK_IN, BLOCK_OUT], tl.float32)
    for first in range(0, num_rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        # whole padded rows: a mask by the true widths would cut the copies
        a = tl.load(
            inputs + row[None, :] * input_width + i[:, None],
            mask=(row < num_rows)[None, :] & (i < input_width)[:, None], other=0.0,
        )  # fmt: skip
        g = tl.load(
            gradients + row[:, None] * gradient_width + o[None, :],
            mask=(row < num_rows)[:, None] & (o < gradient_width)[None, :], other=0.0,
        )  # fmt: skip
        result = dot(across(a, PRECISION), across(g, PRECISION), result, PRECISION)
    at = out + i[:, None] * width_out + o[None, :]
    inside = (i < width_in)[:, None] & (o < width_out)[None, :]
    result *= scale
    if ADD:
        result += tl.load(at, mask=inside, other=0.0)
    tl.store(at, result, mask=inside)


@triton.jit
def reptile_delta_kernel(
    inputs, gradients, out, table, inner_scale,
    PAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Program p: the block of a layer that row p of the table names. Offsets of rows and their widths count in PADs."""
    entry = table + tl.program_id(0) * 10
    input_at, gradient_at = tl.load(entry) * PAD, tl.load(entry + 1) * PAD
    _weight_grad(
        inputs + input_at, gradients + gradient_at, out + tl.load(entry + 2), inner_scale, tl.load(entry + 3),
        tl.load(entry + 4).to(tl.int32) * BLOCK_IN, tl.load(entry + 5).to(tl.int32) * BLOCK_OUT,
        tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8) * PAD, tl.load(entry + 9) * PAD,
        False, PRECISION, BLOCK_IN, BLOCK_OUT, BLOCK_ROWS,
    )  # fmt: skip


@triton.jit
def sgd_step_kernel(
    inputs, gradients, weights, scale, num_rows, width_in, width_out, input_width, gradient_width,
    PRECISION: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (task, block, block)."""
    task = tl.program_id(0).to(tl.int64)
    _weight_grad(
        inputs + task * num_rows * input_width, gradients + task * num_rows * gradient_width, weights + task * width_in * width_out,
        scale, num_rows, tl.program_id(1) * BLOCK_IN, tl.program_id(2) * BLOCK_OUT, width_in, width_out, input_width, gradient_width,
        True, PRECISION, BLOCK_IN, BLOCK_OUT, BLOCK_ROWS,
    )  # fmt: skip


def delta_table(layers: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """int64 [programs, 10], what each program of `reptile_delta_` does; on the layers' device. Build once: it is a copy that waits.

    Raises:
        McdiError: naming the layer and the tensor.
    """
    rows = []
    for name, tensors in zip(("inputs", "gradients", "out"), zip(*layers, strict=True), strict=True):
        check_together(f"{name} of the layers", tensors)
    named = [
        {f"layer {number} {name}": layer[at] for number, layer in enumerate(layers)}
        for at, name in enumerate(("inputs", "gradients", "out"))
    ]
    check_apart(named[2], named[0] | named[1])
    bases = [min(tensor.storage_offset() for tensor in tensors) for tensors in zip(*layers, strict=True)]
    for number, (inputs, gradients, out) in enumerate(layers):
        i, o = check_rank(f"layer {number} out", out, "IO")
        k, b, r, input_width = check_rank(f"layer {number} inputs", inputs, "KBRI")
        check_tensor(f"layer {number} inputs", inputs, (k, b, r, max(i, input_width)), device=out.device)
        check_tensor(f"layer {number} gradients", gradients, (k, b, r, max(o, gradients.shape[-1])), device=out.device)
        check_tensor(f"layer {number} out", out, (i, o), (torch.float32,))
        input_at, gradient_at, out_at = (
            t.storage_offset() - base for t, base in zip((inputs, gradients, out), bases, strict=True)
        )
        padded = (input_at, gradient_at, input_width, gradients.shape[-1])
        if any(value % PAD for value in padded):
            raise McdiError(f"layer {number}: offsets and widths {padded}, expected multiples of {PAD}")
        for block_in in range(triton.cdiv(i, BLOCK_IN)):
            for block_out in range(triton.cdiv(o, BLOCK_OUT)):
                at, widths = (
                    (input_at // PAD, gradient_at // PAD, out_at),
                    (input_width // PAD, gradients.shape[-1] // PAD),
                )
                rows.append((*at, k * b * r, block_in, block_out, i, o, *widths))
    return torch.tensor(rows).to(layers[0][2].device)


def reptile_delta_(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]], inner_lr: float, table: Tensor | None = None, *, precision: str = "ieee"
) -> None:  # fmt: skip
    """Mean over tasks of W_b - W after the K steps, for every layer: -inner_lr / B * sum over all rows of input^T gradient. One launch.

    The sum of a number runs over all rows in one program, in a fixed order: no atomics, the same bits every time.

    Args:
        layers: (inputs [K, B, R, I or more], what went into the layer; gradients [K, B, R, O or more], of what came out; out float32 [I, O]).
            The inputs of all layers lie in one storage, likewise the gradients and the outs, at offsets and widths that are multiples of PAD.
        table: of `delta_table`.

    Raises:
        McdiError: naming the tensor.
    """
    check_precision(precision)
    table = delta_table(layers) if table is None else table
    first = [min(tensors, key=lambda tensor: tensor.storage_offset()) for tensors in zip(*layers, strict=True)]
    launch(
        "reptile_delta_", reptile_delta_kernel, (len(table),), table.device, {"num_stages": stages(precision)},
        inputs=first[0], gradients=first[1], out=first[2], table=table, inner_scale=-inner_lr / layers[0][0].shape[1],
        PAD=PAD, PRECISION=precision, BLOCK_IN=BLOCK_IN, BLOCK_OUT=BLOCK_OUT, BLOCK_ROWS=sum_block(precision),
    )  # fmt: skip


def sgd_step_(weights: Tensor, inputs: Tensor, gradients: Tensor, inner_lr: float, *, precision: str = "ieee") -> None:
    """weights_b -= inner_lr * inputs_b^T gradients_b, in place.

    Args:
        weights: float32 [B, I, O]. inputs: [B, R, I or more]. gradients: [B, R, O or more].

    Raises:
        McdiError: naming the tensor.
    """
    b, i, o = check_rank("weights", weights, "BIO")
    _, r, input_width = check_rank("inputs", inputs, "BRI")
    check_tensor("weights", weights, (b, i, o), (torch.float32,))
    check_tensor("inputs", inputs, (b, r, max(i, input_width)), device=weights.device)
    check_tensor("gradients", gradients, (b, r, max(o, gradients.shape[-1])), device=weights.device)
    check_precision(precision)
    launch(
        "sgd_step_", sgd_step_kernel, (b, triton.cdiv(i, BLOCK_IN), triton.cdiv(o, BLOCK_OUT)), weights.device,
        {"num_stages": stages(precision)},
        inputs=inputs, gradients=gradients, weights=weights, scale=-inner_lr, num_rows=r, width_in=i, width_out=o,
        input_width=input_width, gradient_width=gradients.shape[-1],
        PRECISION=precision, BLOCK_IN=BLOCK_IN, BLOCK_OUT=BLOCK_OUT, BLOCK_ROWS=sum_block(precision),
    )  # fmt: skip
