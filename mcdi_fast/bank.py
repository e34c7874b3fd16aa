"""Trajectories on disk: for every task its k local targets and its condition, in a folder that grows by shards."""

from __future__ import annotations

import bisect
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mcdi_fast import store
from mcdi_fast.errors import McdiError, reason_of
from mcdi_fast.weights import WeightLayout

_HEADER_FILE = "bank.json"
_BANK_KIND = "trajectory-bank"
_SHARD_KIND = "bank-shard"
_FORMATS = (1, 2)  # of bank.json, the last is written; 1 had conditions [n, N, C] alone and no positions
_CHUNK_BYTES = 64 * 2**20
_LOCK_FILE = ".lock"
_LOCK_SECONDS = 600.0  # as long as another process may take to write a shard

Array: TypeAlias = Tensor | np.ndarray | Sequence[Any]


class BankTask(NamedTuple):
    """One task of a bank: targets float32 [k, N, D] and condition float32 [1 or N, C], on the CPU, copies."""

    targets: Tensor
    condition: Tensor


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


class TrajectoryBank:
    """A folder of trajectories: `bank.json` and shards of `targets` [n, k, N, D] and `condition` [n, 1 or N, C], float32.

    Made by `create` or `open`. Shards are memory-mapped; only rows that are asked for are read. Several processes may
    write: each shard gets the next number, under a lock. What others write is seen when the bank is opened again, and by
    `append`.

    From trajectories of your own, here 10 tasks with k = 3 local targets (start to end) of a linear layer, and a
    condition of width C = 8 for each of its N = 5 tokens:

    >>> import tempfile, torch
    >>> folder, net = tempfile.mkdtemp(), torch.nn.Linear(4, 5)
    >>> weight, bias, condition = torch.randn(10, 3, 5, 4), torch.randn(10, 3, 5), torch.randn(10, 5, 8)

    >>> layout = WeightLayout.from_module(net)
    >>> bank = TrajectoryBank.create(folder, layout, num_segments=3, condition_width=8)
    >>> bank.append(layout.pack_batch({"weight": weight, "bias": bias}), condition)

    >>> targets, condition = bank.gather([7, 0])
    >>> len(bank), targets.shape, condition.shape
    (10, torch.Size([2, 3, 5, 5]), torch.Size([2, 5, 8]))

    >>> bank[-1].targets.shape
    torch.Size([3, 5, 5])
    >>> sum(1 for task in bank)
    10

    Attributes:
        folder: where it is.
        layout: of the targets.
        num_segments: k.
        condition_width: C.
        meta: provenance, free JSON. A bank with another meta is another bank.
    """

    def __init__(
        self, folder: Path, layout: WeightLayout, num_segments: int, condition_width: int, meta: dict[str, Any]
    ):
        """Use `create` or `open`."""
        self.folder = folder
        self.layout = layout
        self.num_segments = num_segments
        self.condition_width = condition_width
        self.meta = meta
        self._layout_digest = ""  # of the layout as bank.json says it
        self._targets: list[Tensor] = []
        self._condition: list[Tensor] = []
        self._digests: list[str | None] = []  # of each shard's contents; older shards do not say it
        self._starts = [0]  # task index at which shard s starts; the last entry is the number of tasks

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        layout: WeightLayout,
        num_segments: int,
        condition_width: int,
        meta: Mapping[str, Any] | None = None,
    ) -> TrajectoryBank:
        """Make an empty bank; where the folder already holds a bank with the same header, open that one (to resume).

        Args:
            folder: made with those above it.
            layout: of the targets.
            num_segments: k >= 1, local targets a task.
            condition_width: C >= 1.
            meta: JSON-able provenance (settings, fingerprints). A bank with another meta is another bank.

        Raises:
            McdiError: a bank with another header is there (names what differs); shards without a header; an unwritable
                folder.
        """
        folder = store.make_folder(folder)
        path = folder / _HEADER_FILE
        header = {
            "format": _FORMATS[-1],
            "kind": _BANK_KIND,
            "num_segments": _whole(num_segments),
            "condition_width": _whole(condition_width),
            "layout": layout.to_dict(),
            "meta": dict(meta or {}),
        }
        header = json.loads(store.dumps(header, path))  # tuples in meta become lists, as in the file
        ours = _parse_header(header, path)
        with _writing(folder):
            if not path.exists():
                stray = sorted(folder.glob("shard-*.safetensors"))
                if stray:
                    raise McdiError(
                        f"{store.show_path(stray[0])}: a shard without {_HEADER_FILE}; "
                        "choose an empty folder or restore that file"
                    )
                store.write_json(path, header)
            found = _parse_header(store.read_json(path), path)
            for name, one, two in zip(("layout", "num_segments", "condition_width", "meta"), found, ours, strict=True):
                if one != two:
                    one, two = (side.to_dict() if isinstance(side, WeightLayout) else side for side in (one, two))
                    raise McdiError(
                        f"{store.show_path(path)}: a bank with another {store.difference(name, one, two)} is there; "
                        "choose another folder or remove this one"
                    )
            store.remove_temporaries(folder)
            return cls.open(folder)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TrajectoryBank:
        """Open a bank. Values are not read: see `check_finite`.

        Raises:
            McdiError: naming the file: no bank; a bank of another format; a gap in the shards; a shard that is
                truncated or of another layout, k or C.
        """
        folder = store.user_path(folder)
        path = folder / _HEADER_FILE
        header = store.read_json(path)
        bank = cls(folder, *_parse_header(header, path))
        bank._layout_digest = store.digest(json.dumps(header["layout"], sort_keys=True))
        bank._map_shards()
        return bank

    def _map_shards(self) -> None:
        """Add the shards that are there and not yet in the bank."""
        try:
            present = {
                name for name in os.listdir(self.folder) if name.startswith("shard-") and name.endswith(".safetensors")
            }
        except OSError as error:
            raise McdiError(
                f"cannot read {store.show_path(self.folder)}: {reason_of(error)}; check its permissions"
            ) from error
        for number in range(self.num_shards, len(present)):
            path = self.folder / _shard_name(number)
            # written while the folder was listed, a shard may be left out where a later one is not: look again
            if path.name not in present and not path.exists():
                expected = {_shard_name(i) for i in range(len(present))}
                other = sorted(present - expected)[0]
                raise McdiError(
                    f"{store.show_path(path)}: missing, expected because {other!r} is there; "
                    "restore it, or remove the shards behind the gap"
                )
            self._map_shard(number)

    def _map_shard(self, number: int) -> None:
        """Check shard `number` and add it to the bank."""
        path = self.folder / _shard_name(number)
        tensors, meta = store.load_tensors(path, _SHARD_KIND)
        if meta.get("layout") != self._layout_digest:
            raise McdiError(
                f"{store.show_path(path)}: of another layout than {_HEADER_FILE} says; it belongs to another bank: remove it"
            )
        trouble = self._trouble(tensors.get("targets"), tensors.get("condition"))
        if trouble:
            raise McdiError(f"{store.show_path(path)}: {trouble}; it belongs to another bank: remove it")
        digest = meta.get("contents")
        self._targets.append(tensors["targets"])
        self._condition.append(tensors["condition"])
        self._digests.append(digest if isinstance(digest, str) else None)
        self._starts.append(self._starts[-1] + len(tensors["targets"]))

    def _trouble(self, targets: Tensor | None, condition: Tensor | None) -> str:
        """What is wrong with a shard's shapes and dtypes; empty where nothing is."""
        k, n, d, c = self.num_segments, self.layout.num_tokens, self.layout.width, self.condition_width
        tasks = len(targets) if targets is not None and targets.ndim else 0
        expected = {"targets": [[tasks, k, n, d]], "condition": [[tasks, rows, c] for rows in sorted({1, n})]}
        for name, tensor in (("targets", targets), ("condition", condition)):
            shapes = expected[name]
            if tensor is None or list(tensor.shape) not in shapes or tensor.dtype != torch.float32 or not tasks:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                wanted = " or ".join(map(str, shapes))
                return f"{name} is {found}, expected torch.float32 {wanted} with at least one task"
        return ""

    def __len__(self) -> int:
        """Tasks."""
        return self._starts[-1]

    def __repr__(self) -> str:
        """One line."""
        return (
            f"TrajectoryBank({store.show_path(self.folder)!r}: {len(self)} tasks in {self.num_shards} shards, "
            f"k = {self.num_segments}, {self.layout.num_tokens} tokens of width {self.layout.width}, "
            f"conditions of width {self.condition_width})"
        )

    @property
    def num_shards(self) -> int:
        """Shards, one for each `append`."""
        return len(self._targets)

    @property
    def condition_rows(self) -> int:
        """1 where every task has one condition for all of its tokens; N where any has one for each."""
        return max((condition.shape[1] for condition in self._condition), default=1)

    def contents(self) -> str:
        """16 hex digits of all targets and conditions in their order: the identity of the bank. Reads only shards of older versions."""
        for shard, digest in enumerate(self._digests):
            if digest is None:
                self._digests[shard] = _digest(self._targets[shard], self._condition[shard])
        return store.digest(" ".join(map(str, self._digests)))

    def append(self, targets: Array, condition: Array) -> None:
        """Write one shard, atomically: after a kill it is there whole or not at all.

        Tensors on any device or NumPy arrays, of any floating-point dtype: they are stored as float32.

        Args:
            targets: [n, k, N, D], local targets theta_d … theta_kd (method: section 1).
            condition: [n, C] or [n, 1, C], one for all tokens of a task; or [n, N, C], one for each token.

        Raises:
            McdiError: other shapes or dtypes, n = 0, an entry that is not finite (names task and segment), a full disk.
        """
        given = {"targets": _float32("targets", targets), "condition": _float32("condition", condition)}
        if given["condition"].ndim == 2:
            given["condition"] = given["condition"].unsqueeze(1)
        trouble = self._trouble(given["targets"], given["condition"])
        if trouble:
            raise McdiError(f"{trouble}; pack the weights by this bank's layout")
        bad = _first_not_finite(given["targets"], given["condition"])
        if bad:
            raise McdiError(f"{bad} of the {len(given['targets'])} given; drop this task or prepare it again")
        meta = {"layout": self._layout_digest, "contents": _digest(given["targets"], given["condition"])}
        with _writing(self.folder):
            self._map_shards()  # those that other processes have written meanwhile
            store.save_tensors(self.folder / _shard_name(self.num_shards), given, meta, _SHARD_KIND)
            self._map_shard(self.num_shards)

    def gather(self, index: int | Array) -> tuple[Tensor, Tensor]:
        """Tasks by index, in that order; only their rows are read from disk.

        Args:
            index: integers, any number of them or one: a list, range, NumPy array or tensor [B]. From -len(bank), counted from the
                end, to len(bank) - 1; repeats are fine.

        Returns:
            targets float32 [B, k, N, D] and condition float32 [B, 1 or N, C] (`condition_rows`), on the CPU, copies.

        Raises:
            McdiError: no integers; an index out of range.
        """
        chosen = self._index(index)
        targets = torch.empty(len(chosen), *self._targets[0].shape[1:], dtype=torch.float32, device="cpu")
        condition = torch.empty(
            len(chosen), self.condition_rows, self.condition_width, dtype=torch.float32, device="cpu"
        )
        starts = torch.tensor(self._starts, device="cpu")
        shard_of = torch.searchsorted(starts, chosen, right=True) - 1
        for shard in shard_of.unique().tolist():
            places = (shard_of == shard).nonzero()[:, 0]
            rows = chosen[places] - starts[shard]
            targets[places] = self._targets[shard][rows]
            condition[places] = self._condition[shard][rows]
        return targets, condition

    def _index(self, index: int | Array) -> Tensor:
        """int64 [B] on the CPU, from 0 on."""
        try:
            found = index if isinstance(index, Tensor) else torch.from_numpy(np.array(index))
        except (TypeError, ValueError) as error:
            raise McdiError(f"index: {index!r:.60}, expected integers, one or [B]") from error
        integers = not found.is_floating_point() and not found.is_complex() and found.dtype != torch.bool
        if found.ndim > 1 or not (integers or found.numel() == 0):
            raise McdiError(f"index: {found.dtype} {list(found.shape)}, expected integers, one or [B]; convert it")
        found = found.reshape(-1).to("cpu", torch.int64)
        outside = (found < -len(self)) | (found >= len(self))
        if bool(outside.any()):
            raise McdiError(
                f"index: task {int(found[outside][0])} of a bank of {len(self)}, expected {-len(self)} to {len(self) - 1}"
            )
        return torch.where(found < 0, found + len(self), found)

    def __getitem__(self, index: int) -> BankTask:
        """One task; negative counts from the end. Raises McdiError as `gather`."""
        try:
            number = operator.index(index)
        except TypeError as error:
            raise McdiError(f"index: {index!r:.60}, expected an integer; `gather` takes several") from error
        number = int(self._index(number))
        shard = bisect.bisect_right(self._starts, number) - 1
        row = number - self._starts[shard]
        return BankTask(self._targets[shard][row].clone(), self._condition[shard][row].clone())

    def __iter__(self) -> Iterator[BankTask]:
        """Task by task."""
        return (self[number] for number in range(len(self)))

    def check_finite(self) -> None:
        """Read every value once. Raises McdiError naming shard, task (of the bank) and segment of the first NaN."""
        for shard, (targets, condition) in enumerate(zip(self._targets, self._condition, strict=True)):
            start = self._starts[shard]
            chunk = max(1, _CHUNK_BYTES // (4 * (targets[0].numel() + condition[0].numel())))  # tasks
            for row in range(0, len(targets), chunk):
                rows = slice(row, row + chunk)
                bad = _first_not_finite(targets[rows], condition[rows], start + row)
                if bad:
                    path = store.show_path(self.folder / _shard_name(shard))
                    raise McdiError(f"{path}: {bad} of the bank; the file is damaged: make the bank again")


def _writing(folder: Path) -> AbstractContextManager[None]:
    busy = f"{store.show_path(folder)}: another process has been writing there for {_LOCK_SECONDS:.0f} s; wait for it to end"
    return store.locked(folder / _LOCK_FILE, _LOCK_SECONDS, busy)


def _whole(value: Any) -> Any:
    """NumPy's integers as Python's, everything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


def _float32(name: str, value: Any) -> Tensor:
    """What was given, on the CPU and as float32."""
    if not isinstance(value, Tensor):
        try:
            value = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        except (TypeError, ValueError) as error:
            raise McdiError(
                f"{name}: {type(value).__name__}, expected a tensor or an array of floating point"
            ) from error
    if not value.is_floating_point():
        raise McdiError(f"{name}: {value.dtype} {list(value.shape)}, expected floating point; convert it")
    return value.detach().to("cpu", torch.float32)


def _digest(targets: Tensor, condition: Tensor) -> str:
    """16 hex digits of a shard's contents."""
    return store.digest(str(list(targets.shape)), targets, str(list(condition.shape)), condition)


def _is_finite(tensor: Tensor) -> bool:
    # One pass without a boolean copy: an entry that is not finite makes the sum so. A sum may overflow: look again.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _first_not_finite(targets: Tensor, condition: Tensor, start: int = 0) -> str:
    """Where the first NaN or infinity is, task indices counted from `start`; empty where there is none."""
    if not _is_finite(targets):
        task, segment = (~torch.isfinite(targets)).flatten(2).any(2).nonzero()[0].tolist()
        return f"targets are not finite in task {start + task}, segment {segment},"
    if not _is_finite(condition):
        task = int((~torch.isfinite(condition)).flatten(1).any(1).nonzero()[0])
        return f"condition is not finite in task {start + task}"
    return ""


def _parse_header(header: Any, path: Path) -> tuple[WeightLayout, int, int, dict[str, Any]]:
    where = store.show_path(path)
    if not isinstance(header, dict) or header.get("kind") != _BANK_KIND:
        raise McdiError(f"{where}: not the header of a trajectory bank; give the folder of a bank")
    store.check_format(path, header.get("format"), *_FORMATS)
    for key in ("num_segments", "condition_width"):
        value = header.get(key)
        if type(value) is not int or not 1 <= value < 2**31:
            raise McdiError(
                f"{where}: {key} is {value!r:.40}, expected a positive integer; correct it or make the bank again"
            )
    if not isinstance(header.get("meta"), dict):
        raise McdiError(f"{where}: meta is {type(header.get('meta')).__name__}, expected a dict; make the bank again")
    try:
        layout = WeightLayout.from_dict(header.get("layout"))
    except McdiError as error:
        raise McdiError(f"{where}: {error}") from error
    return layout, header["num_segments"], header["condition_width"], header["meta"]
