"""Optimizer state as plain tensors, so that a checkpoint is one safetensors file and no pickle."""

from __future__ import annotations

import torch
from torch import Tensor

_PREFIX = "optimizer."


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The per-parameter state, named `optimizer.<index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{_PREFIX}{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take the optimizer's tensors out of `tensors` and load them; rates and the like stay as constructed."""
    state: dict[int, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.startswith(_PREFIX)]:
        index, name = key.removeprefix(_PREFIX).split(".", 1)
        state.setdefault(int(index), {})[name] = tensors.pop(key).clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
