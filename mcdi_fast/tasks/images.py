"""Labelled images and features: what a data set is here, and how it is read from packed zips, folders and files of features.

A source is read whole and checked before any work begins. Nothing is ever extracted to the disk, and no pickle is loaded.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.store import show_path, user_path

PACKED = {
    "tiny-imagenet": "tiny_imagenet_fewshot.zip",
    "cifar10": "cifar10.zip",
    "caltech101": "caltech101.zip",
    "flowers17": "flowers17.zip",
    "pacs": "pacs.zip",
    "digits": "digits_dg.zip",
}
"""Data sets with a name: a packed zip in the folder `images` of the data folder."""
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folders and lists of these names are splits; any other folder above the classes is a domain."""
WHOLE = "all"  # the one split of a data set that has none

Stage = Callable[[str, int, str], contextlib.AbstractContextManager[Any]]
"""Called as stage(name, total, unit): a context with a progress bar that has `update(n)`, as `cli.Stages`."""

_NAMED = 3  # how many of many bad things a message names
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
_MAX_PIXELS = 100_000_000  # of one image: larger than any camera's, and 300 MB once decoded
_MAX_STRIP = 64 * 2**20  # bytes of a strip or meta.json of a packed zip; real strips have less than one MB
_MAX_LIST = 64 * 2**20  # bytes of a split list
_MAX_RATIO = 200  # unpacked to packed bytes of a part of an .npz: a zip bomb has 1000, features rarely 3


