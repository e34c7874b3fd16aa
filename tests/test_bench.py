"""The benchmarks do not rot: every provider at a tiny size against its reference, untimed, and the report from a record."""

import importlib.util
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import providers as P
import report
import test_pieces as pieces
import test_sampling as sampling

from mcdi_fast.kernels.operations import TINY

INNER = P.inner_providers()


# compiling takes most of a minute: left to the benchmark, which checks it too
@pytest.mark.parametrize("provider", sorted(INNER.keys() - {"compiled"}))
def test_meta_step(provider):
    phi, batch = P.meta_case(TINY)
    check = P.meta_check(phi, batch)
    for step in (P.meta_step, P.our_meta_step):
        check(step(INNER[provider], phi, batch)())
    delta, losses = INNER[provider](phi, batch)
    with pytest.raises(AssertionError):
        check(({name: 1.1 * value for name, value in delta.items()}, losses))


@pytest.mark.parametrize("provider", P.prepare_providers())
def test_prepare(provider):
    case = P.prepare_case(2, 10)
    P.prepare_check(*case, count=2)(P.prepare_providers()[provider](*case))


def test_sampling(tmp_path):
    generator, family, test = sampling.trained(tmp_path / "bank", meta_steps=3, tasks=20, width=16)
    condition = test.condition[:2]
    found = sampling.providers(generator, condition)
    for name in ("ours", "eager", "loop"):
        P.close_to(sampling.reference(generator, condition, sampling.STEPS), 1e-4)(found[name]())
    P.close_to(sampling.reference(generator, condition, sampling.FEWEST), 1e-4)(found["3 steps"]())
    assert family.scores(found["ours"](), test[:2].query).shape == (2,)


@pytest.mark.parametrize("name", pieces.NAMES)
def test_piece(name):
    at_once, one_by_one, check = pieces.piece(P.WORK[name], TINY, 3)
    check(at_once())
    assert len(one_by_one()) == 3
    work = P.WORK[name].work(TINY)
    assert work.bytes > 0


def test_what_measures_the_peak_of_our_own_products_runs():
    _, run, operations = P.own_products(side=32, times=1)
    if run is not None:
        run()
        assert operations == 2 * 32**3 * torch.get_num_threads()


def test_operations_of_a_meta_step_by_hand():
    z = replace(P.DEFAULT, tasks=1, inner=1, samples=1, tokens=1, hidden=1, condition=64)
    # in: 65 and 64 inputs twice each; two blocks of token, sample (21 inputs) and out, three times each; out.token three times
    assert P.WORK["inner_loop"].work(z).flop == 2 * (2 * (65 + 64) + 2 * 3 * (1 + 21 + 1) + 3 * 65)


def row(what, size, provider, median, work=1, **more):
    shares = {"share_of_peak": 0.5, "nearest_peak": "arithmetic", "device": "cpu"}
    info = {"what": what, "size": size, "provider": provider, "work": work}
    times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), median)
    return {"extra_info": info | times | shares | more}


