"""The linear classification head of a task: what the main job generates. [ways, F + 1], a row a class: its weights, then its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mcdi_fast.config import PrepareConfig
from mcdi_fast.optim import trajectory
from mcdi_fast.weights import WeightLayout


def head_layout(ways: int, features: int) -> WeightLayout:
    """Layout of `nn.Linear(features, ways)`: a token a class, N = ways, D = features + 1; classes are exchangeable."""
    return WeightLayout.from_module(nn.Linear(features, ways), exchangeable=True)


def prototype_head(support: Tensor) -> Tensor:
    """The head that picks the nearest class mean p: weights p, bias -||p||^2 / 2. [B, ways, shots, F] -> [B, ways, F + 1]."""
    prototype = support.mean(-2)
    return torch.cat([prototype, -0.5 * prototype.square().sum(-1, keepdim=True)], -1)


def support_condition(support: Tensor) -> Tensor:
    """What the generator is told of a task, the prototype head: [B, ways, shots, F] -> [B, ways, F + 1].

    The squared norm is worth saying: a network that has to find it by itself makes heads of 98.3 instead of 98.4 % (validation).
    """
    return prototype_head(support)


def head_logits(head: Tensor, features: Tensor) -> Tensor:
    """[B, ways, F + 1], [B, R, F] -> [B, R, ways]."""
    return torch.baddbmm(head[..., None, :, -1], features, head[..., :-1].mT)


def head_gradient(
    head: Tensor, features: Tensor, labels: Tensor, weight_decay: float = 0.0, sample_weight: Tensor | None = None
) -> Tensor:
    """Gradient of the mean cross-entropy + weight_decay / 2 ||head||^2 of linear heads, by hand.

    Args:
        head: [B, ways, F + 1]. features: [B, R, F]. labels: int64 [B, R].
        sample_weight: [R], the share of each row in the mean; equal shares by default.

    Returns:
        [B, ways, F + 1]
    """
    p = head_logits(head, features).softmax(-1)
    p.scatter_add_(-1, labels.unsqueeze(-1), p.new_full((), -1.0).expand(*labels.shape, 1))
    if sample_weight is None:
        p.div_(features.shape[1])
    else:
        p.mul_(sample_weight.unsqueeze(-1))
    return torch.cat([p.mT @ features, p.sum(1).unsqueeze(-1)], -1).add_(head, alpha=weight_decay)


def head_trajectory(
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    segments: int = 1,
    pick: Tensor | None = None,
    sample_weight: Tensor | None = None,
    base: tuple[Tensor, Tensor] | None = None,
    **steps: Any,
) -> Tensor:
    """`optim.trajectory` of B linear heads with the gradient by hand; every random draw is made beforehand.

    Args:
        start: [B, ways, F + 1]. features: [A, B, R, F], A versions of each row. labels: int64 [B, R] in [0, ways).
        segments: k, a divisor of config.steps M.
        pick: integer [M, B, R] in [0, A): the version of every row in every step; version 0 by default.
        sample_weight: [R], the share of each row in the loss, summing to 1; equal shares by default.
        base: (base [B, ways, F + 1], trust [B, 1, 1]): the head is base + trust * theta; theta itself by default.
        steps: `ascend` and `update` of `optim.trajectory`.

    Returns:
        [B, k, ways, F + 1]
    """
    picked = None if pick is None else torch.empty_like(features[:1])  # once: fresh rows cost page faults in every step

    def gradient(theta: Tensor, step: int) -> Tensor:
        x = features[0]
        if pick is not None:
            x = torch.gather(features, 0, pick[step, None, :, :, None].long().expand(1, *x.shape), out=picked)[0]
        if base is None:
            return head_gradient(theta, x, labels, config.weight_decay, sample_weight)
        about, trust = base
        slope = head_gradient(about + trust * theta, x, labels, 0.0, sample_weight)
        return slope.mul_(trust).add_(theta, alpha=config.weight_decay)

    return trajectory(start, gradient, config, segments, **steps)


def head_by_adam(support: Tensor, steps: int, lr: float, decay: float) -> Tensor:
    """Logistic regression by Adam from zero: [B, ways, shots, F] -> [B, ways, F + 1]."""
    ways, shots = support.shape[1:3]
    x = support.flatten(1, 2)
    labels = torch.arange(ways, device=x.device).repeat_interleave(shots).expand(len(x), -1)
    recipe = PrepareConfig(steps=steps, learning_rate=lr, rho=0.0, weight_decay=decay)
    return head_trajectory(x.new_zeros(len(x), ways, x.shape[2] + 1), x[None], labels, recipe)[:, -1]


def head_accuracy(head: Tensor, query: Tensor, labels: Tensor | None = None) -> Tensor:
    """Share of query images each task gets right: float32 [B].

    Args:
        head: [B, ways, F + 1]. query: features [B, ways, Q, F], class after class; or [B, R, F] in any order, with labels int64 [B, R].
    """
    if labels is None:
        labels = torch.arange(query.shape[1], device=query.device).repeat_interleave(query.shape[2])
        query = query.flatten(1, 2)
    return (head_logits(head, query).argmax(-1) == labels).float().mean(1)
