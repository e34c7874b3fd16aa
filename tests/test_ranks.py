"""Several processes are one run: the same result to rounding, and a process that dies ends it with a word and a valid checkpoint."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mcdi_fast import DenoiserConfig, DiffusionConfig, MetaConfig, TrajectoryBank, WeightLayout, prepare, store
from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.ranks import ALONE, Ranks, join
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions

ROOT = Path(__file__).parents[1]
META = MetaConfig(steps=12, meta_batch=5, samples=2, outer_lr=0.01)
CASES = {  # 5 tasks do not divide by 2
    "torch": META,
    "reptile": replace(META, outer="reptile", outer_lr=0.5),
    "triton": replace(META, steps=2, inner_steps=2),
    "skip": replace(META, on_bad_step="skip"),
}
PREPARE = PrepareConfig(tasks=23, steps=6)


def trainer_of(case, bank, ranks=ALONE):
    impl = "triton" if case == "triton" else "torch"
    return MetaTrainer(bank, CASES[case], DiffusionConfig(steps=6), DenoiserConfig(8, 1), 3, impl=impl, ranks=ranks)


def run_case(case, bank, ranks=ALONE):
    """State after every step of a case, with a NaN in the share of the last task at step 4 where steps are skipped."""
    trainer = trainer_of(case, bank, ranks)
    trainer.start_together()
    losses = []
    if case == "skip":
        whole = trainer.batch

        def spoilt(step):
            batch = whole(step)
            if step == 4 and trainer.ranks.rank == trainer.ranks.size - 1:
                batch.target[-1] = float("nan")
            return batch

        trainer.batch = spoilt
    for _ in range(trainer.meta.steps):
        losses.append(float(trainer.outer_step()))
    return {name: value.clone() for name, value in vars(trainer.state).items()}, losses, trainer.skipped


def features():
    return torch.randn(2, 9, 8, 6, generator=torch.Generator().manual_seed(0))


def prepared(folder, ranks=ALONE):
    prepare.SHARD_TASKS = 5
    family = HeadFamily({"train": ClassRows.of_grid(features())}, HeadOptions(3, 1, 2))
    return prepare.prepare_bank(folder, family, PREPARE, 3, seed=1, ranks=ranks)


def as_rank(folder):
    """What each of the processes below runs."""
    folder = Path(folder)
    with join("cpu") as (ranks, _):
        bank = prepared(folder / "bank", ranks)
        for case in CASES:
            state, losses, skipped = run_case(case, bank, ranks)
            meta = {"losses": [repr(loss) for loss in losses], "skipped": skipped}
            store.save_tensors(folder / f"{case}-{ranks.rank}", state, meta, "result")


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **more}


def start(size, code, *arguments):
    """The processes, without torchrun."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRITON_INTERPRET": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def test_two_processes_are_one(tmp_path):
    """Preparation to the bit; every implementation, both outer steps and a step that is skipped to rounding; ranks alike to the bit."""
    processes = start(2, "import sys, test_ranks; test_ranks.as_rank(sys.argv[1])", tmp_path)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    before, prepare.SHARD_TASKS = prepare.SHARD_TASKS, 5
    try:
        alone = prepared(tmp_path / "alone")
    finally:
        prepare.SHARD_TASKS = before
    files = sorted(path.name for path in (tmp_path / "alone").glob("[!.]*"))
    assert len(files) == 1 + 5  # 23 tasks in shards of 5
    assert files == sorted(path.name for path in (tmp_path / "bank").glob("[!.]*"))
    for name in files:
        assert (tmp_path / "bank" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    for case in CASES:
        expected, losses, skipped = run_case(case, alone)
        first, meta = store.load_tensors(tmp_path / f"{case}-0", "result")
        second, meta_1 = store.load_tensors(tmp_path / f"{case}-1", "result")
        assert meta == meta_1
        assert meta["skipped"] == skipped == (1 if case == "skip" else 0)
        found = torch.tensor([float(loss) for loss in meta["losses"]])
        torch.testing.assert_close(found, torch.tensor(losses), rtol=1e-5, atol=1e-6, equal_nan=True)
        for name, value in expected.items():
            assert torch.equal(first[name], second[name])
            # Adam's step is of the size of the rate wherever a gradient is near zero, whatever its sign
            torch.testing.assert_close(first[name], value, rtol=2e-4, atol=2e-5)
        assert (expected["phi"] - vars(trainer_of(case, alone).state)["phi"]).abs().max() > 1e-3


def test_shares_cover_everything_once():
    for size in range(1, 9):
        for count in range(size, 40):
            shares = [list(range(count))[Ranks(rank, size).share(count)] for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def make_bank(folder):
    layout = WeightLayout.from_module(nn.Linear(2, 2))
    bank = TrajectoryBank.create(folder, layout, 3, 2)
    bank.append(torch.randn(4, 3, 2, 3), torch.randn(4, 2, 2))
    return bank


def test_more_processes_than_tasks(tmp_path):
    with pytest.raises(McdiError, match="meta-batch = 5: fewer tasks than the 6 processes"):
        MetaTrainer(make_bank(tmp_path), META, ranks=Ranks(0, 6))


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1")])
def test_a_broken_environment(monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(name, value)
    with pytest.raises(McdiError, match=f"{name} = '{value}'"), join("cpu"):
        pass


LONELY = """
import os, sys, torch
from mcdi_fast.errors import McdiError
from mcdi_fast.ranks import join
try:
    with join("cpu") as (ranks, _):
        ranks.broadcast_number(1)
        if ranks.rank == int(sys.argv[1]):
            os._exit(3)
        for _ in range(3):
            ranks.sum_(torch.ones(2))
except McdiError as error:
    print("error:", error)
    os._exit(1)
"""


@pytest.mark.parametrize("dies", [0, 1])
def test_the_others_are_told(dies):
    processes = start(2, LONELY, dies)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[dies].returncode == 3
    assert processes[1 - dies].returncode == 1
    (line,) = [line for line in outputs[1 - dies].splitlines() if line.startswith("error:")]
    assert f"rank {1 - dies} of 2: another process of this run has ended" in line
    assert "same command again" in line


# --- the command, under torchrun ---

SMALL = (
    "--dataset glyphs --task.backbone.steps 4 --task.backbone.ways 8 --task.backbone.images-per-class 3 --prepare.tasks 1200 --prepare.steps 6 "
    "--task.augmentation 1 --diffusion.steps 6 --denoiser.width 16 --denoiser.depth 1 --meta.meta-batch 5 "
    "--meta.checkpoint-every 50 --evaluate.tasks 6 --evaluate.validation-tasks 6 --evaluate.finetune-steps 3"
).split()


def command(folder, size, steps):
    head = [sys.executable]
    if size > 1:
        head += ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", "0"]
        head += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    tail = ["--run-dir", str(folder / "run"), "--cache-dir", str(folder.parent / "cache"), "--meta.steps", str(steps)]
    return [*head, "-m", "mcdi_fast.train", *SMALL, *tail]


def accuracies(folder):
    methods = json.loads((folder / "run" / "report.json").read_text())["methods"]
    return {name: method["mean"] for name, method in methods.items()}


def state_of(folder):
    return store.load_tensors(folder / "run" / "checkpoint.safetensors", "meta-checkpoint")


@pytest.mark.slow
def test_the_command_with_two_processes(tmp_path):
    for size in (1, 2):
        done = subprocess.run(
            command(tmp_path / str(size), size, 100), env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("100/100") <= 2 + done.stderr.count("\r")  # one bar
    one, two = tmp_path / "1", tmp_path / "2"
    shards = sorted((one / "run" / "bank").glob("[!.]*"))  # not the lock
    assert len(shards) == 4
    for shard in shards:
        assert shard.read_bytes() == (two / "run" / "bank" / shard.name).read_bytes()
    (expected, meta), (found, meta_2) = state_of(one), state_of(two)
    assert meta == meta_2
    torch.testing.assert_close(found["phi"], expected["phi"], rtol=1e-3, atol=1e-3)
    for name, accuracy in accuracies(one).items():
        assert abs(accuracies(two)[name] - accuracy) <= 2
    # and it may go on with another number of processes
    done = subprocess.run(command(two, 1, 100), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "whole"
    done = subprocess.run(command(folder, 2, 1500), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_loses_nothing(tmp_path, whole, victim):
    """kill -9 of one of two processes in meta-training; then the same command to the end, as if nothing had been."""
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(broken, 2, 1500), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    checkpoint = broken / "run" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (pid,) = [pid for pid in children(process.pid) if rank_of(pid) == victim]
    os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if "error: " in line and f"rank {1 - victim} of 2" in line]
    assert len(lines) == 1, errors
    assert re.search("another process of this run has ended|told to stop", lines[0])
    _, meta = state_of(broken)
    assert 50 <= meta["step"] < 1500
    done = subprocess.run(command(broken, 2, 1500), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("checkpoint.safetensors", "metrics.jsonl", "generator/model.safetensors"):
        assert (broken / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    assert accuracies(broken) == accuracies(whole)


def children(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def rank_of(pid):
    import psutil

    return int(psutil.Process(pid).environ().get("RANK", -1))
