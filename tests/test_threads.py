"""The number of threads: measured, chosen, kept for a run that goes on; latencies of one thread, or none."""

import json
import time

import pytest
import torch
from test_tasks import SMALL

from mcdi_fast import DenoiserConfig, DiffusionConfig, MetaConfig, TrajectoryBank, WeightLayout, fit, threads, train
from mcdi_fast.errors import McdiError
from mcdi_fast.threads import Threads, latency, measure


class Clock:
    """time, where a step takes as long as the test says."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    process_time = perf_counter


@pytest.fixture
def machine(monkeypatch):
    """Three threads that nobody asked for, a clock, and `costs`: the seconds of a piece of work by number of threads."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(3)
    clock = Clock()
    clock.costs, clock.measured = {3: 1.0, 1: 1.2}, []

    def measured(work, counts):
        clock.measured.append(torch.get_num_threads())
        return {count: clock.costs[count] for count in counts}

    monkeypatch.setattr(threads, "_AT_START", 3)
    monkeypatch.setattr(threads, "time", clock)
    monkeypatch.setattr(threads, "measure", measured)
    yield clock
    torch.set_num_threads(before)


def steps(chosen, clock, first, seconds):
    """Steps of so many seconds each; the number of threads behind each of them."""
    counts = []
    for number, value in enumerate(seconds, first + 1):
        clock.now += value
        chosen.step(number)
        counts.append(torch.get_num_threads())
    return counts


def test_an_idle_machine_keeps_its_threads(machine, tmp_path):
    said = []
    with Threads(tmp_path / "threads.json", said.append) as chosen:
        chosen.begin("meta-training")
        assert steps(chosen, machine, 0, [1.0] * 200) == [3] * 200
    assert machine.measured == [3]  # and with all threads it is not measured again
    assert not said
    assert not (tmp_path / "threads.json").exists()


@pytest.mark.parametrize(
    ("costs", "expected"), [({3: 1.0, 1: 0.71}, 3), ({3: 1.0, 1: 0.69}, 1), ({3: 12.0, 1: 1.0}, 1)]
)
def test_a_busy_machine(machine, tmp_path, costs, expected):
    machine.costs, said = costs, []
    with Threads(tmp_path / "threads.json", said.append) as chosen:
        chosen.begin("meta-training", 7)
        assert torch.get_num_threads() == expected
        assert steps(chosen, machine, 7, [1.0] * 20) == [expected] * 20
    assert torch.get_num_threads() == 3
    if expected == 1:
        (line,) = said
        assert "meta-training: 1 thread instead of 3 from step 7 on" in line
        assert f"{1000 * costs[3]:.0f} ms on 3, {1000 * costs[1]:.0f} ms on 1" in line
        assert json.loads((tmp_path / "threads.json").read_text()) == {"meta-training": [[7, 1]]}
    assert len(machine.measured) == 1


def test_it_looks_again_when_steps_get_slow(machine, tmp_path):
    with Threads(tmp_path / "threads.json", lambda _: None) as chosen:
        chosen.begin("meta-training")
        assert steps(chosen, machine, 0, [1.0] * 8 + [9.0, 1.0, 9.0, 9.0, 9.0]) == [3] * 13  # one that is slow is none
        assert machine.measured == [3]
        machine.costs = {3: 9.0, 1: 1.5}
        assert steps(chosen, machine, 13, [9.0] * 4) == [3, 1, 1, 1]  # the fifth in a row
        assert machine.measured == [3, 3]
        assert steps(chosen, machine, 17, [1.5] * 10) == [1] * 10
        machine.costs = {3: 1.0, 1: 1.5}  # the other process ends
        counts = steps(chosen, machine, 27, [1.5] * 60)
        assert counts[0] == 1
        assert counts[-1] == 3
        assert len(machine.measured) == 3
    assert [count for _, count in json.loads((tmp_path / "threads.json").read_text())["meta-training"]] == [1, 3]


