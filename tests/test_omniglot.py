"""Real data through MCDI_DATA_DIR (marked `data`); everything that can be wrong with the files on small zips made here."""

import hashlib
import io
import json
import os
import random
import shutil
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import helpers
import numpy as np
import pytest

from mcdi_fast import backbone
from mcdi_fast.backbone import BackboneConfig, fingerprint, load_backbone
from mcdi_fast.tasks import omniglot
from mcdi_fast.tasks.drawings import FewShotData, preprocess

Image = pytest.importorskip("PIL.Image")

SPLITS = {
    "train": ["Greek/character01", "Greek/character02"],
    "val": ["Latin/character01"],
    "test": ["Latin/character02", "Futurama/character01"],
}
FINGERPRINT = "bb775998bf70d77a"  # of the five characters below
ZIPS = {
    "images_background.zip": ["Greek/character01", "Greek/character02", "Latin/character01"],
    "images_evaluation.zip": ["Latin/character02", "Futurama/character01"],
}


def png(seed, size=(105, 105), mode="1"):
    """Black ink on a fifth of white paper. mode: of Pillow, or one of `REPAINTED`."""
    grey = Image.fromarray(
        np.where(np.random.default_rng(seed).random((size[1], size[0])) < 0.2, 0, 255).astype(np.uint8)
    )
    file = io.BytesIO()
    (REPAINTED[mode](grey) if mode in REPAINTED else grey.convert(mode)).save(file, "PNG")
    return file.getvalue()


def negative(grey):
    return grey.point(lambda value: 255 - value)


def flat(grey, value):
    return grey.point(lambda _: value)


def palette_with_transparent_paper(grey):
    image = grey.convert("1").convert("P")
    image.info["transparency"] = 255
    return image


REPAINTED = {
    "inverted": negative,
    "inverted, 1 bit": lambda grey: negative(grey).convert("1"),
    "black ink in alpha": lambda grey: Image.merge("LA", (flat(grey, 0), negative(grey))),
    "white ink in alpha": lambda grey: Image.merge("LA", (flat(grey, 255), negative(grey))),
    "red ink in alpha": lambda grey: Image.merge(
        "RGBA", (flat(grey, 255), flat(grey, 0), flat(grey, 0), negative(grey))
    ),
    "paper in alpha": lambda grey: Image.merge("LA", (flat(grey, 0), grey)),
    "ink twice": lambda grey: Image.merge("LA", (grey, negative(grey))),
    "opaque": lambda grey: Image.merge("RGBA", (grey, grey, grey, flat(grey, 255))),
    "opaque, inverted": lambda grey: Image.merge("LA", (negative(grey), flat(grey, 255))),
    "palette": palette_with_transparent_paper,
}


def entries_of(name):
    """Path in the zip -> PNG, as the official zips are laid out."""
    folder = name.removesuffix(".zip")
    return {
        f"{folder}/{character}/{hash_of(character) % 10000:04d}_{drawer:02d}.png": png((hash_of(character), drawer))
        for character in ZIPS[name]
        for drawer in range(1, 21)
    }


def hash_of(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:3], "big")


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="session")
def packed():
    """The two zips, in memory."""
    files = {}
    for name in ZIPS:
        file = io.BytesIO()
        write_zip(file, entries_of(name))
        files[name] = file.getvalue()
    return files


@pytest.fixture
def folder(tmp_path, monkeypatch, packed):
    """A data folder of five characters, and the module told to expect those."""
    monkeypatch.delenv("MCDI_DATA_DIR", raising=False)
    place = tmp_path / "data" / "omniglot"
    (place / "splits").mkdir(parents=True)
    for name, members in SPLITS.items():
        (place / "splits" / f"{name}.txt").write_text("".join(f"{m}\n" for m in sorted(members)))
    for name, data in packed.items():
        (place / name).write_bytes(data)
    digests = {name.removesuffix(".zip"): hashlib.md5(data).hexdigest() for name, data in packed.items()}
    monkeypatch.setattr(omniglot, "_PARTS", digests)
    monkeypatch.setattr(omniglot, "_SPLITS", {"train": "Greek 2", "val": "Latin 1", "test": "Futurama 1 Latin 2-2"})
    monkeypatch.setattr(omniglot, "_FINGERPRINT", FINGERPRINT)
    return place


