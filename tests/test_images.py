"""Labelled rows: sorting, choosing, joining, and what is refused. Readers of zips, folders and feature files, and bad input to each."""

import io
import json
import os
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import error_of

from mcdi_fast.tasks.images import PACKED, LabelledRows, check_class_splits, join, load

Image = pytest.importorskip("PIL.Image")


def ragged():
    """Classes a (3 rows), b (1), c (2) in two domains, given unsorted; row r holds the number r."""
    return LabelledRows.of(
        torch.arange(6.0)[:, None],
        torch.tensor([2, 0, 1, 0, 2, 0]),
        ("a", "b", "c"),
        torch.tensor([1, 1, 0, 0, 1, 1]),
        ("x", "y"),
    )


def test_rows_are_sorted_by_class_then_domain():
    data = ragged()
    assert data.rows.flatten().tolist() == [3, 1, 5, 2, 0, 4]
    assert data.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert data.domains.tolist() == [0, 1, 1, 0, 1, 1]
    assert data.counts.tolist() == [3, 1, 2]
    assert data.starts.tolist() == [0, 3, 4]
    assert len(data) == 6


def test_select_renumbers_in_the_order_given():
    chosen = ragged().select(classes=["c", 0], domains=["y"])
    assert chosen.class_names == ("c", "a")
    assert chosen.domain_names == ("y",)
    assert chosen.rows.flatten().tolist() == [0, 4, 1, 5]
    assert chosen.labels.tolist() == [0, 0, 1, 1]
    assert chosen.domains.tolist() == [0] * 4
    assert ragged().select().fingerprint == ragged().fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["d"]}, "'d'"),
        ({"classes": [3]}, "class 3"),
        ({"classes": ["a", 0]}, "given twice"),
        ({"domains": ["z"]}, "'z'"),
        ({"classes": ["b"], "domains": ["y"]}, "expected [n, ...] with n >= 1"),
        ({"classes": ["a", "b"], "domains": ["y"]}, "class b has no rows"),
    ],
)
def test_select_names_what_is_wrong(options, message):
    assert message in error_of(ragged().select, **options)


def test_fingerprint_changes_with_every_part():
    data = ragged()
    others = [
        data.with_rows(data.rows + 1),
        data.with_rows(data.rows.reshape(3, 2).repeat(2, 1)),
        LabelledRows(data.rows, data.labels.flip(0), data.class_names, data.domains, data.domain_names),
        LabelledRows(data.rows, data.labels, ("a", "b", "d"), data.domains, data.domain_names),
        LabelledRows(data.rows, data.labels, data.class_names, 1 - data.domains, data.domain_names),
        LabelledRows(data.rows, data.labels, data.class_names),
    ]
    assert len({part.fingerprint for part in [data, *others]}) == len(others) + 1
    assert all(len(part.fingerprint) == 16 for part in others)


def test_join_takes_classes_of_one_name_as_one():
    data = ragged()
    whole = join([data.select(classes=["c", "b"]), data.select(classes=["a"]), data.select(classes=["b"])])
    assert whole.class_names == ("c", "b", "a")
    assert whole.counts.tolist() == [2, 2, 3]
    assert whole.select(classes=["a"]).rows.flatten().tolist() == [3, 1, 5]
    assert "one shape" in error_of(join, [data, data.with_rows(torch.zeros(6, 2))])


def test_a_class_in_two_splits_is_named():
    data = ragged()
    check_class_splits({"train": data.select(classes=["a"]), "test": data.select(classes=["b", "c"])}, "data")
    both = {"train": data.select(classes=["a", "b"]), "test": data.select(classes=["b", "c"])}
    assert "1 classes are in two splits: b (train, test)" in error_of(check_class_splits, both, "data")


def test_too_few_rows_of_a_class_are_named_and_counted():
    message = error_of(ragged().check_counts, 3, "data")
    assert "2 of 3 classes have fewer than 3 rows: b (1), c (2)" in message
    ragged().check_counts(1, "data")


