"""The linear classification head of a task: what the main job generates. [ways, F + 1], a row a class: its weights, then its bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mcdi_fast.weights import WeightLayout


def head_layout(ways: int, features: int) -> WeightLayout:
    """Layout of `nn.Linear(features, ways)`: a token a class, N = ways, D = features + 1."""
    return WeightLayout.from_module(nn.Linear(features, ways))


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
    head: Tensor, features: Tensor, labels: Tensor, weight_decay: float = 0.0, row_weight: Tensor | None = None
) -> Tensor:
    """Gradient of the mean cross-entropy + weight_decay / 2 ||head||^2 of linear heads, by hand.

    Args:
        head: [B, ways, F + 1]. features: [B, R, F]. labels: int64 [B, R].
        row_weight: [R], the share of each row in the mean; equal shares by default.

    Returns:
        [B, ways, F + 1]
    """
    p = head_logits(head, features).softmax(-1)
    p.scatter_add_(-1, labels.unsqueeze(-1), p.new_full((), -1.0).expand(*labels.shape, 1))
    if row_weight is None:
        p.div_(features.shape[1])
    else:
        p.mul_(row_weight.unsqueeze(-1))
    return torch.cat([p.mT @ features, p.sum(1).unsqueeze(-1)], -1).add_(head, alpha=weight_decay)


def head_accuracy(head: Tensor, query: Tensor) -> Tensor:
    """Share of query images each task gets right: [B, ways, F + 1], [B, ways, Q, F] -> float32 [B]."""
    label = torch.arange(query.shape[1], device=query.device).repeat_interleave(query.shape[2])
    return (head_logits(head, query.flatten(1, 2)).argmax(-1) == label).float().mean(1)


def head_loss(head: Tensor, query: Tensor) -> Tensor:
    """Mean cross-entropy of each task: [B, ways, F + 1], [B, ways, Q, F] -> [B]."""
    label = torch.arange(query.shape[1], device=query.device).repeat_interleave(query.shape[2])
    log_p = head_logits(head, query.flatten(1, 2)).log_softmax(-1)
    return -log_p.gather(-1, label.expand(len(head), -1).unsqueeze(-1)).mean((1, 2))