def fingerprint_of(folder):
    """Of the folder. A warning means that it is not the known one, and nothing else does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = omniglot.load(folder.parent, folder / "no-cache").fingerprint
    assert [str(folder) in str(w.message) and found in str(w.message) for w in said] == [True] * (found != FINGERPRINT)
    return found


def error_of(folder, name=None):
    """The one-line error of loading `folder`; it names the file."""
    message = helpers.error_of(omniglot.load, folder.parent, folder / "no-cache")
    if name:
        assert str(folder / name) in message
    assert not (folder / "no-cache").exists()
    return message


# --- real data ---


@pytest.fixture(scope="module")
def real():
    if not os.environ.get("MCDI_DATA_DIR"):
        pytest.skip("MCDI_DATA_DIR is not set")
    return omniglot.load(None, Path("no-cache"))


@pytest.mark.data
def test_real_counts(real):
    assert isinstance(real, FewShotData)
    assert real.name == "omniglot"
    for split, characters in ((real.train, 1028), (real.val, 172), (real.test, 423)):
        assert split.images.shape == (4 * characters, 20, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
        assert split.num_classes == 4 * characters
        assert split.images_per_class == 20


@pytest.mark.data
def test_real_fingerprint(real):
    assert real.fingerprint == "3f7d49794c010c94"


@pytest.mark.data
def test_the_split_is_that_of_the_published_lists():
    """Their sha256, sorted, the four rotations folded into one; and those kept beside the real data."""
    published = {
        "train": "189c10b6479a07e808302b5f1ada00d995589557373e68ebe3e718780196ed0a",
        "val": "8b1baec8706cbc2c2f1d23874a30a50ac8f589502ea36e213c3c3cf14d30a189",
        "test": "af119b10f318ddb7afdf5108b360887823cf06da68d846c7e5de7286492976d7",
    }
    for name, sha256 in published.items():
        members = omniglot._members(omniglot._SPLITS[name])
        assert members == sorted(members)
        assert hashlib.sha256("".join(f"{m}\n" for m in members).encode()).hexdigest() == sha256


@pytest.mark.data
def test_the_records_backbone_is_that_of_the_records(real, tmp_path, monkeypatch):
    """The one kept beside the records: named by its recipe, the one before today's, and loaded for whatever the records name."""
    (file,) = (Path(__file__).parents[1] / "docs/records/backbone").glob("*.safetensors")
    named = {
        cell["backbone_weights"]
        for path in file.parents[1].glob("*-ablation-omniglot-*.json")
        for cell in json.loads(path.read_text())["cells"]
        if "backbone_weights" in cell  # the first records do not say
    }
    (digest,) = named
    (tmp_path / "backbones").mkdir()
    shutil.copy(file, tmp_path / "backbones")
    load_backbone({"backbone": file.stem, "backbone_weights": digest}, tmp_path)
    monkeypatch.setattr(backbone, "_RECIPE", 1)
    before = BackboneConfig(steps=1500, ways=64, images_per_class=6, learning_rate=0.002)
    assert file.stem == fingerprint(real, before)


@pytest.mark.data
def test_real_turns_and_ink(real):
    for split in (real.train, real.val, real.test):
        upright = split.images[::4]
        for turn in (1, 2, 3):
            assert np.array_equal(split.images[turn::4], np.rot90(upright, turn, axes=(2, 3)))
        ink = (upright / 255).mean((2, 3))
        assert ink.min() > 0
        assert ink.max() < 0.5  # thin strokes on paper; ink and paper swapped would lie near 0.9
        assert upright.max() == 255
    # a class is a character: its drawers agree more with each other than with another class
    assert len({split.images[::4].tobytes() for split in (real.train, real.val, real.test)}) == 3


@pytest.mark.data
def test_real_splits_share_no_image(real):
    """Two files of Braille hold the same image; whatever else is alike would be a leak between the splits."""
    seen: dict[bytes, str] = {}
    for name in ("train", "val", "test"):
        for image in getattr(real, name).images[::4].reshape(-1, 28 * 28):
            assert seen.setdefault(image.tobytes(), name) == name


# --- small zips ---


def test_what_is_read_is_what_was_drawn(folder, monkeypatch):
    data = omniglot.load(folder.parent, folder / "no-cache")
    for name in SPLITS:
        split = getattr(data, name).images
        assert split.shape == (4 * len(SPLITS[name]), 20, 28, 28)
        for number, character in enumerate(sorted(SPLITS[name])):
            for drawer in (1, 7, 20):
                image = Image.open(io.BytesIO(png((hash_of(character), drawer)))).convert("L")
                expected = 255 - np.asarray(image.resize((28, 28), Image.Resampling.BOX))
                for turn in range(4):
                    assert np.array_equal(split[4 * number + turn, drawer - 1], np.rot90(expected, turn))
    assert len(data.fingerprint) == 16
    monkeypatch.setenv("MCDI_DATA_DIR", str(folder.parent))
    again = omniglot.load(None, folder / "no-cache")
    assert again.fingerprint == data.fingerprint
    assert not (folder / "no-cache").exists()


