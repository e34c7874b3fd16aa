"""Any torch module, or some of its parameters: the family for networks of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mcdi_fast.config import PrepareConfig
from mcdi_fast.optim import trajectory
from mcdi_fast.slots import call, find
from mcdi_fast.store import digest
from mcdi_fast.tasks import Data, Metric, Setup, TaskBatch, TaskFamily
from mcdi_fast.weights import WeightLayout

Net = Callable[..., Any]
_ONE_TOKEN = 2**16
"""Weights up to which a network is one token: the denoiser's outer matrices are then 64 MiB each at width 256."""


class ModuleFamily(TaskFamily):
    """Weights of a module, from its own initial weights as the common start of all tasks.

    >>> family = ModuleFamily(net, draw, lambda net, data: F.mse_loss(net(data["x"]), data["y"]))  # doctest: +SKIP
    >>> train(TrainConfig(dataset="mine"), family=family)  # doctest: +SKIP

    A common start keeps networks comparable: units that are permuted against each other have no mean.
    """

    def __init__(
        self,
        module: nn.Module,
        draw: Callable[[str, int, int, int], TaskBatch],
        loss: Callable[[Net, Data], Tensor],
        *,
        score: Callable[[Net, Data], Tensor] | None = None,
        metric: Metric = Metric(),  # noqa: B008 (a constant)
        select: Callable[[str], bool] | Sequence[str] | None = None,
        tokens: Literal["unit", "network"] | None = None,
        fingerprint: str = "",
    ):
        """Take the module's layout.

        Args:
            module: in eval mode if its norms should keep their running statistics. Parameters outside `select` stay as they are, for all tasks.
            draw: `TaskFamily.tasks`, called as draw(split, start, count, seed).
            loss, score: called as loss(net, data) with one task's data; net(x) is the module with that task's weights.
            select, tokens: as of `WeightLayout.from_module`; tokens None: "network" up to 65,536 weights. fingerprint: of the data.
        """
        self.module, self._draw, self._loss, self._score = module, draw, loss, score or loss
        self.metric = metric
        self.layout = WeightLayout.from_module(module, select, buffers=False, tokens=tokens or "network")
        if tokens is None and self.layout.width > _ONE_TOKEN:
            self.layout = WeightLayout.from_module(module, select, buffers=False)
        self._places = find(self.layout.shapes, module)
        self._initial = self.layout.pack(module).detach().float()
        self.fingerprint = fingerprint
        self._module_weights = digest(*module.state_dict().values())

    def provenance(self) -> dict[str, Any]:
        """With a digest of the module's weights as they were given: a bank of another start is another bank."""
        return {**super().provenance(), "module_weights": self._module_weights}

    def tasks(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        """Of `draw`."""
        return self._draw(split, start, count, seed)

    def net(self, theta: Tensor) -> Net:
        """The module with the weights theta [N, D], as a function."""
        weights = [(self._places[name], tensor) for name, tensor in self.layout.unpack(theta).items()]
        return lambda *inputs, **keywords: call(self.module, weights, inputs, keywords)

    def loss(self, theta: Tensor, data: Data) -> Tensor:
        """Of `loss`."""
        return self._loss(self.net(theta), data)

    def score(self, theta: Tensor, data: Data) -> Tensor:
        """Of `score`."""
        return self._score(self.net(theta), data)

    def start(self, count: int, config: PrepareConfig, generator: torch.Generator) -> Tensor:
        """The module's own weights, plus Gaussian noise of `start_std`."""
        return self._initial + super().start(count, config, generator)

    def _reptile(
        self, data: Callable[[int, int], Data], learning_rate: float, tasks: int, steps: int, setup: Setup
    ) -> None:
        """Meta-learn the start: Reptile (Nichol et al., 2018), all tasks of an outer step at once, ten steps of Adam each.

        data: of tasks `start` to `start + count - 1`. tasks: an outer step. steps: outer ones.
        """
        recipe, initial = PrepareConfig(steps=10, learning_rate=learning_rate, rho=0.0, weight_decay=0.0), self._initial

        def trained(start: Tensor, data: Data) -> Tensor:
            return trajectory(start, lambda theta, _: self.gradient(theta, data), recipe, 1)[:, -1]

        with setup.stage("start", steps, "steps") as bar:
            for step in range(steps):
                end = trained(initial.expand(tasks, -1, -1), data(step * tasks, tasks))
                initial = initial + (1 - step / steps) * (end.mean(0) - initial)
                bar.update()
        self._initial = initial