def test_bad_parts_are_refused():
    rows, labels = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    bad = rows.clone()
    bad[2, 1], bad[3, 0] = float("nan"), float("inf")
    assert "2 of 4 rows hold NaN or infinity (first: row 2)" in error_of(LabelledRows.of, bad, labels)
    assert "labels from 0 to 2, expected 0 to 1" in error_of(
        LabelledRows.of, rows, torch.tensor([0, 1, 2, 0]), ("a", "b")
    )
    assert "labels from -1 to 1" in error_of(LabelledRows.of, rows, torch.tensor([0, 1, -1, 0]))
    assert "class 1 has no rows" in error_of(LabelledRows.of, rows, torch.tensor([0, 2, 2, 0]))
    assert "expected integers [4]" in error_of(LabelledRows.of, rows, labels[:3])
    assert "expected integers [4]" in error_of(LabelledRows.of, rows, labels.float())
    assert "stands twice" in error_of(LabelledRows.of, rows, labels, ("a", "a"))
    assert "rows of torch.int64" in error_of(LabelledRows.of, rows.long(), labels)
    assert "n >= 1" in error_of(LabelledRows.of, rows[:0], labels[:0])


# --- packed zips ---


def tiles(seed, count, size=4):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def strip(images, columns=3):
    """The tiles as one lossless strip, row-major, black where the last line ends early."""
    size = images.shape[1]
    lines = -(-len(images) // columns)
    sheet = np.zeros((lines * columns, size, size, 3), np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(lines, columns, size, size, 3).swapaxes(1, 2).reshape(lines * size, columns * size, 3)
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG")
    return file.getvalue()


GROUPS = [("a", 0, 4, "train"), ("b", 1, 7, "train"), ("c", 2, 2, "test")]  # name, label, count, split


def packed(path, change=lambda meta, members: None, compression=zipfile.ZIP_STORED):
    meta = {
        "size": 4,
        "tile_columns": 3,
        "class_names": ["a", "b", "c"],
        "strips": [{"strip": f"{n}.png", "label": i, "count": c, "split": s} for n, i, c, s in GROUPS],
    }
    members = {f"{n}.png": strip(tiles(i, c)) for n, i, c, _ in GROUPS}
    change(meta, members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("meta.json", json.dumps(meta))
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_packed_zip_is_read_tile_by_tile(tmp_path):
    data = load(packed(tmp_path / "x.zip"))
    assert {name: part.class_names for name, part in data.items()} == {"train": ("a", "b"), "test": ("c",)}
    assert data["train"].counts.tolist() == [4, 7]
    assert np.array_equal(data["train"].rows.numpy(), np.concatenate([tiles(0, 4), tiles(1, 7)]))
    assert np.array_equal(data["test"].rows.numpy(), tiles(2, 2))
    check_class_splits(data, "x")


def test_domains_of_a_packed_zip(tmp_path):
    def domains(meta, members):
        for entry, domain in zip(meta["strips"], ["photo", "sketch", "photo"], strict=True):
            del entry["split"]
            entry["domain"] = domain

    data = load(packed(tmp_path / "x.zip", domains))["all"]
    assert data.domain_names == ("photo", "sketch")
    assert data.domains.tolist() == [0] * 4 + [1] * 7 + [0] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta, members: members.pop("b.png"), "'b.png' is not in it"),
        (lambda meta, members: members.update({"b.png": members["b.png"][:60]}), "damaged"),
        (lambda meta, members: members.update({"b.png": members["a.png"]}), "12x8 pixels, expected 12x12"),
        (lambda meta, members: meta["strips"][1].update(strip="../b.png"), "'../b.png' is not in it"),
        (lambda meta, members: meta["strips"][1].update(strip="/etc/passwd"), "is not in it"),
        (lambda meta, members: meta["strips"][1].update(label=3), "labels from 0 to 3, expected 0 to 2"),
        (lambda meta, members: meta["strips"][1].update(label=-1), "labels from -1"),
        (lambda meta, members: meta["strips"][1].update(label=0), "class b has no rows"),
        (lambda meta, members: meta["strips"][1].pop("split"), "meta.json does not describe"),
        (lambda meta, members: meta["strips"][1].update(count=10**9), "12x12 pixels, expected 12x1333333336"),
        (lambda meta, members: meta.update(size=0), "12x8 pixels, expected 0x0"),
        (lambda meta, members: meta.update(size="4"), "meta.json does not describe"),
        (lambda meta, members: meta.update(strips=[]), "meta.json does not describe"),
        (lambda meta, members: meta.update(class_names=["a", "b", "b"]), "stands twice"),
    ],
)
def test_a_damaged_packed_zip_is_named(tmp_path, change, message):
    path = packed(tmp_path / "x.zip", change)
    found = error_of(load, path)
    assert message in found
    assert str(path) in found


