"""Omniglot (Lake et al., Science 350, 2015) with the Vinyals split; each quarter turn of a character is a class of its own.

It is read as people have it, zips or extracted folders, in the layouts of the official repository, torchvision, learn2learn and others; nothing
is ever extracted. Where the user has none the official zips are downloaded. What is read is verified by what it holds, not by its container.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mcdi_fast.errors import McdiError, needs, reason_of
from mcdi_fast.store import digest, show_path, user_path
from mcdi_fast.tasks import Setup, register
from mcdi_fast.tasks.drawings import (
    SIDE,
    ClassImages,
    DrawingOptions,
    FewShotData,
    drawing_defaults,
    drawing_family,
    preprocess,
)
from mcdi_fast.tasks.heads import HeadFamily

DRAWERS = 20
TURNS = 4

_PARTS = {  # md5 of the official zip, as torchvision and others publish it
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
_SOURCE = "https://github.com/brendenlake/omniglot/raw/master/python/"
_FINGERPRINT = "3f7d49794c010c94"  # of the official images
# The Vinyals split (github.com/jakesnell/prototypical-networks, data/omniglot/splits/vinyals): alphabets and their characters, from 1 or first-last.
_SPLITS = {
    "train": "Alphabet_of_the_Magi 20 Angelic 20 Anglo-Saxon_Futhorc 29 Arcadian 26 Asomtavruli_(Georgian) 40 Atemayar_Qelisayer 26 "
    "Atlantean 26 Aurek-Besh 26 Avesta 26 Balinese 24 Blackfoot_(Canadian_Aboriginal_Syllabics) 14 Braille 26 Burmese_(Myanmar) 34 "
    "Cyrillic 33 Futurama 26 Ge_ez 26 Glagolitic 45 Grantha 43 Greek 24 Gujarati 48 Gurmukhi 41 "
    "Inuktitut_(Canadian_Aboriginal_Syllabics) 16 Japanese_(hiragana) 52 Japanese_(katakana) 47 Korean 40 Latin 26 "
    "Malay_(Jawi_-_Arabic) 40 N_Ko 33 Ojibwe_(Canadian_Aboriginal_Syllabics) 14 Sanskrit 42 Syriac_(Estrangelo) 23 Tagalog 17 Tifinagh 55",
    "val": "Armenian 41 Bengali 46 Early_Aramaic 22 Hebrew 22 Mkhedruli_(Georgian) 41",
    "test": "Gurmukhi 42-45 Kannada 41 Keble 26 Malayalam 47 Manipuri 40 Mongolian 30 Old_Church_Slavonic_(Cyrillic) 45 Oriya 46 "
    "Sylheti 28 Syriac_(Serto) 23 Tengwar 25 Tibetan 42 ULOG 26",
}
# Under the data folder: ours, torchvision's and learn2learn's, the official repository's, those of other few-shot code; then without "omniglot",
# for who gives the folder itself.
_PLACES = (
    "omniglot omniglot-py omniglot/omniglot-py omniglot/python omniglot/data omniglot/raw omniglot/processed "
    ". python data raw processed"
).split()
_MEMBER = re.compile(r"(?:.*/)?([^/]+/character\d\d)/\d{4}_(\d\d)\.png")
_MAX_PNG = 100_000  # bytes, packed or unpacked; the real ones are some hundred


def load(data_dir: Path | None, cache_dir: Path, splits: Path | None = None) -> FewShotData:
    """Load Omniglot, 28x28: 1028 / 172 / 423 characters of 4 turns each, 20 drawers.

    Found first under `data_dir`, then the folder MCDI_DATA_DIR names, else downloaded into `cache_dir`. Zips (however packed) and extracted
    folders `images_background`, `images_evaluation` are taken where the official repository, torchvision or learn2learn put them. Ink in the
    alpha channel and white ink on black are put right. Warns where the images are not the official ones, pixel by pixel.

    Raises:
        McdiError: naming the file: missing, truncated, not these characters, another split; no network.
    """
    with needs("omniglot", "pillow", "'mcdi_fast[train]'"):
        import PIL  # noqa: F401
    members_of = {name: _members(text) for name, text in _SPLITS.items()} if splits is None else _own_lists(splits)
    folder, sources = _find(data_dir) or _download(user_path(cache_dir) / "omniglot")
    if splits is None:
        _check_lists(folder, members_of)
    images = _read(folder, sources, [character for members in members_of.values() for character in members])
    parts = {}
    for name, members in members_of.items():
        upright, images = images[: len(members)], images[len(members) :]  # [characters, drawers, 28, 28]
        turned = np.stack([np.rot90(upright, turn, axes=(2, 3)) for turn in range(TURNS)], 1)
        turned = np.ascontiguousarray(turned).reshape(-1, DRAWERS, SIDE, SIDE)
        parts[name] = turned
    fingerprint = digest("omniglot", *(part for named in parts.items() for part in named))
    if splits is None and fingerprint != _FINGERPRINT:
        warnings.warn(
            f"{show_path(folder)}: these are not the official images of Omniglot (fingerprint {fingerprint}, known {_FINGERPRINT}): "
            "redrawn, cleaned or damaged? Results on them compare with no one else's",
            stacklevel=2,
        )
    train, val, test = map(ClassImages, parts.values())
    return FewShotData("omniglot", train, val, test, fingerprint)


def _members(text: str) -> list[str]:
    """The characters of a split, `ALPHABET/characterNN`, in order."""
    words, members = text.split(), []
    for alphabet, numbers in zip(words[::2], words[1::2], strict=True):
        first, _, last = numbers.rpartition("-")
        members += [f"{alphabet}/character{number:02d}" for number in range(int(first or 1), int(last) + 1)]
    return sorted(members)


def _find(data_dir: Path | None) -> tuple[Path, list[Path]] | None:
    """The folder and the two sources in it, zips or folders, or the one folder that holds all alphabets. None: no place was given."""
    option = "--data-dir" if data_dir is not None else "MCDI_DATA_DIR"
    given = data_dir if data_dir is not None else os.environ.get("MCDI_DATA_DIR")
    if not given:
        return None
    place, half = user_path(given), ""
    for folder in (place / name for name in _PLACES):
        found = [source for part in _PARTS for source in _sources(folder, part)]
        if len(found) == len(_PARTS):
            return folder, found
        if _holds_alphabets(folder):
            return folder, [folder]
        if found:
            other = next(part for part in _PARTS if part not in found[0].name)
            half = half or f"{show_path(folder / other)}.zip: not there, nor as a folder, beside {found[0].name}; "
    raise McdiError(
        f"{half or f'{show_path(place)}: no Omniglot there; '}looked for images_background and images_evaluation, zips or folders, in "
        f"{', '.join(_PLACES)} under {show_path(place)}, because {option} names it; put them there, or leave {option} out to download them"
    )


def _sources(folder: Path, part: str) -> list[Path]:
    """What holds a part: the zip, else the extracted folder, or one that was extracted into a folder of its own name. None or one."""
    zipped, extracted = folder / f"{part}.zip", (folder / part, folder / part / part)
    return [zipped] if zipped.is_file() else [path for path in extracted if _holds_alphabets(path)][:1]


def _holds_alphabets(folder: Path) -> bool:
    return any((folder / alphabet).is_dir() for text in _SPLITS.values() for alphabet in text.split()[::2])


def _download(folder: Path) -> tuple[Path, list[Path]]:
    with needs("omniglot", "pooch to download it", "'mcdi_fast[train]'"):
        import pooch  # only here: a machine with the data needs no network library

    sources = []
    for part, md5 in _PARTS.items():
        url = f"{_SOURCE}{part}.zip"
        try:
            pooch.retrieve(url, f"md5:{md5}", fname=f"{part}.zip", path=folder, progressbar=True)
        except ValueError as error:  # pooch's word for another checksum
            raise McdiError(
                f"{url}: its checksum is not {md5}; the download was damaged, run the same command again"
            ) from error
        except Exception as error:  # requests has many words for no network
            raise McdiError(
                f"cannot download {url}: {reason_of(error)}; connect to the network, or put both zips under DIR/omniglot and give --data-dir DIR"
            ) from error
        sources.append(folder / f"{part}.zip")
    return folder, sources


def _check_lists(folder: Path, splits: dict[str, list[str]]) -> None:
    """Refuse lists of another split beside the images: the split is known, and nobody should think that theirs was used."""
    for name, members in splits.items():
        path = folder / "splits" / f"{name}.txt"
        try:
            found = _listed(path)
        except OSError:  # most people have none
            continue
        if found != set(members):
            other = sorted(found ^ set(members))
            raise McdiError(
                f"{show_path(path)}: {len(found)} characters, not the {len(members)} of the Vinyals split ({len(other)} differ, the first "
                f"is {other[0]!r:.60}); give --task.splits {show_path(path.parent)} to use them, or take splits/ away: the Vinyals split is built in"
            )


def _own_lists(folder: Path) -> dict[str, list[str]]:
    """The user's split: characters by split, none in two."""
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for name in _SPLITS:
        path = user_path(folder) / f"{name}.txt"
        try:
            found[name] = sorted(_listed(path))
        except (OSError, ValueError) as error:
            raise McdiError(f"{show_path(path)}: cannot be read ({error}); expected a character a line") from error
        for character in found[name]:
            if not re.fullmatch(r"[^/]+/character\d\d", character):
                raise McdiError(f"{show_path(path)}: {character!r:.60}, expected ALPHABET/characterNN")
            if character in owner:
                raise McdiError(
                    f"{show_path(path)}: {character} is in {owner[character]}.txt too; a class belongs to one split"
                )
            owner[character] = name
        if not found[name]:
            raise McdiError(f"{show_path(path)}: no character, expected one ALPHABET/characterNN a line")
    return found


