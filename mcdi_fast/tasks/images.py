"""Labelled images and features: what a data set is here, and how it is read from packed zips, folders and files of features.

A source is read whole and checked before any work begins. Nothing is ever extracted to the disk, and no pickle is loaded.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from mcdi_fast.errors import McdiError, needs, reason_of
from mcdi_fast.store import MAX_JSON_BYTES, digest, show_path, user_path
from mcdi_fast.tasks import Stage, no_stage

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

Column = Tensor | Sequence[str]  # one a row: int64 [n], or names

_COLUMNS = {"class": "labels", "domain": "domains", "split": "splits"}  # in a source; names of each: class_names, …
_NAMED = 3  # how many of many bad things a message names
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
_MAX_PIXELS = 100_000_000  # of one image: larger than any camera's, and 300 MB once decoded
_MAX_LIST = 64 * 2**20  # bytes of a split list
_MAX_RATIO = 200  # unpacked to packed bytes of a part of a zip: a zip bomb has 1000, features rarely 3


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
        labels: Column,
        class_names: Sequence[str] | None = None,
        domains: Column | None = None,
        domain_names: Sequence[str] | None = None,
        what: str = "data",
    ) -> LabelledRows:
        """Check the parts and sort the rows.

        Args:
            rows: [n, ...], uint8 or floating, which becomes float32.
            labels, domains: one a row, integers [n] or names.
            class_names, domain_names: of the integers "0", "1", … by default; of names those there are, classes sorted.
            what: named in errors.

        Raises:
            McdiError: no rows; parts of different lengths; a label or domain out of range; a class without rows; a name twice; NaN or infinity.
        """
        names = {"class_names": class_names, "domain_names": domain_names}
        return _by_split(what, rows, labels, domains, **names)[WHOLE]

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
    def cells(self) -> Tensor:
        """int64 [classes, domains], rows of each class in each domain; one domain where there are none."""
        width = max(len(self.domain_names), 1)
        domain = 0 if self.domains is None else self.domains
        return torch.bincount(self.labels * width + domain, minlength=self.num_classes * width).view(-1, width)

    @cached_property
    def places(self) -> Tensor:
        """int64 [n], the place of each row among those of its class and domain, from 0."""
        sizes = self.cells.flatten()
        return torch.arange(len(self)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any of the contents."""
        tensors = [tensor for tensor in (self.rows, self.labels, self.domains) if tensor is not None]
        parts = (part for tensor in tensors for part in (repr((tensor.dtype, list(tensor.shape))), tensor))
        return digest(*parts, repr((self.class_names, self.domain_names)))

    def select(
        self, classes: Sequence[str | int] | None = None, domains: Sequence[str | int] | None = None
    ) -> LabelledRows:
        """The rows of some classes and some domains, by name or number, renumbered in the order given; all by default.

        Raises:
            McdiError: a class or domain that is not there or given twice; a class without rows in those domains.
        """
        class_of, names = _chosen(classes, self.class_names, "class")
        labels, places, domain_names = class_of[self.labels], self.domains, list(self.domain_names)
        keep = labels >= 0
        if domains is not None:
            if places is None:
                raise McdiError("this data has no domains to choose from; leave the domains out")
            domain_of, domain_names = _chosen(domains, self.domain_names, "domain")
            places = domain_of[places]
            keep &= places >= 0
        what = f"classes {_some(names)}" + (f", domains {_some(domain_names)}" if domain_names else "")
        return LabelledRows.of(
            self.rows[keep], labels[keep], names, None if places is None else places[keep], domain_names, what
        )

    def rows_where(self, keep: Tensor) -> LabelledRows:
        """Some of the rows, bool [n]; every class keeps at least one."""
        domains = None if self.domains is None else self.domains[keep]
        return replace(self, rows=self.rows[keep], labels=self.labels[keep], domains=domains)

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

    def column(codes: str, names: str) -> tuple[list[str], list[str]]:
        every = [getattr(part, names)[i] for part in parts for i in getattr(part, codes).tolist()]
        return every, list(dict.fromkeys(name for part in parts for name in getattr(part, names)))

    domains = (None, None) if parts[0].domains is None else column("domains", "domain_names")
    return LabelledRows.of(torch.cat([part.rows for part in parts]), *column("labels", "class_names"), *domains)


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


