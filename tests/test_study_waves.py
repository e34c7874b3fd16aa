"""The comparison on waves: its arithmetic, its methods, and the whole of it in small."""

from dataclasses import replace

import pytest

from mcdi_fast.store import read_json
from mcdi_fast.study import waves as study
from mcdi_fast.tasks.waves import WaveFamily, WaveOptions


def test_ridge_on_sines_knows_the_family():
    tasks = WaveFamily(WaveOptions(points=4)).tasks("test", 0, 20, 0)
    assert float(study.sines(tasks).max()) < 1e-3


def test_maml_adapts_better_than_its_start(monkeypatch):
    monkeypatch.setattr(study, "_MAML_STEPS", 150)
    family, start = study.maml(10)
    tasks = family.tasks("val", 0, 50, 0)
    before, after = (family.scores(study.descend(family, start, n, tasks), tasks.query).mean() for n in (0, 3))
    plain = family.layout.pack(family.module)
    fresh = family.scores(study.descend(family, plain, 3, tasks), tasks.query).mean()
    assert after < 0.95 * before
    assert after < fresh


def test_records_pair_over_tasks_and_steps_get_their_own_table():
    def seed(ours, theirs):
        rows = {"Mc-Di": ours, "Mc-Di, 3 steps": ours, "MAML, 10 steps": theirs}
        return {name: {str(p): {"scores": scores} for p in study.POINTS} for name, scores in rows.items()}

    rows = study.record_of([seed([1.0, 2.0], [2.0, 3.0]), seed([3.0, 4.0], [4.0, 5.0])])
    entry = rows["MAML, 10 steps"]["10"]
    assert (entry["mean"], entry["minus_mc_di"], entry["minus_mc_di_ci95"]) == (3.5, 1.0, 0.0)
    assert entry["std_over_seeds"] == pytest.approx(2**0.5, abs=1e-5)
    text = "\n".join(study.tabulated(rows))
    assert "| MAML, 10 steps | 2 | 3.50 ± 1.41 |" in text
    assert "| steps | 3 | 10 |\n| --- | --- | --- |\n| Mc-Di | 2.50 |  |\n| MAML |  | 3.50 |" in text


@pytest.mark.slow
def test_the_whole_comparison_in_small(tmp_path, monkeypatch):
    changes = {"_MAML_STEPS": 3, "SEEDS": (0, 1), "_GRADIENT_STEPS": (1, 3)}
    for name, value in changes.items():
        monkeypatch.setattr(study, name, value)
    config = study.configuration()
    small = replace(
        config,
        prepare=replace(config.prepare, tasks=20, steps=9),
        meta=replace(config.meta, steps=3),
        task=replace(config.task, width=4, start_steps=2),
        evaluate=replace(config.evaluate, tasks=5, validation_tasks=4),
    )
    monkeypatch.setattr(study, "configuration", lambda: small)
    study.main([str(tmp_path / "run"), str(tmp_path / "out")])
    first = read_json(tmp_path / "out" / "waves.json")
    assert all(row[str(p)]["seeds"] == 2 for row in first["rows"].values() for p in study.POINTS)
    assert {"Mc-Di", "Mv-Di", "Tw-Di", "Reptile, Adam", "MAML, 1 steps", "regressed weights"} <= first["rows"].keys()
    assert all(row[str(p)]["mean"] >= 0 for row in first["rows"].values() for p in study.POINTS)
    study.main([str(tmp_path / "run"), str(tmp_path / "out")])  # from the kept seeds
    assert read_json(tmp_path / "out" / "waves.json")["rows"] == first["rows"]