def test_bombs_and_no_zips_are_refused(tmp_path):
    path = packed(
        tmp_path / "x.zip", lambda meta, members: members.update({"a.png": bytes(10**6)}), zipfile.ZIP_DEFLATED
    )
    assert "refused as a zip bomb" in error_of(load, path)
    path.write_bytes(b"PK no zip")
    assert "damaged (File is not a zip file)" in error_of(load, path)
    path.write_bytes(packed(tmp_path / "y.zip").read_bytes()[:-100])
    assert "damaged" in error_of(load, path)


def test_without_pillow(tmp_path, monkeypatch):
    photo(tmp_path / "data/a/1.png", "red")
    sources = packed(tmp_path / "x.zip"), tmp_path / "data"
    monkeypatch.setitem(sys.modules, "PIL", None)
    for source in sources:
        assert "reading images needs pillow" in error_of(load, source)


def test_what_is_no_source_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MCDI_DATA_DIR", raising=False)
    assert "no such file or folder" in error_of(load, tmp_path / "nothing")
    (tmp_path / "x.mat").touch()
    assert "a file of kind '.mat'" in error_of(load, tmp_path / "x.mat")
    assert "set MCDI_DATA_DIR" in error_of(load, "pacs")
    assert "pacs.zip: not there" in error_of(load, "pacs", data_dir=tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tiny-imagenet", {"train": (64, 60), "val": (16, 60), "test": (20, 60)}),
        ("cifar10", {"train": (10, 150), "test": (10, 50)}),
        ("caltech101", {"all": (20, 60)}),
        ("flowers17", {"all": (17, 60)}),
        ("pacs", {"all": (7, 240)}),
        ("digits", {"all": (10, 180)}),
    ],
)
def test_real_data(name, parts):
    if not os.environ.get("MCDI_DATA_DIR"):
        pytest.skip("MCDI_DATA_DIR is not set")
    data = load(name)
    assert {split: (part.num_classes, part.counts.unique().item()) for split, part in data.items()} == parts
    domains = {"pacs": ("photo", "art_painting", "cartoon", "sketch"), "digits": ("mnist", "mnist_m", "usps")}
    assert all(part.domain_names == domains.get(name, ()) for part in data.values())
    side = 32 if name in ("cifar10", "digits") else 64
    assert all(part.rows.shape[1:] == (side, side, 3) and part.rows.dtype == torch.uint8 for part in data.values())
    assert len(PACKED) == 6


# --- folders ---