@contextlib.contextmanager
def quiet(name: str, total: int, unit: str) -> Iterator[Any]:
    """A `Stage` that shows nothing."""

    class Bar:
        def update(self, count: int = 1) -> None:
            pass

    yield Bar()


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Images or features of one data set, or of one split of it. Rows are sorted by class, and by domain within a class.

    Classes may have different numbers of rows: `counts` and `starts` say where they lie.

    Attributes:
        rows: uint8 [n, side, side, 3] images, or float32 [n, F] features.
        labels: int64 [n], the class of each row, 0 to classes - 1.
        class_names: one a class.
        domains: int64 [n], the domain of each row; None where there are no domains.
        domain_names: one a domain.
    """

    rows: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        rows: Tensor,
        labels: Tensor,
        class_names: Sequence[str] | None = None,
        domains: Tensor | None = None,
        domain_names: Sequence[str] | None = None,
        what: str = "data",
    ) -> LabelledRows:
        """Check the parts and sort the rows.

        Args:
            rows: [n, ...], uint8 or floating, which becomes float32. labels, domains: integers [n].
            class_names, domain_names: "0", "1", … by default.
            what: named in errors.

        Raises:
            McdiError: no rows; parts of different lengths; a label or domain out of range; a class without rows; a name twice; NaN or infinity.
        """
        if rows.ndim < 2 or len(rows) == 0:
            raise McdiError(f"{what}: rows of shape {list(rows.shape)}, expected [n, ...] with n >= 1")
        if rows.dtype != torch.uint8:
            if not rows.is_floating_point():
                raise McdiError(f"{what}: rows of {rows.dtype}, expected uint8 images or floating features")
            rows = rows.float()
            bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten()
            if len(bad):
                raise McdiError(
                    f"{what}: {len(bad)} of {len(rows)} rows hold NaN or infinity (first: row {int(bad[0])}); "
                    "expected finite numbers: make them again"
                )
        labels, class_names = _checked_codes(labels, class_names, len(rows), "label", what)
        order = labels
        if domains is not None:
            domains, domain_names = _checked_codes(domains, domain_names, len(rows), "domain", what)
            order = labels * len(domain_names) + domains
        empty = torch.bincount(labels, minlength=len(class_names)) == 0
        if empty.any():
            raise McdiError(
                f"{what}: class {_some([class_names[i] for i in empty.nonzero().flatten().tolist()])} has no rows; leave it out"
            )
        order = order.argsort(stable=True)
        in_order = bool((order.diff() > 0).all())  # then no copy of what may be gigabytes
        return cls(
            rows if in_order else rows[order],
            labels[order],
            tuple(class_names),
            None if domains is None else domains[order],
            () if domains is None else tuple(domain_names or ()),
        )

    def __len__(self) -> int:
        """Rows, of all classes."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.class_names)

    @cached_property
    def counts(self) -> Tensor:
        """int64 [classes], rows of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [classes], the first row of each class."""
        return self.counts.cumsum(0) - self.counts

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any of the contents."""
        digest = hashlib.sha256()
        for tensor in (self.rows, self.labels, self.domains):
            if tensor is not None:
                tensor = tensor.detach().cpu().contiguous()
                digest.update(repr((tensor.dtype, list(tensor.shape))).encode() + tensor.numpy().data)
        digest.update(repr((self.class_names, self.domain_names)).encode())
        return digest.hexdigest()[:16]

    def select(
        self, classes: Sequence[str | int] | None = None, domains: Sequence[str | int] | None = None
    ) -> LabelledRows:
        """The rows of some classes and some domains, by name or number, renumbered in the order given; all by default.

        Raises:
            McdiError: a class or domain that is not there or given twice; a class without rows in those domains.
        """
        class_of = _renumbered(classes, self.class_names, "class")
        labels, keep = class_of[self.labels], class_of[self.labels] >= 0
        names, places = _names_at(class_of, self.class_names), self.domains
        domain_names = self.domain_names
        if domains is not None:
            if places is None:
                raise McdiError("this data has no domains to choose from; leave the domains out")
            domain_of = _renumbered(domains, self.domain_names, "domain")
            places = domain_of[places]
            keep &= places >= 0
            domain_names = _names_at(domain_of, self.domain_names)
        what = f"classes {_some(names)}, domains {_some(domain_names)}" if domain_names else f"classes {_some(names)}"
        return LabelledRows.of(
            self.rows[keep], labels[keep], names, None if places is None else places[keep], domain_names, what
        )

    def with_rows(self, rows: Tensor) -> LabelledRows:
        """The same labels and domains with other rows [n, ...]: the features of images."""
        assert len(rows) == len(self), f"{len(rows)} rows for {len(self)} labels"
        return replace(self, rows=rows)

    def check_counts(self, least: int, what: str) -> None:
        """Raise McdiError, naming the classes, unless every class has at least so many rows."""
        few = (self.counts < least).nonzero().flatten().tolist()
        if few:
            listed = _some([f"{self.class_names[i]} ({int(self.counts[i])})" for i in few])
            raise McdiError(
                f"{what}: {len(few)} of {self.num_classes} classes have fewer than {least} rows: {listed}; "
                "leave them out, or ask for fewer shots and queries"
            )


def join(parts: Sequence[LabelledRows]) -> LabelledRows:
    """All rows of several parts (the splits of a data set, say). Classes and domains of one name become one.

    Raises:
        McdiError: rows of different shapes; domains in some parts only.
    """
    shapes = sorted({str(list(part.rows.shape[1:])) for part in parts})
    if len(shapes) != 1:
        raise McdiError(f"parts with rows of shapes {', '.join(shapes)}: expected one shape; read them at one side")
    if len({part.domains is None for part in parts}) != 1:
        raise McdiError("some parts have domains and some have none: expected them in all or none")
    class_names = list(dict.fromkeys(name for part in parts for name in part.class_names))
    domain_names = list(dict.fromkeys(name for part in parts for name in part.domain_names))
    labels = [torch.tensor([class_names.index(name) for name in part.class_names])[part.labels] for part in parts]
    domains = [
        torch.tensor([domain_names.index(name) for name in part.domain_names])[part.domains]
        for part in parts
        if part.domains is not None
    ]
    return LabelledRows.of(
        torch.cat([part.rows for part in parts]),
        torch.cat(labels),
        class_names,
        torch.cat(domains) if domains else None,
        domain_names,
    )


def check_class_splits(splits: Mapping[str, LabelledRows], what: str) -> None:
    """Raise McdiError, naming them, if a class is in two splits: few-shot tasks are tested on new classes."""
    seen: dict[str, str] = {}
    twice = [
        f"{name} ({first}, {split})"
        for split, part in splits.items()
        for name in part.class_names
        if (first := seen.setdefault(name, split)) != split
    ]
    if twice:
        raise McdiError(
            f"{what}: {len(twice)} classes are in two splits: {_some(twice)}; expected each class in one split only"
        )


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(f"{name if name.isprintable() else repr(name):.60}" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _checked_codes(
    codes: Tensor, names: Sequence[str] | None, rows: int, kind: str, what: str
) -> tuple[Tensor, Sequence[str]]:
    """int64 [n] codes within the names, and the names."""
    if codes.ndim != 1 or len(codes) != rows or codes.is_floating_point() or codes.is_complex():
        raise McdiError(f"{what}: {kind}s are {codes.dtype} {list(codes.shape)}, expected integers [{rows}], one a row")
    codes = codes.long()
    low, high = int(codes.min()), int(codes.max())
    if names is None:
        names = [str(i) for i in range(high + 1)] if 0 <= high < 2**20 else []
    if low < 0 or high >= len(names):
        raise McdiError(f"{what}: {kind}s from {low} to {high}, expected 0 to {max(len(names) - 1, 0)}")
    if len(set(names)) != len(names):
        raise McdiError(f"{what}: a {kind} name stands twice in {_some(sorted(names))}; give each its own")
    return codes, names


def _renumbered(chosen: Sequence[str | int] | None, names: tuple[str, ...], kind: str) -> Tensor:
    """int64 [names], the new number of each, -1 where it was not chosen."""
    new = torch.full((len(names),), -1)
    for number, choice in enumerate(range(len(names)) if chosen is None else chosen):
        old = choice if isinstance(choice, int) else names.index(choice) if choice in names else -1
        if not 0 <= old < len(names):
            raise McdiError(f"{kind} {choice!r:.60}: not among the {len(names)} there are ({_some(names)})")
        if new[old] >= 0:
            raise McdiError(f"{kind} {choice!r:.60}: given twice; name each once")
        new[old] = number
    return new


def _names_at(new: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    order = sorted((number, name) for number, name in zip(new.tolist(), names, strict=True) if number >= 0)
    return tuple(name for _, name in order)


def load(
    source: str | os.PathLike[str],
    *,
    data_dir: Path | None = None,
    side: int = 128,
    splits: Path | None = None,
    stage: Stage = quiet,
) -> dict[str, LabelledRows]:
    """Read a data set: its splits by name, or {"all": rows} where it has none. A split holds only its own classes, numbered anew.

    Args:
        source: what to read.
            - A name of `PACKED`: that zip under `data_dir`, else under the folder that MCDI_DATA_DIR names. Images keep the side they have there.
            - A packed zip (the README of that folder has the format).
            - A folder with a sub-folder a class. Above the classes may be a level of splits (train, val, test) or of domains (any other names).
            - A file of ready-made features, `.npz` or `.safetensors`: `features` float [n, F], `labels` [n], optionally `domains` [n] and
              `splits` [n]. Each is integers with names beside it (`class_names`, `domain_names`, `split_names`; lists in JSON in the metadata of
              a safetensors file) or, in an .npz, the names themselves.
        side: of images out of a folder: the centre square, scaled.
        splits: a folder of lists `train`, `val`, `test`, as `.txt` (a class a line) or `.csv` (a header with `label`; with `filename` too,
            the images lie in one folder). Without it, lists in the source folder or its sub-folder `splits` are used. Classes in no list
            are left out.
        stage: shows the progress of reading a folder.

    Raises:
        McdiError: a source that is not there or is damaged; unreadable images, named and counted; a class without images; a class in two
            lists; a name that leads out of the folder; features that are not finite; labels out of range.
    """
    path = _named_zip(str(source), data_dir) if str(source) in PACKED else user_path(source)
    readers = {".zip": _read_packed, ".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.is_dir():
        with _naming(path):
            return _read_folder(path, side, splits, stage)
    if path.suffix.lower() not in readers or not path.is_file():
        found = f"a file of kind {path.suffix!r}" if path.exists() else "no such file or folder"
        raise McdiError(
            f"{show_path(path)}: {found}; expected a folder of images, a packed .zip, features as .npz or .safetensors, "
            f"or one of {', '.join(PACKED)}"
        )
    with _naming(path):
        return readers[path.suffix.lower()](path)


def _named_zip(name: str, data_dir: Path | None) -> Path:
    option = "MCDI_DATA_DIR" if data_dir is None else "--data-dir"
    place = os.environ.get("MCDI_DATA_DIR") if data_dir is None else data_dir
    if not place:
        raise McdiError(
            f"{name}: no data folder; set MCDI_DATA_DIR or --data-dir to the folder with images/{PACKED[name]}"
        )
    path = user_path(place) / "images" / PACKED[name]
    if not path.is_file():
        raise McdiError(f"{show_path(path)}: not there, expected because {option} is {show_path(place)}; put it there")
    return path


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise McdiError(
            "reading images needs pillow, which is not installed; run pip install 'mcdi_fast[train]'"
        ) from error
    return Image


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a library finds wrong with a file becomes one line with its name."""
    try:
        yield
    except McdiError:
        raise
    except Exception as error:  # zipfile, zlib, numpy, safetensors and Pillow have a dozen types for a damaged file
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise McdiError(f"{show_path(path)}: damaged ({reason}); make or copy it again") from error