def _by_split(
    what: str, rows: Tensor, labels: Column, domains: Column | None = None, splits: Column | None = None, **names: Any
) -> dict[str, LabelledRows]:
    """What every source becomes: its columns, of one row each, checked, sorted and divided into splits. names: class_names, …"""
    n = len(rows) if rows.ndim else 0
    if rows.ndim < 2 or n == 0:
        raise McdiError(f"{what}: rows of shape {list(rows.shape)}, expected [n, ...] with n >= 1")
    if rows.dtype != torch.uint8:
        if not rows.is_floating_point():
            raise McdiError(f"{what}: rows of {rows.dtype}, expected uint8 images or floating features")
        rows = rows.float()
        bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten()
        if len(bad):
            raise McdiError(
                f"{what}: {len(bad)} of {n} rows hold NaN or infinity (first: row {int(bad[0])}); "
                "expected finite numbers: make them again"
            )
    label, class_names = _codes("class", labels, names, n, what)
    domain, domain_names = (None, ()) if domains is None else _codes("domain", domains, names, n, what)
    split, split_names = (label * 0, (WHOLE,)) if splits is None else _codes("split", splits, names, n, what)
    order = (label if domain is None else label * len(domain_names) + domain).argsort(stable=True)
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(split_names):
        numbers.setdefault(SPLIT_NAMES.get(name.lower(), name), []).append(number)
    parts = {}
    for name, chosen in numbers.items():
        at = order[torch.isin(split[order], torch.tensor(chosen))]
        present, own = label[at].unique(return_inverse=True)
        in_order = len(at) == n and bool((at.diff() > 0).all())  # then no copy of what may be gigabytes
        parts[name] = LabelledRows(
            rows if in_order else rows[at],
            own,
            tuple(class_names[i] for i in present.tolist()),
            None if domain is None else domain[at],
            domain_names,
        )
    return parts