def test_a_machine_that_is_slow_on_any_number_of_threads_is_not_measured_on_and_on(machine):
    with Threads(say=lambda _: None) as chosen:
        chosen.begin("meta-training")
        steps(chosen, machine, 0, [1.0] * 10 + [5.0] * 200)
    assert len(machine.measured) == 2


def test_stages_are_kept_apart(machine, tmp_path):
    machine.costs = {3: 5.0, 1: 1.0}
    with Threads(tmp_path / "threads.json", lambda _: None) as chosen:
        chosen.begin("trajectories")
        machine.costs = {3: 1.0, 1: 1.2}
        chosen.begin("meta-training")
        assert torch.get_num_threads() == 3
    with Threads(tmp_path / "threads.json", lambda _: None) as chosen:
        chosen.begin("trajectories", 10)
        assert torch.get_num_threads() == 1


def test_a_run_that_goes_on_follows_what_was_kept(machine, tmp_path):
    """Up to where the run that was stopped had got it does not measure: a choice of its own would be another one."""
    kept = {"meta-training": [[0, 1], [10, 3], [20, 1]], "trajectories": [[0, 99]]}
    (tmp_path / "threads.json").write_text(json.dumps(kept))
    with Threads(tmp_path / "threads.json", lambda _: None) as chosen:
        chosen.begin("meta-training", 5)
        assert torch.get_num_threads() == 1
        assert steps(chosen, machine, 5, [1.0] * 17) == [1] * 4 + [3] * 10 + [1] * 3
        assert not machine.measured
        chosen.begin("trajectories")
        assert torch.get_num_threads() == 3  # of a larger machine
    assert json.loads((tmp_path / "threads.json").read_text()) == kept


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"a": [[1]]}', '{"a": [[0, 0]]}', '{"a": [[0, 1.5]]}', "{"])
def test_a_damaged_record_is_named(machine, tmp_path, text):
    (tmp_path / "threads.json").write_text(text)
    with pytest.raises(McdiError, match=r"threads\.json: .*damaged"):
        Threads(tmp_path / "threads.json")


@pytest.mark.parametrize("how", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "set_num_threads", "one core", "fixed"])
def test_what_the_user_chose_is_kept(machine, monkeypatch, tmp_path, how):
    machine.costs = {3: 9.0, 2: 9.0, 1: 1.0}
    if how.endswith("THREADS"):
        monkeypatch.setenv(how, "3")
    elif how == "set_num_threads":
        torch.set_num_threads(2)
    elif how == "one core":
        torch.set_num_threads(1)
        monkeypatch.setattr(threads, "_AT_START", 1)
    before = torch.get_num_threads()
    with Threads(tmp_path / "threads.json", pytest.fail, fixed=how == "fixed") as chosen:
        chosen.begin("meta-training")
        assert steps(chosen, machine, 0, [1.0] * 10 + [9.0] * 10) == [before] * 20
    assert not machine.measured


def test_the_same_bits_after_a_stop(machine, tmp_path):
    """A run that changes its threads on the way is stopped behind that and goes on from before it, though the machine is idle by then."""
    draw = torch.Generator().manual_seed(0)
    layout = WeightLayout.from_module(torch.nn.Linear(64, 5))
    bank = TrajectoryBank.create(tmp_path / "bank", layout, num_segments=3, condition_width=65)
    bank.append(torch.randn(64, 3, 5, 65, generator=draw) / 4, torch.randn(64, 5, 65, generator=draw))
    recipe = MetaConfig(steps=12, meta_batch=32, checkpoint_every=4), DiffusionConfig(), DenoiserConfig(width=256)

    def run(name, busy_from=99, stop=None):
        counts = []

        def on_step(trainer, loss):
            busy = trainer.step >= busy_from
            machine.now += 9.0 if busy else 1.0
            machine.costs = {3: 9.0, 1: 1.0} if busy else {3: 1.0, 1: 1.2}
            chosen.step(trainer.step)
            counts.append(torch.get_num_threads())
            if trainer.step == stop:
                raise KeyboardInterrupt

        machine.costs = {3: 1.0, 1: 1.2}
        with Threads(tmp_path / f"{name}.json", lambda _: None) as chosen:
            begin = lambda trainer: chosen.begin("meta-training", trainer.step)  # noqa: E731
            return fit(bank, *recipe, checkpoint=tmp_path / name, on_start=begin, on_step=on_step).phi, counts

    idle, counts = run("idle")
    assert counts == [3] * 12
    changed, counts = run("changed", busy_from=6)
    assert counts == [3] * 9 + [1] * 3
    if all(torch.equal(changed[name], value) for name, value in idle.items()):
        pytest.skip("on this machine the bits do not depend on the number of threads: there is nothing to show")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", busy_from=6, stop=11)
    again, counts = run("stopped")
    assert counts == [3] + [1] * 3  # from the checkpoint behind step 8
    assert all(torch.equal(changed[name], value) for name, value in again.items())