def test_report_from_a_record(tmp_path):
    machine = {"processor": "CPU", "threads": 2, "torch": "2", "git": "abc", "device": "cpu"}
    rows = [row("meta-step", "32x16", name, ms) for name, ms in {"ours": 10.0, "vmap": 25.0, "loop": 50.0}.items()]
    rows += [row("meta-step", "32x20 depth 1", name, 10.0, in_turns=3.5) for name in ("ours", "compiled")]
    rows += [row("preparation", "500 tasks", "ours", 100.0, 500), row("preparation", "8 tasks", "loop", 64.0, 8)]
    rows += [row("sampling", "1 tasks", name, ms) for name, ms in {"3 steps": 0.2, "fine-tuning": 10.0}.items()]
    for size, ms in {"8x16": 3.0, "128x16": 40.0}.items():
        rows += [
            row("meta-step", size, name, ms * times)
            for name, times in {"ours": 1, "vmap": 1.01, "stacked": 1.02}.items()
        ]
    peak = {"gflop_per_s": 100.0, "gb_per_s": 10.0}
    record = {"format": 2, "machine_info": machine, "peak": peak, "benchmarks": rows}
    (tmp_path / "2026-01-02-cpu.json").write_text(json.dumps(record))
    (tmp_path / "2026-01-01-cpu.json").write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    (found,) = report.records(tmp_path)
    section = report.whole(found)
    assert "| meta-step 32x16: at least 3 times vmap | 2.5 times | missed by 17 % |" in section
    assert "| meta-step 32x16: at least 4 times loop | 5 times | met |" in section
    assert "| meta-step 32x20 depth 1: at least 3 times compiled | 3.5 times | met |" in section
    assert "| preparation 500 tasks: at least 30 times loop | 40 times | met |" in section
    assert "| 1 heads in 3 steps: at most 0.25 ms | 0.2 ms | met |" in section
    assert "| 1 heads in 3 steps: at least 60 times fine-tuning | 50 times | missed by 17 % |" in section
    assert "| preparation, 500 tasks | 100 | a Python loop over tasks | 40 |" in report.short(found)
    assert report.plots(found, tmp_path)[0].stat().st_size > 1000
    readme = report.rewrite("README", f"a\n{report.BEGIN}\nold\n{report.END}\nb\n", section)
    assert "old" not in readme
    assert report.rewrite("README", readme, section) == readme


def test_others_are_timed_in_turns_with_ours(monkeypatch):
    """Half of the rounds at half the speed, of both: their ratio is untouched."""
    clock, log = [0.0], []

    class Benchmark:
        extra_info: ClassVar[dict] = {}
        stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

        def pedantic(self, run, setup, rounds, iterations, warmup_rounds):
            for number in range(warmup_rounds + rounds):
                setup()
                start = clock[0]
                run()
                if number >= warmup_rounds:
                    self.stats.stats.data.append(clock[0] - start)

    def worker(name, seconds):
        def run():
            log.append(name)
            clock[0] += seconds * (1 + len(log) // 30 % 2)

        return run

    spec = importlib.util.spec_from_file_location("bench_conftest", Path(P.__file__).with_name("conftest.py"))
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=lambda _: None))
    found, peak = Benchmark(), {"gflop_per_s": 1.0, "gb_per_s": 1.0}
    timed = inspect.unwrap(harness.measure._get_wrapped_function())(found, peak)
    timed(
        worker("theirs", 0.03),
        lambda _: None,
        P.WORK["inner_loop"].work(TINY),
        worker("ours", 0.01),
        what="w",
        provider="p",
    )
    assert found.extra_info["in_turns"] == pytest.approx(3)
    assert found.extra_info["p80_ms"] > 1.9 * found.extra_info["p20_ms"]
    assert log[2:] == ["ours", "ours", "theirs", "theirs"] * (len(log[2:]) // 4)


def test_names_in_the_picture_do_not_meet():
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    (found,) = report.records()
    for panel in report.PANELS:
        figure, axis = plt.subplots(figsize=(13 / 3, 3.4), layout="constrained")
        names = report.draw(axis, found, *panel)
        figure.canvas.draw()
        boxes = [*axis.get_xticklabels(), *names]
        boxes = [Text.get_window_extent(text) for text in boxes]  # of the words: a leader may pass beside another one's
        plt.close(figure)
        assert len(names) > 1
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)], panel


def test_both_documents_are_the_report_of_the_record():
    found = report.records()
    for name, section in {"README.md": report.short, "docs/performance.md": report.whole}.items():
        text = (report.ROOT / name).read_text()
        assert "\n\n".join(map(section, found)) in text, f"{name}: run make bench-report"
        assert report.END in text


def test_torch_is_not_left_in_another_state():
    before = torch.get_num_threads(), torch.is_grad_enabled()
    phi, batch = P.meta_case(TINY)
    INNER["ours"](phi, batch)
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before
