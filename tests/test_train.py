"""The main job: a whole small run, bad input refused before any work, nothing lost by a stop. Kills at random moments: test_kills.py."""

import json
import os
import re
import shutil

import pytest

from mcdi_fast import backbone, prepare, store, train
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.cli import open_run
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.tasks import find_family, glyphs

SMALL = (
    "--task.backbone.steps 4 --task.backbone.ways 8 --task.backbone.images-per-class 3 --task.backbone.checkpoint-every 2 --prepare.tasks 30 "
    "--prepare.steps 6 --task.augmentation 1 --diffusion.steps 6 --denoiser.width 16 --denoiser.depth 1 --meta.steps 30 "
    "--meta.meta-batch 4 --meta.checkpoint-every 10 --evaluate.tasks 6 --evaluate.validation-tasks 6 "
    "--evaluate.finetune-steps 3"
).split()
METHODS = ("local-consistency", "finetune", "finetune-decay", "nearest-prototype", "trained-target")


@pytest.fixture(scope="module", autouse=True)
def small_glyphs():
    with pytest.MonkeyPatch.context() as patch:
        data = glyphs.load(24, 8, 8)
        patch.setattr(glyphs, "load", lambda: data)
        patch.setattr(prepare, "SHARD_TASKS", 10)
        yield


def options_of(place):
    return [*SMALL, "--run-dir", str(place / "run"), "--cache-dir", str(place / "cache")]


@pytest.fixture
def options(tmp_path):
    return options_of(tmp_path)


@pytest.fixture(scope="module")
def whole(small_glyphs, tmp_path_factory):
    """A place with a finished run and its cache."""
    place = tmp_path_factory.mktemp("whole")
    assert train.main(options_of(place)) == 0
    return place


@pytest.fixture
def cached(whole, tmp_path):
    """The test's own place has the backbone already."""
    shutil.copytree(whole / "cache", tmp_path / "cache")


@pytest.fixture
def finished(whole, cached, tmp_path):
    """The test's own place has the finished run already: its result."""
    shutil.copytree(whole / "run", tmp_path / "run")
    return result(tmp_path / "run")


def result(folder):
    """What must be the same bit for bit: the generator, the checkpoint, the metrics and the accuracies."""
    report = json.loads((folder / "report.json").read_text())
    methods = {
        name: {key: value for key, value in method.items() if not key.startswith("latency")}
        for name, method in report["methods"].items()
    }
    files = ["generator/model.safetensors", "checkpoint.safetensors", "metrics.jsonl"]
    return [(folder / name).read_bytes() for name in files], methods, report["norms"], report["plane"]


