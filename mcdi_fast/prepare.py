"""Weight preparation: the trajectories of many classification heads at once, by Adam + SAM from Gaussian starts."""

from __future__ import annotations

import torch
from torch import Tensor

from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError


def sam_perturbation(theta: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """theta_b + rho * g_b / (||g_b|| + tiny), one norm a task (method, section 3). theta, gradient: [B, ...]."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return theta + (rho / norm).view(-1, *[1] * (theta.ndim - 1)) * gradient


def adam_step(
    theta: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float, betas=(0.9, 0.999), eps=1e-8
) -> None:
    """One Adam step in place, with bias correction; `step` counts from 1. Same arithmetic as torch.optim.Adam."""
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = second.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    theta.addcdiv_(first, denominator, value=-rate / (1 - betas[0] ** step))


def head_gradient(head: Tensor, features: Tensor, labels: Tensor, weight_decay: float = 0.0) -> Tensor:
    """Gradient of the mean cross-entropy + weight_decay / 2 ||head||^2 of linear heads, by hand.

    Args:
        head: [B, ways, F + 1], a row a class: its weights, then its bias. features: [B, R, F]. labels: int64 [B, R].

    Returns:
        [B, ways, F + 1]
    """
    rows = features.shape[1]
    logits = torch.baddbmm(head[..., None, :, -1], features, head[..., :-1].mT)
    p = logits.softmax(-1)
    p.scatter_add_(-1, labels.unsqueeze(-1), p.new_full((), -1.0).expand(*labels.shape, 1))
    p.div_(rows)
    return torch.cat([p.mT @ features, p.sum(1).unsqueeze(-1)], -1).add_(head, alpha=weight_decay)


def train_heads(
    features: Tensor, labels: Tensor, config: PrepareConfig, generator: torch.Generator, ways: int, *, record: int = 1
) -> Tensor:
    """Train the heads of B tasks together: the weight-preparation stage.

    Args:
        features: float [A, B, R, F], A augmented copies of each task's R rows; every step picks one of them a row.
        labels: int64 [B, R] in [0, ways).
        config: steps M, learning rate, rho (0: plain Adam, one gradient a step), start deviation.
        generator: draws the Gaussian start and the copies.
        record: k; the heads after steps d, 2d, …, kd = M are kept, d = M / k.

    Returns:
        [B, k, ways, F + 1], the local targets theta_d … theta_M.

    Raises:
        McdiError: k does not divide M; features that are not finite.
    """
    if record < 1 or config.steps % record:
        raise McdiError(
            f"preparation steps M = {config.steps} are not divisible by the segments k = {record}: raise M to {-(-config.steps // max(record, 1)) * record}"
        )
    if not features.isfinite().all():
        raise McdiError(
            "preparation features: found NaN or infinity, expected finite numbers; look at the backbone that made them"
        )
    copies, num_tasks, rows, width = features.shape
    theta = torch.randn(num_tasks, ways, width + 1, generator=generator, dtype=features.dtype) * config.start_deviation
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    kept = []
    for step in range(1, config.steps + 1):
        x = features[0]
        if copies > 1:
            pick = torch.randint(copies, (num_tasks, rows, 1), generator=generator)
            x = features.gather(0, pick.expand(num_tasks, rows, width).unsqueeze(0))[0]
        gradient = head_gradient(theta, x, labels, config.weight_decay)
        if config.rho > 0:
            gradient = head_gradient(sam_perturbation(theta, gradient, config.rho), x, labels, config.weight_decay)
        adam_step(theta, gradient, first, second, step, config.learning_rate)
        if step % (config.steps // record) == 0:
            kept.append(theta.clone())
    return torch.stack(kept, 1)