def _split_up(
    rows: Tensor,
    labels: Tensor,
    class_names: Sequence[str] | None,
    domains: tuple[Tensor, Sequence[str] | None] | None,
    splits: tuple[Tensor, Sequence[str] | None] | None,
    what: str,
) -> dict[str, LabelledRows]:
    """All rows, checked, as one `LabelledRows` a split."""
    places, domain_names = domains or (None, None)
    if splits is None:
        return {WHOLE: LabelledRows.of(rows, labels, class_names, places, domain_names, what)}
    split, split_names = _checked_codes(*splits, len(rows), "split", what)
    LabelledRows.of(rows, labels, class_names, places, domain_names, what)
    parts = {}
    for number, name in enumerate(split_names):
        keep = split == number
        if not keep.any():
            raise McdiError(f"{what}: split {name!r:.60} has no rows; leave it out")
        present, own = labels[keep].unique(return_inverse=True)
        own_names = [str(i) if class_names is None else class_names[i] for i in present.tolist()]
        parts[SPLIT_NAMES.get(name, name)] = LabelledRows.of(
            rows[keep], own, own_names, None if places is None else places[keep], domain_names, what
        )
    return parts


def _numbered(names: Sequence[str], order: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
    """Names as numbers, and the names in that order: of `order`, or of first appearance."""
    known = {name: number for number, name in enumerate(order if order is not None else dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names]), list(known)


# --- packed zips ---


def _read_packed(path: Path) -> dict[str, LabelledRows]:
    pillow, what = _pillow(), show_path(path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        meta = _packed_meta(archive, members, what)
        size, columns, strips = meta["size"], meta["tile_columns"], meta["strips"]
        tiles, numbers, domains, splits = list[np.ndarray](), list[int](), list[str](), list[str]()
        for strip in strips:
            data = archive.read(_member(members, strip["strip"], what))
            image = pillow.open(io.BytesIO(data), formats=["JPEG", "PNG"])
            count = strip["count"]
            lines = -(-count // columns)
            if image.size != (columns * size, lines * size):
                raise McdiError(
                    f"{what}: strip {strip['strip']!r:.80} is {image.size[0]}x{image.size[1]} pixels, expected "
                    f"{columns * size}x{lines * size} for {count} tiles; pack it again"
                )
            pixels = np.asarray(image.convert("RGB")).reshape(lines, size, columns, size, 3).swapaxes(1, 2)
            tiles.append(pixels.reshape(lines * columns, size, size, 3)[:count])
            numbers += [strip["label"]] * count
            domains += [strip.get("domain", "")] * count
            splits += [strip.get("split", "")] * count
    return _split_up(
        torch.from_numpy(np.concatenate(tiles)),
        torch.tensor(numbers),
        meta["class_names"],
        _numbered(domains) if "domain" in strips[0] else None,
        _numbered(splits) if "split" in strips[0] else None,
        what,
    )


def _member(members: Mapping[str, zipfile.ZipInfo], name: str, what: str) -> zipfile.ZipInfo:
    info = members.get(name)
    if info is None:
        raise McdiError(f"{what}: {name!r:.80} is not in it; it is no packed zip of images, or truncated")
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
    if not stored or info.file_size > _MAX_STRIP:
        raise McdiError(
            f"{what}: {name!r:.80} takes {info.compress_size} bytes for {info.file_size}, expected at most {_MAX_STRIP}, stored; pack it again"
        )
    return info


def _packed_meta(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], what: str) -> dict[str, Any]:
    meta = json.loads(archive.read(_member(members, "meta.json", what)))

    def holds(entry: Any, **kinds: type) -> bool:
        return isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())

    good = holds(meta, size=int, tile_columns=int, class_names=list, strips=list)
    good = good and 1 <= meta["size"] <= 1024 and 1 <= meta["tile_columns"] <= 1024 and len(meta["strips"]) > 0
    good = good and all(type(name) is str for name in meta["class_names"])
    if good:
        extra = {key: str for key in ("domain", "split") if key in meta["strips"][0]}  # in all strips, or in none
        good = all(
            holds(strip, strip=str, label=int, count=int, **extra)
            and 1 <= strip["count"] * meta["size"] ** 2 <= _MAX_PIXELS
            for strip in meta["strips"]
        )
    if not good:
        raise McdiError(
            f"{what}: meta.json does not describe strips of images (size, tile_columns, class_names, strips with strip, label, count); "
            "pack it again"
        )
    return meta


# --- files of features ---


def _read_npz(path: Path) -> dict[str, LabelledRows]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > _MAX_RATIO * max(info.compress_size, 1000):
                raise McdiError(
                    f"{show_path(path)}: {info.filename!r:.60} unpacks from {info.compress_size} to {info.file_size} bytes; refused as a zip bomb"
                )
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    names = {}
    for name, column in list(columns.items()):
        if column.dtype.kind == "U":
            names[name] = column.reshape(-1).tolist()
            del columns[name]
        elif column.dtype.kind not in "iuf":
            raise McdiError(f"{show_path(path)}: {name!r:.60} holds {column.dtype}, expected numbers or text")
    numbers = {name: torch.from_numpy(np.ascontiguousarray(_native(column))) for name, column in columns.items()}
    return _features(path, numbers, names)


def _native(column: np.ndarray) -> np.ndarray:
    """In a dtype that torch has: native byte order, int64 for integers."""
    return column.astype(np.int64 if column.dtype.kind in "iu" else column.dtype.newbyteorder("="))


def _read_safetensors(path: Path) -> dict[str, LabelledRows]:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        names = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name.endswith("_names")}
    for name, listed in names.items():
        if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
            raise McdiError(f"{show_path(path)}: {name!r:.60} in its metadata is no JSON list of names")
    return _features(path, numbers, names)