def _listed(path: Path) -> set[str]:
    """The characters of a list, with the four rotations of each or without."""
    data = path.read_bytes() if path.stat().st_size < 2**20 else b"too long"
    return {"/".join(line.split("/")[:2]) for line in data.decode("utf-8", errors="replace").split()}


def _read(folder: Path, sources: list[Path], characters: list[str]) -> np.ndarray:
    """uint8 [characters, drawers, 28, 28], ink = 255."""
    images = np.empty((len(characters), DRAWERS, SIDE, SIDE), np.uint8)
    row = {character: number for number, character in enumerate(characters)}
    seen: dict[tuple[str, int], str] = {}
    for source in sources:
        for character, drawer, where, data in _zip(source, row) if source.is_file() else _folder(source, row):
            if (character, drawer) in seen:
                raise McdiError(
                    f"{where}: {character}, drawer {drawer}, stands there twice, also as {seen[character, drawer]}; keep one of them"
                )
            seen[character, drawer] = where
            images[row[character], drawer - 1] = _decode(data, where)
    found = Counter(character for character, _ in seen)
    lacking = [character for character in characters if found[character] != DRAWERS]
    if lacking:
        raise McdiError(
            f"{show_path(folder)}: {len(lacking)} of {len(row)} characters are not complete ({lacking[0]} has {found[lacking[0]]} of "
            f"{DRAWERS} images) in {' and '.join(path.name for path in sources)}; get them again"
        )
    return images