def test_the_fingerprint_changes_with_a_pixel_and_not_with_the_packing(folder):
    before = fingerprint_of(folder)
    path, entries = folder / "images_evaluation.zip", entries_of("images_evaluation.zip")
    shuffled = list(entries.items())
    random.Random(0).shuffle(shuffled)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in shuffled:
            archive.writestr(name, data)
        archive.writestr("images_evaluation/", "")
        archive.writestr("README.txt", "more")
    assert fingerprint_of(folder) == before
    entries[next(iter(entries))] = png(12345)
    write_zip(path, entries)
    assert fingerprint_of(folder) != before


@pytest.mark.parametrize("mode", ["L", "RGB", *REPAINTED])
def test_images_in_any_mode_are_put_right(folder, mode):
    """The same pixels, to the bit: what can be told for sure is put right, and the known fingerprint is the proof."""
    entries = {
        name: png((hash_of("/".join(name.split("/")[1:3])), int(name[-6:-4])), mode=mode)
        for name in entries_of("images_evaluation.zip")
    }
    write_zip(folder / "images_evaluation.zip", entries)
    assert fingerprint_of(folder) == FINGERPRINT


@pytest.mark.parametrize("values", [(0, 0), (255, 255), (0, 255)], ids=["black", "transparent black", "black, opaque"])
def test_a_blank_image_is_refused(folder, values):
    blank = io.BytesIO()
    Image.merge("LA", [Image.new("L", (105, 105), value) for value in values]).save(blank, "PNG")
    entries = entries_of("images_evaluation.zip")
    name = next(iter(entries))
    write_zip(folder / "images_evaluation.zip", entries | {name: blank.getvalue()})
    message = error_of(folder, "images_evaluation.zip")
    assert name in message
    assert "blank" in message


LAYOUTS = {  # where the zips or folders go, under the data folder
    "ours": "omniglot",
    "torchvision, learn2learn": "omniglot-py",
    "torchvision in omniglot": "omniglot/omniglot-py",
    "the official repository": "omniglot/python",
    "the folder itself": ".",
    "the official repository itself": "python",
    "raw": "raw",
}