def _features(path: Path, numbers: dict[str, Tensor], names: dict[str, list[str]]) -> dict[str, LabelledRows]:
    what = show_path(path)
    features = numbers.get("features")
    if features is None or features.ndim != 2 or not features.is_floating_point():
        found = "absent" if features is None else f"{features.dtype} {list(features.shape)}"
        raise McdiError(f"{what}: features are {found}, expected floating numbers [n, F]")

    def column(name: str, names_of: str) -> tuple[Tensor, Sequence[str] | None] | None:
        if name in names:
            order = names.get(names_of) or sorted(set(names[name]))
            unknown = set(names[name]) - set(order)
            if unknown:
                raise McdiError(f"{what}: {name} hold {_some(sorted(unknown))}, not among {names_of}")
            return _numbered(names[name], order)
        return None if name not in numbers else (numbers[name], names.get(names_of))

    labels = column("labels", "class_names")
    if labels is None:
        raise McdiError(f"{what}: labels are absent, expected integers [n] or names [n]")
    return _split_up(features, *labels, column("domains", "domain_names"), column("splits", "split_names"), what)


# --- folders ---


class _File(NamedTuple):
    path: Path
    name: str  # of its class
    domain: str = ""
    split: str = ""


def _read_folder(folder: Path, side: int, splits: Path | None, stage: Stage) -> dict[str, LabelledRows]:
    if not 1 <= side <= 1024:
        raise McdiError(f"side = {side}: expected 1 to 1024 pixels")
    lists = _find_lists(folder, splits)
    files = _listed_files(folder, lists) or _files_of(folder)
    if lists:
        files = _by_lists(folder, files, lists)
    images = _read_images(folder, files, side, stage)
    labels, class_names = _numbered([file.name for file in files], sorted({file.name for file in files}))
    return _split_up(
        images,
        labels,
        class_names,
        _numbered([file.domain for file in files]) if files[0].domain else None,
        _numbered([file.split for file in files]) if files[0].split else None,
        show_path(folder),
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    """Images right in a folder, or in its one sub-folder `images` (how Tiny ImageNet comes)."""
    found = sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in _SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )
    inner = folder / "images"
    return _images_in(inner) if not found and inner.is_dir() else found


