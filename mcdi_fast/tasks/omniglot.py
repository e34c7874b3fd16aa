"""Omniglot (Lake et al., Science 350, 2015) with the Vinyals split; each quarter turn of a character is a class of its own.

The official zips are read in place, never extracted. Where the user has none they are downloaded from the official repository.
A local zip may be packed differently from the official one (the container is not the data), so it is verified by what it holds.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from mcdi_fast.errors import McdiError
from mcdi_fast.store import atomic_write, show_path
from mcdi_fast.tasks import Setup
from mcdi_fast.tasks.drawings import ClassImages, DrawingOptions, FewShotData, drawing_family
from mcdi_fast.tasks.heads import HeadFamily

SIDE = 28
DRAWERS = 20
TURNS = 4

_ZIPS = {  # name: (characters, md5 of the official file, as torchvision and others publish it)
    "images_background.zip": (964, "68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation.zip": (659, "6b91aef0f799c5bb55b94e3f2daec811"),
}
_ZIP_SOURCE = "https://github.com/brendenlake/omniglot/raw/master/python/"
_SPLIT_SOURCE = "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals/"
_SPLITS = {  # sha256 of the sorted characters, one a line, the four rotations of each folded into one
    "train": "189c10b6479a07e808302b5f1ada00d995589557373e68ebe3e718780196ed0a",
    "val": "8b1baec8706cbc2c2f1d23874a30a50ac8f589502ea36e213c3c3cf14d30a189",
    "test": "af119b10f318ddb7afdf5108b360887823cf06da68d846c7e5de7286492976d7",
}
_MEMBER = re.compile(r"images_(?:background|evaluation)/([^/]+/character\d\d)/\d{4}_(\d\d)\.png")
_MAX_PNG = 100_000  # bytes, packed or unpacked; the real ones are some hundred


def load(data_dir: Path | None, cache_dir: Path) -> FewShotData:
    """Load Omniglot, 28x28: 1028 / 172 / 423 characters of 4 turns each, 20 drawers.

    Found first under `data_dir`, then the folder MCDI_DATA_DIR names (both hold `omniglot/images_background.zip`,
    `omniglot/images_evaluation.zip` and `omniglot/splits/{train,val,test}.txt`), else downloaded into `cache_dir`.

    Raises:
        McdiError: naming the file: missing, truncated, not these characters; no network.
    """
    _require("PIL", "pillow")
    folder = _find(data_dir)
    if folder is None:
        folder = _download(cache_dir / "omniglot")
    splits = {name: _read_split(folder / "splits" / f"{name}.txt", sha256) for name, sha256 in _SPLITS.items()}
    characters: dict[str, np.ndarray] = {}
    for name, (count, _) in _ZIPS.items():
        characters |= _read_zip(folder / name, count)
    digest = hashlib.sha256(b"omniglot")
    parts = []
    for name, members in splits.items():
        missing = [m for m in members if m not in characters]
        if missing:
            raise McdiError(
                f"{show_path(folder)}: character {missing[0]} of the {name} split is in neither zip; get both zips again"
            )
        images = np.stack([characters[m] for m in members])  # [characters, drawers, 28, 28]
        turned = np.stack([np.rot90(images, turn, axes=(2, 3)) for turn in range(TURNS)], 1)
        turned = np.ascontiguousarray(turned).reshape(-1, DRAWERS, SIDE, SIDE)
        digest.update(name.encode() + turned.tobytes())
        parts.append(ClassImages(turned))
    train, val, test = parts
    return FewShotData("omniglot", train, val, test, digest.hexdigest()[:16])


def _require(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise McdiError(
            f"omniglot needs {package}, which is not installed; run pip install 'mcdi_fast[train]'"
        ) from error


def _find(data_dir: Path | None) -> Path | None:
    option = "--data-dir" if data_dir is not None else "MCDI_DATA_DIR"
    place = data_dir if data_dir is not None else os.environ.get("MCDI_DATA_DIR")
    if not place:
        return None
    folder = Path(place) / "omniglot"
    for name in [*_ZIPS, *(f"splits/{split}.txt" for split in _SPLITS)]:
        if not (folder / name).is_file():
            raise McdiError(
                f"{show_path(folder / name)}: not there, expected because {option} is {show_path(place)}; "
                f"put it there, or leave {option} out to download it"
            )
    return folder


def _download(folder: Path) -> Path:
    _require("pooch", "pooch to download it")
    import pooch  # only here: a machine with the data needs no network library

    def get(url: str, known_hash: str | None, path: Path) -> None:
        try:
            pooch.retrieve(url, known_hash, fname=path.name, path=path.parent, progressbar=True)
        except ValueError as error:  # pooch's word for another checksum
            raise McdiError(
                f"{url}: its checksum is not {known_hash}; the download was damaged, run the same command again"
            ) from error
        except Exception as error:  # requests has many words for no network
            reason = " ".join(str(error).split())[:120]
            raise McdiError(
                f"cannot download {url}: {reason}; connect to the network, or put both zips and splits/ under DIR/omniglot "
                "and give --data-dir DIR"
            ) from error

    for name, (_, md5) in _ZIPS.items():
        get(_ZIP_SOURCE + name, f"md5:{md5}", folder / name)
    for name, sha256 in _SPLITS.items():
        path, raw = folder / "splits" / f"{name}.txt", folder / "splits" / f"{name}.rotations.txt"
        if not path.exists():
            raw.unlink(missing_ok=True)  # no checksum of it is known, so pooch would keep a damaged one
            get(f"{_SPLIT_SOURCE}{name}.txt", None, raw)
            text = raw.read_text(encoding="utf-8", errors="replace")
            members = {"/".join(line.split("/")[:2]) for line in text.split()}
            atomic_write(path, "".join(f"{m}\n" for m in sorted(members)).encode())
            try:
                _read_split(path, sha256)
            except McdiError:
                path.unlink()  # so that the next run downloads it again
                raise
    return folder


def _read_split(path: Path, sha256: str) -> list[str]:
    try:
        data = path.read_bytes() if path.stat().st_size < 2**20 else b""
    except OSError as error:
        raise McdiError(
            f"{show_path(path)}: {error.strerror}; put the Vinyals split there, one ALPHABET/characterNN a line"
        ) from error
    members = sorted(data.decode("utf-8", errors="replace").split())
    found = hashlib.sha256("".join(f"{m}\n" for m in members).encode()).hexdigest()
    if found != sha256:
        raise McdiError(
            f"{show_path(path)}: {len(members)} lines with sha256 {found[:12]}…, expected {sha256[:12]}…; "
            "it is not the Vinyals split (one ALPHABET/characterNN a line, rotations folded): get it again"
        )
    return members


def _read_zip(path: Path, expected: int) -> dict[str, np.ndarray]:
    """`ALPHABET/characterNN` -> uint8 [20, 28, 28], ink = 255."""
    try:
        with zipfile.ZipFile(path) as archive:
            found: dict[tuple[str, int], zipfile.ZipInfo] = {}
            for info in archive.infolist():
                match = _MEMBER.fullmatch(info.filename)
                if not match:  # folders, and whatever else: nothing is ever extracted, so it can do no harm
                    continue
                # zipfile unpacks all that is packed, whatever is declared
                size = max(info.file_size, info.compress_size)
                if size > _MAX_PNG:
                    raise McdiError(
                        f"{show_path(path)}: {info.filename!r:.80} declares {size} bytes, expected at most {_MAX_PNG}; "
                        "it is not the Omniglot zip: get it again"
                    )
                found[match[1], int(match[2])] = info
            counts = Counter(character for character, _ in found)
            wrong = [c for c, n in counts.items() if n != DRAWERS]
            if len(counts) != expected or wrong:
                detail = f"{len(counts)} characters" if not wrong else f"{wrong[0]} with {counts[wrong[0]]} images"
                raise McdiError(
                    f"{show_path(path)}: holds {detail}, expected {expected} characters of {DRAWERS} images each; "
                    "it is truncated or another zip: get it again"
                )
            images = {c: np.empty((DRAWERS, SIDE, SIDE), np.uint8) for c in sorted(counts)}
            for (character, drawer), info in found.items():
                if not 1 <= drawer <= DRAWERS:
                    raise McdiError(
                        f"{show_path(path)}: {info.filename!r:.80}: drawer {drawer}, expected 1 to {DRAWERS}; get it again"
                    )
                images[character][drawer - 1] = _decode(archive.read(info), f"{show_path(path)}: {info.filename!r:.80}")
            return images
    except (
        OSError,
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        RuntimeError,
        NotImplementedError,
        ValueError,
    ) as error:
        # RuntimeError: an encrypted entry; NotImplementedError: an unknown compression; zlib.error is no ValueError
        raise McdiError(
            f"{show_path(path)}: {' '.join(str(error).split())[:200]}; it is truncated or no zip: get it again"
        ) from error
    except Exception as error:
        if isinstance(error, McdiError):
            raise
        raise McdiError(f"{show_path(path)}: damaged ({' '.join(str(error).split())[:200]}); get it again") from error


def _decode(data: bytes, where: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (105, 105):
            raise McdiError(f"{where}: {image.size[0]}x{image.size[1]} pixels, expected 105x105; get the zip again")
        small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise McdiError(f"{where}: no PNG image ({' '.join(str(error).split())[:80]}); get the zip again") from error
    return 255 - np.asarray(small)


def omniglot(options: DrawingOptions, setup: Setup) -> HeadFamily:
    """Real drawings: found under --data-dir or MCDI_DATA_DIR, else downloaded."""
    with setup.stage("data", 1, "set") as bar:
        data = load(setup.data_dir, setup.cache_dir)
        bar.update()
    return drawing_family(data, options, setup)