@pytest.mark.parametrize("extracted", [False, True, "twice"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, tmp_path, layout, extracted):
    place = tmp_path / "elsewhere" / LAYOUTS[layout]
    place.mkdir(parents=True)
    for name in ZIPS:
        if extracted:  # Windows extracts into a folder of the zip's name
            zipfile.ZipFile(folder / name).extractall(
                place / name.removesuffix(".zip") if extracted == "twice" else place
            )
        else:
            (place / name).write_bytes((folder / name).read_bytes())
    assert omniglot.load(tmp_path / "elsewhere", tmp_path).fingerprint == FINGERPRINT


def test_one_folder_of_all_alphabets(folder, tmp_path):
    """As prototypical networks keep them: data/ALPHABET/characterNN, beside the lists of four splits in splits/vinyals."""
    for name in ZIPS:
        zipfile.ZipFile(folder / name).extractall(tmp_path / "x")
        shutil.copytree(tmp_path / "x" / name.removesuffix(".zip"), tmp_path / "y/omniglot/data", dirs_exist_ok=True)
    assert omniglot.load(tmp_path / "y", tmp_path).fingerprint == FINGERPRINT
    assert omniglot.load(tmp_path / "y/omniglot/data", tmp_path).fingerprint == FINGERPRINT


def test_a_zip_comes_before_a_folder(folder):
    """torchvision leaves both."""
    for name in ZIPS:
        zipfile.ZipFile(folder / name).extractall(folder)
        shutil.rmtree(folder / name.removesuffix(".zip") / ZIPS[name][0])
    assert fingerprint_of(folder) == FINGERPRINT


PACKINGS = {
    "another top folder": lambda name: f"python/{name}",
    "no top folder": lambda name: name.split("/", 1)[1],
    "dot": lambda name: f"./{name}",
    "backslashes": lambda name: name.replace("/", "\\"),
    "absolute": lambda name: f"/home/me/{name}",
    "a drive": lambda name: "C:\\data\\" + name.replace("/", "\\"),
    "umlauts": lambda name: f"Zeichen ä/{name}",
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packings(folder, packing):
    for name in ZIPS:
        entries = {PACKINGS[packing](entry): data for entry, data in entries_of(name).items()}
        mac = {"__MACOSX/{}/._{}".format(*entry.rsplit("/", 1)): b"resource fork" for entry in entries_of(name)}
        write_zip(folder / name, entries | mac)
    assert fingerprint_of(folder) == FINGERPRINT


def test_home_and_symbolic_links(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(folder.parent.parent))
    assert omniglot.load(Path("~/data"), tmp_path).fingerprint == FINGERPRINT
    monkeypatch.setenv("MCDI_DATA_DIR", "~/data")
    assert omniglot.load(None, tmp_path).fingerprint == FINGERPRINT
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "omniglot").symlink_to(folder)
    assert omniglot.load(tmp_path / "link", tmp_path).fingerprint == FINGERPRINT


@pytest.mark.parametrize("name", ZIPS)
def test_a_missing_part(folder, name, monkeypatch):
    (folder / name).unlink()
    message = error_of(folder, name)
    assert "--data-dir" in message
    assert "not there, nor as a folder" in message
    monkeypatch.setenv("MCDI_DATA_DIR", str(folder.parent))
    message = helpers.error_of(omniglot.load, None, folder / "no-cache")
    assert "MCDI_DATA_DIR" in message
    assert str(folder / name) in message
    (folder / name).mkdir()  # a folder is no file
    error_of(folder, name)


def test_nothing_there(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        message = helpers.error_of(omniglot.load, place, tmp_path)
        assert f"{place}: no Omniglot there" in message
        for word in ("omniglot-py", "omniglot/python", "images_background", "--data-dir"):
            assert word in message


def test_an_extracted_folder_that_is_not_whole(folder):
    for name in ZIPS:
        zipfile.ZipFile(folder / name).extractall(folder)
        (folder / name).unlink()
    (image,) = (folder / "images_background/Greek/character02").glob("*_07.png")
    data = image.read_bytes()
    image.unlink()
    message = error_of(folder)
    assert "1 of 5 characters are not complete (Greek/character02 has 19 of 20 images)" in message
    image.mkdir()
    assert "19 of 20" in error_of(folder)
    image.rmdir()
    os.mkfifo(image)  # would hang
    assert "19 of 20" in error_of(folder)
    image.unlink()
    image.write_bytes(bytes(100_001))
    assert "100001 bytes" in error_of(folder, image)
    image.write_bytes(data[:100])
    assert "no image" in error_of(folder, image)
    image.write_bytes(data)
    assert fingerprint_of(folder) == FINGERPRINT
    other = image.with_name("9999_07.png")
    other.write_bytes(data)
    assert f"also as {image}" in error_of(folder, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "Greek/character09\n",
        lambda text: "\n".join(text.split()[1:]),
        lambda text: text.replace("character01", "character03"),
        lambda text: text.upper(),
        lambda text: "",
        lambda text: "\0" * 50,
        lambda text: "\xff\xfe" * 20,  # written below as no UTF-8
        lambda text: "x" * (2**20 + 1),
    ],
)
@pytest.mark.parametrize("name", list(SPLITS))
def test_another_split(folder, name, change):
    path = folder / "splits" / f"{name}.txt"
    path.write_text(change(path.read_text()), encoding="latin-1")
    message = error_of(folder, f"splits/{name}.txt")
    assert "Vinyals" in message
    assert "take splits/ away" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: "\r\n".join(reversed(lines)),
        lambda lines: "".join(f"{line}/rot{turn:03d}\n" for line in lines for turn in (0, 90, 180, 270)),
        lambda lines: " ".join(lines * 2),
        None,
    ],
    ids=["order", "rotations", "twice", "none"],
)
def test_lists_of_the_same_split(folder, change):
    for path in sorted((folder / "splits").iterdir()):
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_text().split()).encode())
    assert fingerprint_of(folder) == FINGERPRINT


