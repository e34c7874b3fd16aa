import doctest
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mcdi_fast.bank
from mcdi_fast import store
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.weights import WeightLayout

LAYOUT = WeightLayout.from_module(nn.Linear(4, 3))  # N = 3, D = 5
K, C = 2, 7


def tasks(count, seed=0, layout=LAYOUT, k=K, c=C):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, k, layout.num_tokens, layout.width, generator=generator),
        torch.randn(count, layout.num_tokens, c, generator=generator),
    )


def make_bank(folder, sizes=(3, 1, 4)):
    """The bank and all it holds, in memory."""
    bank = TrajectoryBank.create(folder, LAYOUT, K, C, {"made": "here"})
    parts = [tasks(size, seed) for seed, size in enumerate(sizes)]
    for part in parts:
        bank.append(*part)
    return bank, torch.cat([t for t, _ in parts]), torch.cat([c for _, c in parts])


def test_docstring():
    result = doctest.testmod(mcdi_fast.bank)
    assert result.attempted > 5
    assert result.failed == 0


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), data=st.data())
def test_gather_equals_indexing_in_memory(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("bank")
    bank, targets, condition = make_bank(folder, sizes)
    index = torch.tensor(data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12)), dtype=torch.int64)
    for one in (bank, TrajectoryBank.open(folder)):
        assert len(one) == sum(sizes)
        assert one.num_shards == len(sizes)
        found = one.gather(index)
        assert torch.equal(found[0], targets[index])
        assert torch.equal(found[1], condition[index])
        one.check_finite()