def test_whole_run(options, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    for name in METHODS:
        assert report["methods"][name].keys() >= {"mean", "ci95", "latency_ms"}
        assert name in (folder / "report.md").read_text()
    for plot in ("learning", "methods", "steps", "norms", "chains"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({plot}.png)" in (folder / "report.md").read_text()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [10, 20, 30]
    assert all("validation" in m for m in metrics)
    assert report["sampling_steps"][-1]["steps"] == 6
    assert len(report["plane"]["targets"]) == 3
    assert WeightGenerator.from_pretrained(folder / "generator").provenance["dataset"] == "glyphs"

    assert train.main(options) == 0  # the same command again changes nothing
    assert result(folder) == finished
    assert "report.md" in capsys.readouterr().out

    other = [*options, "--seed", "1"]
    assert train.main(other) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "seed (0, now 1)" in error
    assert "--run-dir" in error


class Stop(Exception):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("stage", ["backbone", "bank", "meta", "generator", "report"])
def test_stopped_run_goes_on_to_the_same_bits(options, whole, tmp_path, monkeypatch, stage):
    if stage != "backbone":
        shutil.copytree(whole / "cache", tmp_path / "cache")

    def stop_at(call, function):
        calls = iter(range(1000))

        def wrapped(*args, **kwargs):
            if next(calls) == call:
                raise Stop
            return function(*args, **kwargs)

        return wrapped

    where = {
        "backbone": (backbone, "augment", 3),  # in the third episode, behind the checkpoint after the second
        "bank": (TrajectoryBank, "append", 1),
        "meta": (MetaTrainer, "outer_step", 17),
        "generator": (WeightGenerator, "save_pretrained", 0),
        "report": (train, "write_report", 0),
    }
    owner, name, call = where[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(Stop):
            train.main(options)
    assert train.main(options) == 0
    assert result(tmp_path / "run") == result(whole / "run")


def test_a_run_does_not_go_on_with_another_backbone(options, finished, tmp_path, capsys):
    """As after a move to another kind of processor, where the same recipe trains other weights."""
    (path,) = (tmp_path / "cache" / "backbones").iterdir()
    tensors, meta = store.load_tensors(path, "backbone")
    tensors["0.bias"][0] += 1e-6
    store.save_tensors(path, tensors, meta, "backbone")
    assert train.main(options) == 1
    assert "another meta.backbone_weights (" in capsys.readouterr().err
    assert result(tmp_path / "run") == finished


BAD = {
    "--task.ways 9": "--task.ways = 9: more than the 8 classes",
    "--task.ways 1": "--task.ways = 1",
    "--task.shots 10 --task.queries 11": "more than the 20 images",
    "--task.shots 0": "--task.shots = 0",
    "--diffusion.segments 7 --prepare.steps 7": "segments k = 7 exceed the steps T = 6",
    "--diffusion.segments 0": "--diffusion.segments = 0: expected at least 1",
    "--prepare.steps 7": "M = 7 (--prepare.steps) are not divisible by the segments k = 3",
    "--prepare.rho -1": "--prepare.rho = -1.0",
    "--prepare.learning-rate nan": "--prepare.learning-rate = nan",
    "--diffusion.beta-start 1.5": "beta_start = 1.5",
    "--denoiser.width 0": "--denoiser.width = 0",
    "--task.backbone.ways 1": "--task.backbone.ways = 1",
    "--meta.inner-lr -1": "--meta.inner-lr = -1.0",
    "--meta.ema 1": "--meta.ema = 1.0",
    "--evaluate.sampling-steps 2": "--evaluate.sampling-steps = 2",
    "--evaluate.eta-noise 2": "--evaluate.eta-noise = 2.0",
    "--evaluate.tasks 1": "--evaluate.tasks = 1",
    "--seed -1": "--seed = -1: expected 0 or more, below 1000000",
    "--dataset nothing": "--dataset 'nothing': expected one of glyphs, omniglot, ",
    "--dataset mcdi_fast.tasks.glyphs:nothing": "cannot import it",
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_settings_start_nothing(options, tmp_path, capsys, bad):
    assert train.main([*options, *bad.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert BAD[bad] in lines[0]
    assert not (tmp_path / "run").exists()


def test_unknown_option_is_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*options, "--meta.inner-ratte", "1"])
    assert stop.value.code == 2


def test_missing_data_is_named(options, tmp_path, capsys, monkeypatch):
    assert train.main([*options, "--dataset", "omniglot", "--data-dir", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'}: no Omniglot there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main([*SMALL, "--run-dir", str(tmp_path / "file" / "run"), "--cache-dir", str(tmp_path)]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_two_runs_in_one_folder(options, tmp_path, capsys):
    config = find_family("glyphs").config()
    with open_run(tmp_path / "run", config, train._FREE):
        assert train.main(options) == 2
    assert "another run is writing there" in capsys.readouterr().err


def test_full_disk_loses_nothing(options, finished, tmp_path, capsys, monkeypatch):
    shutil.rmtree(tmp_path / "run" / "generator")
    os.remove(tmp_path / "run" / "report.json")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train.main(options) in (1, 2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in message
    assert "free space" in message
    assert train.main(options) == 0
    assert result(tmp_path / "run") == finished


def test_control_c(options, cached, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt  # what Python makes of the signal, where it is not ignored as in background jobs

    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "outer_step", interrupted)
        assert train.main(options) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert train.main(options) == 0


def test_nan_in_the_bank(options, finished, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shard = folder / "bank" / "shard-000001.safetensors"
    tensors, meta = store.load_tensors(shard, "bank-shard")
    tensors = {name: value.clone() for name, value in tensors.items()}
    tensors["targets"][3, 1] = float("nan")
    store.save_tensors(shard, tensors, meta, "bank-shard")
    checkpoint = (folder / "checkpoint.safetensors").read_bytes()
    assert train.main(options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "shard-000001.safetensors" in error
    assert "task 13" in error
    assert (folder / "checkpoint.safetensors").read_bytes() == checkpoint


def test_checkpoint_of_another_kind(options, finished, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    good = checkpoint.read_bytes()
    for bad in (good[:1000], b"", good.replace(b'\\"format\\": 1', b'\\"format\\": 9')):
        assert bad != good
        checkpoint.write_bytes(bad)
        assert train.main(options) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert "checkpoint.safetensors" in error


def test_loss_not_finite(options, cached, tmp_path, capsys):
    assert train.main([*options, "--meta.inner-lr", "1e30"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "outer step" in error
    assert "--meta.inner-lr" in error


def test_loss_not_finite_by_choice(options, cached, tmp_path, capsys, monkeypatch):
    """A step that is not finite stops the run, naming step, task and checkpoint; it may go on skipping and counting such steps."""
    whole = MetaTrainer.batch

    def spoilt(self, step):
        batch = whole(self, step)
        if step == 14:
            batch.target[2] = float("nan")
        return batch

    monkeypatch.setattr(MetaTrainer, "batch", spoilt)
    folder = tmp_path / "run"
    assert train.main(options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"not finite at outer step 14, task \d+ of the bank, target [123];", error)
    assert f"the last good checkpoint is {folder / 'checkpoint.safetensors'}, step 10" in error
    assert store.load_tensors(folder / "checkpoint.safetensors", "meta-checkpoint")[1]["step"] == 10
    assert train.main([*options, "--meta.on-bad-step", "skip"]) == 0
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [10, 20, 30]
    assert [m.get("skipped", 0) for m in metrics] == [0, 1, 1]
    assert json.loads((folder / "report.json").read_text())["skipped_steps"] == 1
    assert "**1 of the 30 outer steps were skipped" in (folder / "report.md").read_text()


def test_nothing_but_skipped_steps_stops(options, cached, capsys):
    bad = ["--meta.inner-lr", "1e30", "--meta.on-bad-step", "skip", "--meta.steps", "300"]
    assert train.main([*options, *bad]) == 1
    assert "each of the 100 outer steps up to 99, all skipped" in capsys.readouterr().err.strip().splitlines()[-1]


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 2.0}\n{"step": 30, "lo')
    assert [m["step"] for m in train.Metrics(path, 10).lines] == [10]
    assert path.read_text() == '{"step": 10, "loss": 1.0}\n'