def _codes(
    kind: str, column: Column, all_names: Mapping[str, Any], rows: int, what: str
) -> tuple[Tensor, tuple[str, ...]]:
    """int64 [rows], numbers of names, and the names."""
    called, names = _COLUMNS[kind], all_names.get(f"{kind}_names")
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise McdiError(f"{what}: {kind}_names are {names!r:.60}, expected a list of names")
    if not isinstance(column, Tensor):
        if names is None:
            names = sorted(set(column)) if kind == "class" else list(dict.fromkeys(column))
        known = {name: number for number, name in enumerate(names)}
        unknown = sorted(set(column) - set(known))
        if unknown:
            raise McdiError(f"{what}: {called} hold {_some(unknown)}, not among {kind}_names")
        column = torch.tensor([known[name] for name in column])
    if column.ndim != 1 or len(column) != rows or column.is_floating_point() or column.is_complex():
        raise McdiError(
            f"{what}: {called} are {column.dtype} {list(column.shape)}, expected integers [{rows}], one a row"
        )
    column = column.long()
    low, high = int(column.min()), int(column.max())
    if names is None:
        names = [str(i) for i in range(high + 1)] if 0 <= high < 2**20 else []
    if low < 0 or high >= len(names):
        raise McdiError(f"{what}: {called} from {low} to {high}, expected 0 to {max(len(names) - 1, 0)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise McdiError(f"{what}: {kind} {_some(twice)} stands twice in {kind}_names; give each its own name")
    empty = [names[i] for i in (torch.bincount(column, minlength=len(names)) == 0).nonzero().flatten().tolist()]
    if empty and kind != "domain":
        raise McdiError(f"{what}: {kind} {_some(empty)} has no rows; leave it out")
    return column, tuple(names)


def _chosen(chosen: Sequence[str | int] | None, names: Sequence[str], kind: str) -> tuple[Tensor, list[str]]:
    """int64 [names], the new number of each, -1 where it was not chosen; and the names chosen."""
    known: dict[str | int, int] = {name: number for number, name in enumerate(names)}
    new = torch.full((len(names),), -1)
    picked: list[str] = []
    for choice in range(len(names)) if chosen is None else chosen:
        old = choice if isinstance(choice, int) else known.get(choice, -1)
        if not 0 <= old < len(names):
            raise McdiError(f"{kind} {choice!r:.60}: not among the {len(names)} there are ({_some(names)})")
        if new[old] >= 0:
            raise McdiError(f"{kind} {choice!r:.60}: given twice; name each once")
        new[old] = len(picked)
        picked.append(names[old])
    return new, picked


def load(
    source: str | os.PathLike[str],
    *,
    data_dir: Path | None = None,
    side: int = 128,
    splits: Path | None = None,
    stage: Stage = no_stage,
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
    readers = {".zip": _read_packed, ".npz": _read_features, ".safetensors": _read_features}
    reader = readers.get(path.suffix.lower())
    if not path.is_dir() and not (reader and path.is_file()):
        found = f"a file of kind {path.suffix!r}" if path.exists() else "no such file or folder"
        raise McdiError(
            f"{show_path(path)}: {found}; expected a folder of images, a packed .zip, features as .npz or .safetensors, "
            f"or one of {', '.join(PACKED)}"
        )
    with _naming(path), needs("reading images", "pillow", "'mcdi_fast[train]'"):
        columns = reader(path) if reader and path.is_file() else _read_folder(path, side, splits, stage)
        return _by_split(show_path(path), **columns)


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


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a library finds wrong with a file becomes one line with its name."""
    try:
        yield
    except McdiError:
        raise
    except Exception as error:  # zipfile, zlib, numpy, safetensors and Pillow have a dozen types for a damaged file
        raise McdiError(f"{show_path(path)}: damaged ({reason_of(error)}); make or copy it again") from error


# Each reader gives the columns of a source, by the names of `_by_split`.


def _open_zip(path: Path) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(path)
    for info in archive.infolist():
        if info.file_size > _MAX_RATIO * max(info.compress_size, 1000):
            raise McdiError(
                f"{show_path(path)}: {info.filename!r:.60} unpacks from {info.compress_size} to {info.file_size} bytes; refused as a zip bomb"
            )
    return archive


def _read_packed(path: Path) -> dict[str, Any]:
    from PIL import Image

    what = show_path(path)

    def holds(entry: Any, **kinds: type) -> bool:
        return isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())

    with _open_zip(path) as archive:

        def member(name: str) -> IO[bytes]:
            if name not in archive.NameToInfo:
                raise McdiError(f"{what}: {name!r:.80} is not in it; it is no packed zip of images, or truncated")
            return archive.open(name)

        meta = json.loads(member("meta.json").read(MAX_JSON_BYTES))
        strips = meta["strips"] if holds(meta, size=int, tile_columns=int, class_names=list, strips=list) else []
        extra = {key: str for key in ("domain", "split") if strips and key in strips[0]}  # in all strips, or in none
        if not strips or not all(holds(strip, strip=str, label=int, count=int, **extra) for strip in strips):
            raise McdiError(
                f"{what}: meta.json does not describe strips of images (size, tile_columns, class_names, strips with strip, label, count); "
                "pack it again"
            )
        tiles, size, columns = [], meta["size"], meta["tile_columns"]
        for strip in strips:
            image, count = Image.open(member(strip["strip"]), formats=["JPEG", "PNG"]), strip["count"]
            lines = -(-count // columns)
            if image.size != (columns * size, lines * size):
                raise McdiError(
                    f"{what}: strip {strip['strip']!r:.80} is {image.size[0]}x{image.size[1]} pixels, expected "
                    f"{columns * size}x{lines * size} for {count} tiles; pack it again"
                )
            pixels = np.asarray(image.convert("RGB")).reshape(lines, size, columns, size, 3).swapaxes(1, 2)
            tiles.append(pixels.reshape(-1, size, size, 3)[:count])
    found: dict[str, Any] = {
        f"{key}s": [strip[key] for strip in strips for _ in range(strip["count"])] for key in ("label", *extra)
    }
    found["labels"] = torch.tensor(found["labels"])
    return {"rows": torch.from_numpy(np.concatenate(tiles)), "class_names": meta["class_names"], **found}


def _read_features(path: Path) -> dict[str, Any]:
    what = show_path(path)
    names = {f"{kind}_names" for kind in _COLUMNS}
    wanted = {"features", *_COLUMNS.values(), *names}
    if path.suffix.lower() == ".npz":
        with _open_zip(path), np.load(path, allow_pickle=False) as file:
            columns = {name: _from_numpy(file[name], f"{what}: {name}") for name in sorted(wanted & set(file.files))}
    else:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            columns = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in names}
            columns |= {name: file.get_tensor(name) for name in wanted & set(file.keys())}
    features = columns.pop("features", None)
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        found = f"{features.dtype} {list(features.shape)}" if isinstance(features, Tensor) else "absent or text"
        raise McdiError(f"{what}: features are {found}, expected floating numbers [n, F]")
    if "labels" not in columns:
        raise McdiError(f"{what}: labels are absent, expected integers [n] or names [n]")
    return {"rows": features, **columns}


def _from_numpy(array: np.ndarray, what: str) -> Column:
    if array.dtype.kind == "U":
        return array.reshape(-1).tolist()
    if array.dtype.kind not in "iuf":
        raise McdiError(f"{what} holds {array.dtype}, expected numbers or text")
    dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.dtype(np.int64)  # torch has few others
    return torch.from_numpy(np.ascontiguousarray(array, dtype))


class _File(NamedTuple):
    """An image, or a row of a split list."""

    path: Path
    label: str
    domain: str = ""
    split: str = ""


def _read_folder(folder: Path, side: int, splits: Path | None, stage: Stage) -> dict[str, Any]:
    if not 1 <= side <= 1024:
        raise McdiError(f"side = {side}: expected 1 to 1024 pixels")
    listed = _read_lists(splits) if splits else _read_lists(folder) or _read_lists(folder / "splits")
    if splits and not listed:
        raise McdiError(f"{show_path(splits)}: holds no split list; expected train, val and test as .txt or .csv")
    # lists may name images that lie in one folder, as Mini-ImageNet's do
    named = [row for row in listed if row.path.name]
    base = next((b for b in (folder, folder / "images") if named and (b / named[0].path).is_file()), None)
    files = [row._replace(path=base / row.path) for row in named] if base else _files_of(folder)
    missing = [file.path.name for file in files if not file.path.is_file()] if base else []
    if missing:
        raise McdiError(
            f"{show_path(folder)}: {len(missing)} of {len(files)} listed images are not there: {_some(missing)}"
        )
    split_of = {row.label: row.split for row in listed}
    unknown = sorted(split_of.keys() - {file.label for file in files})
    if unknown:
        raise McdiError(
            f"{show_path(splits or folder)}: {len(unknown)} of {len(split_of)} classes are not in {show_path(folder)}: {_some(unknown)}"
        )
    if listed:
        files = [file._replace(split=split_of[file.label]) for file in files if file.label in split_of]
    columns = {f"{name}s": [getattr(file, name) for file in files] for name in ("label", "domain", "split")}
    given = {name: column for name, column in columns.items() if column[0]}
    return {"rows": _read_images(folder, files, side, stage), **given}


def _files_of(folder: Path) -> list[_File]:
    """Every image of class folders, or of class folders one level down, where the level above is of splits or domains."""

    def inside(parent: Path) -> list[Path]:
        return sorted(sub for sub in parent.iterdir() if sub.is_dir() and not sub.name.startswith("."))

    above = [sub for sub in inside(folder) if sub.name != "splits"]
    images = {sub: _images_in(sub) for sub in above}
    flat = any(images.values())
    if not flat:
        images = {sub: _images_in(sub) for parent in above for sub in inside(parent) or [parent]}
    if not any(images.values()):
        raise McdiError(
            f"{show_path(folder)}: no images in class sub-folders; expected CLASS/image.jpg, DOMAIN/CLASS/image.jpg or train/CLASS/image.jpg"
        )
    empty = [str(sub.relative_to(folder)) for sub, found in images.items() if not found]
    if empty:
        raise McdiError(
            f"{show_path(folder)}: {len(empty)} class folders hold no image ({_some(empty)}); put images there or remove them"
        )
    level = "split" if all(parent.name.lower() in SPLIT_NAMES for parent in above) else "domain"
    return [
        _File(image, sub.name, **({} if flat else {level: sub.parent.name}))
        for sub, found in images.items()
        for image in found
    ]


def _images_in(folder: Path) -> list[Path]:
    """Images right in a folder, or in its one sub-folder `images` (how Tiny ImageNet comes)."""
    found = sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in _SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )
    inner = folder / "images"
    return _images_in(inner) if not found and inner.is_dir() else found


def _read_lists(folder: Path) -> list[_File]:
    """All rows of the split lists in a folder, train first. A path is as the list has it, empty where it names classes only."""
    listed: list[_File] = []
    for path in (folder / f"{name}{suffix}" for name in SPLIT_NAMES for suffix in (".txt", ".csv")):
        if not path.is_file():
            continue
        split, split_of = SPLIT_NAMES[path.stem], {row.label: row.split for row in listed}
        if split in split_of.values():
            raise McdiError(f"{show_path(path)}: a second list of {split}; keep one list of it")
        with _naming(path), open(path, encoding="utf-8-sig", newline="") as file:
            if path.stat().st_size > _MAX_LIST:
                raise McdiError(f"{show_path(path)}: larger than {_MAX_LIST} bytes; is it a list of classes?")
            if path.suffix == ".csv":
                rows = [(row.get("label") or "", row.get("filename") or "") for row in csv.DictReader(file)]
            else:
                rows = [(line.strip(), "") for line in file if line.strip()]
        if not rows or any(not label for label, _ in rows):
            raise McdiError(
                f"{show_path(path)}: expected a class a line, or a csv with a column `label` (and `filename`)"
            )
        for _, name in rows:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise McdiError(f"{show_path(path)}: {name!r:.80} leads out of the folder; expected a name below it")
        twice = sorted({label for label, _ in rows} & split_of.keys())
        if twice:
            raise McdiError(
                f"{show_path(path)}: {len(twice)} classes are in the list of {split_of[twice[0]]} too: {_some(twice)}; keep each in one"
            )
        listed += [_File(Path(name), label, split=split) for label, name in rows]
    return listed


def _read_images(folder: Path, files: Sequence[_File], side: int, stage: Stage) -> Tensor:
    import PIL.Image  # noqa: F401 (where it is missing, no image is damaged)

    images = np.empty((len(files), side, side, 3), np.uint8)
    bad: list[str] = []

    def read(number: int) -> list[str]:
        try:
            images[number] = _decode(files[number].path, side)
        except Exception as error:  # Pillow has many types for a damaged image
            return [f"{files[number].path.relative_to(folder)} ({reason_of(error)})"]
        return []

    # Pillow decodes and scales outside the interpreter's lock
    with stage("images", len(files), "images") as bar, ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for failure in pool.map(read, range(len(files))):
            bad += failure
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