def photo(path, colour, size=(20, 10), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.convert(mode).save(path, **options)
    return path


def colours(part):
    """The colour of each row's middle, red, green or blue by its largest channel."""
    return part.rows[:, part.rows.shape[1] // 2, part.rows.shape[2] // 2].float().argmax(1).tolist()


@pytest.fixture
def folder(tmp_path):
    """cat: 3 red, dog: 1 green, of several modes, sizes and formats, beside what is no image."""
    photo(tmp_path / "data/dog/1.JPG", "lime", (7, 31), quality=95)
    photo(tmp_path / "data/cat/1.png", "red", mode="RGBA")
    photo(tmp_path / "data/cat/2.gif", "red", mode="P")
    photo(tmp_path / "data/cat/3.jpeg", "red", (900, 700), mode="CMYK", quality=95)
    (tmp_path / "data/cat/notes.txt").write_text("no image")
    (tmp_path / "data/cat/._1.png").write_bytes(b"what a Mac leaves")
    (tmp_path / "data/.cache").mkdir()
    return tmp_path / "data"


def test_a_folder_with_a_sub_folder_a_class(folder):
    counted = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            counted[-1] += 1

    def stage(*what):
        counted.extend([what, 0])
        return Bar()

    data = load(folder, side=8, stage=stage)["all"]
    assert data.class_names == ("cat", "dog")
    assert data.rows.shape == (4, 8, 8, 3)
    assert colours(data) == [0, 0, 0, 1]
    assert counted == [("images", 4, "images"), 4]
    assert data.fingerprint == load(folder, side=8)["all"].fingerprint


def test_the_centre_square_is_taken_upright(tmp_path):
    stripes = np.zeros((10, 30, 3), np.uint8)  # red, green, blue squares beside each other
    for channel in range(3):
        stripes[:, 10 * channel : 10 * channel + 10, channel] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(stripes).save(tmp_path / "a/1.png")
    assert np.array_equal(load(tmp_path, side=10)["all"].rows[0].numpy(), stripes[:, 10:20])
    half = np.zeros((16, 16, 3), np.uint8)
    half[:8, :, 0] = 255  # red above; orientation 3 turns it over
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(half).save(tmp_path / "a/1.png", exif=exif)
    row = load(tmp_path, side=16)["all"].rows[0]
    assert row[:8].sum() == 0
    assert (row[8:, :, 0] == 255).all()


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    (tmp_path / "a").mkdir()
    for name, value in (("1", 0), ("2", 25700), ("3", 65535)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"a/{name}.png")
    assert load(tmp_path, side=4)["all"].rows[:, 0, 0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_a_large_jpeg_decoded_small_is_close_to_the_whole(tmp_path):
    smooth = np.random.default_rng(0).normal(128, 60, (6, 6, 3)).clip(0, 255).astype(np.uint8)
    large = Image.fromarray(smooth).resize((2000, 2000), Image.Resampling.BICUBIC)
    (tmp_path / "a").mkdir()
    large.save(tmp_path / "a/1.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a/1.jpg").resize((64, 64), Image.Resampling.LANCZOS))
    assert np.abs(load(tmp_path, side=64)["all"].rows[0].numpy().astype(int) - expected).max() <= 4


def test_splits_and_domains_above_the_classes(tmp_path):
    for name, colour in (("cat", "red"), ("dog", "lime")):
        photo(tmp_path / f"s/train/{name}/1.png", colour)
        photo(tmp_path / f"s/valid/{name}2/images/1.png", colour)  # as Tiny ImageNet comes
        photo(tmp_path / f"d/sketch/{name}/1.png", colour)
    photo(tmp_path / "d/photo/dog/1.png", "lime")
    splits = load(tmp_path / "s", side=4)
    assert {name: part.class_names for name, part in splits.items()} == {
        "train": ("cat", "dog"),
        "val": ("cat2", "dog2"),
    }
    data = load(tmp_path / "d", side=4)["all"]
    assert data.domain_names == ("photo", "sketch")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.domains.tolist() == [1, 0, 1]


def test_split_lists(folder, tmp_path):
    photo(folder / "cow/1.png", "blue")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("dog\n\n")
    (lists / "test.csv").write_text("label,count\ncat,3\n")
    parts = load(folder, side=4, splits=lists)  # cow is in no list
    assert {name: part.class_names for name, part in parts.items()} == {"train": ("dog",), "test": ("cat",)}
    lists.rename(folder / "splits")
    assert load(folder, side=4)["test"].fingerprint == parts["test"].fingerprint


def test_images_listed_one_by_one(tmp_path):
    """Mini-ImageNet: one folder `images`, lists with filename and label."""
    for number, colour in enumerate(["red", "lime", "blue", "red"]):
        photo(tmp_path / f"images/{number}.png", colour)
    (tmp_path / "train.csv").write_text("filename,label\n3.png,n01\n1.png,n02\n0.png,n01\n")
    (tmp_path / "test.csv").write_text("filename,label\n2.png,n03\n")
    parts = load(tmp_path, side=4)
    assert colours(parts["train"]) == [0, 0, 1]
    assert colours(parts["test"]) == [2]
    (tmp_path / "test.csv").write_text("filename,label\n2.png,n03\n9.png,n03\n")
    assert "1 of 5 listed images are not there: 9.png" in error_of(load, tmp_path)
    for escape in ("../secret.png", "/etc/secret.png"):
        (tmp_path / "test.csv").write_text(f"filename,label\n{escape},n03\n")
        assert "leads out of the folder" in error_of(load, tmp_path)
    (tmp_path / "test.csv").write_text("filename,label\n2.png,n01\n")
    assert "1 classes are in the list of train too: n01" in error_of(load, tmp_path)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train.txt": "cat\ndog", "val.txt": "dog"}, "1 classes are in the list of train too: dog"),
        ({"train.txt": "cat\nbird\nfish"}, "2 of 3 classes are not in"),
        ({"train.txt": ""}, "expected a class a line"),
        ({"train.csv": "name\ncat"}, "a csv with a column `label`"),
        ({"train.csv": "label\ncat", "train.txt": "cat"}, "keep one list"),
        ({"other.txt": "cat"}, "holds no split list"),
    ],
)
def test_bad_split_lists_are_named(folder, tmp_path, lists, message):
    place = tmp_path / "lists"
    place.mkdir()
    for name, text in lists.items():
        (place / name).write_text(text)
    found = error_of(load, folder, splits=place)
    assert message in found
    assert str(place) in found


