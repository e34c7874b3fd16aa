"""Adapters as peft keeps them: the names in its files, and folders that `peft.PeftModel.from_pretrained` reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.store import atomic_write, make_folder, write_json

_TOP = "base_model.model."
# What stands in a module's names and not in a file's: the adapter's name, as in lora_A.default.weight.
_IN_MODULE = re.compile(
    r"(?<=\.lora_[AB])\.[^.]+(?=\.)|(?<=\.lora_embedding_[AB])\.[^.]+|(?<=\.lora_magnitude_vector)\.[^.]+\.weight"
    r"|\.modules_to_save\.[^.]+(?=\.)"
)
_MATRIX_A = re.compile(r"(?<![^.])lora_(embedding_)?A(?![^.])")


def is_adapted(name: str) -> bool:
    """Whether a parameter belongs to an adapter: a LoRA tensor, or one of a module in `modules_to_save`."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def partner(name: str) -> str | None:
    """The name of lora_B for that of lora_A; None for any other."""
    found = _MATRIX_A.sub(lambda match: f"lora_{match[1] or ''}B", name)
    return None if found == name else found


def adapter_name(name: str) -> str:
    """A parameter's name in an adapter file, for its name in a module that peft has wrapped."""
    return _IN_MODULE.sub("", _TOP + name.removeprefix(_TOP))


def adapter_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of an adapter file, as `peft.set_peft_model_state_dict` takes them."""
    return {adapter_name(name): tensor for name, tensor in state.items()}


def save_adapter(folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: Any) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        folder: made with those above it.
        state: by the names of the module.
        config: the `peft.LoraConfig` (`model.peft_config["default"]`), or the dict of an `adapter_config.json`.

    Raises:
        McdiError: a config of another kind; a file that cannot be written.
    """
    content = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    if content.get("peft_type") != "LORA":
        raise McdiError(
            f"config: {type(config).__name__}, expected a peft.LoraConfig or the dict of an adapter_config.json; "
            'give model.peft_config["default"]'
        )
    folder = make_folder(folder)
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_state_dict(state).items()}
    atomic_write(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write_json(folder / "adapter_config.json", content | {"inference_mode": True})
