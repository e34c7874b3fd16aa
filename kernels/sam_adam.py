"""SAM's ascent and Adam's step for the parameters of B tasks, [B, P]: `optim.sam_perturbation` and `optim.adam_step`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import check_tensor, element_block, launch
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS, SAM_TINY, adam_step, sam_perturbation

sam_ascent_ref = sam_perturbation

_FLOAT32 = (torch.float32,)
ADAM = {"keep_first": 1 - ADAM_BETAS[0], "keep_second": 1 - ADAM_BETAS[1], "eps": ADAM_EPS}
"""Arguments of every kernel that calls `adam_update`."""


def adam_step_ref(
    theta: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rate: float, root: float
) -> None:
    """`optim.adam_step`, which uses the gradient up, on a copy of it."""
    adam_step(theta, gradient.clone(), exp_avg, exp_avg_sq, rate, root)


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
def adam_update(theta, gradient, exp_avg, exp_avg_sq, rate, root, KEEP_FIRST, KEEP_SECOND, EPS):
    """Adam on blocks: returns (theta, exp_avg, exp_avg_sq). rate: rate / (1 - beta1^t). root: sqrt(1 - beta2^t). The others are 1 - beta."""
    exp_avg += KEEP_FIRST * (gradient - exp_avg)
    exp_avg_sq += KEEP_SECOND * (gradient * gradient - exp_avg_sq)
    return theta - rate * exp_avg / (tl.sqrt(exp_avg_sq) / root + EPS), exp_avg, exp_avg_sq


@triton.jit
def adam_kernel(
    theta, gradient, exp_avg, exp_avg_sq, rate, root, keep_first, keep_second, eps, count, BLOCK: tl.constexpr
):  # fmt: skip
    """In place, every element read and written once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside)
    m, v = tl.load(exp_avg + at, mask=inside), tl.load(exp_avg_sq + at, mask=inside)
    p = tl.load(theta + at, mask=inside)
    p, m, v = adam_update(p, g, m, v, rate, root, keep_first, keep_second, eps)
    tl.store(theta + at, p, mask=inside)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)


def sam_ascent(theta: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """theta_b + rho * g_b / max(||g_b||, tiny), one norm a task.

    Args:
        theta, gradient: float32 [B, ...], contiguous.

    Returns:
        [B, ...]

    Raises:
        McdiError: naming the tensor.
    """
    shape = tuple(theta.shape)
    if len(shape) < 2:
        raise McdiError(f"theta: shape {shape}, expected [B, ...]")
    check_tensor("theta", theta, shape, _FLOAT32)
    check_tensor("gradient", gradient, shape, _FLOAT32, theta.device)
    out, count = torch.empty_like(theta), theta[0].numel()
    launch(
        "sam_ascent", sam_kernel, (shape[0],), theta.device, None,
        theta=theta, gradient=gradient, out=out, rho=rho, count=count, TINY=SAM_TINY, BLOCK=element_block(count),
    )  # fmt: skip
    return out


def adam_step_(theta: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rate: float, root: float) -> None:
    """One Adam step in place, with bias correction.

    Args:
        theta, gradient, exp_avg, exp_avg_sq: float32, contiguous, of one shape. rate, root: of `optim.adam_scalars`.

    Raises:
        McdiError: naming the tensor.
    """
    names = {"theta": theta, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in names.items():
        check_tensor(name, tensor, tuple(theta.shape), _FLOAT32, theta.device)
    count = theta.numel()
    block = element_block(count)
    launch(
        "adam_step_", adam_kernel, (triton.cdiv(count, block),), theta.device, None,
        **names, **ADAM, rate=rate, root=root, count=count, BLOCK=block,
    )  # fmt: skip