def test_gather_reads_only_the_rows_asked_for(tmp_path):
    """A bank far larger than what may be resident: a sparse file of 2 GiB, of which 3 rows are read."""
    with open("/proc/self/status") as file:
        if "RssFile" not in file.read():
            pytest.skip("needs /proc/self/status with RssFile")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    bank, targets, condition = make_bank(tmp_path, [2])
    path = tmp_path / "shard-000000.safetensors"
    digest = store.load_tensors(path, "bank-shard")[1]["layout"]
    count = 2**31 // (4 * K * LAYOUT.num_tokens * LAYOUT.width)
    sizes = [4 * count * LAYOUT.num_tokens * C, 4 * count * K * LAYOUT.num_tokens * LAYOUT.width]
    header = json.dumps(
        {
            "__metadata__": {
                "mcdi_fast": json.dumps({"format": 1, "kind": "bank-shard", "meta": {"layout": digest}}),
            },
            "condition": {"dtype": "F32", "shape": [count, 3, C], "data_offsets": [0, sizes[0]]},
            "targets": {"dtype": "F32", "shape": [count, K, 3, 5], "data_offsets": [sizes[0], sum(sizes)]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    del bank, targets, condition
    try:
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + sum(sizes))
        before = resident()
        bank = TrajectoryBank.open(tmp_path)
        assert len(bank) == count
        targets, _ = bank.gather(torch.tensor([0, count // 2, count - 1]))
        assert not targets.any()
        assert resident() - before < 64 * 2**20
    finally:
        path.unlink()


def test_append_is_seen_at_once_and_after_opening(tmp_path):
    bank = TrajectoryBank.create(tmp_path / "a" / "b", LAYOUT, K, C)
    assert len(bank) == bank.num_shards == 0
    assert "bank of 0" in error_of(bank.gather, torch.tensor([0]))
    first = tasks(2)
    bank.append(*first)
    assert len(bank) == 2
    bank.append(*tasks(3, 1))
    again = TrajectoryBank.open(tmp_path / "a" / "b")
    assert (len(again), again.num_shards, again.num_segments, again.condition_width) == (5, 2, K, C)
    assert again.layout == LAYOUT
    assert again.meta == {}
    assert torch.equal(again.gather(torch.tensor([1, 0]))[0], first[0].flip(0))


def test_create_resumes_the_same_bank_and_refuses_another(tmp_path):
    make_bank(tmp_path)
    leftover = tmp_path / ".shard-000003.safetensors.0123abcd.tmp"
    leftover.write_bytes(b"half")
    assert len(TrajectoryBank.create(tmp_path, LAYOUT, K, C, {"made": "here"})) == 8
    assert not leftover.exists()
    other = WeightLayout.from_module(nn.Linear(4, 4))
    for what, args in {
        "num_segments": (LAYOUT, K + 1, C, {"made": "here"}),
        "condition_width": (LAYOUT, K, C + 1, {"made": "here"}),
        "layout": (other, K, C, {"made": "here"}),
        "meta.made ('here', now 'there')": (LAYOUT, K, C, {"made": "there"}),
        "layout.exchangeable (False, now True)": (WeightLayout(LAYOUT.entries, True), K, C, {"made": "here"}),
    }.items():
        message = error_of(TrajectoryBank.create, tmp_path, *args)
        assert "bank.json" in message
        assert what in message
    assert len(TrajectoryBank.open(tmp_path)) == 8
    (tmp_path / "bank.json").unlink()
    assert "shard-000000" in error_of(TrajectoryBank.create, tmp_path, LAYOUT, K, C)


def test_meta_with_tuples_resumes(tmp_path):
    for _ in range(2):
        bank = TrajectoryBank.create(tmp_path, LAYOUT, K, C, {"sizes": (1, 2)})
    assert bank.meta == {"sizes": [1, 2]}
    assert "bank.json" in error_of(TrajectoryBank.create, tmp_path / "b", LAYOUT, K, C, {"x": float("nan")})
    assert "num_segments" in error_of(TrajectoryBank.create, tmp_path / "b", LAYOUT, 0, C)


def test_append_refuses_what_does_not_fit(tmp_path):
    bank, *_ = make_bank(tmp_path)
    targets, condition = tasks(4)
    for bad_targets, bad_condition, expected in (
        (targets[0], condition, "targets"),
        (targets[:, :1], condition, "targets"),
        (targets[..., :4], condition, "targets"),
        (targets.long(), condition, "int64"),
        (targets, condition[:3], "condition"),
        (targets, condition[..., 1:], "condition"),
        (
            targets,
            condition[:, :2],
            "condition is torch.float32 [4, 2, 7], expected torch.float32 [4, 1, 7] or [4, 3, 7]",
        ),
        (targets, condition > 0, "bool"),
        (targets, ["a"], "condition: list, expected a tensor or an array of floating point"),
        (targets, [[1.0], [1.0, 2.0]], "condition: list"),
        (targets.double() * 1e300, condition, "task 0, segment 0"),
        (targets[:0], condition[:0], "at least one task"),
        (torch.tensor(1.0), condition, "targets"),
    ):
        assert expected in error_of(bank.append, bad_targets, bad_condition)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = targets.clone()
        bad[2, 1, 0, 3] = value
        assert "task 2, segment 1" in error_of(bank.append, bad, condition)
        bad = condition.clone()
        bad[3, 1, 0] = value
        assert "condition is not finite in task 3" in error_of(bank.append, targets, bad)
    large = torch.full_like(targets, 3e38)  # finite, though its sum is not
    bank.append(large, condition)
    assert bank.num_shards == 4
    bank.check_finite()


def test_full_disk_loses_no_shard(tmp_path, monkeypatch):
    bank, targets, _ = make_bank(tmp_path)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    message = error_of(bank.append, *tasks(2))
    monkeypatch.undo()
    assert "shard-000003" in message
    assert "nothing made so far is lost" in message
    assert len(bank) == 8
    bank.append(*tasks(2, 9))
    again = TrajectoryBank.open(tmp_path)
    assert len(again) == 10
    assert torch.equal(again.gather(torch.arange(8))[0], targets)


def test_both_of_two_writers_are_kept(tmp_path):
    make_bank(tmp_path)
    one, two = TrajectoryBank.open(tmp_path), TrajectoryBank.open(tmp_path)
    one.append(*tasks(1, 7))
    two.append(*tasks(2, 8))
    assert len(two) == 11
    assert two.num_shards == 5
    again = TrajectoryBank.open(tmp_path)
    assert torch.equal(again.gather(range(8, 11))[0], torch.cat([tasks(1, 7)[0], tasks(2, 8)[0]]))


WRITER = """
import sys, torch
from mcdi_fast.bank import TrajectoryBank
for i in range(25):
    bank = TrajectoryBank.open(sys.argv[1])
    bank.append(torch.full((1, 2, 3, 5), float(1000 * int(sys.argv[2]) + i)), torch.ones(1, 7))
"""


def test_processes_that_write_at_once(tmp_path):
    """Each append is there once; whoever reads meanwhile finds neither a gap nor fewer tasks than before."""
    TrajectoryBank.create(tmp_path, LAYOUT, K, C)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(i)]) for i in range(2)]
    seen = []
    while any(writer.poll() is None for writer in writers):
        seen.append(len(TrajectoryBank.open(tmp_path)))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen == sorted(seen)
    targets, condition = TrajectoryBank.open(tmp_path).gather(range(50))
    assert condition.shape == (50, 1, C)
    assert sorted(targets[:, 0, 0, 0].tolist()) == [1000.0 * writer + i for writer in range(2) for i in range(25)]


def test_the_lock_of_a_killed_writer_stops_nobody(tmp_path, monkeypatch):
    bank, *_ = make_bank(tmp_path)
    if (child := os.fork()) == 0:
        with store.locked(tmp_path / ".lock", 0, ""):
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    bank.append(*tasks(1))
    monkeypatch.setattr(mcdi_fast.bank, "_LOCK_SECONDS", 0.1)
    with store.locked(tmp_path / ".lock", 0, ""):
        assert "another process has been writing there for 0 s" in error_of(bank.append, *tasks(1))


def test_conditions_of_a_task_or_of_each_token(tmp_path):
    bank = TrajectoryBank.create(tmp_path, LAYOUT, K, C)
    assert bank.condition_rows == 1
    targets, condition = tasks(2)
    bank.append(targets, condition[:, 0])
    bank.append(targets, condition[:, :1])
    assert bank.condition_rows == 1
    assert torch.equal(bank.gather(range(4))[1], condition[:, :1].repeat(2, 1, 1))
    assert bank[3].condition.shape == (1, C)
    bank.append(targets, condition)
    again = TrajectoryBank.open(tmp_path)
    for one in (bank, again):
        assert one.condition_rows == 3
        assert torch.equal(one.gather([5, 1])[1], torch.stack([condition[1], condition[1, :1].expand(3, -1)]))
    alone = TrajectoryBank.create(tmp_path / "alone", WeightLayout.from_module(nn.Linear(4, 1)), K, C)
    alone.append(targets[:, :, :1], condition[:, :1])  # one token: both are the same
    assert alone.condition_rows == 1


def test_arrays_and_other_precisions_are_stored_as_float32(tmp_path):
    bank = TrajectoryBank.create(tmp_path, LAYOUT, np.int64(K), np.int32(C), {})
    targets, condition = tasks(4)
    wide = targets.double().requires_grad_()
    strided = np.ascontiguousarray(condition.numpy()[::-1])[::-1]
    frozen = targets.numpy().copy()
    frozen.flags.writeable = False
    for pair in ((targets.numpy(), condition.numpy()), (wide, strided), (frozen, condition.tolist())):
        bank.append(*pair)
        assert torch.equal(bank.gather(range(-4, 0))[0], targets)
        assert torch.equal(bank.gather(range(-4, 0))[1], condition)
    bank.append(targets.bfloat16(), condition.half())
    assert torch.equal(bank.gather(range(12, 16))[0], targets.bfloat16().float())
    for name in ("num_segments", "condition_width"):
        for bad in (2.0, True, "2", None):
            sizes = {"num_segments": K, "condition_width": C, name: bad}
            assert name in error_of(TrajectoryBank.create, tmp_path / "other", LAYOUT, **sizes)


def test_any_integers_are_an_index(tmp_path):
    bank, targets, condition = make_bank(tmp_path)
    for index in (
        [7, 0, 7],
        (7, 0, 7),
        range(1, 4),
        np.array([2, 1]),
        np.arange(3, dtype=np.uint8),
        torch.tensor([1]).int(),
        [],
        3,
        -1,
    ):
        number = torch.as_tensor(index).long().reshape(-1) if not isinstance(index, range) else torch.tensor(index)
        found = bank.gather(index)
        assert torch.equal(found[0], targets[number])
        assert torch.equal(found[1], condition[number])
    for index in (0, 5, -1, -8, np.int64(3), torch.tensor(2)):
        found = bank[index]
        assert torch.equal(found.targets, targets[index])
        assert torch.equal(found.condition, condition[index])
        found.targets.zero_()  # a copy
        assert torch.equal(bank[index][0], targets[index])
    assert torch.equal(torch.stack([task.targets for task in bank]), targets)
    for index in (8, -9):
        assert "expected -8 to 7" in error_of(bank.gather, index)
        assert "expected -8 to 7" in error_of(bank.__getitem__, index)
    assert "task 99 of a bank of 8" in error_of(bank.gather, [0, 99])
    for index in (
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        [True],
        "1",
        [0, None],
        [[1], [1, 2]],
        1.0,
        torch.ones(8) > 0,
    ):
        assert "expected integers" in error_of(bank.gather, index)
    for index in ([1], slice(2), "1", 1.0):
        assert "expected an integer" in error_of(bank.__getitem__, index)


def test_repr_is_one_line(tmp_path):
    bank, *_ = make_bank(tmp_path)
    text = f"{tmp_path}': 8 tasks in 3 shards, k = 2, 3 tokens of width 5, conditions of width 7)"
    assert repr(bank).endswith(text)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    TrajectoryBank.create("~/bank", LAYOUT, K, C).append(*tasks(1))
    assert len(TrajectoryBank.open("~/bank")) == 1
    assert (tmp_path / "bank" / "bank.json").exists()


def test_another_default_dtype_and_device(tmp_path):
    bank, targets, condition = make_bank(tmp_path)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = bank.gather([0, 5])
            bank.append(*found)
            assert bank[8].targets.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found[0], targets[[0, 5]])
    assert torch.equal(found[1], condition[[0, 5]])


def test_contents_are_the_identity(tmp_path):
    """Also of shards without a digest, as older versions wrote them."""
    (one, *_), (two, *_) = make_bank(tmp_path / "one"), make_bank(tmp_path / "two")
    assert one.contents() == two.contents() == TrajectoryBank.open(tmp_path / "one").contents()
    for number in range(3):
        path = tmp_path / "two" / f"shard-{number:06d}.safetensors"
        tensors, meta = store.load_tensors(path, "bank-shard")
        assert meta.pop("contents")
        store.save_tensors(path, tensors, meta, "bank-shard")
    assert TrajectoryBank.open(tmp_path / "two").contents() == one.contents()
    two.append(*tasks(1))
    assert two.contents() != one.contents()
    for change in (0, 1):
        other, parts = TrajectoryBank.create(tmp_path / f"other{change}", LAYOUT, K, C), list(tasks(3, 0))
        parts[change][0, 0, 0] += 1e-6
        other.append(*parts)
        whole = TrajectoryBank.create(tmp_path / f"whole{change}", LAYOUT, K, C)
        whole.append(*tasks(3, 0))
        assert other.contents() != whole.contents()


def test_a_bank_of_format_1_is_read_and_goes_on(tmp_path):
    """As version 0.1 wrote it before conditions of a task and positions: no word of exchangeable tokens, no digest of contents."""
    old = WeightLayout(LAYOUT.entries, exchangeable=True)
    layout = {key: value for key, value in old.to_dict().items() if key != "exchangeable"}
    digest = hashlib.sha256(json.dumps(layout, sort_keys=True).encode()).hexdigest()[:16]
    header = {
        "format": 1,
        "kind": "trajectory-bank",
        "num_segments": K,
        "condition_width": C,
        "layout": layout,
        "meta": {"a": 1},
    }
    store.write_json(tmp_path / "bank.json", header)
    targets, condition = tasks(3)
    store.save_tensors(
        tmp_path / "shard-000000.safetensors",
        {"targets": targets, "condition": condition},
        {"layout": digest},
        "bank-shard",
    )
    before = (tmp_path / "bank.json").read_bytes()
    bank = TrajectoryBank.create(tmp_path, old, K, C, {"a": 1})
    assert bank.layout == old
    assert torch.equal(bank.gather(range(3))[1], condition)
    bank.append(targets, condition[:, 0])
    assert len(TrajectoryBank.open(tmp_path)) == 6
    assert (tmp_path / "bank.json").read_bytes() == before
    assert "layout.exchangeable (True, now False)" in error_of(TrajectoryBank.create, tmp_path, LAYOUT, K, C, {"a": 1})


def test_damaged_folders_name_the_file(tmp_path):
    source = tmp_path / "source"
    make_bank(source)
    work = tmp_path / "work"

    def refused(spoil, *expected):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)
        spoil()
        message = error_of(TrajectoryBank.open, work)
        for text in expected:
            assert text in message

    def cut(name, size):
        data = (work / name).read_bytes()
        return lambda: (work / name).write_bytes(data[:size])

    shutil.copytree(source, work)
    shard = "shard-000001.safetensors"
    for size in (0, 5, 100, (work / shard).stat().st_size - 1):
        refused(cut(shard, size), shard, "cut short")
    refused(lambda: (work / shard).unlink(), shard, "missing")
    refused(lambda: (work / "shard-000000.safetensors").unlink(), "shard-000000")
    refused(lambda: (work / shard).rename(work / "shard-1.safetensors"), shard, "shard-1.")
    refused(lambda: (work / "shard-extra.safetensors").write_bytes(b""), "shard-000003", "shard-extra")
    refused(lambda: store.save_tensors(work / shard, {}, {}, "generator"), shard, "'generator'")
    refused(lambda: store.save_tensors(work / shard, {}, {}, "bank-shard"), shard, "layout")

    def foreign(layout=LAYOUT, k=K, c=C):
        def spoil():
            bank = TrajectoryBank.create(tmp_path / f"foreign-{layout.width}-{k}-{c}", layout, k, c)
            bank.append(*tasks(1, layout=layout, k=k, c=c))
            shutil.copy(bank.folder / "shard-000000.safetensors", work / shard)

        return spoil

    refused(foreign(k=K + 1), shard, "targets")
    refused(foreign(c=C + 2), shard, "condition")
    refused(foreign(layout=WeightLayout.from_module(nn.Linear(3, 3))), shard, "layout")
    # as many tokens as wide, but other tensors
    refused(foreign(layout=WeightLayout.from_module(nn.Linear(5, 3, bias=False))), shard, "layout")

    good = json.loads((source / "bank.json").read_text())
    for change, expected in (
        ({"format": 7}, "made by format 7, this mcdi_fast reads 1 and 2"),
        ({"kind": "report"}, "not the header"),
        ({"num_segments": True}, "num_segments"),
        ({"num_segments": -1}, "num_segments"),
        ({"condition_width": 2**40}, "condition_width"),
        ({"meta": None}, "meta"),
        ({"layout": {}}, "layout"),
    ):
        refused(lambda change=change: store.write_json(work / "bank.json", good | change), "bank.json", expected)
    refused(lambda: (work / "bank.json").write_text("[1]"), "bank.json")
    refused(lambda: (work / "bank.json").write_text('{"a": NaN}'), "bank.json")
    refused(lambda: (work / "bank.json").unlink(), "bank.json")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    assert "plain" in error_of(TrajectoryBank.create, tmp_path / "plain", LAYOUT, K, C)
    assert "plain" in error_of(TrajectoryBank.open, tmp_path / "plain")


@pytest.mark.parametrize("chunk", [1, 10**6])
def test_check_finite_names_shard_task_and_segment(tmp_path, monkeypatch, chunk):
    """A NaN that came in behind append's back, found whatever the chunk."""
    monkeypatch.setattr(mcdi_fast.bank, "_CHUNK_BYTES", chunk)
    make_bank(tmp_path)
    path = tmp_path / "shard-000002.safetensors"
    tensors, meta = store.load_tensors(path, "bank-shard")
    targets = tensors["targets"].clone()
    targets[2, 1, 0, 0] = float("nan")
    store.save_tensors(path, tensors | {"targets": targets}, meta, "bank-shard")
    message = error_of(TrajectoryBank.open(tmp_path).check_finite)
    assert "shard-000002" in message
    assert "task 6, segment 1" in message
    condition = tensors["condition"].clone()
    condition[3, 0, 0] = float("inf")
    store.save_tensors(path, tensors | {"condition": condition}, meta, "bank-shard")
    assert "condition is not finite in task 7" in error_of(TrajectoryBank.open(tmp_path).check_finite)