@pytest.mark.parametrize("zip_name", list(ZIPS))
def test_damaged_zips(folder, zip_name):
    path = folder / zip_name
    data = path.read_bytes()
    for size in (len(data) - 30, len(data) // 2, 30, 0):
        path.write_bytes(data[:size])
        assert "get it again" in error_of(folder, zip_name)
    path.write_bytes(b"<html>Not Found</html>" * 10)
    assert "get it again" in error_of(folder, zip_name)
    middle = data.index(b"IDAT") + 30
    path.write_bytes(data[:middle] + bytes(8) + data[middle + 8 :])
    assert "get it again" in error_of(folder, zip_name)  # CRC
    (other,) = set(ZIPS) - {zip_name}  # under this name
    path.write_bytes((folder / other).read_bytes())
    assert "stands there twice" in error_of(folder, zip_name)


def drop(entries, name):
    return {key: value for key, value in entries.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: {"readme.txt": b"hello"}, ("3 of 5 characters", "Greek/character01 has 0")),
        (lambda e: drop(e, "Latin"), ("1 of 5 characters", "Latin/character01 has 0")),
        (lambda e: drop(e, "Greek/character02") | {"images_background/Greek/character02/": b""}, ("1 of 5",)),
        (lambda e: drop(e, "_07.png"), ("3 of 5", "19 of 20 images")),
        (lambda e: {k.replace("_20.png", "_00.png"): v for k, v in e.items()}, ("19 of 20 images",)),
        (lambda e: {k.replace("Greek/", "Geek/"): v for k, v in e.items()}, ("2 of 5", "Greek/character01 has 0")),
        (
            lambda e: e | {f"python/{k}": v for k, v in e.items()},
            ("stands there twice", "python/images_background/Greek"),
        ),
        (lambda e: {k: png(0, (104, 105)) for k in e}, ("104x105", "expected 105x105")),
        (lambda e: {k: png(0, (28, 28)) for k in e}, ("28x28",)),
        (lambda e: {k: b"" for k in e}, ("no image",)),
        (lambda e: {k: b"GIF89a" + bytes(50) for k in e}, ("no image",)),
        (lambda e: {k: v[: len(v) // 2] for k, v in e.items()}, ("no image",)),
        (lambda e: {k: bytes(100_001) for k in e}, ("100001 bytes", "at most 100000")),
    ],
)
def test_foreign_zips(folder, change, words):
    write_zip(folder / "images_background.zip", change(entries_of("images_background.zip")))
    message = error_of(folder)
    assert "images_background.zip" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "more",
    [
        {"images_background/Greek/character01/0001_21.png": b"a drawer too many"},
        {"images_background/Greek/character03/0001_01.png": b"a character too many"},
        {"images_background/More/character01/0001_01.png": b"an alphabet too many"},
        {f"images_background/../character01/0001_{d:02d}.png": b"" for d in range(1, 21)},
        {
            "../evil.png": b"points outside",
            "../../images_background/Greek/character01/0001_01.png": b"",
            "/etc/evil": b"",
            "images_background/../../evil/character01/0001_01.png": b"",
            "images_background\\..\\Greek\\character01\\0001_01.png": b"",
        },
    ],
)
def test_what_is_not_asked_for_is_passed_over(folder, more):
    """And nothing is ever extracted."""
    write_zip(folder / "images_background.zip", more | entries_of("images_background.zip"))
    files = sorted(folder.parent.parent.rglob("*"))
    assert fingerprint_of(folder) == FINGERPRINT
    assert sorted(folder.parent.parent.rglob("*")) == files


def patched(path, number, offsets):
    """Overwrite fields of entry `number`: {(signature, offset): struct-packed bytes}."""
    data = bytearray(path.read_bytes())
    for (signature, offset), value in offsets.items():
        at = -1
        for _ in range(number + 1):
            at = data.index(signature, at + 1)
        data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)


LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def test_a_declared_size_is_believed_only_up_to_a_limit(folder):
    path = folder / "images_background.zip"
    patched(path, 5, {(CENTRAL, 24): struct.pack("<I", 2**31)})
    assert f"{2**31} bytes" in error_of(folder, path.name)


def test_a_packed_size_is_believed_only_up_to_a_limit(folder):
    """A bomb: little declared, much packed."""
    path, entries = folder / "images_background.zip", entries_of("images_background.zip")
    entries[next(iter(entries))] = bytes(2**21)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    patched(path, 0, {(CENTRAL, 24): struct.pack("<I", 700)})
    assert f"{2**21}" in error_of(folder, path.name)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [(6, 1, "encrypted"), (8, 97, "get it again"), (8, 8, "get it again")],
    ids=["encrypted", "an unknown compression", "stored bytes called deflated"],
)
def test_an_entry_that_cannot_be_unpacked(folder, field, value, words):
    path, packed = folder / "images_evaluation.zip", struct.pack("<H", value)
    patched(path, 3, {(LOCAL, field): packed, (CENTRAL, field + 2): packed})
    assert words in error_of(folder, path.name)