def test_unreadable_images_are_named_and_counted(folder):
    for name in ("4.png", "5.jpg", "6.bmp", "7.gif"):
        (folder / "cat" / name).write_bytes(b"no image")
    cut = (folder / "cat/3.jpeg").read_bytes()
    (folder / "cat/3.jpeg").write_bytes(cut[: len(cut) // 2])
    found = error_of(load, folder)
    assert "5 of 8 images cannot be read: cat/3.jpeg (" in found
    assert "cat/4.png" in found
    assert "and 2 more" in found


def test_an_image_of_too_many_pixels_is_not_decoded(folder):
    Image.new("1", (20000, 20000)).save(folder / "cat/bomb.png")
    assert "1 of 5 images cannot be read: cat/bomb.png" in error_of(load, folder)


def test_folders_that_are_none_of_images(tmp_path, folder):
    (folder / "empty").mkdir()
    assert "1 class folders hold no image (empty)" in error_of(load, folder)
    (tmp_path / "bare").mkdir()
    assert "no images in class sub-folders" in error_of(load, tmp_path / "bare")
    photo(tmp_path / "flat/1.png", "red")
    assert "no images in class sub-folders" in error_of(load, tmp_path / "flat")
    assert "side = 0" in error_of(load, folder, side=0)
    os.symlink(folder / "loop", folder / "loop")  # neither a folder nor a file
    (folder / "empty").rmdir()
    assert len(load(folder, side=4)["all"]) == 4


# --- files of features ---

FEATURES = np.random.default_rng(0).normal(size=(6, 3))
LABELS = np.array([1, 0, 1, 2, 2, 0])


def test_features_of_an_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, features=FEATURES, labels=LABELS, domains=list("abbaab"), class_names=["cat", "dog", "cow"])
    data = load(path)["all"]
    assert data.class_names == ("cat", "dog", "cow")
    assert data.domain_names == ("a", "b")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.domains.tolist() == [1, 1, 0, 1, 0, 0]
    assert torch.equal(data.rows, torch.tensor(FEATURES[[1, 5, 0, 2, 3, 4]]).float())
    names = np.array(["cat", "dog", "cow"])[LABELS]
    np.savez_compressed(path, features=FEATURES.astype(">f4"), labels=names, splits=["train"] * 3 + ["test"] * 3)
    parts = load(path)
    assert {name: part.class_names for name, part in parts.items()} == {"train": ("cat", "dog"), "test": ("cat", "cow")}
    assert np.allclose(parts["test"].rows, FEATURES[[5, 3, 4]], atol=1e-6)


def test_features_of_a_safetensors_file(tmp_path):
    path = tmp_path / "x.safetensors"
    numbers = {"features": torch.tensor(FEATURES).half(), "labels": torch.tensor(LABELS).int()}
    numbers["splits"] = torch.tensor([0, 0, 0, 1, 1, 1])
    names = {"class_names": json.dumps(["cat", "dog", "cow"]), "split_names": json.dumps(["training", "test"])}
    safetensors.torch.save_file(numbers, path, names)
    parts = load(path)
    assert {name: part.class_names for name, part in parts.items()} == {"train": ("cat", "dog"), "test": ("cat", "cow")}
    assert parts["train"].rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None}, "features are absent"),
        ({"labels": None}, "labels are absent"),
        ({"features": LABELS}, "features are torch.int64 [6]"),
        ({"features": FEATURES[:5]}, "expected integers [5]"),
        ({"features": FEATURES * np.inf}, "6 of 6 rows hold NaN or infinity"),
        ({"labels": LABELS - 1}, "labels from -1 to 1"),
        ({"labels": LABELS * 1.5}, "labels are torch.float64"),
        ({"labels": LABELS + 2**40}, "expected 0 to 0"),
        ({"class_names": ["a", "b"]}, "labels from 0 to 2, expected 0 to 1"),
        ({"class_names": ["a", "b", "c", "d"]}, "class d has no rows"),
        ({"labels": list("aabbcc"), "class_names": ["a", "b"]}, "labels hold c, not among class_names"),
        ({"domains": [0, 1, 2]}, "domains are"),
        ({"splits": [0, 0, 0, 2, 2, 2], "split_names": ["train", "val", "test"]}, "split val has no rows"),
        ({"labels": np.array([{}] * 6)}, "damaged"),
        ({"labels": LABELS + 1j}, "holds complex128"),
        ({"features": np.zeros((10**6, 4))}, "refused as a zip bomb"),
    ],
)
def test_bad_files_of_features_are_named(tmp_path, change, message):
    path = tmp_path / "x.npz"
    columns = {"features": FEATURES, "labels": LABELS} | change
    np.savez_compressed(path, **{name: column for name, column in columns.items() if column is not None})
    found = error_of(load, path)
    assert message in found
    assert str(path) in found


def test_splits_of_two_spellings_are_one(tmp_path):
    np.savez(
        tmp_path / "x.npz", features=FEATURES, labels=LABELS, splits=["train", "valid", "val", "Train", "val", "valid"]
    )
    parts = load(tmp_path / "x.npz")
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "val": 4}
    assert torch.equal(parts["train"].rows, torch.tensor(FEATURES[[0, 3]]).float())


def test_truncated_files_of_features_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", features=FEATURES, labels=LABELS)
    numbers = {"features": torch.tensor(FEATURES), "labels": torch.tensor(LABELS)}
    safetensors.torch.save_file(numbers, tmp_path / "x.safetensors", {"class_names": "3"})
    assert "class_names are 3, expected a list of names" in error_of(load, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.npz", tmp_path / "x.safetensors"):
        whole = path.read_bytes()
        for length in (0, 7, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert str(path) in error_of(load, path)
