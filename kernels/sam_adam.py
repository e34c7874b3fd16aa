"""SAM's ascent and Adam's step for the parameters of B tasks, [B, P]. Same arithmetic as prepare.py, which is their reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_runs
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import check_tensor, element_block, on_device, output
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS, SAM_TINY, adam_step, sam_perturbation

sam_ascent_ref = sam_perturbation
adam_step_ref = adam_step

_FLOAT32 = (torch.float32,)


@triton.jit
def sam_kernel(theta, gradient, out, rho, count, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a task: its norm, then the ascent; the second pass finds the gradient in the cache."""
    start = tl.program_id(0).to(tl.int64) * count
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        g = tl.load(gradient + start + first + columns, mask=first + columns < count, other=0.0)
        total += g * g
    factor = rho / tl.maximum(tl.sqrt(tl.sum(total, 0)), TINY)
    for first in range(0, count, BLOCK):
        inside = first + columns < count
        at = start + first + columns
        g = tl.load(gradient + at, mask=inside)
        tl.store(out + at, tl.load(theta + at, mask=inside) + factor * g, mask=inside)


@triton.jit
def adam_update(theta, gradient, first, second, rate, root, KEEP_FIRST, KEEP_SECOND, EPS):
    """Adam on blocks: returns (theta, first, second). rate: rate / (1 - beta1^t). root: sqrt(1 - beta2^t). The others are 1 - beta."""
    first += KEEP_FIRST * (gradient - first)
    second += KEEP_SECOND * (gradient * gradient - second)
    return theta - rate * first / (tl.sqrt(second) / root + EPS), first, second


@triton.jit
def adam_kernel(
    theta, gradient, first, second, rate, root, keep_first, keep_second, eps, count, BLOCK: tl.constexpr
):  # fmt: skip
    """In place, every element read and written once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside)
    m, v = tl.load(first + at, mask=inside), tl.load(second + at, mask=inside)
    p = tl.load(theta + at, mask=inside)
    p, m, v = adam_update(p, g, m, v, rate, root, keep_first, keep_second, eps)
    tl.store(theta + at, p, mask=inside)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)


def sam_ascent(theta: Tensor, gradient: Tensor, rho: float, *, out: Tensor | None = None) -> Tensor:
    """theta_b + rho * g_b / max(||g_b||, tiny), one norm a task.

    Args:
        theta, gradient: float32 [B, ...], contiguous.

    Returns:
        [B, ...], in `out` where given (theta itself is allowed).

    Raises:
        McdiError: naming the tensor.
    """
    shape = tuple(theta.shape)
    if len(shape) < 2:
        raise McdiError(f"theta: shape {shape}, expected [B, ...]")
    check_tensor("theta", theta, shape, _FLOAT32)
    check_tensor("gradient", gradient, shape, _FLOAT32, theta.device)
    out = output("out", out, shape, theta.device)
    check_runs(theta.device, "sam_ascent")
    count = theta[0].numel()
    with on_device(theta.device):
        sam_kernel[(shape[0],)](theta, gradient, out, rho, count, SAM_TINY, element_block(count))
    return out


def adam_step_(theta: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: float, root: float) -> None:
    """One Adam step in place, with bias correction.

    Args:
        theta, gradient, first, second: float32, contiguous, of one shape. rate, root: of prepare.adam_scalars.

    Raises:
        McdiError: naming the tensor.
    """
    names = {"theta": theta, "gradient": gradient, "first": first, "second": second}
    for name, tensor in names.items():
        check_tensor(name, tensor, tuple(theta.shape), _FLOAT32, theta.device)
    check_runs(theta.device, "adam_step_")
    count = theta.numel()
    block = element_block(count)
    with on_device(theta.device):
        adam_kernel[(triton.cdiv(count, block),)](
            theta, gradient, first, second, rate, root, 1 - ADAM_BETAS[0], 1 - ADAM_BETAS[1], ADAM_EPS, count, block
        )
