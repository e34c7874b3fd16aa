"""What accuracy costs: python -m mcdi_fast.study.front."""

import json

import pytest

from mcdi_fast.study import front
from mcdi_fast.tasks import Metric

ACCURACY = Metric("accuracy", "%", True, 100.0)


def cell(width, seed, scores, ms):
    size = {"trajectories": 10, "M": 3, "k": 3, "T": 3, "width": width, "depth": 1}
    points = [{"outer": 8, "steps": 3, "seconds": 1.0, "scores": scores}]
    return {"size": size, "seed": seed, "points": points, "latency_ms": {"3": ms}, "parameters": 1000 * width}


def test_rows_are_paired_and_the_quickest_that_is_level_is_bold():
    """Error of the best 10 %: level is what is behind by 0.1 % at most, its interval included."""
    cells = [cell(4, 0, [0.8, 0.9], 0.1), cell(4, 1, [0.8, 0.9], 0.1)]
    cells += [cell(8, 0, [0.899, 0.9], 0.2), cell(8, 1, [0.9, 0.8995], 0.2)]
    cells += [cell(16, 0, [0.9, 0.9], 0.4), cell(16, 1, [0.9, 0.9], 0.4)]
    rows = front.rows_of(cells, ACCURACY)
    assert [row["width"] for row in rows] == [4, 8, 16]
    assert [row["level"] for row in rows] == [False, True, True]
    assert rows[0]["behind"] == pytest.approx(5.0)
    assert rows[1]["behind"] == pytest.approx(100 * 0.0015 / 4)
    assert rows[2]["behind"] == rows[2]["behind_ci95"] == 0
    assert rows[1]["kilobytes"] == 32
    assert front.front_of(rows) == rows
    low = front.rows_of([cell(4, 0, [0.2, 0.1], 0.1), cell(8, 0, [0.3, 0.2], 0.2)], Metric())
    assert [row["behind"] for row in low] == [0, pytest.approx(0.1)]  # of a loss, lower is better
    assert front.front_of(low) == low[:1]


def test_a_picture_where_fewer_outer_steps_are_better():
    cells = [cell(4, seed, [0.8, 0.9], 0.1) for seed in (0, 1)]
    for one in cells:
        one["points"] = [one["points"][0] | {"outer": 2, "scores": [0.9, 0.9]}, *one["points"]]
    rows = front.rows_of(cells, ACCURACY)
    assert [row["level"] for row in rows] == [True, False]
    record = {"rows": rows, "metric": ACCURACY._asdict(), "seeds": [0, 1], "outer_steps": 8}
    assert front.plot(record).startswith(b"\x89PNG")


def test_the_command(tmp_path, capsys):
    """All sizes and seeds, once each; a further seed adds its own cells; sizes that contradict each other are refused first."""
    options = (
        f"--dataset test_tasks:lines --run-dir {tmp_path / 'run'} --widths 4 8 --depths 1 --chains 3 "
        "--prepare.tasks 20 --prepare.steps 6 --meta.steps 8 --evaluate.validation-tasks 10"
    ).split()
    assert front.main([*options, "--seeds", "0"]) == 0
    shown = capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cells").iterdir()}
    assert len(kept) == 2
    assert front.main([*options, "--seeds", "0", "1", "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    record = json.loads((tmp_path / "out" / "front-test_tasks-lines.json").read_text())
    assert {row["outer"] for row in record["rows"]} == {2, 4, 8}
    assert record["seeds"] == [0, 1]
    assert "**" in shown
    assert (tmp_path / "out" / "front-test_tasks-lines.png").read_bytes().startswith(b"\x89PNG")
    record, more = tmp_path / "run" / "front-test_tasks-lines.json", [*options, "--seeds", "0", "--widths", "16"]
    assert front.main(more) == 0  # a further size, of one seed
    assert {row["width"] for row in json.loads(record.read_text())["rows"]} == {4, 8, 16}
    assert front.main([*options, "--seeds", "0", "1"]) == 0
    assert {row["width"] for row in json.loads(record.read_text())["rows"]} == {4, 8}
    assert front.main([*options, "--segments", "4"]) == 2
    assert "segments k = 4 exceed" in capsys.readouterr().err