def _files_of(folder: Path) -> list[_File]:
    """Every image of class folders, or of class folders one level down, where the level above is of splits or domains."""
    classes = [(sub, _images_in(sub)) for sub in _folders(folder) if sub.name != "splits"]
    if any(images for _, images in classes):
        _no_empty(folder, classes)
        return [_File(image, sub.name) for sub, images in classes for image in images]
    files = []
    is_split = all(above.name.lower() in SPLIT_NAMES for above, _ in classes)
    for above, _ in classes:
        inner = [(sub, _images_in(sub)) for sub in _folders(above)]
        _no_empty(above, inner)
        level = ("", SPLIT_NAMES[above.name.lower()]) if is_split else (above.name, "")
        files += [_File(image, sub.name, *level) for sub, images in inner for image in images]
    if not files:
        raise McdiError(
            f"{show_path(folder)}: no images in class sub-folders; expected CLASS/image.jpg, DOMAIN/CLASS/image.jpg or train/CLASS/image.jpg"
        )
    return files


def _no_empty(folder: Path, classes: Sequence[tuple[Path, Sequence[Path]]]) -> None:
    empty = [sub.name for sub, images in classes if not images]
    if empty or not classes:
        raise McdiError(
            f"{show_path(folder)}: {len(empty) or 'all'} class folders hold no image ({_some(empty)}); put images there or remove them"
        )


