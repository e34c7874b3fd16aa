"""How many threads a command computes with, and how long one call takes on one thread: on a machine that has other things to do.

Torch uses a thread a core. Where another process keeps a core busy, every one of the hundreds of parallel operations of a step waits for the
thread that has lost its core: an outer step then takes 12 times longer on two threads than on one (docs/reliability.md). So the commands measure.

Bits depend on the number of threads, in some operations (sums of a whole tensor, the weight gradients of convolutions). So what was chosen is
kept beside the run, by the step from which it holds: a run that is stopped and goes on computes the same bits as one that was not stopped.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mcdi_fast.errors import McdiError
from mcdi_fast.store import read_json, show_path, write_json

Work = Callable[[], object]

_AT_START = torch.get_num_threads()  # another number later is somebody's choice
_WORTH = 0.7  # another number of threads is taken where it needs at most this share of the time; most choices are clear by far
_SLOW = 2.0  # measured again where each of _WATCHED steps takes so many times the fastest
_WATCHED = 5
_AGAIN_SECONDS = 60.0  # measured again after so long on fewer threads than there are: the other process may have ended
_STEADY, _WAITED = 2.0, 0.25  # a latency is none where calls scatter more, or waited longer for a core


class Threads:
    """The number of threads of a run, chosen by measurement. Used as a context, which puts the old number back.

        with Threads(folder / "threads.json", say=print) as threads:
            threads.begin("meta-training", work=lambda: …)
            for step in range(steps):
                …
                threads.step(step + 1)

    A number that the user chose (OMP_NUM_THREADS, MKL_NUM_THREADS, torch.set_num_threads) is kept, and nothing is measured.
    """

    def __init__(self, record: Path | None = None, say: Callable[[str], object] = print, fixed: bool = False) -> None:
        """record: a JSON file in the run folder; what it says of a stage is followed. say: told each choice, a line. fixed: choose nothing."""
        self.most = torch.get_num_threads()
        chosen = self.most != _AT_START or any(os.environ.get(f"{kind}_NUM_THREADS") for kind in ("OMP", "MKL"))
        self.fixed = fixed or chosen or self.most == 1
        self._record, self._say = record, say
        self._stages: dict[str, list[list[int]]] = {}  # stage: [step, threads from there on], in order
        self._stage = ""
        self._work: Work = work_like_a_step
        self._times: deque[float] = deque(maxlen=_WATCHED)
        self._fastest = self._last = self._looked = 0.0
        if record is not None and record.exists() and not self.fixed:
            self._stages = _read(record)

    def __enter__(self) -> Threads:
        """Nothing is changed before the first `begin`."""
        return self

    def __exit__(self, *_: object) -> None:
        """Put the old number back."""
        if not self.fixed:
            torch.set_num_threads(self.most)

    def begin(self, stage: str, step: int = 0, work: Work | None = None) -> None:
        """A stage starts, or goes on behind `step`: take the number of threads that was kept for it, or measure and choose.

        Args:
            work: a piece of the stage's work that changes nothing, some 10 to 100 ms of it; by default one like a step of meta-training.
        """
        if self.fixed:
            return
        self._stage, self._work = stage, work or work_like_a_step
        torch.set_num_threads(self._kept(step))
        self._watch()
        if not self._ahead(step):
            self._look(step)

    def step(self, step: int) -> None:
        """So many steps of the stage are done: follow what was kept, and measure again where steps have become slow."""
        if self.fixed:
            return
        now = time.perf_counter()
        self._times.append(now - self._last)
        self._last = now
        if self._kept(step) != torch.get_num_threads():
            torch.set_num_threads(self._kept(step))
        if self._ahead(step) or len(self._times) < _WATCHED:
            return
        quick = min(self._times)
        self._fastest = min(self._fastest, quick)
        idle_again = torch.get_num_threads() < self.most and now - self._looked > _AGAIN_SECONDS
        if quick > _SLOW * self._fastest or idle_again:
            self._look(step)

    def _kept(self, step: int) -> int:
        """The number that holds behind `step`."""
        found = [count for first, count in self._stages.get(self._stage, []) if first <= step]
        return min(found[-1], self.most) if found else self.most

    def _ahead(self, step: int) -> bool:
        """Whether the run that was stopped had got further and chosen again there."""
        return any(first > step for first, _ in self._stages.get(self._stage, []))

    def _look(self, step: int) -> None:
        before = torch.get_num_threads()
        seconds = measure(self._work, sorted({before, *halves(self.most)}, reverse=True))
        best = min(seconds, key=lambda count: seconds[count])
        if seconds[best] > _WORTH * seconds[before]:
            best = before
        if best != before:
            self._stages.setdefault(self._stage, []).append([step, best])
            if self._record is not None and self._record.parent.is_dir():
                write_json(self._record, self._stages)  # before it holds: a kill must not forget it
            times = ", ".join(f"{1000 * value:.0f} ms on {count}" for count, value in seconds.items())
            behind = f" from step {step} on" if step else ""
            self._say(
                f"{self._stage}: {best} {'thread' if best == 1 else 'threads'} instead of {before}{behind} (a piece of it takes {times})"
            )
        torch.set_num_threads(best)
        self._watch()

    def _watch(self) -> None:
        self._times.clear()
        self._fastest = float("inf")
        self._last = self._looked = time.perf_counter()


def halves(most: int) -> list[int]:
    """most, half of it, … 1."""
    return [most >> shift for shift in range(most.bit_length())]


def measure(work: Work, counts: list[int], seconds: float = 0.2) -> dict[int, float]:
    """Median seconds of a piece of work by number of threads, from many to few; those below a number that is much slower are left out.

    seconds: for each number, with two calls at least, the first of which is not counted.
    """
    before, found = torch.get_num_threads(), dict[int, float]()
    try:
        for count in counts:
            torch.set_num_threads(count)
            work()
            times: list[float] = []
            while not times or (sum(times) < seconds and len(times) < 15):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            found[count] = sorted(times)[len(times) // 2]
            if found[count] > 1.5 * min(found.values()):
                break
    finally:
        torch.set_num_threads(before)
    return found


def work_like_a_step() -> None:
    """Some 20 ms on one core: as many parallel operations as a step of meta-training has, of its sizes."""
    x, weight = torch.ones(32, 20, 256), torch.ones(32, 256, 256)
    for _ in range(12):
        x = torch.bmm(x, weight).mul_(1 / 256)
        torch.nn.functional.silu(x).add_(x)


def _read(path: Path) -> dict[str, list[list[int]]]:
    found = read_json(path)
    good = isinstance(found, dict) and all(
        isinstance(entries, list)
        and all(isinstance(e, list) and len(e) == 2 and all(type(n) is int for n in e) and e[1] > 0 for e in entries)
        for entries in found.values()
    )
    if not good:
        raise McdiError(f"{show_path(path)}: expected steps and numbers of threads by stage; it is damaged: remove it")
    return found


def latency(
    call: Callable[[int], object], wait: Callable[[], object] | None = None, calls: int = 30, seconds: float = 1.0
) -> dict[str, Any]:
    """Milliseconds of one call on one thread, if the machine lets them be measured.

    Args:
        call: called with 0, 1, …; the first two are not counted. wait: for a device that computes on, called after each.
        calls, seconds: at most so many counted calls, and no further one after so long (three at least).

    Returns:
        JSON-able. `latency_quartile_ms`: the lower quartile. `latency_ms`: the same; None where it says more of the machine than of the call.
        `latency_scatter`: upper quartile by lower. `latency_waited`: share of the lower quartile in which the call was not running (0 with
        `wait`: the device's time is none of the processor's). `latency_load`: processes that want a core, mean of the last minute.
    """
    before, found = torch.get_num_threads(), list[tuple[float, float]]()
    torch.set_num_threads(1)
    try:
        for number in range(calls + 2):
            if len(found) > 4 and sum(wall for wall, _ in found) > seconds:
                break
            start, used = time.perf_counter(), time.process_time()
            call(number)
            if wait:
                wait()
            found.append((time.perf_counter() - start, time.process_time() - used))
    finally:
        torch.set_num_threads(before)
    found = sorted(found[2:])
    (low, used), (high, _) = found[len(found) // 4], found[(3 * len(found)) // 4]
    waited = 0.0 if wait else max(0.0, 1 - used / low)
    steady = high <= _STEADY * low and waited <= _WAITED
    return {
        "latency_ms": 1000 * low if steady else None,
        "latency_quartile_ms": 1000 * low,
        "latency_scatter": high / low,
        "latency_waited": waited,
        "latency_load": load(),
    }


def load() -> float | None:
    """Processes that want a core, mean of the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
