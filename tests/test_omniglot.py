"""Real data through MCDI_DATA_DIR (marked `data`); everything that can be wrong with the files on small zips made here."""

import hashlib
import io
import json
import os
import random
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mcdi_fast.backbone import BackboneConfig, fingerprint, train_backbone, weights_digest
from mcdi_fast.errors import McdiError
from mcdi_fast.tasks import omniglot
from mcdi_fast.tasks.drawings import FewShotData

Image = pytest.importorskip("PIL.Image")

SPLITS = {
    "train": ["Greek/character01", "Greek/character02"],
    "val": ["Latin/character01"],
    "test": ["Latin/character02", "Futurama/character01"],
}
ZIPS = {
    "images_background.zip": ["Greek/character01", "Greek/character02", "Latin/character01"],
    "images_evaluation.zip": ["Latin/character02", "Futurama/character01"],
}


def png(seed, size=(105, 105), mode="1"):
    pixels = np.random.default_rng(seed).integers(0, 2, (size[1], size[0]), np.uint8) * 255
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder of five characters, and the module told to expect those."""
    monkeypatch.delenv("MCDI_DATA_DIR", raising=False)
    place = tmp_path / "data" / "omniglot"
    (place / "splits").mkdir(parents=True)
    digests = {}
    for name, members in SPLITS.items():
        text = "".join(f"{m}\n" for m in sorted(members))
        (place / "splits" / f"{name}.txt").write_text(text)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    zips = {}
    for name, members in ZIPS.items():
        path = write_zip(place / name, entries_of(name))
        zips[name] = (len(members), hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(omniglot, "_ZIPS", zips)
    monkeypatch.setattr(omniglot, "_SPLITS", digests)
    return place


def error_of(folder, name=None):
    """The one-line error of loading `folder`; it names the file."""
    with pytest.raises(McdiError) as caught:
        omniglot.load(folder.parent, folder / "no-cache")
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
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
def test_the_records_backbone_is_found_under_its_name(real, tmp_path):
    """The one kept beside the records, put into a cache as the README says, is what the default recipe loads instead of training."""
    (file,) = (Path(__file__).parents[1] / "docs/records/backbone").glob("*.safetensors")
    assert file.stem == fingerprint(real, BackboneConfig())
    shutil.copy(file, tmp_path)
    trained = train_backbone(real, BackboneConfig(), tmp_path, on_step=lambda *_: pytest.fail("trained again"))
    named = {
        cell["backbone_weights"]
        for path in file.parents[1].glob("*-ablation-omniglot-*.json")
        for cell in json.loads(path.read_text())["cells"]
        if "backbone_weights" in cell  # the first records do not say
    }
    assert named == {weights_digest(trained)}


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


@pytest.mark.data
def test_a_real_zip_cut_short(tmp_path, monkeypatch):
    source = os.environ.get("MCDI_DATA_DIR")
    if not source:
        pytest.skip("MCDI_DATA_DIR is not set")
    place = tmp_path / "omniglot"
    (place / "splits").mkdir(parents=True)
    original = Path(source, "omniglot")
    for split in (original / "splits").glob("*.txt"):
        (place / "splits" / split.name).write_bytes(split.read_bytes())
    (place / "images_evaluation.zip").symlink_to(original / "images_evaluation.zip")
    data = (original / "images_background.zip").read_bytes()
    for size in (len(data) - 1000, len(data) // 2, 100, 0):
        (place / "images_background.zip").write_bytes(data[:size])
        assert "get it again" in error_of(place, "images_background.zip")
    damaged = bytearray(data)
    damaged[len(data) // 3 : len(data) // 3 + 50] = bytes(50)  # inside an image
    (place / "images_background.zip").write_bytes(damaged)
    assert "get" in error_of(place, "images_background.zip")
    # the other zip under this name
    (place / "images_background.zip").unlink()
    (place / "images_background.zip").symlink_to(original / "images_evaluation.zip")
    assert "659 characters" in error_of(place, "images_background.zip")


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
    before = omniglot.load(folder.parent, folder).fingerprint
    path, entries = folder / "images_evaluation.zip", entries_of("images_evaluation.zip")
    shuffled = list(entries.items())
    random.Random(0).shuffle(shuffled)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in shuffled:
            archive.writestr(name, data)
        archive.writestr("images_evaluation/", "")
        archive.writestr("README.txt", "more")
    assert omniglot.load(folder.parent, folder).fingerprint == before
    entries[next(iter(entries))] = png(12345)
    write_zip(path, entries)
    assert omniglot.load(folder.parent, folder).fingerprint != before


def test_grey_and_colour_images_are_read_alike(folder):
    before = omniglot.load(folder.parent, folder).fingerprint
    for mode in ("L", "RGB"):
        entries = {
            name: png((hash_of("/".join(name.split("/")[1:3])), int(name[-6:-4])), mode=mode)
            for name in entries_of("images_evaluation.zip")
        }
        write_zip(folder / "images_evaluation.zip", entries)
        assert omniglot.load(folder.parent, folder).fingerprint == before


@pytest.mark.parametrize("name", [*ZIPS, *(f"splits/{split}.txt" for split in SPLITS)])
def test_a_missing_file(folder, name, monkeypatch):
    (folder / name).unlink()
    message = error_of(folder, name)
    assert "--data-dir" in message
    monkeypatch.setenv("MCDI_DATA_DIR", str(folder.parent))
    with pytest.raises(McdiError) as caught:
        omniglot.load(None, folder / "no-cache")
    assert "MCDI_DATA_DIR" in str(caught.value)
    assert str(folder / name) in str(caught.value)
    (folder / name).mkdir()  # a folder is no file
    error_of(folder, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "Greek/character09\n",
        lambda text: "\n".join(text.split()[1:]),
        lambda text: text.replace("character01", "character03"),
        lambda text: text.upper(),
        lambda text: "",
        lambda text: "\0" * 50,
        lambda text: "x" * (2**20 + 1),
        lambda text: "".join(f"{line}/rot{turn:03d}\n" for line in text.split() for turn in (0, 90, 180, 270)),
    ],
)
@pytest.mark.parametrize("name", list(SPLITS))
def test_a_changed_split(folder, name, change):
    path = folder / "splits" / f"{name}.txt"
    path.write_text(change(path.read_text()))
    assert "Vinyals" in error_of(folder, f"splits/{name}.txt")


def test_a_split_that_is_no_text(folder):
    (folder / "splits" / "val.txt").write_bytes(b"\xff\xfe" * 20)
    assert "Vinyals" in error_of(folder, "splits/val.txt")


def test_line_endings_and_order_of_a_split_do_not_matter(folder):
    before = omniglot.load(folder.parent, folder).fingerprint
    path = folder / "splits" / "test.txt"
    path.write_bytes("\r\n".join(reversed(path.read_text().split())).encode())
    assert omniglot.load(folder.parent, folder).fingerprint == before


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


def drop(entries, name):
    return {key: value for key, value in entries.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: {"readme.txt": b"hello"}, ("0 characters", "expected 3")),
        (lambda e: drop(e, "Latin"), ("2 characters",)),
        (lambda e: drop(e, "Greek/character02") | {"images_background/Greek/character02/": b""}, ("2 characters",)),
        (lambda e: drop(e, "_07.png"), ("19 images", "20 images each")),
        (lambda e: e | {"images_background/Greek/character01/0001_21.png": png(0)}, ("21 images",)),
        (lambda e: e | {"images_background/More/character01/0001_01.png": png(0)}, ("More/character01 with 1 images",)),
        (lambda e: {k.replace("_20.png", "_00.png"): v for k, v in e.items()}, ("drawer 0", "expected 1 to 20")),
        (lambda e: {k.replace("Greek/", "Geek/"): v for k, v in e.items()}, ("Greek/character01", "train")),
        (lambda e: {k: png(0, (104, 105)) for k in e}, ("104x105", "expected 105x105")),
        (lambda e: {k: png(0, (28, 28)) for k in e}, ("28x28",)),
        (lambda e: {k: b"" for k in e}, ("no PNG",)),
        (lambda e: {k: b"GIF89a" + bytes(50) for k in e}, ("no PNG",)),
        (lambda e: {k: v[: len(v) // 2] for k, v in e.items()}, ("no PNG",)),
        (lambda e: {k: bytes(100_001) for k in e}, ("100001 bytes", "at most 100000")),
        (
            lambda e: e | {f"images_background/../character01/0001_{d:02d}.png": png(0) for d in range(1, 21)},
            ("4 characters",),
        ),
    ],
)
def test_foreign_zips(folder, change, words):
    write_zip(folder / "images_background.zip", change(entries_of("images_background.zip")))
    message = error_of(folder, None if "train" in words else "images_background.zip")
    for word in words:
        assert word in message


def test_entries_that_point_outside_are_not_followed(folder):
    """Nothing is ever extracted; what is no image of a character is passed over."""
    before = omniglot.load(folder.parent, folder).fingerprint
    outside = {
        "../evil.png": b"evil",
        "../../images_background/Greek/character01/0001_01.png": b"evil",
        "/etc/evil": b"evil",
        "images_background/../../evil/character01/0001_01.png": b"evil",
        "images_background\\Greek\\character01\\0001_01.png": b"evil",
    }
    write_zip(folder / "images_background.zip", outside | entries_of("images_background.zip"))
    files = sorted(folder.parent.parent.rglob("*"))
    assert omniglot.load(folder.parent, folder).fingerprint == before
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


def test_an_encrypted_entry(folder):
    path = folder / "images_evaluation.zip"
    patched(path, 3, {(LOCAL, 6): struct.pack("<H", 1), (CENTRAL, 8): struct.pack("<H", 1)})
    assert "encrypted" in error_of(folder, path.name)


def test_an_unknown_compression(folder):
    path = folder / "images_evaluation.zip"
    patched(path, 3, {(LOCAL, 8): struct.pack("<H", 97), (CENTRAL, 10): struct.pack("<H", 97)})
    assert "get it again" in error_of(folder, path.name)


def test_stored_bytes_called_deflated(folder):
    path = folder / "images_evaluation.zip"
    patched(path, 3, {(LOCAL, 8): struct.pack("<H", 8), (CENTRAL, 10): struct.pack("<H", 8)})
    assert "get it again" in error_of(folder, path.name)


def test_without_pillow_the_zip_is_not_called_damaged(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = error_of(folder)
    assert "pillow" in message.lower()
    assert "mcdi_fast[train]" in message
    assert "damaged" not in message


# --- download ---


@pytest.fixture
def download(folder, monkeypatch):
    """pooch.retrieve that copies from `folder`; the splits come with their rotations, as the real ones do."""
    pooch = pytest.importorskip("pooch")
    calls = []

    def retrieve(url, known_hash, fname=None, path=None, **options):
        calls.append((url, known_hash))
        name = url.rsplit("/", 1)[1]
        target = Path(path, fname)
        if target.exists():
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".zip"):
            target.write_bytes((folder / name).read_bytes())
        else:
            lines = (folder / "splits" / name).read_text().split()
            target.write_text("".join(f"{line}/rot{turn:03d}\n" for line in lines for turn in (0, 90, 180, 270)))
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return calls


def test_download_folds_the_rotations(folder, download, tmp_path):
    cache = tmp_path / "cache"
    found = omniglot.load(None, cache)
    assert found.fingerprint == omniglot.load(folder.parent, cache).fingerprint
    urls = dict(download)
    for name in ZIPS:
        (url,) = (url for url in urls if url.endswith(name))
        assert url.startswith("https://")
        assert urls[url] == f"md5:{omniglot._ZIPS[name][1]}"
    for name, members in SPLITS.items():
        lines = (cache / "omniglot" / "splits" / f"{name}.txt").read_text().split()
        assert lines == sorted(members)
        assert sum(url.endswith(f"{name}.txt") for url in urls) == 1
    again = omniglot.load(None, cache)
    assert again.fingerprint == found.fingerprint
    assert len(download) == 5 + 2  # the splits are there; the zips' checksums are pooch's business


def test_download_without_a_network(folder, monkeypatch, tmp_path):
    pooch = pytest.importorskip("pooch")

    def retrieve(url, *args, **options):
        raise ConnectionError("HTTPSConnectionPool(host='github.com'):\n Max retries exceeded\n with url: /")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(McdiError) as caught:
        omniglot.load(None, tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    for word in (
        "https://github.com/brendenlake/omniglot",
        "Max retries exceeded",
        "--data-dir",
        "images_background.zip",
    ):
        assert word in message


def test_download_without_pooch(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(McdiError) as caught:
        omniglot.load(None, tmp_path / "cache")
    assert "pooch" in str(caught.value)
    assert "mcdi_fast[train]" in str(caught.value)
    omniglot.load(folder.parent, tmp_path / "cache")  # with the data there it is not needed


def test_download_with_another_checksum(folder, monkeypatch, tmp_path):
    pooch = pytest.importorskip("pooch")

    def retrieve(url, known_hash, **options):
        raise ValueError(f"SHA256 hash of downloaded file does not match\n the known hash: expected {known_hash}")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(McdiError) as caught:
        omniglot.load(None, tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    assert "checksum" in message
    assert "images_background.zip" in message


def test_a_downloaded_split_that_is_something_else(folder, download, tmp_path, monkeypatch):
    """It is refused, and the next run downloads it again."""
    pooch = pytest.importorskip("pooch")
    good = pooch.retrieve

    def retrieve(url, known_hash, fname=None, path=None, **options):
        if url.endswith("val.txt"):
            Path(path).mkdir(parents=True, exist_ok=True)
            Path(path, fname).write_bytes(b"\xff\xfe<html>")
            return None
        return good(url, known_hash, fname=fname, path=path, **options)

    cache = tmp_path / "cache"
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(McdiError) as caught:
        omniglot.load(None, cache)
    assert "val.txt" in str(caught.value)
    monkeypatch.setattr(pooch, "retrieve", good)
    assert omniglot.load(None, cache).name == "omniglot"


def test_a_cache_that_cannot_be_written(folder, download, tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("a file")
    with pytest.raises(McdiError) as caught:
        omniglot.load(None, cache)
    assert "\n" not in str(caught.value)