def test_measuring_puts_the_threads_back_and_leaves_out_the_hopeless():
    before, seen = torch.get_num_threads(), []

    def work():
        seen.append(torch.get_num_threads())
        time.sleep(0.02 / seen[-1])

    assert list(measure(work, [8, 4, 2, 1], seconds=0.02)) == [8, 4]
    assert set(seen) == {8, 4}
    assert torch.get_num_threads() == before

    def broken():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        measure(broken, [3])
    assert torch.get_num_threads() == before
    assert threads.halves(12) == [12, 6, 3, 1]


def test_latency_of_steady_calls(machine):
    def call(number):
        assert torch.get_num_threads() == 1
        machine.now += 9.0 if number < 2 else 0.010 + 0.0001 * (number % 10)

    found = latency(call)
    assert found["latency_ms"] == pytest.approx(10.2)
    assert found["latency_scatter"] < 1.1
    assert found["latency_waited"] == 0
    assert "latency_load" in found
    assert torch.get_num_threads() == 3


def test_a_slow_call_is_made_a_few_times(machine):
    made = []

    def call(number):
        made.append(number)
        machine.now += 1.0

    assert latency(call)["latency_ms"] == pytest.approx(1000)
    assert made == [0, 1, 2, 3, 4]


def test_no_latency_where_calls_scatter(machine):
    def call(number):
        machine.now += 0.01 if number % 2 else 0.03

    found = latency(call)
    assert found["latency_ms"] is None
    assert found["latency_quartile_ms"] == pytest.approx(10)
    assert found["latency_scatter"] == pytest.approx(3)


def test_no_latency_where_calls_wait_for_a_core():
    found = latency(lambda _: time.sleep(0.005), calls=4)
    assert found["latency_ms"] is None
    assert found["latency_waited"] > 0.25
    assert latency(lambda _: None, wait=lambda: time.sleep(0.005), calls=8)["latency_waited"] == 0


def test_the_command_chooses_and_the_library_does_not(machine, monkeypatch, tmp_path):
    """The main job: from the command its stages are measured, on their own work; `train` leaves the threads alone."""
    measured = []

    def measure(work, counts):
        work()
        measured.append(counts)
        return {3: 9.0, 1: 1.0}

    monkeypatch.setattr(threads, "time", time)
    monkeypatch.setattr(
        threads, "_SLOW", float("inf")
    )  # whatever else the machine does meanwhile, nothing is measured again
    monkeypatch.setattr(threads, "_AGAIN_SECONDS", float("inf"))
    monkeypatch.setattr(threads, "measure", measure)
    options = [*SMALL, "--dataset", "test_tasks:lines", "--run-dir", str(tmp_path / "run")]
    assert train.main(options) == 0
    assert measured == [[3, 1]] * 4
    kept = json.loads((tmp_path / "run" / "threads.json").read_text())
    assert kept == {name: [[0, 1]] for name in ("data", "trajectories", "meta-training", "evaluation")}
    assert torch.get_num_threads() == 3
    config = train.parse(train.kind_of(train.TrainConfig), "x", [*options[:-1], str(tmp_path / "other")])
    train.train(config)
    assert len(measured) == 4
    assert not (tmp_path / "other" / "threads.json").exists()
