"""What both chains share: the folded matrices, padded; their reference, `diffusion.sample_chain` over `denoiser.FoldedDenoiser`; the checks."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdi_fast.backend import check_precision
from mcdi_fast.denoiser import FoldedDenoiser
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import FLOATS, check_rank, check_tensor, padded


@dataclass(frozen=True)
class ChainWeights:
    """The matrices of `FoldedDenoiser`, every width padded with zeros to a multiple of launch.PAD: D', H', C'. Build once, by `pack_weights`.

    Attributes:
        token, sample: [R, H'], the L matrices [D' + l H', H'] of each below each other. step: [L, T, H']. last: [D' + L H', D'].
        condition: [C', L H' + D']. condition_mean: [C', L H'].
    """

    token: Tensor
    sample: Tensor
    step: Tensor
    last: Tensor
    condition: Tensor
    condition_mean: Tensor


def _sections(matrix: Tensor, rows: list[int], columns: list[int]) -> Tensor:
    """The matrix with each of its sections of rows and columns padded."""

    def pad(part: Tensor) -> Tensor:
        high, wide = part.shape
        return F.pad(part, (0, padded(wide) - wide, 0, padded(high) - high))

    return torch.cat([torch.cat([pad(part) for part in strip.split(columns, 1)], 1) for strip in matrix.split(rows)])


def pack_weights(folded: FoldedDenoiser, dtype: torch.dtype = torch.float32) -> ChainWeights:
    """As float32 or bfloat16 (half the bytes to stream; pair it with precision="bf16")."""
    if dtype not in FLOATS:
        raise McdiError(f"dtype: {dtype}, expected {' or '.join(map(str, FLOATS))}")
    depth, h, d, c = len(folded.token), folded.width, folded.token_width, len(folded.condition_token)
    rows = [[d] + [h] * layer for layer in range(depth + 1)]
    step = [F.pad(torch.cat(rows_of), (0, padded(h) - h)) for rows_of in folded.step_rows]
    parts = (
        torch.cat([_sections(matrix, rows[layer], [h]) for layer, matrix in enumerate(folded.token)]),
        torch.cat([_sections(matrix, rows[layer], [h]) for layer, matrix in enumerate(folded.sample)]),
        torch.stack(step),
        _sections(functools.reduce(torch.mm, (factor.double() for factor in folded.last)), rows[depth], [d]),
        _sections(folded.condition_token, [c], [h] * depth + [d]),
        _sections(folded.condition_mean, [c], [h] * depth),
    )
    return ChainWeights(*(part.detach().to(dtype).contiguous() for part in parts))


def run_chain_ref(
    weights: ChainWeights, x: Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor, mask: Tensor | None = None
) -> Tensor:
    """As `run_chain`, in any dtype."""
    depth, _, h = weights.step.shape
    d, c, wide = x.shape[-1], condition.shape[-1], weights.last.shape[1]
    cond_bias = condition @ weights.condition[:c]
    cond_bias[..., : depth * h] += condition.mean(1, keepdim=True) @ weights.condition_mean[:c]
    sizes = [wide + layer * h for layer in range(depth)]
    token, sample = weights.token.split(sizes), weights.sample.split(sizes)
    for t, (keep_x, keep_f, move) in zip(steps.tolist(), coefficients.tolist(), strict=True):
        columns = F.pad(x, (0, wide - d))
        for layer in range(depth):
            a = columns @ token[layer] + columns.mean(1, keepdim=True) @ sample[layer] + weights.step[layer, t]
            columns = torch.cat([columns, F.silu(a + cond_bias[..., layer * h : (layer + 1) * h])], -1)
        net = (columns @ weights.last + cond_bias[..., depth * h :])[..., :d]
        f = keep_f * x + move * net
        x = keep_x * x + (f if mask is None else f * mask)
    return x


def check_chain(
    weights: ChainWeights, x: Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor, mask: Tensor | None, precision: str
) -> None:  # fmt: skip
    """Raise McdiError, naming the tensor, unless these are the arguments of a chain."""
    b, n, d = check_rank("x", x, "BND")
    depth, num_rows, h = check_rank("weights.step", weights.step, "LTH")
    c, wide = condition.shape[-1], padded(d)
    device, dtype = x.device, (weights.step.dtype,)
    check_tensor("x", x, (b, n, d), (torch.float32,))
    check_tensor("condition", condition, (b, n, c), device=device)
    check_tensor("steps", steps, (len(steps),), (torch.int64,), device)
    check_tensor("coefficients", coefficients, (len(steps), 3), (torch.float32,), device)
    if mask is not None:
        check_tensor("mask", mask, (n, d), (torch.float32,), device)
    check_tensor("weights.step", weights.step, (depth, num_rows, padded(h)), device=device)
    rows, every = depth * wide + depth * (depth - 1) // 2 * h, depth * h
    for name, shape in {
        "token": (rows, h), "sample": (rows, h), "last": (wide + every, wide),
        "condition": (padded(c), every + wide), "condition_mean": (padded(c), every),
    }.items():  # fmt: skip
        check_tensor(f"weights.{name}", getattr(weights, name), shape, dtype, device)
    check_precision(precision)
