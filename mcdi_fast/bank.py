"""Trajectories on disk: for every task its k local targets and its condition, in a folder that grows by shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast import store
from mcdi_fast.errors import McdiError
from mcdi_fast.weights import WeightLayout

_HEADER_FILE = "bank.json"
_BANK_KIND = "trajectory-bank"
_SHARD_KIND = "bank-shard"
_CHUNK_BYTES = 64 * 2**20


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


class TrajectoryBank:
    """A folder of trajectories: `bank.json` and shards of `targets` [n, k, N, D] and `condition` [n, N, C], float32.

    Made by `create` or `open`. Shards are memory-mapped; only rows that are asked for are read. One process may write
    at a time.

    From trajectories of your own, here 10 tasks with k = 3 local targets (start to end) of a linear layer, and a
    condition of width C = 8 for each of its N = 5 tokens:

    >>> import tempfile, torch
    >>> folder, net = tempfile.mkdtemp(), torch.nn.Linear(4, 5)
    >>> weight, bias, condition = torch.randn(10, 3, 5, 4), torch.randn(10, 3, 5), torch.randn(10, 5, 8)

    >>> layout = WeightLayout.from_module(net)
    >>> bank = TrajectoryBank.create(folder, layout, num_segments=3, condition_width=8)
    >>> bank.append(layout.pack_batch({"weight": weight, "bias": bias}), condition)

    >>> targets, condition = bank.gather(torch.tensor([7, 0]))
    >>> len(bank), targets.shape, condition.shape
    (10, torch.Size([2, 3, 5, 5]), torch.Size([2, 5, 8]))

    Attributes:
        folder: where it is.
        layout: of the targets.
        num_segments: k.
        condition_width: C.
        meta: provenance, free JSON; part of the bank's identity.
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
        self._digest = hashlib.sha256(json.dumps(layout.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        self._targets: list[Tensor] = []
        self._condition: list[Tensor] = []
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
        header = {
            "format": store.FORMAT_VERSION,
            "kind": _BANK_KIND,
            "num_segments": num_segments,
            "condition_width": condition_width,
            "layout": layout.to_dict(),
            "meta": dict(meta or {}),
        }
        path = folder / _HEADER_FILE
        _parse_header(header, path)
        if not path.exists():
            stray = sorted(folder.glob("shard-*.safetensors"))
            if stray:
                raise McdiError(
                    f"{store.show_path(stray[0])}: a shard without {_HEADER_FILE}; "
                    "choose an empty folder or restore that file"
                )
            store.write_json(path, header)
            return cls.open(folder)
        found = store.read_json(path)
        _parse_header(found, path)
        for key, value in json.loads(store.dumps(header, path)).items():  # tuples in meta become lists, as in the file
            if found.get(key) != value:
                raise McdiError(
                    f"{store.show_path(path)}: a bank with another {key} is there "
                    f"({_difference(found.get(key), value)}); "
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
        folder = Path(folder)
        path = folder / _HEADER_FILE
        bank = cls(folder, *_parse_header(store.read_json(path), path))
        try:
            present = {
                name for name in os.listdir(folder) if name.startswith("shard-") and name.endswith(".safetensors")
            }
        except OSError as error:
            raise McdiError(
                f"cannot read {store.show_path(folder)}: {error.strerror}; check its permissions"
            ) from error
        for number in range(len(present)):
            if _shard_name(number) not in present:
                expected = {_shard_name(i) for i in range(len(present))}
                other = sorted(present - expected)[0]
                raise McdiError(
                    f"{store.show_path(folder / _shard_name(number))}: missing, expected because {other!r} is there; "
                    "restore it, or remove the shards behind the gap"
                )
            bank._map_shard(number)
        return bank

    def _map_shard(self, number: int) -> None:
        """Check shard `number` and add it to the bank."""
        path = self.folder / _shard_name(number)
        tensors, meta = store.load_tensors(path, _SHARD_KIND)
        if meta.get("layout") != self._digest:
            raise McdiError(
                f"{store.show_path(path)}: layout {meta.get('layout')!r:.40}, expected {self._digest!r} as the bank's; "
                "it belongs to another bank: remove it"
            )
        count = len(tensors["condition"]) if "condition" in tensors and tensors["condition"].ndim else 0
        for name, shape in self._shapes(count).items():
            tensor = tensors.get(name)
            found = f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "missing"
            if tensor is None or tensor.shape != shape or tensor.dtype != torch.float32 or not count:
                raise McdiError(
                    f"{store.show_path(path)}: {name} is {found}, expected torch.float32 {list(shape)} "
                    "with at least one task; it belongs to another bank: remove it"
                )
        self._targets.append(tensors["targets"])
        self._condition.append(tensors["condition"])
        self._starts.append(self._starts[-1] + count)

    def _shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        tokens, width = self.layout.num_tokens, self.layout.width
        return {
            "targets": (count, self.num_segments, tokens, width),
            "condition": (count, tokens, self.condition_width),
        }

    def __len__(self) -> int:
        """Tasks."""
        return self._starts[-1]

    @property
    def num_shards(self) -> int:
        """Shards, one for each `append`."""
        return len(self._targets)

    def append(self, targets: Tensor, condition: Tensor) -> None:
        """Write one shard, atomically: after a kill it is there whole or not at all.

        Args:
            targets: float32 [n, k, N, D], local targets theta_d … theta_kd (method: section 1), any device.
            condition: float32 [n, N, C].

        Raises:
            McdiError: other shapes or dtypes, n = 0, an entry that is not finite (names task and segment), a full disk.
        """
        given = {"targets": targets.detach().cpu(), "condition": condition.detach().cpu()}
        count = targets.shape[0] if targets.ndim else 0
        for name, shape in self._shapes(count).items():
            tensor = given[name]
            if tensor.shape != shape or tensor.dtype != torch.float32 or not count:
                raise McdiError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)}, expected torch.float32 {list(shape)} "
                    "with at least one task; pack the weights by this bank's layout"
                )
        bad = _first_not_finite(given["targets"], given["condition"])
        if bad:
            raise McdiError(f"{bad} of the {count} given; drop this task or prepare it again")
        path = self.folder / _shard_name(self.num_shards)
        if path.exists():
            raise McdiError(
                f"{store.show_path(path)}: written by another process meanwhile; let one process write a bank"
            )
        store.save_tensors(path, given, {"layout": self._digest}, _SHARD_KIND)
        self._map_shard(self.num_shards)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tasks by index, in that order; only their rows are read from disk.

        Args:
            index: int64 [B], 0 to len(bank) - 1; repeats are fine.

        Returns:
            targets float32 [B, k, N, D] and condition float32 [B, N, C], on the CPU, copies.

        Raises:
            McdiError: another shape or dtype; an index out of range.
        """
        if index.ndim != 1 or index.dtype != torch.int64:
            raise McdiError(f"index: {index.dtype} {list(index.shape)}, expected torch.int64 [B]; convert it")
        index = index.cpu()
        outside = (index < 0) | (index >= len(self))
        if bool(outside.any()):
            raise McdiError(
                f"index: task {int(index[outside][0])} of a bank of {len(self)}, expected 0 to {len(self) - 1}"
            )
        shapes = self._shapes(len(index))
        targets, condition = torch.empty(shapes["targets"]), torch.empty(shapes["condition"])
        starts = torch.tensor(self._starts)
        shard_of = torch.searchsorted(starts, index, right=True) - 1
        for shard in shard_of.unique().tolist():
            places = (shard_of == shard).nonzero()[:, 0]
            rows = index[places] - starts[shard]
            targets[places] = self._targets[shard][rows]
            condition[places] = self._condition[shard][rows]
        return targets, condition

    def check_finite(self) -> None:
        """Read every value once. Raises McdiError naming shard, task (of the bank) and segment of the first NaN."""
        shapes = self._shapes(1)
        chunk = max(1, _CHUNK_BYTES // (4 * sum(torch.Size(shape).numel() for shape in shapes.values())))  # tasks
        for shard in range(self.num_shards):
            start = self._starts[shard]
            for row in range(0, self._starts[shard + 1] - start, chunk):
                rows = slice(row, row + chunk)
                bad = _first_not_finite(self._targets[shard][rows], self._condition[shard][rows], start + row)
                if bad:
                    path = store.show_path(self.folder / _shard_name(shard))
                    raise McdiError(f"{path}: {bad} of the bank; the file is damaged: make the bank again")


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
    if header.get("format") != store.FORMAT_VERSION:
        raise McdiError(
            f"{where}: made by format {header.get('format')!r:.40}, this mcdi_fast reads {store.FORMAT_VERSION}; "
            "use the version that made it, or make it again"
        )
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


def _difference(found: Any, expected: Any) -> str:
    """The first differing field of two headers' values, for a message."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                return f"{key!r:.40}: {found.get(key)!r:.60}, expected {expected.get(key)!r:.60}"
    return f"{found!r:.60}, expected {expected!r:.60}"