def _find_lists(folder: Path, splits: Path | None) -> dict[str, Path]:
    """The split lists, train first; none are asked for where `splits` is None."""
    places = [folder, folder / "splits"] if splits is None else [splits]
    for place in places:
        found: dict[str, Path] = {}
        for name, split in SPLIT_NAMES.items():
            for path in (place / f"{name}.txt", place / f"{name}.csv"):
                if path.is_file():
                    if split in found:
                        raise McdiError(
                            f"{show_path(path)}: {found[split].name} is there too; keep one list of {split}"
                        )
                    found[split] = path
        if found:
            return found
    if splits is not None:
        raise McdiError(f"{show_path(splits)}: holds no split list; expected train, val and test as .txt or .csv")
    return {}


def _read_list(path: Path) -> list[dict[str, str]]:
    """Rows of a split list: `label`, and `filename` where a csv has it."""
    with _naming(path):
        if path.stat().st_size > _MAX_LIST:
            raise McdiError(
                f"{show_path(path)}: {path.stat().st_size} bytes, expected at most {_MAX_LIST}; is it a list?"
            )
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            rows = [{"label": line.strip()} for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(not row.get("label") for row in rows):
        raise McdiError(f"{show_path(path)}: expected a class a line, or a csv with a column `label` (and `filename`)")
    for row in rows:
        for name in (row["label"], row.get("filename") or "x"):
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise McdiError(f"{show_path(path)}: {name!r:.80} leads out of the folder; expected a name below it")
    return rows


def _listed_files(folder: Path, lists: Mapping[str, Path]) -> list[_File]:
    """The images that lists name one by one, where they lie in one folder (how Mini-ImageNet comes); else none."""
    rows = [(split, row) for split, path in lists.items() for row in _read_list(path) if row.get("filename")]
    base = next((b for b in (folder, folder / "images") if rows and (b / rows[0][1]["filename"]).is_file()), None)
    if base is None:
        return []
    files = [_File(base / row["filename"], row["label"], split=split) for split, row in rows]
    missing = [file.path.name for file in files if not file.path.is_file()]
    if missing:
        raise McdiError(
            f"{show_path(base)}: {len(missing)} of {len(files)} listed images are not there: {_some(missing)}"
        )
    return files


def _by_lists(folder: Path, files: Sequence[_File], lists: Mapping[str, Path]) -> list[_File]:
    """The files of the classes that lists name, each with its split."""
    split_of: dict[str, str] = {}
    known = {file.name for file in files}
    for split, path in lists.items():
        names = list(dict.fromkeys(row["label"] for row in _read_list(path)))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise McdiError(
                f"{show_path(path)}: {len(unknown)} of {len(names)} classes are not in {show_path(folder)}: {_some(unknown)}"
            )
        twice = [name for name in names if name in split_of]
        if twice:
            raise McdiError(
                f"{show_path(path)}: {len(twice)} classes are in the list of {split_of[twice[0]]} too: {_some(twice)}; keep each in one"
            )
        split_of |= dict.fromkeys(names, split)
    return [file._replace(split=split_of[file.name]) for file in files if file.name in split_of]


def _read_images(folder: Path, files: Sequence[_File], side: int, stage: Stage) -> Tensor:
    _pillow()
    images = np.empty((len(files), side, side, 3), np.uint8)
    bad = []

    def read(number: int) -> str | None:
        try:
            images[number] = _decode(files[number].path, side)
        except Exception as error:  # Pillow has many types for a damaged image
            reason = " ".join(str(error).split())[:80] or type(error).__name__
            return f"{files[number].path.relative_to(folder)} ({reason})"
        return None

    # Pillow decodes and scales outside the interpreter's lock
    with stage("images", len(files), "images") as bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for failure in pool.map(read, range(len(files))):
            if failure:
                bad.append(failure)
            bar.update()
    if bad:
        raise McdiError(
            f"{show_path(folder)}: {len(bad)} of {len(files)} images cannot be read: {_some(bad)}; mend or remove them"
        )
    return torch.from_numpy(images)


def _decode(path: Path, side: int) -> np.ndarray:
    """The centre square of an image of any size and mode: uint8 [side, side, 3]."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=_FORMATS) as image:
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at half, a quarter or an eighth of its size
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] in "IF":  # 16 bits a pixel: convert would cut them off at 255
            grey = np.asarray(upright, np.float32)
            upright = Image.fromarray((grey / (257 if grey.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        edge = min(upright.size)
        left, top = (upright.width - edge) / 2, (upright.height - edge) / 2
        box = (left, top, left + edge, top + edge)
        return np.asarray(upright.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box))
