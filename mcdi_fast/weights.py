"""Layouts: a module's weights as tokens, one row an output unit, `[N tokens, D width]`."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.errors import McdiError
from mcdi_fast.peft_files import adapter_name, is_adapted, partner
from mcdi_fast.slots import advice, checked_shape, find, joined, listed, slots, tensor_of

# Entries of one task's tokens, N * D: 1 GiB in float32. A layout from a stranger's file must not make us allocate more.
MAX_ELEMENTS = 2**28
_ONE_HOT_TOKENS = 512  # up to so many tokens a position is one-hot


@dataclass(frozen=True)
class LayoutEntry:
    """Tensors of one module that share tokens: each is [rows, -1], and they stand side by side in order.

    Attributes:
        rows: tokens; the size of every tensor in its dimension of `axes`, or 1 where one token takes all of them whole.
        names: names as in `module.named_parameters()` (or buffers).
        shapes: their shapes.
        axes: the dimension of each tensor that its tokens are taken from; 0 for all by default.
    """

    rows: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the default."""
        if not self.axes:
            object.__setattr__(self, "axes", (0,) * len(self.names))

    @property
    def has_units(self) -> bool:
        """Whether a token is a unit of every tensor, not all of them whole."""
        return all(shape and shape[axis] == self.rows for shape, axis in zip(self.shapes, self.axes, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns that each tensor takes."""
        return tuple(math.prod(shape) // self.rows for shape in self.shapes)

    @property
    def width(self) -> int:
        """Columns that all of them take."""
        return sum(self.widths)


@dataclass(frozen=True)
class WeightLayout:
    """How a module's parameters lie in tokens [N, D]: one token an output unit, its weights then its bias.

    The rule: within one module, tensors of two or more dimensions with the same first dimension share tokens, and
    one-dimensional tensors of that length (biases) are appended. A one-dimensional tensor with no such partner (the
    weight or bias of a norm) is one token. So a convolution [out, in, h, w] gives out tokens, an embedding [num, dim]
    gives num. Tokens narrower than D are padded with zeros on the right. Tied parameters are taken once. Names leave
    out what wrappers put in (DataParallel, `torch.compile`). Or one token is the whole network (`from_module(tokens="network")`).

    Attributes:
        entries: in the order of the module; entry after entry gives the tokens.
        exchangeable: whether tokens differ by their condition alone, as the classes of a head do. Where they do not, as
            the units of a network, `position` tells which token is which.

    Raises:
        McdiError: on construction, for entries that contradict themselves or are too large.
    """

    entries: tuple[LayoutEntry, ...]
    exchangeable: bool = False

    def __post_init__(self) -> None:
        """Check everything: a layout may come from a stranger's file."""
        _expect(self.entries, "no entry, expected at least one parameter")
        _expect(type(self.exchangeable) is bool, f"exchangeable is {self.exchangeable!r:.40}, expected True or False")
        names: set[str] = set()
        for entry in self.entries:
            _check_entry(entry)
            for name in entry.names:
                _expect(name not in names, f"parameter {name!r} stands twice, expected once")
                names.add(name)
        for name in names:
            for prefix in _prefixes(name)[:-1]:
                _expect(prefix not in names, f"{prefix!r} and {name!r} overlap (a parameter holds no other)")
        n, d, p = self.num_tokens, self.width, self.position_width
        sizes = f"{n} tokens of width {d} and positions of width {p}, expected {MAX_ELEMENTS} numbers at most"
        _expect(n * max(d, p) <= MAX_ELEMENTS, f"{sizes}: select fewer parameters")

    def __getstate__(self) -> dict[str, Any]:
        """Without the positions: another process makes its own."""
        return {"entries": self.entries, "exchangeable": self.exchangeable}

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        select: Callable[[str], bool] | Sequence[str] | None = None,
        exchangeable: bool = False,
        buffers: bool | None = None,
        tokens: Literal["unit", "network"] = "unit",
    ) -> WeightLayout:
        """The layout of a module's parameters.

        Args:
            module: any module; only names, shapes and dtypes are read.
            select: None takes every parameter. A sequence takes a parameter if its name or a dotted prefix of it (a
                submodule's name) is in the sequence. A callable is asked for each name.
            exchangeable: whether tokens differ by their condition alone (class attribute).
            buffers: True also takes floating-point buffers that a state dict holds, such as running statistics of a
                batch norm. None warns where weights would be generated without the statistics that belong to them.
            tokens: "unit", a token an output unit, for what a permutation of units leaves alike: the classes of a head.
                "network", one token that is all parameters side by side, for networks from one start: every weight then has
                a row and a column of the denoiser to itself, where units share theirs (measured on waves, docs/choices.md:
                half the error at a fifth of the time). The denoiser's first and last matrix grow with the network.

        Raises:
            McdiError: nothing selected; a name in `select` that matches no parameter; a parameter that is not floating
                point, not yet initialised (lazy) or empty; exchangeable tokens where there is one; other `tokens`.
        """
        if tokens not in ("unit", "network") or (exchangeable and tokens == "network"):
            raise McdiError(
                f"tokens {tokens!r:.40}, exchangeable = {exchangeable}: expected unit, or network without exchangeable"
            )
        found = _selected(module, select, bool(buffers))
        if buffers is None:
            _warn_of_statistics(module, found)
        if tokens == "network":
            return cls((LayoutEntry(1, tuple(found), tuple(found.values())),))
        return cls(_grouped(found), exchangeable)

    @classmethod
    def lora(cls, module: nn.Module, select: Callable[[str], bool] | Sequence[str] | None = None) -> WeightLayout:
        """The layout of LoRA matrices, a token a rank component: row j of lora_A [r, in] beside column j of lora_B.

        A token an output unit, as `from_module` makes, would pad all of lora_B [out, r] to the width of lora_A [r, in].

        Args:
            module: one that peft has wrapped, or any with parameters so named.
            select: as of `from_module`; None takes what an adapter file holds, that is every LoRA matrix and the
                modules in `modules_to_save`, which lie as in `from_module`.

        Raises:
            McdiError: as `from_module`; no LoRA matrix; a lora_A without its lora_B.
        """
        found = _selected(module, is_adapted if select is None else select, buffers=False)
        pairs = {name: partner(name) for name in found}
        entries = []
        for name, other in pairs.items():
            if other is None:
                continue
            shapes = found.get(name, ()), found.get(other, ())
            if len(shapes[1]) < 2 or shapes[0][0] != shapes[1][1]:
                raise McdiError(
                    f"module: {name!r} of shape {list(shapes[0])} has no {other!r} of shape [out, {shapes[0][0]}] beside it "
                    f"(found {list(shapes[1])}); select both"
                )
            entries.append(LayoutEntry(shapes[0][0], (name, other), shapes, (0, 1)))
        if not entries:
            raise McdiError(f"module: no lora_A among {listed(list(found))}; wrap it by peft.get_peft_model first")
        paired = {name for entry in entries for name in entry.names}
        rest = {name: shape for name, shape in found.items() if name not in paired}
        return cls((*entries, *_grouped(rest)))

    @functools.cached_property
    def num_tokens(self) -> int:
        """N."""
        return sum(entry.rows for entry in self.entries)

    @functools.cached_property
    def width(self) -> int:
        """D, the widest entry."""
        return max(entry.width for entry in self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the tokens."""
        return tuple(name for entry in self.entries for name in entry.names)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter, by name."""
        return {name: shape for entry in self.entries for name, shape in zip(entry.names, entry.shapes, strict=True)}

    @property
    def mask(self) -> Tensor:
        """bool [N, D] on the CPU: True for real entries, False for padding."""
        widths = torch.tensor([entry.width for entry in self.entries], device="cpu")[self.owner]
        return torch.arange(self.width, device="cpu") < widths[:, None]

    @property
    def owner(self) -> Tensor:
        """int64 [N] on the CPU: index into `entries` of each token."""
        rows = torch.tensor([entry.rows for entry in self.entries], device="cpu")
        return torch.repeat_interleave(torch.arange(len(self.entries), device="cpu"), rows)

    @property
    def position_width(self) -> int:
        """P of `position`."""
        if self.exchangeable:
            return 0
        if self.num_tokens <= _ONE_HOT_TOKENS:
            return self.num_tokens
        return len(self.entries) + (max(entry.rows for entry in self.entries) - 1).bit_length()

    def position(self) -> Tensor:
        """float32 [N, P] on the CPU, to be read only: which token is which; all rows differ.

        P = 0 where tokens are exchangeable. One-hot of the token (P = N) up to 512 tokens. Beyond that one-hot of the
        entry, beside the row's number within it in bits of -1 and 1. Each column's mean square is 1, as that of a
        normalised condition: with ones alone a network of 17 units had 31 and 19 % more error (two seeds, 600 steps).
        """
        return self._position

    @functools.cached_property
    def _position(self) -> Tensor:
        tokens = self.num_tokens
        with torch.inference_mode(False):  # it outlives the call, and autograd refuses tensors of inference
            if self.exchangeable:
                return torch.zeros(tokens, 0, dtype=torch.float32, device="cpu")
            if tokens <= _ONE_HOT_TOKENS:
                columns = torch.eye(tokens, dtype=torch.float64, device="cpu")
            else:
                rows = torch.cat([torch.arange(entry.rows, device="cpu") for entry in self.entries])
                num_bits = (max(entry.rows for entry in self.entries) - 1).bit_length()
                bits = rows[:, None] >> torch.arange(num_bits, device="cpu") & 1
                columns = torch.cat([F.one_hot(self.owner, len(self.entries)), 2 * bits - 1], 1).to(torch.float64)
            return (columns / columns.square().mean(0).sqrt()).to(torch.float32)

    def resized(self, num_tokens: int) -> WeightLayout:
        """The same with another number of tokens: the layout of a head of `num_tokens` classes.

        Raises:
            McdiError: tokens that are not exchangeable; more than one entry; a number out of range.
        """
        num_tokens = int(num_tokens) if isinstance(num_tokens, np.integer) else num_tokens
        entry = self.entries[0]
        if not self.exchangeable or len(self.entries) > 1 or not entry.has_units:
            raise McdiError(
                f"layout: {self.num_tokens} tokens of {len(self.entries)} entries, exchangeable = {self.exchangeable}; only "
                f"exchangeable tokens of one entry can be {num_tokens} instead; train with a layout of that many"
            )
        shapes = tuple(
            (*shape[:axis], num_tokens, *shape[axis + 1 :])
            for shape, axis in zip(entry.shapes, entry.axes, strict=True)
        )
        return WeightLayout((LayoutEntry(num_tokens, entry.names, shapes, entry.axes),), exchangeable=True)

    def pack(
        self, source: nn.Module | Mapping[str, Tensor], dtype: torch.dtype | None = None, prefix: str = ""
    ) -> Tensor:
        """Tokens [N, D] of a module or a state dict (further names in it are ignored). Differentiable; always a copy.

        Args:
            source: where the tensors are; a state dict may hold NumPy arrays, and names of wrappers or of peft's files.
            dtype: of the result; default: the one all tensors promote to, so the round trip is bit-exact.
            prefix: dotted name of the submodule of `source` that the layout is of.

        Raises:
            McdiError: a name is missing or has another shape.
        """
        return self._pack(source, dtype, prefix, batched=False)

    def pack_batch(
        self, source: Mapping[str, Tensor] | Sequence[Any], dtype: torch.dtype | None = None, prefix: str = ""
    ) -> Tensor:
        """Tokens [..., N, D] of many networks.

        Args:
            source: stacked tensors [..., *shape], all with the same leading dimensions ([B], [tasks, k]); or a list of
                state dicts or modules, or of such lists.
            dtype, prefix: as of `pack`.

        Raises:
            McdiError: a name is missing, has another shape, or leading dimensions differ.
        """
        if not isinstance(source, list | tuple):
            return self._pack(source, dtype, prefix, batched=True)
        parts = [self.pack_batch(part, dtype, prefix) for part in source]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) != 1:
            raise McdiError(
                f"state dicts: {len(parts)} of shapes {sorted(shapes)!s:.80}, expected one or more of one shape; give as many a task"
            )
        return torch.stack(parts)

    def _pack(self, source: Any, dtype: torch.dtype | None, prefix: str, batched: bool) -> Tensor:
        state = _tensors_of(source)
        lead: tuple[int, ...] | None = None if batched else ()
        tensors: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            where = joined(prefix, name)
            tensor = tensor_of(state.get(where if where in state else adapter_name(where)))
            if not isinstance(tensor, Tensor):
                what = "missing" if tensor is None else f"of type {type(tensor).__name__}"
                raise McdiError(
                    f"state dict: {where!r} is {what}, expected a tensor of shape {list(shape)}; "
                    f"{advice(self.shapes, state)}"
                )
            if not tensor.is_floating_point():
                raise McdiError(f"state dict: {name!r} is {tensor.dtype}, expected floating point; convert it")
            if tensor.is_meta:
                raise McdiError(f"state dict: {name!r} is on the meta device, which holds no numbers; load it first")
            if lead is None:
                lead = tuple(tensor.shape[: max(tensor.ndim - len(shape), 0)])
            if tensor.shape != (*lead, *shape):
                expected = [*lead, *shape]
                raise McdiError(
                    f"state dict: {name!r} has shape {list(tensor.shape)}, expected {expected}; is it the same model?"
                )
            tensors[name] = tensor
        assert lead is not None
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        device, width = tensors[self.names[0]].device, self.width
        blocks = []
        for entry in self.entries:
            parts = [
                _moved(tensors[name].to(device, dtype), axis, 0, lead).reshape(*lead, entry.rows, columns)
                for name, axis, columns in zip(entry.names, entry.axes, entry.widths, strict=True)
            ]
            blocks.append(F.pad(torch.cat(parts, -1), (0, width - entry.width)))
        return torch.cat(blocks, -2)

    def unpack(self, tokens: Tensor) -> dict[str, Tensor]:
        """Parameters [..., *shape] by name, of tokens [..., N, D]: views, differentiable; padding is ignored.

        Raises:
            McdiError: the last two dimensions are not [N, D].
        """
        self.check_tokens(tokens)
        lead = tuple(tokens.shape[:-2])
        result: dict[str, Tensor] = {}
        start = 0
        for entry in self.entries:
            column = 0
            for name, shape, axis, columns in zip(entry.names, entry.shapes, entry.axes, entry.widths, strict=True):
                block = tokens[..., start : start + entry.rows, column : column + columns]
                rows_first = (*shape[axis : axis + 1], *shape[:axis], *shape[axis + 1 :])
                result[name] = _moved(block.reshape((*lead, *rows_first)), 0, axis, lead)
                column += columns
            start += entry.rows
        return result

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise McdiError unless tokens are [..., N, D]."""
        if not isinstance(tokens, Tensor):
            raise McdiError(f"tokens: {type(tokens).__name__}, expected a tensor; convert them by torch.as_tensor")
        if tokens.ndim < 2 or tokens.shape[-2:] != (self.num_tokens, self.width):
            raise McdiError(
                f"tokens: shape {list(tokens.shape)}, expected [..., {self.num_tokens}, {self.width}]; "
                "they belong to another layout"
            )

    def check_module(self, module: nn.Module, prefix: str = "") -> None:
        """Raise McdiError, with name, found and expected shape, unless the module has every tensor of the layout.

        Args:
            module: also one that DataParallel or `torch.compile` wraps.
            prefix: dotted name of the submodule that the layout is of.
        """
        find(self.shapes, module, prefix)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back equal."""
        return {
            "num_tokens": self.num_tokens,
            "width": self.width,
            "exchangeable": self.exchangeable,
            "entries": [
                {"rows": entry.rows, "names": list(entry.names), "shapes": [list(shape) for shape in entry.shapes]}
                | ({"axes": list(entry.axes)} if any(entry.axes) else {})
                for entry in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, data: Any) -> WeightLayout:
        """The layout of `to_dict`'s result. Raises McdiError for anything that contradicts itself or is too large.

        Without "exchangeable", as in older files, tokens are exchangeable: no position was told then.
        """
        entries = data.get("entries") if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise McdiError(
                "layout: no list of entries, expected the result of WeightLayout.to_dict; the file is damaged"
            )
        parsed = []
        for item in entries:
            if not (
                isinstance(item, dict)
                and isinstance(item.get("names"), list)
                and isinstance(item.get("shapes"), list)
                and all(isinstance(shape, list) for shape in item["shapes"])
                and isinstance(item.get("axes", []), list)
            ):
                raise McdiError(
                    f"layout: entry {item!r:.80} is malformed, expected rows, names and shapes; the file is damaged"
                )
            shapes = tuple(tuple(shape) for shape in item["shapes"])
            parsed.append(LayoutEntry(item.get("rows"), tuple(item["names"]), shapes, tuple(item.get("axes", ()))))  # type: ignore[arg-type]
        layout = cls(tuple(parsed), data.get("exchangeable", True))
        for key, found in (("num_tokens", layout.num_tokens), ("width", layout.width)):
            if data.get(key) != found:
                raise McdiError(
                    f"layout: {key} is {data.get(key)!r:.40}, expected {found} by its entries; the file is damaged"
                )
        return layout


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_ELEMENTS  # bool is an int


def _expect(holds: object, what: str) -> None:
    if not holds:
        raise McdiError(f"layout: {what}; make the layout again")


def _check_entry(entry: LayoutEntry) -> None:
    _expect(_is_size(entry.rows), f"rows {entry.rows!r:.40}, expected an integer from 1 to {MAX_ELEMENTS}")
    names, shapes, axes = len(entry.names), len(entry.shapes), len(entry.axes)
    counts = f"{names} names, {shapes} shapes and {axes} axes"
    _expect(names and names == shapes == axes, f"{counts} in one entry, expected as many")
    for name, shape, axis in zip(entry.names, entry.shapes, entry.axes, strict=True):
        is_name = isinstance(name, str) and len(name) <= 1000 and all(name.split("."))
        _expect(is_name, f"{name!r:.80} is no parameter name, expected dotted text of at most 1000 letters")
        # The number of dimensions is bounded so that the product below stays small enough to compute.
        fits = len(shape) <= 64 and all(_is_size(size) for size in shape) and math.prod(shape) <= MAX_ELEMENTS
        what = f"{name!r} has shape {list(shape)!r:.80}"
        _expect(fits, f"{what}, expected sizes from 1 and at most {MAX_ELEMENTS} elements")
        is_axis = type(axis) is int and 0 <= axis < max(len(shape), 1)
        _expect(is_axis, f"{what} and axis {axis!r:.40}, expected one of its dimensions")
        whole = entry.rows == 1 and axis == 0
        of_rows = f"expected dimension {axis} to be {entry.rows} (its entry's rows)"
        _expect(whole or (shape and shape[axis] == entry.rows), f"{what}, {of_rows}")


def _selected(module: nn.Module, select: Any, buffers: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by name of what is selected of a module's parameters, and of the buffers that a state dict holds."""
    if not isinstance(module, nn.Module):
        raise McdiError(
            f"module: {type(module).__name__}, expected a torch.nn.Module, which says what belongs to one unit and what is "
            "tied; build the network and give that"
        )
    found = {
        name: slot.tensor
        for name, slot in slots(module).items()
        if not slot.is_buffer or (buffers and slot.is_saved and slot.tensor.is_floating_point())
    }
    wanted = _selector(list(found), select)
    # A tied parameter may be selected by any of its names; the first that is selected stands in the layout.
    seen: set[int] = set()
    taken: dict[str, tuple[int, ...]] = {}
    for name, tensor in found.items():
        if wanted(name) and id(tensor) not in seen:
            seen.add(id(tensor))
            taken[name] = checked_shape(name, tensor)
    if not taken:
        raise McdiError(
            f"select: no parameter selected, expected at least one of {listed(list(found))}; "
            "select a parameter or module"
        )
    return taken


def _grouped(found: Mapping[str, tuple[int, ...]]) -> tuple[LayoutEntry, ...]:
    """Entries of tensors (name -> shape), module by module."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in found.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = shape
    return tuple(entry for tensors in modules.values() for entry in _group(tensors))


def _group(tensors: dict[str, tuple[int, ...]]) -> list[LayoutEntry]:
    """Entries of one module's tensors (name -> shape)."""
    units = {shape[0] for shape in tensors.values() if len(shape) >= 2}
    groups: dict[int | str, list[str]] = {}
    for name, shape in tensors.items():
        shared = bool(shape) and shape[0] in units
        groups.setdefault(shape[0] if shared else name, []).append(name)
    return [
        LayoutEntry(key if isinstance(key, int) else 1, tuple(names), tuple(tensors[name] for name in names))
        for key, names in groups.items()
    ]


def _selector(names: list[str], select: Callable[[str], bool] | Sequence[str] | None) -> Callable[[str], bool]:
    if select is None:
        return lambda name: True
    if callable(select):
        return select
    if isinstance(select, str):
        raise McdiError(f"select: {select!r} is text, expected a list of names; write [{select!r}]")
    chosen, known = list(select), {prefix for name in names for prefix in _prefixes(name)}
    unknown = [item for item in chosen if not isinstance(item, str) or item not in known]
    if unknown:
        raise McdiError(
            f"select: {unknown[0]!r} matches no parameter, expected a name or module of {listed(names)}; "
            "correct the name"
        )
    return lambda name: not set(chosen).isdisjoint(_prefixes(name))


def _prefixes(name: str) -> list[str]:
    """The dotted names of what a parameter is in, from the outside, and its own."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _moved(tensor: Tensor, source: int, target: int, lead: tuple[int, ...]) -> Tensor:
    """A view with dimension `source` of the tensor's own, after those of `lead`, moved to `target`."""
    return tensor if source == target else tensor.movedim(len(lead) + source, len(lead) + target)


def _tensors_of(source: Any) -> Mapping[str, Any]:
    """Name -> tensor of a module or a state dict, as well by names without what wrappers put in."""
    if isinstance(source, nn.Module):
        return {name: slot.tensor for name, slot in slots(source).items()}
    if not isinstance(source, Mapping):
        raise McdiError(
            f"state dict: {type(source).__name__}, expected a module or a dict of tensors by name; to pack many, give a list"
        )
    source = {str(name): tensor for name, tensor in source.items()}
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in source.items()}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    return {**plain, **source}


def _warn_of_statistics(module: nn.Module, taken: Mapping[str, Any]) -> None:
    """Running statistics belong to the weights in front of them: say so where those are generated without them."""
    after_taken = False
    for name, slot in slots(module).items():
        after_taken |= name in taken
        if after_taken and slot.is_buffer and getattr(slot.owner, "track_running_stats", False):
            warnings.warn(
                f"layout: {name!r} is not generated, and a network with generated weights keeps statistics of others; pass "
                "buffers=True, or False and estimate them by torch.optim.swa_utils.update_bn after load_into",
                stacklevel=3,
            )
            return
