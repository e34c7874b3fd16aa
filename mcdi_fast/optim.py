"""Adam, SAM, and the trajectory of any weights: all tasks at once, `[B, N, D]`. A leaf: it knows no task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mcdi_fast.config import PrepareConfig

SAM_TINY = 1e-12  # least norm: float32 squares of smaller entries underflow, and a norm of 0 must not make the step larger than rho
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, of every Adam here


def sam_perturbation(theta: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """theta_b + rho * g_b / (||g_b|| + tiny), one norm a task (method, section 3). theta, gradient: [B, ...]."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(SAM_TINY)
    return theta + (rho / norm).view(-1, *[1] * (theta.ndim - 1)) * gradient


def adam_scalars(step: int, rate: float) -> tuple[float, float]:
    """(rate / (1 - beta1^step), sqrt(1 - beta2^step)); `step` counts from 1. In double precision: in float32 1 - 0.999 has lost four digits."""
    return rate / (1 - ADAM_BETAS[0] ** step), (1 - ADAM_BETAS[1] ** step) ** 0.5


def adam_step(theta: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rate: float, root: float) -> None:
    """One Adam step in place, with bias correction. Same arithmetic as torch.optim.Adam. rate, root: of `adam_scalars`.

    The gradient is used up as scratch: for phi, fresh memory every time made an outer step 7 times slower (8.7 against 1.3 ms).
    """
    exp_avg.lerp_(gradient, 1 - ADAM_BETAS[0])
    exp_avg_sq.mul_(ADAM_BETAS[1]).addcmul_(gradient, gradient, value=1 - ADAM_BETAS[1])
    theta.addcdiv_(exp_avg, torch.sqrt(exp_avg_sq, out=gradient).div_(root).add_(ADAM_EPS), value=-rate)


@torch.no_grad()  # a module that is partly frozen leaves leaves that ask for gradients, which `out=` refuses
def trajectory(
    theta: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    config: PrepareConfig,
    segments: int,
    ascend: Callable[[Tensor, Tensor, float], Tensor] = sam_perturbation,
    update: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], None] = adam_step,
) -> Tensor:
    """Adam + SAM from theta_0, for the weights of B tasks at once; the local targets on the way (method, section 1).

    Args:
        theta: [B, N, D], the starts; not written to.
        gradient: called as gradient(theta, step), step from 0 to M - 1: [B, N, D], fresh memory, used up here. Called twice a step with SAM.
        config: steps M, learning rate, rho (0: plain Adam).
        segments: k, a divisor of M.
        ascend, update: other implementations of `sam_perturbation` and `adam_step` (kernels/sam_adam.py).

    Returns:
        [B, k, N, D]: theta_d, theta_2d, …, theta_kd = theta_M with d = M / k.
    """
    theta, kept = theta.clone(), []
    exp_avg, exp_avg_sq = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(config.steps):
        slope = gradient(theta, step)
        if config.rho > 0:
            slope = gradient(ascend(theta, slope, config.rho), step)
        update(theta, slope, exp_avg, exp_avg_sq, *adam_scalars(step + 1, config.learning_rate))
        if (step + 1) % (config.steps // segments) == 0:
            kept.append(theta.clone())
    return torch.stack(kept, 1)
