import contextlib
import errno
import json
import os
import struct

import pytest
import safetensors.torch
import torch
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast import store
from mcdi_fast.errors import McdiError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def raw_file(path, header, data=b"", length=None):
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def ours(**changed):
    return {"mcdi_fast": json.dumps({"format": 1, "kind": "test", "meta": {}} | changed)}


# --- tensors ---


@settings(max_examples=40, deadline=None)
@given(
    entries=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=4,
    ),
    meta=st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_bit_exact(tmp_path_factory, entries, meta, seed):
    path = tmp_path_factory.mktemp("round") / "file.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in entries.items():
        size = torch.empty(shape, dtype=dtype).nbytes
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator, dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)  # any bits: NaN payloads, subnormals
    store.save_tensors(path, tensors, meta, "test")
    loaded, found = store.load_tensors(path, "test")
    assert found == meta
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)


def test_strided_tied_and_sliced_tensors_are_stored_apart(tmp_path):
    path = tmp_path / "file"
    base = torch.randn(6, 5)
    tensors = {
        "a": base,
        "again": base,
        "transposed": base.T,
        "slice": base[2:4, 1:3],
        "parameter": torch.nn.Parameter(base),
    }
    store.save_tensors(path, tensors, {}, "test")
    loaded, _ = store.load_tensors(path, "test")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert path.stat().st_size < 4 * (4 * 30 + 4) + 1000  # the slice alone, not the storage under it


def test_writing_to_a_loaded_tensor_leaves_the_file_and_replacing_the_file_leaves_the_tensor(tmp_path):
    path = tmp_path / "file"
    store.save_tensors(path, {"a": torch.zeros(5000)}, {}, "test")
    before = path.read_bytes()
    first = store.load_tensors(path, "test")[0]["a"]
    first += 1
    assert path.read_bytes() == before
    second = store.load_tensors(path, "test")[0]["a"]
    assert torch.equal(second, torch.zeros(5000))
    store.save_tensors(path, {"a": torch.full((5000,), 7.0)}, {}, "test")
    assert torch.equal(second, torch.zeros(5000))


