"""Where a module's tensors stand, whatever wraps it, and calls of a module with other tensors: one set a task."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree  # what vmap and transformers use; torch has no public one

from mcdi_fast.errors import McdiError

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, checkpointing
_TENSOR = object()
_ADVICE = "give a module of the architecture the layout was made from"


@dataclass(frozen=True, eq=False)
class Slot:
    """A place that holds a parameter or buffer, and what it held when it was looked up."""

    owner: nn.Module
    local: str
    tensor: Tensor

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer."""
        return self.local in self.owner._buffers

    @property
    def is_saved(self) -> bool:
        """Whether a state dict holds it."""
        return self.local not in self.owner._non_persistent_buffers_set


def _wrapped(owner: nn.Module, local: str) -> bool:
    return local in _WRAPPED or (local == "module" and isinstance(owner, _WRAPPERS))


def slots(module: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer by its dotted name, without what DataParallel, torch.compile and others put in.

    In the order of the modules, parameters before buffers in each. A tensor of several names stands under each of them.
    """
    found: dict[str, Slot] = {}
    owners: dict[str, tuple[nn.Module, str]] = {}  # by path: the module, and its path without wrappers
    for path, owner in module.named_modules(remove_duplicate=False):
        above, _, local = path.rpartition(".")
        if not path:
            plain = ""
        elif _wrapped(owners[above][0], local):
            plain = owners[above][1]
        else:
            plain = joined(owners[above][1], local)
        owners[path] = owner, plain
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found[joined(plain, name)] = Slot(owner, name, tensor)
    return found


def joined(prefix: str, name: str) -> str:
    """The dotted name of `name` in the submodule `prefix`, "" for the module itself."""
    return f"{prefix.removesuffix('.')}.{name}" if prefix else name


def tensor_of(value: Any) -> Any:
    """A NumPy array as a tensor, a copy in its own dtype; anything else as it is."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except TypeError:  # text, objects: whoever asked says what was expected
        return value


def listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    shown = ", ".join(repr(name) for name in names[:8])
    return (f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown) or "(the module has no parameters)"


def checked_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor that can be generated. Raises McdiError for any other."""
    if is_lazy(tensor):
        raise McdiError(f"parameter {name!r} is not initialised yet; run the module once before taking its layout")
    if not tensor.is_floating_point():
        raise McdiError(f"parameter {name!r} is {tensor.dtype}, expected floating point; leave it out by select")
    if tensor.numel() == 0:
        raise McdiError(f"parameter {name!r} has shape {list(tensor.shape)}, no element; leave it out by select")
    return tuple(tensor.shape)


def find(shapes: Mapping[str, tuple[int, ...]], module: nn.Module, prefix: str = "") -> dict[str, list[Slot]]:
    """The slots of each tensor in `shapes` (several where it is tied), by its name there.

    Args:
        shapes: by name. prefix: dotted name of the submodule that the names start from.

    Raises:
        McdiError: a tensor that is missing, has another shape, or is tied to another of them.
    """
    if not isinstance(module, nn.Module):
        raise McdiError(f"module: {type(module).__name__}, expected a torch.nn.Module; build it and give that")
    all_slots = slots(module)
    places: dict[int, dict[tuple[int, str], Slot]] = {}  # a submodule that occurs twice is one place
    for place in all_slots.values():
        places.setdefault(id(place.tensor), {})[id(place.owner), place.local] = place
    taken: dict[int, str] = {}
    found = {}
    for name, shape in shapes.items():
        slot = all_slots.get(joined(prefix, name))
        if slot is None:
            raise McdiError(
                f"module: no parameter {joined(prefix, name)!r}, expected one of shape {list(shape)}; "
                f"found {listed(list(all_slots))}; {advice(shapes, {n: s.tensor for n, s in all_slots.items()})}"
            )
        actual = checked_shape(name, slot.tensor)
        if actual != shape:
            raise McdiError(f"module: {name!r} has shape {list(actual)}, expected {list(shape)}; {_ADVICE}")
        if slot.tensor.is_meta and hasattr(slot.owner, "_hf_hook"):  # its hook puts the module's own back in every call
            raise McdiError(f"module: {name!r} is offloaded by accelerate; load the weights before that")
        other = taken.setdefault(id(slot.tensor), name)
        if other != name:
            raise McdiError(f"module: {other!r} and {name!r} are one tensor, in the layout they are two; {_ADVICE}")
        found[name] = list(places[id(slot.tensor)].values())
    return found


def advice(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]) -> str:
    """What to do about names that are not there: say the prefix under which tensors of these shapes are, if any."""

    def fits(name: str, shape: tuple[int, ...]) -> bool:
        actual = tuple(getattr(found.get(name), "shape", ()))
        return name in found and actual[max(len(actual) - len(shape), 0) :] == shape

    first = next(iter(shapes))
    for name in found:
        prefix = name.removesuffix(f".{first}")
        if prefix != name and all(fits(f"{prefix}.{other}", shape) for other, shape in shapes.items()):
            return f"they are in {prefix!r}: pass prefix={prefix!r}"
    return _ADVICE


def assign(places: Sequence[Slot], tensor: Tensor) -> None:
    """Give the slots of one tensor its values, in place; a tensor on the meta device, which has none, is replaced."""
    target = places[0].tensor
    if not target.is_meta:
        target.copy_(tensor)
        return
    fresh: Tensor = tensor.detach().to(target.dtype, copy=True, memory_format=torch.contiguous_format)
    if isinstance(target, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=target.requires_grad)
    for slot in places:
        setattr(slot.owner, slot.local, fresh)


def call(
    module: nn.Module, tensors: Sequence[tuple[Sequence[Slot], Tensor]], args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """`module(*args, **kwargs)` with these tensors and copies of its buffers. Then it is as before, attributes and all.

    A forward pass may set attributes, as an old-style weight norm sets its weight. After vmap they would be dead.
    """
    kept, owners = [], [owner for owner in module.modules() if not isinstance(owner, torch.jit.ScriptModule)]
    for owner in owners:
        kept += [(live, dict(live)) for live in (vars(owner), owner._parameters, owner._buffers)]
    try:
        copies: dict[int, Tensor] = {}
        for owner in owners:
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        for places, tensor in tensors:
            for slot in places:
                home = slot.owner._buffers if slot.is_buffer else slot.owner._parameters
                home[slot.local] = tensor  # type: ignore[assignment]
        return _inner(module)(*args, **kwargs)
    finally:
        for live, before in kept:
            live.clear()
            live.update(before)


def _inner(module: nn.Module) -> nn.Module:
    """The module itself, of one that is wrapped."""
    for local, child in module.named_children():
        if _wrapped(module, local):
            return _inner(child)
    return module


def call_tasks(
    module: nn.Module,
    tensors: Sequence[tuple[Sequence[Slot], Tensor]],
    count: int,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Any:
    """`module(*args, **kwargs)` of `count` tasks at once, each with its own tensors.

    Args:
        module: may be wrapped.
        tensors: slots of a tensor and its values, [count, *shape].
        args, kwargs: with tensors [count, ...] in tuples, lists and dicts; anything else is shared by the tasks.

    Returns:
        The module's output with [count, ...] for each tensor. Numbers, text and None stay themselves; where they differ
        between tasks, a list of them.

    Raises:
        McdiError: inputs for another number of tasks; an output that cannot be stacked. The module's own errors.
    """
    leaves, form = pytree.tree_flatten((args, dict(kwargs)))
    leaves = [tensor_of(leaf) for leaf in leaves]
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for tensor in inputs:
        if tensor.shape[:1] != (count,):
            raise McdiError(
                f"inputs: a tensor of shape {list(tensor.shape)}, expected [{count}, ...], one input a task; stack the inputs, "
                f"or .expand({count}, ...) what all tasks share"
            )
    new = {id(slot.tensor) for places, _ in tensors for slot in places}
    for name, slot in slots(module).items():
        if slot.tensor.is_meta and id(slot.tensor) not in new:
            raise McdiError(f"module: {name!r} is on the meta device and holds no numbers; load it first")
        if id(slot.tensor) in new and isinstance(slot.owner, torch.jit.ScriptModule):
            raise McdiError(
                f"module: {name!r} is in TorchScript, which keeps its own; give the module it was made from, or load_into"
            )
    homes, values = [places for places, _ in tensors], [value for _, value in tensors]

    def task(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[list[Any], pytree.TreeSpec]:
        given = iter(inputs)
        own_args, own_kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
        )
        result = call(module, list(zip(homes, weights, strict=True)), own_args, own_kwargs)
        outputs, out_form = pytree.tree_flatten(result)
        for leaf in outputs:
            if not isinstance(leaf, Tensor | None | int | float | complex | str):
                raise McdiError(
                    f"output: {type(module).__name__} returns a {type(leaf).__name__}, expected tensors, numbers or None in "
                    "tuples, lists or dicts; load_into one task's weights at a time and call the module"
                )
        return outputs, out_form

    try:
        return _together(task, values, inputs)
    except McdiError:
        raise
    except Exception as error:
        if count == 0:
            raise
        where, reason = _culprit(module, error), re.split(r"\n|(?<=\.) ", str(error))[0][:150]
    # Whatever vmap stumbled over. If it is the caller's mistake, the first task raises it again in plain words.
    result = _one_by_one(task, values, inputs, count)
    warnings.warn(
        f"{where}: torch.vmap cannot run it ({reason}); the tasks ran one by one, slower, with the same result",
        stacklevel=3,
    )
    return result


def _together(task: Callable, values: list[Tensor], inputs: list[Tensor]) -> Any:
    others: list[Any] = []  # leaves of the output that are no tensors: vmap returns nothing but tensors
    form: Any = None

    def tensors_alone(weights: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        nonlocal form
        leaves, form = task(weights, given)
        others[:] = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    stacked = iter(vmap(tensors_alone, randomness="different")(values, inputs))
    return pytree.tree_unflatten([next(stacked) if leaf is _TENSOR else leaf for leaf in others], form)


def _one_by_one(task: Callable, values: list[Tensor], inputs: list[Tensor], count: int) -> Any:
    tasks, forms = [], []
    for b in range(count):
        leaves, form = task([value[b] for value in values], [tensor[b] for tensor in inputs])
        tasks.append(leaves)
        forms.append(form)
    if any(form != forms[0] for form in forms):
        raise McdiError(
            f"output: of other parts for some tasks, {forms[0]!s:.60} for the first; load_into one task's weights at a time and "
            "call the module"
        )
    stacked: list[Any] = []
    for leaves in zip(*tasks, strict=True):
        if isinstance(leaves[0], Tensor):
            shapes = {tuple(leaf.shape) for leaf in leaves}
            if len(shapes) > 1:
                raise McdiError(
                    f"output: shapes {sorted(shapes)!s:.80} of different tasks, expected one; load_into one task's weights at a "
                    "time and call the module"
                )
            stacked.append(torch.stack(leaves))
        else:
            stacked.append(leaves[0] if all(leaf == leaves[0] for leaf in leaves) else list(leaves))
    return pytree.tree_unflatten(stacked, forms[0])


def _culprit(module: nn.Module, error: Exception) -> str:
    """The innermost submodule whose code the error came through, with its class, for a message."""
    names = {
        id(child): f"{name!r} ({type(child).__name__})" if name else type(child).__name__
        for name, child in module.named_modules()
    }
    found, trace = type(module).__name__, error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found