def test_without_pillow_the_zip_is_not_called_damaged(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = error_of(folder)
    assert "pillow" in message.lower()
    assert "mcdi_fast[train]" in message
    assert "damaged" not in message


# --- download ---


@pytest.fixture
def download(folder, monkeypatch):
    """pooch.retrieve that copies from `folder`."""
    pooch = pytest.importorskip("pooch")
    calls = []

    def retrieve(url, known_hash, fname=None, path=None, **options):
        calls.append((url, known_hash))
        target = Path(path, fname)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((folder / url.rsplit("/", 1)[1]).read_bytes())
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return calls


def test_download(folder, download, tmp_path):
    cache = tmp_path / "cache"
    assert omniglot.load(None, cache).fingerprint == FINGERPRINT
    urls = dict(download)
    for part, md5 in omniglot._PARTS.items():
        (url,) = (url for url in urls if url.endswith(f"{part}.zip"))
        assert url.startswith("https://")
        assert urls[url] == f"md5:{md5}"
    assert omniglot.load(None, cache).fingerprint == FINGERPRINT
    assert len(download) == 2 + 2  # whether they are there already is pooch's business
    assert omniglot.load(cache, tmp_path).fingerprint == FINGERPRINT  # they may be given as one's own


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Pool(host='github.com'):\n Max retries exceeded\n"), ("Max retries exceeded", "--data-dir")),
        (ValueError("SHA256 hash of downloaded file does not match\n the known hash"), ("checksum",)),
    ],
    ids=["no network", "another checksum"],
)
def test_a_download_that_fails(folder, monkeypatch, tmp_path, error, words):
    def retrieve(*args, **options):
        raise error

    monkeypatch.setattr(pytest.importorskip("pooch"), "retrieve", retrieve)
    message = helpers.error_of(omniglot.load, None, tmp_path / "cache")
    assert "https://github.com/brendenlake/omniglot" in message
    for word in ("images_background.zip", *words):
        assert word in message


def test_download_without_pooch(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    message = helpers.error_of(omniglot.load, None, tmp_path / "cache")
    assert "pooch" in message
    assert "mcdi_fast[train]" in message
    omniglot.load(folder.parent, tmp_path / "cache")  # with the data there it is not needed


def test_a_cache_that_cannot_be_written(folder, download, tmp_path):
    (tmp_path / "cache").write_text("a file")
    helpers.error_of(omniglot.load, None, tmp_path / "cache")


# --- drawings and splits of one's own ---


def test_preprocess_is_what_the_data_set_gets(tmp_path):
    data = png((3, 5))
    image = Image.open(io.BytesIO(data))
    expected = preprocess(image)
    assert expected.shape == (28, 28)
    assert expected.dtype == np.uint8
    grey = np.asarray(image.convert("L"))
    (tmp_path / "one.png").write_bytes(data)
    for same in (
        tmp_path / "one.png",
        str(tmp_path / "one.png"),
        grey,
        255 - grey,
        np.stack([grey] * 3, -1),
        image.convert("LA"),
    ):
        assert np.array_equal(preprocess(same), expected)
    for bad in (np.full((9, 9), 255, np.uint8), "nowhere.png", None):
        assert "drawing: " in helpers.error_of(preprocess, bad)


def test_a_split_of_one_s_own(folder, tmp_path):
    every = sorted(character for members in SPLITS.values() for character in members)
    lists = {"train": every[:2], "val": every[2:3], "test": every[3:]}
    for name, members in lists.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{member}/rot090\n" for member in members))
    data = omniglot.load(folder.parent, tmp_path / "cache", tmp_path)
    assert [part.num_classes for part in (data.train, data.val, data.test)] == [
        4 * len(members) for members in lists.values()
    ]
    given = folder.parent, tmp_path / "cache", tmp_path
    (tmp_path / "val.txt").write_text(f"{every[0]}\n")
    assert f"val.txt: {every[0]} is in train.txt too" in helpers.error_of(omniglot.load, *given)
    (tmp_path / "val.txt").write_text("a\n")
    assert "expected ALPHABET/characterNN" in helpers.error_of(omniglot.load, *given)
    (tmp_path / "val.txt").unlink()
    assert "val.txt: cannot be read" in helpers.error_of(omniglot.load, *given)
