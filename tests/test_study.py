"""The comparison: cells are made once, a stop loses nothing, records are the same after it, and the arithmetic of the tables."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mcdi_fast import backbone, prepare, store
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.errors import McdiError
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.study import __main__ as command
from mcdi_fast.study import cells as study_cells
from mcdi_fast.study.cells import scored
from mcdi_fast.study.plan import CHANGES, METHODS, Cell, StudyConfig, plan, train_config
from mcdi_fast.study.records import joint_config, load_records, read_record
from mcdi_fast.study.report import accuracy, paired, pooled_interval, render
from mcdi_fast.tasks import glyphs

SMALL = (
    "--dataset glyphs --settings 5way1shot --seeds 0 --task.queries 5 --task.backbone.steps 3 --task.backbone.ways 6 "
    "--task.backbone.images-per-class 3 "
    "--prepare.tasks 20 --prepare.steps 6 --diffusion.steps 6 --denoiser.width 8 --denoiser.depth 1 --meta.steps 6 --meta.meta-batch 2 "
    "--meta.checkpoint-every 2 --evaluate.tasks 4 --evaluate.validation-tasks 4 --evaluate.finetune-steps 3 --selection-tasks 4 "
    "--reptile.head-steps 3 --reptile.head-batch 2 --reptile.net-steps 3 --reptile.net-batch 1 --reptile.inner-steps 2 "
    "--reptile.test-steps 1 2 --reptile.net-test-steps 1 2 --reptile.checkpoint-every 1"
).split()
ROWS = [*SMALL, "--parts", "comparison"]


@pytest.fixture(autouse=True)
def small_glyphs(monkeypatch):
    data = glyphs.load(12, 8, 8)
    monkeypatch.setattr(glyphs, "load", lambda: data)
    monkeypatch.setattr(prepare, "SHARD_TASKS", 10)


@pytest.fixture
def options(tmp_path):
    return ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]


def cells(folder):
    """Every record without what a clock says."""
    found = {}
    for path in sorted((folder / "cells").glob("*.json")):
        record = json.loads(path.read_text())
        assert record.pop("machine")
        assert record.pop("date")
        found[path.stem] = _timeless(record)
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.endswith(("_ms", "_seconds"))}
    return value


def test_every_part_and_a_second_call_changes_nothing(options, tmp_path, capsys, monkeypatch):
    parts = "--variants sam-augment plain --segment-numbers 1 3 --changes default M-30 no-skip".split()
    assert command.main([*SMALL, *parts, *options]) == 0
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in (folder / "cells").iterdir()}
    names = {path.stem for path in before}
    for method in METHODS:
        assert any(f"_{method}" in name for name in names), method
    assert "5way1shot_seed0_mc-di_sam-augment_k1" in names
    assert "5way1shot_seed0_mc-di_sam-augment_k3_M-30" in names
    assert "5way1shot_seed0_mc-di_sam-augment_k3_no-skip" in names
    assert "5way1shot_seed0_ceiling_plain" in names
    assert not any((folder / part).glob("*") and list((folder / part).glob("*")) for part in ("banks", "partial"))
    for path in before:
        record = json.loads(path.read_text())
        if record["cell"]["method"] == "analysis":
            assert [len(curve) for curve in record["distances"].values()] == [7, 7, 7, 7]
            continue
        if record["cell"]["method"] == "latency":
            assert record["adapt_ms"].keys() == set(METHODS) - {"reptile-net", "ceiling"}
            assert record["adapt_ms"]["mc-di"].keys() == {"all", "3", "5"}
            continue
        assert len(record["correct"]) == 4
        assert all(0 <= count <= 25 for count in record["correct"])
        assert record["accuracy_mean"] == pytest.approx(100 * sum(record["correct"]) / 100, abs=1e-3)
        assert record["adapt_ms"] > 0
        assert record["gradient_steps"] >= 0
    text = (folder / "results.md").read_text()
    for word in (
        "Theorem 1",
        "figure 4",
        "Which claims hold here",
        "Are generated heads new",
        "One change at a time",
        "Both with the same preparation",
    ):
        assert word in text
    assert re.search(r"\| Reptile, whole network \([03] outer steps\) \|", text)
    for figure in ("accuracy", "segments", "theorem1", "chains"):
        assert (folder / "figures" / f"5way1shot-{figure}.png").read_bytes().startswith(b"\x89PNG")

    def never(*args):
        raise AssertionError("a finished cell was made again")

    monkeypatch.setattr(command, "run_cell", never)
    assert command.main([*SMALL, *parts, *options]) == 0
    assert {path: path.read_bytes() for path in (folder / "cells").iterdir()} == before

    out = tmp_path / "docs"  # the same tables from the records alone, elsewhere
    assert command.main([*SMALL, *parts, *options, "--out", str(out), "--report-only"]) == 0
    assert (out / "results.md").read_text() == text
    (record,) = (out / "records").iterdir()
    assert record.name.endswith("-ablation-glyphs-5way1shot.json")
    assert len(store.read_json(record)["cells"]) == len(before)
    assert render(out, "glyphs").read_text() == text

    capsys.readouterr()
    assert command.main([*SMALL, *parts, *options, "--meta.steps", "7"]) == 2
    assert "meta.steps (6, now 7)" in capsys.readouterr().err


def test_results_are_what_the_kept_records_say(tmp_path):
    """Byte for byte; records older than a renamed setting are understood."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    shutil.copytree(docs / "records", tmp_path / "records")
    assert render(tmp_path, "omniglot").read_text() == (docs / "results.md").read_text()
    assert {path.name for path in (tmp_path / "figures").iterdir()} <= {p.name for p in (docs / "figures").iterdir()}


