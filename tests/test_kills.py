"""kill -9 at random moments of whole runs, in every stage and in the middle of writes: each goes on to the bits of the uninterrupted run."""

import json
import os
import random
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from test_train import result

from mcdi_fast import prepare, store, train
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.tasks import glyphs

# Small, but every stage lasts some tenths of a second and writes often.
OPTIONS = (
    "--task.backbone.steps 16 --task.backbone.ways 8 --task.backbone.images-per-class 3 --task.backbone.checkpoint-every 2 --prepare.tasks 200 "
    "--prepare.steps 6 --task.augmentation 1 --diffusion.steps 6 --denoiser.width 16 --denoiser.depth 1 --meta.steps 200 "
    "--meta.meta-batch 4 --meta.checkpoint-every 10 --evaluate.tasks 150 --evaluate.validation-tasks 6 --evaluate.finetune-steps 20"
).split()
CLASSES, SHARD_TASKS = (16, 8, 8), 10
COMMAND = f"""
import sys
from mcdi_fast import prepare, train
from mcdi_fast.tasks import glyphs
data = glyphs.load(*{CLASSES})
glyphs.load = lambda: data
prepare.SHARD_TASKS = {SHARD_TASKS}
sys.exit(train.main(sys.argv[1:]))
"""
# What the command says when a stage begins: its progress bar; of the report, the end of the bar before. Then the last line.
STAGES = ("backbone", "features", "trajectories", "meta-training", "evaluation", "report")
SIGNS = {name: rf"{name} *:" for name in STAGES[:-1]} | {"report": r" 5/5 \[", "exit": r"report: "}
WRITING = ("backbone", "trajectories", "meta-training", "report")  # the stages that write files
# Each kills in each of the 6 stages and in a write: 63 kills. One that came later than drawn and hit another stage again is one more.
BLOCKS = 9


def folders(folder):
    return ["--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache")]


class Process:
    """The main job in a process of its own, with the moment each stage began."""

    def __init__(self, folder):
        self.folder, self.said, self.began = folder, "", {}
        self.leftovers = set(folder.rglob(".*.tmp"))  # of earlier kills
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *OPTIONS, *folders(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.pipe = self.process.stdout

    def read(self, seconds=None):
        """Wait so long, or until it says something. False at its end."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return True
        chunk = os.read(self.pipe.fileno(), 2**16)
        self.said += chunk.decode(errors="replace")
        for stage, sign in SIGNS.items():
            if stage not in self.began and re.search(sign, self.said):
                self.began[stage] = time.monotonic()
        return bool(chunk)

    def until(self, stage, seconds=0.0):
        """Wait until a stage has gone on for so long. False where the run has ended before."""
        while stage not in self.began:
            if not self.read():
                return False
        end = self.began[stage] + seconds
        while (left := end - time.monotonic()) > 0:
            if not self.read(left):
                return False
        return True

    def until_a_write(self):
        """Wait for the temporary file of a write. False where the run has ended before."""
        while self.read(0.0005):
            if self.half_written():
                return True
        return False

    def half_written(self):
        return set(self.folder.rglob(".*.tmp")) - self.leftovers

    def kill(self):
        """SIGKILL. Returns the stage it was in, by number."""
        self.process.kill()
        while self.read():
            pass
        self.process.wait()
        return len(self.began) - 1

    def end(self):
        """Wait for the end; whole seconds of every stage."""
        while self.read():
            pass
        assert self.process.wait() == 0, self.said
        times = [self.began[stage] for stage in SIGNS]
        return {stage: times[i + 1] - times[i] for i, stage in enumerate(STAGES)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Its result and the seconds of each stage."""
    folder = tmp_path_factory.mktemp("kills")
    seconds = Process(folder).end()
    return result(folder / "run"), seconds


def progress(folder):
    """What a killed run has left, after reading every file of it: numbers of which none ever falls."""
    run = folder / "run"
    backbones = list((folder / "cache" / "backbones").glob("[!.]*.safetensors"))
    for path in backbones:
        store.load_tensors(path, "backbone-checkpoint" if "partial" in path.name else "backbone")
    shards, step = 0, -1
    if (run / "bank" / "bank.json").exists():
        bank = TrajectoryBank.open(run / "bank")
        bank.check_finite()
        shards = bank.num_shards
    if (run / "checkpoint.safetensors").exists():
        tensors, meta = store.load_tensors(run / "checkpoint.safetensors", "meta-checkpoint")
        assert all(bool(value.isfinite().all()) for value in tensors.values())
        step = meta["step"]
    generator, report = (run / "generator" / "config.json").exists(), (run / "report.json").exists()
    if generator:
        WeightGenerator.from_pretrained(run / "generator")
    if report:
        json.loads((run / "report.json").read_text())
    return bool(backbones), shards, step, generator, report


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_kill_nine(tmp_path, uninterrupted, block):
    """A random moment in every stage, one of a random write; which of them fall into the same run is drawn too.

    What is once there is there and valid after every later kill: no moment without a checkpoint. A kill counts for the stage that it hit.
    """
    expected, seconds = uninterrupted
    rng = random.Random(block)
    missing = {(stage, False) for stage in range(len(STAGES))} | {(STAGES.index(rng.choice(WRITING)), True)}
    hit, halves, runs = Counter(), 0, 0
    while missing:
        folder, last, landed = tmp_path / str(runs), (), 0
        runs += 1
        assert runs < 20, (missing, hit)
        plan = [aim for aim in sorted(missing) if rng.random() < 0.7] or sorted(missing)
        for stage, in_a_write in plan:
            if stage < landed or (stage, in_a_write) not in missing:
                continue  # the kill before came later than drawn
            process = Process(folder)
            reached = process.until(STAGES[stage], rng.uniform(0, seconds[STAGES[stage]]))
            if not reached or (in_a_write and not process.until_a_write()):
                process.end()  # it ended first: what it had to do was less than in the uninterrupted run
                break
            landed = process.kill()
            halves += bool(process.half_written())
            hit[STAGES[landed] if landed < len(STAGES) else "exit"] += 1
            missing.discard((stage, True) if in_a_write else (landed, False))
            now = progress(folder)
            assert all(new >= old for new, old in zip(now, last, strict=False)), (last, now)
            last = now
        else:
            Process(folder).end()
        assert result(folder / "run") == expected
        assert not list((folder / "run").rglob(".*.tmp"))
    print(f"\n{hit.total()} kills over {runs} runs: {dict(hit)}; {halves} left a file half written")


def test_there_is_a_valid_checkpoint_at_every_moment(tmp_path, monkeypatch):
    """What stands at its path is taken and read, again and again while a run replaces it."""
    data = glyphs.load(*CLASSES)
    monkeypatch.setattr(glyphs, "load", lambda: data)
    monkeypatch.setattr(prepare, "SHARD_TASKS", 100)
    checkpoint, taken = tmp_path / "run" / "checkpoint.safetensors", tmp_path / "taken"
    steps, errors, done = [], [], threading.Event()

    def read():
        while not done.is_set():
            time.sleep(0.001)
            try:
                taken.write_bytes(checkpoint.read_bytes())  # opened once: what a kill at that moment would have left
                steps.append(store.load_tensors(taken, "meta-checkpoint")[1]["step"])
            except Exception as error:
                if steps or not isinstance(error, FileNotFoundError):  # there is none before the first
                    errors.append(error)
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        options = [*OPTIONS, *folders(tmp_path), "--meta.checkpoint-every", "1"]
        assert train.main(options) == 0
    finally:
        done.set()
        reader.join()
    assert not errors
    assert steps == sorted(steps)
    assert len(set(steps)) > 20