def _zip(path: Path, known: Collection[str]) -> Iterator[tuple[str, int, str, bytes]]:
    """Character, drawer, place and PNG of the images of known characters. Whatever folders are above them, and with backslashes too."""
    try:
        with zipfile.ZipFile(path) as archive:
            place = show_path(path)
            for info in archive.infolist():
                name = info.filename.replace("\\", "/")
                match = _MEMBER.fullmatch(name)
                # whatever else there is, is passed over: nothing is ever extracted, so it can do no harm
                if not match or match[1] not in known or not 1 <= int(match[2]) <= DRAWERS or ".." in name.split("/"):
                    continue
                where = f"{place}: {info.filename!r:.80}"
                # zipfile unpacks all that is packed, whatever is declared
                _check_size(max(info.file_size, info.compress_size), where)
                yield match[1], int(match[2]), where, archive.read(info)
    except McdiError:
        raise
    except Exception as error:  # zipfile has a dozen words for damage, encryption and unknown compression
        raise McdiError(f"{show_path(path)}: {reason_of(error)}; it is damaged or no zip: get it again") from error


def _folder(path: Path, known: Collection[str]) -> Iterator[tuple[str, int, str, bytes]]:
    """The same of an extracted folder `ALPHABET/characterNN/NNNN_DD.png`."""
    try:
        for character in known:
            if not (path / character).is_dir():
                continue  # of the other part
            for file in sorted((path / character).iterdir()):
                match = _MEMBER.fullmatch(f"{character}/{file.name}")
                if match and 1 <= int(match[2]) <= DRAWERS and file.is_file():
                    _check_size(file.stat().st_size, show_path(file))
                    yield character, int(match[2]), show_path(file), file.read_bytes()
    except OSError as error:
        raise McdiError(
            f"cannot read {show_path(error.filename or path)}: {error.strerror}; check its permissions, or get it again"
        ) from error


def _check_size(size: int, where: str) -> None:
    if size > _MAX_PNG:
        raise McdiError(
            f"{where} declares {size} bytes, expected at most {_MAX_PNG}; it is no image of Omniglot: get it again"
        )


def _decode(data: bytes, where: str) -> np.ndarray:
    """PNG -> uint8 [28, 28], ink = 255."""
    from PIL.PngImagePlugin import PngImageFile

    try:
        file = PngImageFile(io.BytesIO(data))
        if file.size != (105, 105):
            raise McdiError(f"{where}: {file.size[0]}x{file.size[1]} pixels, expected 105x105; get it again")
        return preprocess(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise McdiError(f"{where}: no image ({reason_of(error)}); get it again") from error
    except McdiError as error:
        raise error if where in str(error) else McdiError(f"{where}: {error}; get it again") from error


@dataclass(frozen=True)
class OmniglotOptions(DrawingOptions):
    """A few-shot task on Omniglot."""

    splits: Path | None = None
    """Folder of train.txt, val.txt and test.txt, a character ALPHABET/characterNN a line, for another split than the Vinyals split."""


@register(drawing_defaults)
def omniglot(options: OmniglotOptions, setup: Setup) -> HeadFamily:
    """Real drawings: found under --data-dir or MCDI_DATA_DIR, else downloaded."""
    return drawing_family(partial(load, setup.data_dir, setup.cache_dir, options.splits), options, setup)
