"""Generated weights of many tasks, as tokens `[B, N, D]`, and how they get into modules and files."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcdi_fast.errors import McdiError
from mcdi_fast.peft_files import save_adapter
from mcdi_fast.slots import assign, call_tasks, find, tensor_of
from mcdi_fast.weights import WeightLayout


def _index(i: Any) -> int:
    try:
        return operator.index(i)
    except TypeError:
        raise McdiError(f"task {i!r:.40}: {type(i).__name__}, expected an integer") from None


@dataclass(frozen=True, eq=False)
class GeneratedWeights:
    """Weights of B modules.

    Attributes:
        layout: how they lie.
        tokens: [B, N, D], floating point.

    Raises:
        McdiError: on construction, for tokens of another shape.
    """

    layout: WeightLayout
    tokens: Tensor

    def __post_init__(self) -> None:
        """Check the shape."""
        tokens = tensor_of(self.tokens)
        object.__setattr__(self, "tokens", tokens)
        self.layout.check_tokens(tokens)
        if tokens.ndim != 3 or not tokens.is_floating_point():
            raise McdiError(
                f"tokens: {tokens.dtype} of shape {list(tokens.shape)}, expected floating point [B, N, D]; "
                "stack one task's tokens by tokens[None]"
            )

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)

    def __getitem__(self, i: int | slice) -> Any:
        """Task i's `state_dict` (a negative i counts from the end), or GeneratedWeights of a slice."""
        if isinstance(i, slice):
            return GeneratedWeights(self.layout, self.tokens[i])
        i = _index(i)
        return self.state_dict(i + len(self) if i < 0 else i)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Each task's parameters in turn."""
        return (self.state_dict(i) for i in range(len(self)))

    def _tensors(self, tokens: Tensor) -> dict[str, Tensor]:
        """Parameters and buffers by name. A generated variance may fall below 0, and a batch norm takes its root."""
        return {
            name: tensor.clamp_min(0) if name.endswith("running_var") else tensor
            for name, tensor in self.layout.unpack(tokens).items()
        }

    def _task(self, i: int) -> dict[str, Tensor]:
        i = _index(i)
        if not 0 <= i < len(self):
            raise McdiError(
                f"task {i}: out of range, expected 0 to {len(self) - 1} ({len(self)} tasks); give one of these"
            )
        return self._tensors(self.tokens[i].detach())

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """Task i's parameters by name: copies of their own, detached, in the tokens' dtype, on their device.

        Only the parameters of the layout: load it with `strict=False` where the module has more, or use `load_into`.
        """
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self._task(i).items()}

    def save_peft(self, folder: str | os.PathLike[str], i: int, config: Any) -> None:
        """Write task i's adapter as peft does: `peft.PeftModel.from_pretrained(base_model, folder)` loads it.

        Args:
            folder: made with those above it; gets `adapter_model.safetensors` and `adapter_config.json`.
            i: the task.
            config: the `peft.LoraConfig` of the layout's module (`model.peft_config["default"]`), or the dict of another
                adapter's `adapter_config.json`.

        Raises:
            McdiError: i out of range; another config; a file that cannot be written.
        """
        save_adapter(folder, self._task(i), config)

    def load_into(self, module: nn.Module, i: int, prefix: str = "") -> None:
        """Copy task i's weights into the module's parameters, in place, in each parameter's dtype and device.

        A parameter on the meta device (`torch.device("meta")`, accelerate's `init_empty_weights`) is replaced by one on
        the tokens' device.

        Args:
            module: of the layout's architecture; also one that DataParallel or `torch.compile` wraps.
            i: the task.
            prefix: dotted name of the submodule that the layout is of, such as "fc" for a network's head.

        Raises:
            McdiError: i out of range; a parameter missing or of another shape. Then the module is unchanged.
        """
        tensors = self._task(i)
        places = find(self.layout.shapes, module, prefix)
        with torch.no_grad():
            for name, tensor in tensors.items():
                assign(places[name], tensor)

    def functional_call(
        self, module: nn.Module, args: Any, kwargs: Mapping[str, Any] | None = None, prefix: str = ""
    ) -> Any:
        """The module's outputs for all B tasks at once, each with its own weights; the module is left as it is.

        What `torch.vmap` cannot run (an LSTM, a branch on a value) goes task by task, and a warning names it.

        Args:
            module: of the layout's architecture, as in `load_into`. What is outside the layout is shared by the tasks.
            args: the input; a tuple of inputs; or a dict of inputs by keyword. Each tensor is [B, ...], task b's at b,
                on the module's device. Whatever is no tensor is shared.
            kwargs: further inputs by keyword.
            prefix: dotted name of the submodule that the layout is of; the inputs are of `module`.

        Returns:
            The module's output, [B, ...] for each tensor in it (also in tuples, lists and dicts): what
            `load_into(module, b); module(x[b])` gives for each b. Differentiable in tokens and inputs.

        Raises:
            McdiError: another B; a parameter missing, of another shape or without values; a norm that would update
                running statistics; an output that cannot be stacked.
        """
        places = find(self.layout.shapes, module, prefix)
        for name, child in module.named_modules():
            # Each task would update them, and none of the updates would stay.
            if child.training and getattr(child, "track_running_stats", False):
                raise McdiError(
                    f"module: {name!r} ({type(child).__name__}) would update its running statistics; "
                    "call module.eval() first"
                )
        tensors = []
        for name, tensor in self._tensors(self.tokens).items():
            target = places[name][0].tensor
            tensors.append((places[name], tensor.to(tensor.device if target.is_meta else target.device, target.dtype)))
        if isinstance(args, Mapping):
            args, kwargs = (), {**args, **(kwargs or {})}
        return call_tasks(module, tensors, len(self), args if isinstance(args, tuple) else (args,), kwargs or {})