def test_same_content_gives_the_same_bytes(tmp_path):
    for name in "xy":
        store.save_tensors(tmp_path / name, {"b": torch.ones(3), "a": torch.zeros(2)}, {"k": 1}, "test")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "meta", "expected"),
    [
        ({"__metadata__": torch.ones(1)}, {}, "__metadata__"),
        ({"a": [1, 2]}, {}, "list"),
        ({"a": torch.ones(2, device="meta")}, {}, "'a'"),
        ({"a": torch.ones(2, 2).to_sparse()}, {}, "'a'"),
        ({"a": torch.ones(2)}, {"loss": float("nan")}, "finite"),
        ({"a": torch.ones(2)}, {"loss": torch.ones(1)}, "Tensor"),
        ({"a": torch.ones(2)}, {"long": "x" * store.MAX_JSON_BYTES}, "exceed"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_writing(tmp_path, tensors, meta, expected):
    message = error_of(store.save_tensors, tmp_path / "out.file", tensors, meta, "test")
    assert "out.file" in message
    assert expected in message
    assert os.listdir(tmp_path) == []


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "some.file"
    assert "some.file" in error_of(store.load_tensors, path, "test")
    tensors = {"a": torch.arange(10)}
    store.save_tensors(path, tensors, {}, "bank-shard")
    message = error_of(store.load_tensors, path, "generator")
    assert "some.file" in message
    assert "'bank-shard'" in message
    assert "'generator'" in message
    safetensors.torch.save_file(tensors, path)
    assert "not made by mcdi_fast" in error_of(store.load_tensors, path, "test")
    safetensors.torch.save_file(tensors, path, {"mcdi_fast": json.dumps({"format": 7, "kind": "test", "meta": {}})})
    message = error_of(store.load_tensors, path, "test")
    assert "some.file: made by format 7, this mcdi_fast reads 1" in message
    assert "regular file" in error_of(store.load_tensors, tmp_path, "test")
    assert "regular file" in error_of(store.load_tensors, "/dev/zero", "test")
    assert "null" in error_of(store.load_tensors, tmp_path / "a\0b", "test")
    (tmp_path / "two\nlines").write_bytes(b"nonsense")
    assert "two\\nlines" in error_of(store.load_tensors, tmp_path / "two\nlines", "test")


def test_truncated_anywhere_is_an_error_naming_the_file(tmp_path):
    whole = tmp_path / "whole"
    store.save_tensors(whole, {"a": torch.arange(10), "b": torch.ones(3)}, {"x": 1}, "test")
    data = whole.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "cut.file"
    for size in {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1, *range(10, len(data), 17)}:
        path.write_bytes(data[:size])
        message = error_of(store.load_tensors, path, "test")
        assert "cut.file" in message
        assert "cut short" in message
    path.write_bytes(data + b"more")
    assert "cut.file" in error_of(store.load_tensors, path, "test")


def test_lying_headers(tmp_path):
    path = tmp_path / "lie.file"
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    good = {"__metadata__": ours(), "a": tensor}
    raw_file(path, good, bytes(8))
    assert store.load_tensors(path, "test")[0]["a"].tolist() == [0, 0]

    def refused(header, length=None, data=bytes(8)):
        message = error_of(store.load_tensors, raw_file(path, header, data, length), "test")
        assert "lie.file" in message
        return message

    assert "declares a header" in refused(good, length=2**63)
    assert "declares a header" in refused(good, length=store.MAX_JSON_BYTES + 1)
    assert "cut short" in refused(good, length=5000)
    refused(b"[" * 100_000)
    refused(b"\xff\xfe")
    refused(b'{"a": NaN}')
    refused([])
    refused({"__metadata__": 3})
    refused({"__metadata__": {"mcdi_fast": "["}})
    refused({"__metadata__": {"mcdi_fast": "3"}})
    refused({"__metadata__": ours(meta=[])})
    refused({"__metadata__": ours(format="1")})
    refused({"__metadata__": ours(kind=None)})
    text = json.dumps(ours())
    refused(f'{{"__metadata__": {text}, "__metadata__": {text}}}'.encode(), data=b"")  # a key twice
    for lie in (
        {"shape": [3]},
        {"shape": [-2]},
        {"shape": [2**62, 2**62]},
        {"shape": [2**40], "data_offsets": [0, 2**42]},
        {"data_offsets": [0, 2**64 - 1]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [4, 12]},
        {"data_offsets": [True, 8]},
        {"dtype": "F12"},
        {"shape": [2**63 - 1, 0], "data_offsets": [0, 0]},
    ):
        refused({"__metadata__": ours(), "a": tensor | lie})


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda b: struct.pack("<Q", len(b)) + b))
def test_random_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.file"
    path.write_bytes(data)
    assert "fuzz.file" in error_of(store.load_tensors, path, "test")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_load_or_are_refused(tmp_path_factory, flips):
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.file"
    store.save_tensors(path, {"a": torch.arange(4), "b": torch.ones(3)}, {"x": [1, 2.5]}, "test")
    data = bytearray(path.read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(McdiError):
        store.load_tensors(path, "test")


# --- JSON ---


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "some.json"
    value = {"a": [1, 2.5, None, True], "ü": {"nested": 1e-300}, "": "\ud800"}
    store.write_json(path, value)
    assert store.read_json(path) == value
    before = path.read_bytes()
    for bad in (float("nan"), [float("inf")], {"x": {1, 2}}, torch.ones(1)):
        assert "some.json" in error_of(store.write_json, path, bad)
    assert path.read_bytes() == before
    for text in (
        b"",
        b"{",
        b"NaN",
        b"-Infinity",
        b"\xff",
        b"[" * 10**5,
        b"9" * 10**4,
        b"1 2",
    ):
        path.write_bytes(text)
        assert "some.json" in error_of(store.read_json, path)
    with open(path, "wb") as file:
        file.truncate(store.MAX_JSON_BYTES + 1)
    assert "at most" in error_of(store.read_json, path)
    assert "missing.json" in error_of(store.read_json, tmp_path / "missing.json")


# --- atomic writes ---


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, exists):
    path = tmp_path / "run.file"
    if exists:
        path.write_bytes(b"old")
    monkeypatch.setattr(os, call, no_space)
    message = error_of(store.atomic_write, path, b"new")
    monkeypatch.undo()
    assert f"cannot write {path}: No space left on device; free space and run the same command again" in message
    assert os.listdir(tmp_path) == (["run.file"] if exists else [])
    assert not exists or path.read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_write_that_really_fails(tmp_path, monkeypatch):
    """The kernel itself says ENOSPC, in write() and not in fsync()."""
    path = tmp_path / "run.file"
    path.write_bytes(b"old")
    real = os.open

    def open_full(name, *args):
        if str(name).endswith(".tmp"):
            os.close(real(name, *args))
            return real("/dev/full", os.O_WRONLY)
        return real(name, *args)

    monkeypatch.setattr(os, "open", open_full)
    assert "No space left" in error_of(store.atomic_write, path, b"new" * 10**6)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["run.file"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_read_only_folder(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    (tmp_path / "run.file").write_bytes(b"old")
    monkeypatch.setattr(os, "open", refuse)
    message = error_of(store.atomic_write, tmp_path / "run.file", b"new")
    monkeypatch.undo()
    assert "run.file" in message
    assert "writable" in message
    assert (tmp_path / "run.file").read_bytes() == b"old"


def test_impossible_paths(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (
        tmp_path / "missing" / "x.file",
        tmp_path / "plain" / "x.file",
        tmp_path / "folder",
        tmp_path / ("x" * 300),
        tmp_path / "nul\0x.file",
        "/",
    ):
        assert "cannot write" in error_of(store.atomic_write, path, b"new")
    assert "plain" in error_of(store.make_folder, tmp_path / "plain" / "sub")
    assert sorted(os.listdir(tmp_path)) == ["folder", "plain"]


def test_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.file"
    path.write_bytes(b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.atomic_write(path, b"new")
    assert os.listdir(tmp_path) == ["run.file"]
    assert path.read_bytes() == b"old"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        store.atomic_write(tmp_path / "x", b"new")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *args: os._exit(9))
    if (child := os.fork()) == 0:
        try:
            store.atomic_write(tmp_path / "bank.json", b"new")
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 1
    for name in (".hidden.tmp", "bank.json", "notes.tmp"):
        (tmp_path / name).write_bytes(b"")
    store.remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden.tmp", "bank.json", "notes.tmp"]
    store.remove_temporaries(tmp_path / "missing")