def test_records_of_two_run_folders_meet_and_other_budgets_do_not_mix(options, tmp_path, capsys):
    out = tmp_path / "docs"
    common = [*SMALL, "--cache-dir", str(tmp_path / "cache"), "--out", str(out), "--parts", "comparison", "--methods"]
    assert command.main([*common, "prototype", "--run-dir", str(tmp_path / "a")]) == 0
    assert command.main([*common, "finetune", "--run-dir", str(tmp_path / "b")]) == 0
    (record,) = (out / "records").iterdir()
    assert {cell["cell"]["method"] for cell in store.read_json(record)["cells"]} == {"prototype", "finetune"}
    before = record.read_bytes()
    assert command.main([*common, "prototype", "--run-dir", str(tmp_path / "c"), "--meta.steps", "9"]) != 0
    assert "another budget" in capsys.readouterr().err
    assert record.read_bytes() == before


def test_rows_on_another_backbone_are_refused(options, tmp_path, capsys):
    """As a run folder or a record has them that go on on another kind of processor: the same recipe, other weights."""
    out, run = tmp_path / "docs", tmp_path / "run"
    common = [*SMALL, "--cache-dir", str(tmp_path / "cache"), "--parts", "comparison", "--methods"]
    assert command.main([*common, "prototype", "--run-dir", str(run), "--out", str(out)]) == 0
    (cell,) = (run / "cells").iterdir()
    ours = store.read_json(cell)["backbone_weights"]
    (weights,) = (tmp_path / "cache" / "backbones").iterdir()
    tensors, meta = store.load_tensors(weights, "backbone")
    tensors["0.bias"][0] += 1e-6
    store.save_tensors(weights, tensors, meta, "backbone")
    before = cell.read_bytes()
    capsys.readouterr()
    assert command.main([*common, "finetune", "--run-dir", str(run), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"{cell.name}: made on backbone {ours}" in said
    assert "--cache-dir" in said
    assert [path.read_bytes() for path in (run / "cells").iterdir()] == [before]
    assert command.main([*common, "finetune", "--run-dir", str(tmp_path / "other"), "--out", str(out)]) == 1
    assert "another backbone" in capsys.readouterr().err


def test_features_of_several_views_have_a_table_of_their_own(options, tmp_path):
    common = [*ROWS, "--methods", "prototype", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "docs")]
    assert command.main([*common, "--run-dir", str(tmp_path / "a")]) == 0
    assert command.main([*common, "--run-dir", str(tmp_path / "b"), "--task.backbone.views", "3"]) == 0
    assert [table.name for table in load_records(tmp_path / "docs", "glyphs")] == ["5way1shot", "5way1shot-views3"]
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "## glyphs, 5-way 1-shot\n" in text
    assert "## glyphs, 5-way 1-shot, 3 views\n" in text
    assert text.count("--task.backbone.views 3") == 1
    assert len(list((tmp_path / "cache" / "backbones").iterdir())) == 1  # one backbone serves both


def test_reptile_s_settings_for_the_whole_network_bind_only_who_ran_it():
    def one(method, lr=1, steps=1, net=1):
        config = {"meta.steps": steps, "reptile.head_lrs": lr, "reptile.net_lrs": net}
        return {"config": config, "cells": [{"cell": {"method": method}}]}

    plain = one("mc-di")
    assert joint_config(plain, one("ocd")) == plain["config"]
    for other in (one("ocd", steps=2), one("ocd", lr=2)):
        assert joint_config(plain, other) is None
    ran = one("reptile-net", net=2)
    assert joint_config(plain, ran) == joint_config(ran, plain) == ran["config"]
    assert joint_config(plain, one("ocd", net=2)) == plain["config"]
    assert joint_config(ran, one("reptile-net", net=3)) is None


class Stop(Exception):
    """Stands for a kill: nothing catches it."""


STOPS = {
    "bank": (TrajectoryBank, "append", 2),
    "meta": (MetaTrainer, "outer_step", 9),
    "reptile": (study_cells, "reptile_step", 4),
    "reptile evaluation": (study_cells, "adapt", 9),
    "record": (command, "write_json", 5),
    "backbone": (backbone, "augment", 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        data = glyphs.load(12, 8, 8)
        patch.setattr(glyphs, "load", lambda: data)
        patch.setattr(prepare, "SHARD_TASKS", 10)
        assert command.main([*ROWS, "--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache")]) == 0
    return cells(folder / "run")


QUICK = ("meta", "reptile evaluation", "record")


@pytest.mark.parametrize("where", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in STOPS])
def test_a_stop_anywhere_loses_nothing(options, tmp_path, monkeypatch, whole, where):
    owner, name, call = STOPS[where]
    function, calls = getattr(owner, name), iter(range(10**6))

    def wrapped(*args, **kwargs):
        if next(calls) == call:
            raise Stop
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        with pytest.raises(Stop):
            command.main([*ROWS, *options])
    for path in (tmp_path / "run" / "cells").glob("*"):
        json.loads(path.read_text())  # whole or not there
    assert command.main([*ROWS, *options]) == 0
    assert cells(tmp_path / "run") == whole


def test_a_kill_while_a_record_is_written_leaves_none(options, tmp_path, monkeypatch):
    def killed(source, target):
        if "cells" in str(target):
            raise Stop
        return replace(source, target)

    import os

    replace = os.replace
    one = [*SMALL, *options, "--parts", "comparison", "--methods", "prototype"]
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", killed)
        with pytest.raises(Stop):
            command.main(one)
    assert not list((tmp_path / "run" / "cells").glob("*.json"))
    assert command.main(one) == 0
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 1


@pytest.mark.slow
def test_time_limit_goes_on_to_the_same_records(options, tmp_path, whole):
    calls = 0
    while (code := command.main([*ROWS, *options, "--time-limit", "0.0001"])) == 3:
        calls += 1
        assert calls < 100
    assert code == 0
    assert calls > len(whole)  # it stopped inside cells too
    assert cells(tmp_path / "run") == whole


BAD = {
    "--seeds -1": "--seeds = -1",
    "--seeds 1 1": "--seeds 1 1: one stands twice",
    "--changes nonsense": "--changes 'nonsense': expected some of default",
    "--time-limit 0": "--time-limit = 0.0",
    "--segment-numbers 7": "segments k = 7 exceed the steps T = 6",
    "--settings 20way1shot": "--task.ways = 20: more than the 12 classes",
    "--task.queries 20": "more than the 20 images",
    "--task.ways 3": "choose by --settings",
    "--meta.inner-lr 0": "--meta.inner-lr = 0.0",
    "--reptile.net-lrs -1": "--reptile.net-lrs = -1.0",
    "--reptile.outer-lr 1.5": "--reptile.outer-lr = 1.5",
    "--prepare.rho -1": "--prepare.rho = -1.0",
    "--selection-tasks 1": "--selection-tasks = 1",
    "--parts variants --variants sam-augment": "no cell to make",
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_options_are_refused_before_any_work(options, tmp_path, capsys, bad):
    assert command.main([*SMALL, "--segment-numbers", "1", *options, *bad.split()]) == 2
    assert BAD[bad] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_plan():
    config = StudyConfig(seeds=(0, 1))
    found = plan(config)
    assert len(set(found)) == len(found) == len({cell.name for cell in found})
    assert Cell("20way1shot", 1, "reptile-net") in found
    assert Cell("5way5shot", 0, "mc-di", "plain", 3) in found
    assert Cell("5way1shot", 0, "mv-di", "sam", 1) in found
    assert [c for c in found if c.method == "mc-di" and c.segments == 8] == [
        Cell("5way1shot", s, "mc-di", "sam-augment", 8) for s in (0, 1)
    ]
    assert sum(bool(c.change) for c in found) == len(CHANGES)
    none = plan(StudyConfig(methods=("prototype",), parts=("comparison",), settings=("5way5shot",), seeds=(3,)))
    assert none == [Cell("5way5shot", 3, "prototype")]


def test_a_cells_settings():
    config = StudyConfig()

    def of(**cell):
        return train_config(config, Cell(**{"setting": "5way1shot", "seed": 0, "variant": "sam-augment"} | cell))

    mc, mv, ocd = of(method="mc-di", segments=3), of(method="mv-di", segments=1), of(method="ocd", segments=1)
    assert (mc.prepare, mc.meta, mc.diffusion) == (config.prepare, config.meta, config.diffusion)
    assert (mv.diffusion.objective, mv.diffusion.segments) == ("vanilla", 1)
    assert mv.meta == config.meta
    assert ocd.meta.inner_steps == 1
    assert ocd.meta.samples == config.meta.samples * config.meta.inner_steps
    paper = of(method="mc-di-paper", segments=3).diffusion
    assert (paper.window, paper.carry) == ("whole", "full")
    assert (mc.diffusion.window, mc.diffusion.carry) == ("segment", "scaled")
    plain = of(method="mc-di", segments=3, variant="plain")
    assert (plain.prepare.rho, plain.task.augmentation) == (0, 0)
    assert of(method="mc-di", segments=3, variant="sam").prepare.rho == config.prepare.rho
    assert [of(method="mc-di", segments=k).prepare.steps for k in (1, 7, 8)] == [60, 63, 64]
    assert of(method="mc-di", segments=3, change="T-6").diffusion.steps == 6
    assert of(method="mc-di", segments=3, change="half-the-steps").meta.steps == config.meta.steps // 2
    assert of(method="mc-di", segments=3, change="twice-the-tasks").prepare.tasks == 2 * config.prepare.tasks
    assert of(method="mc-di", segments=3, change="no-ema").meta.ema == 0
    for change in CHANGES:
        of(method="mc-di", segments=3, change=change)


def test_scored():
    record = scored([75, 60, 45], 75)
    assert (record["correct"], record["queries"], record["accuracy_mean"]) == ([75, 60, 45], 75, 80.0)
    assert record["accuracy_ci95"] == pytest.approx(1.96 * 20 / 3**0.5, abs=1e-3)


def entry(seed, correct, queries=75):
    return {"seed": seed, "correct": correct, "queries": queries}


def test_paired_difference_and_intervals():
    rng = np.random.default_rng(0)
    a = [entry(s, rng.integers(60, 75, 50).tolist()) for s in (0, 1, 2)]
    b = [entry(s, rng.integers(50, 75, 50).tolist()) for s in (2, 1, 4)]
    difference = paired(a, b)
    x = np.concatenate([a[1]["correct"], a[2]["correct"]]) - np.concatenate([b[1]["correct"], b[0]["correct"]])
    x = 100 * x / 75
    assert difference.mean == pytest.approx(x.mean())
    assert difference.half == pytest.approx(1.96 * x.std(ddof=1) / 10)
    assert paired(a, [entry(7, [1])]) is None
    same = paired(a, a)
    assert (same.mean, same.half, same.verdict) == (0, 0, 0)
    assert paired([entry(0, [75] * 9 + [74])], [entry(0, [1] * 10)]).verdict == 1
    assert paired([entry(0, [1] * 10)], [entry(0, [75] * 9 + [74])]).verdict == -1
    every = 100 * np.concatenate([e["correct"] for e in a]) / 75
    assert pooled_interval(a) == pytest.approx(1.96 * every.std(ddof=1) / math.sqrt(150))


def test_paired_interval_against_scipy():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = rng.integers(60, 75, 600), rng.integers(58, 75, 600)
    ours = paired([entry(0, a.tolist())], [entry(0, b.tolist())])
    low, high = scipy.ttest_rel(a / 0.75, b / 0.75).confidence_interval(0.95)
    assert (ours.mean - ours.half, ours.mean + ours.half) == pytest.approx((low, high), abs=0.01)


def test_accuracy_over_seeds():
    entries = [{**entry(i, [74, 75]), "accuracy_mean": value} for i, value in enumerate([98.0, 98.2, 98.1, 98.3, 97.9])]
    assert accuracy(entries, interval=False) == "98.10 ± 0.16"
    assert accuracy(entries[:1], interval=False) == "98.00"
    assert accuracy(entries[:1]) == "98.00 (± 1.31)"  # 1.96 * (100 / 75 / sqrt 2) / sqrt 2
    assert accuracy([]) == ""


def record(setting="5way1shot", config=None, cells=()):
    """What `publish` writes, with the default settings but for `config`."""
    return {"format": 1, "dataset": "glyphs", "setting": setting, "config": config or {}, "cells": list(cells)}


def cell(method="prototype", seed=0, setting="5way1shot", **more):
    where = {"setting": setting, "seed": seed, "method": method, "variant": "", "segments": 0, "change": ""}
    return {"cell": where, "machine": {"processor": "a", "threads": 1, "torch": "2", "git": "1"}, **more}


def test_older_records_of_the_same_settings_add_to_the_newest_and_others_stand_behind(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()

    def write(date, steps, seed, value, backbone="one"):
        made = cell(seed=seed, value=value, backbone_weights=backbone)
        store.write_json(
            folder / f"{date}-ablation-glyphs-5way1shot.json", record(config={"meta": {"steps": steps}}, cells=[made])
        )

    def found():
        return {t.name: sorted(e["value"] for e in t.entries) for t in load_records(tmp_path, "glyphs")}

    write("2026-01-01", 1, 0, "another budget")
    write("2026-01-02", 2, 0, "old")
    write("2026-01-03", 2, 1, "new")
    assert found() == {"5way1shot": ["new", "old"], "5way1shot-2026-01-01": ["another budget"]}
    write("2026-01-04", 2, 0, "newest")
    assert found() == {"5way1shot": ["new", "newest"], "5way1shot-2026-01-01": ["another budget"]}
    write("2026-01-05", 1, 3, "with the first")
    write("2026-01-06", 2, 0, "moved", backbone="two")
    assert found() == {
        "5way1shot": ["moved"],
        "5way1shot-2026-01-05": ["another budget", "with the first"],
        "5way1shot-2026-01-04": ["new", "newest"],
    }
    (folder / "2026-01-07-ablation-glyphs-5way1shot.json").write_text("{}")
    with pytest.raises(McdiError, match="2026-01-07-ablation"):
        load_records(tmp_path, "glyphs")


def test_older_records_are_read_under_todays_names(tmp_path):
    path = tmp_path / "old.json"
    made = cell("mc-di")
    made["cell"]["change"] = "inner-rate-0.02"
    config = {"meta": {"inner_rate": 0.02, "steps": 7}, "queries": 9, "backbone": {"views": 3}}
    config |= {"prepare": {"copies": 2}, "evaluate": {"finetune_steps": 50}}
    store.write_json(path, record(config=config, cells=[made]))
    found = read_record(path)
    assert found["cells"][0]["cell"]["change"] == "inner-lr-0.02"
    today = found["config"]
    assert (today["meta.inner_lr"], today["meta.steps"], today["task.queries"]) == (0.02, 7, 9)
    assert (today["task.backbone.views"], today["task.augmentation"]) == (3, 1)
    assert today["evaluate.finetune_steps"] == [50]
    assert today["meta.ema"] == 0.999  # not said: as it is today
    again = tmp_path / "again.json"
    store.write_json(again, found)
    assert read_record(again) == found
    store.write_json(path, record(config={"meta": {"nonsense": 1}}))
    with pytest.raises(McdiError, match=r"unknown setting meta\.nonsense"):
        read_record(path)


def test_rows_made_before_the_corrections_are_named(tmp_path):
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / "2026-01-01-ablation-glyphs-5way1shot.json"

    def said(*revisions):
        numbers = {"correct": [5, 6], "queries": 9, "accuracy_mean": 50.0, "gradient_steps": 0, "adapt_ms": 1.0}
        cells = [cell(m, **numbers, **more) for m, more in zip(("prototype", "tw-di", "mc-di"), revisions, strict=True)]
        store.write_json(path, record(cells=cells))
        return render(tmp_path, "glyphs").read_text()

    old, new = {}, {"revision": 2}
    assert "two corrections: all diffusion rows and trained targets of 5-way 1-shot.**" in said(old, old, old)
    assert "two corrections: of 5-way 1-shot 1 cells of Mc-Di.**" in said(old, new, old)
    assert "corrections" not in said(old, new, new)  # nearest prototypes were never concerned
