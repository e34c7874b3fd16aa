"""What every record carries: machine, threads, versions, git sha, the peaks measured in this run; and how a provider is timed."""

from mcdi_fast import environment  # noqa: F401

# isort: split

import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import providers as P

from mcdi_fast.report import machine

_BUDGET_S = 1.0  # of timed rounds, a provider and size
_REST_S = 0.005  # OpenMP's threads spin for 1.5 ms behind a parallel operation, on cores that who comes next wants
_peak: dict[str, float] = {}


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # the default names the host
    machine_info.update(machine())
    machine_info["device"] = torch.cuda.get_device_name() if P.DEVICE == "cuda" else "cpu"
    machine_info["packages"] = P.OPTIONAL


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["peak"] = dict(_peak)
    output_json["format"] = 2
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def best_seconds(run, repeats=10):
    """The fastest of some calls: a peak is what the machine can do."""
    times = []
    for _ in range(repeats + 2):
        P.synchronize()
        start = time.perf_counter()
        run()
        P.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[2:])


@pytest.fixture(scope="session")
def peak():
    """GFLOP/s of a large sgemm and GB/s of a large copy, in this process and now; on a CPU also of our own products, in cache."""
    if not _peak:
        side = 8192 if P.DEVICE == "cuda" else 1536
        a, b, out = (torch.randn(side, side, device=P.DEVICE) for _ in range(3))
        _peak["gflop_per_s"] = 2 * side**3 / best_seconds(lambda: torch.mm(a, b, out=out)) / 1e9
        source = torch.zeros(2**30 if P.DEVICE == "cuda" else 2**26, device=P.DEVICE)
        target = torch.empty_like(source)
        _peak["gb_per_s"] = 2 * source.nbytes / best_seconds(lambda: target.copy_(source)) / 1e9
        name, run, flop = P.own_products()
        if run:
            _peak[f"{name}_gflop_per_s"] = flop / best_seconds(run) / 1e9
    return _peak


@pytest.fixture
def measure(benchmark, peak):
    """measure(run, check, work, beside, **labels): check first, then time with synchronisation; everything into the record.

    beside: ours, timed before every round of another's; `in_turns` is the median of what one took of the other. A machine that is shared has slow
    seconds, which meet both then.
    """

    def timed(run, check, amount, beside=None, **labels):
        ours = []

        def call():
            result = run()
            P.synchronize()
            return result

        def turn():
            time.sleep(_REST_S)
            for _ in range(2):  # the second counts, of both: the first finds caches and cores as the other left them
                start = time.perf_counter()
                beside()
                P.synchronize()
                seconds = time.perf_counter() - start
            ours.append(seconds)
            time.sleep(_REST_S)
            call()

        start = time.perf_counter()
        first = call()
        first_call = time.perf_counter() - start
        check(first)
        del first
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
        rounds = max(5 if once < 0.5 else 3, min(50, int(_BUDGET_S / once)))
        setup = turn if beside else None
        benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1 if once < 1 else 0)
        data = benchmark.stats.stats.data
        if beside:
            labels["in_turns"] = statistics.median(t / o for t, o in zip(data, ours[-len(data) :], strict=True))
        data = sorted(data)
        median = data[len(data) // 2]
        gflops, gbs = amount.flop / median / 1e9, amount.bytes / median / 1e9
        shares = {"arithmetic": gflops / peak["gflop_per_s"], "memory": gbs / peak["gb_per_s"]}
        bound = max(shares, key=shares.__getitem__)
        for name in ("tiles", "vectors"):
            if f"{name}_gflop_per_s" in peak and (labels.get("what"), labels.get("provider")) in P.BY_OWN:
                benchmark.extra_info[f"share_of_{name}"] = gflops / peak[f"{name}_gflop_per_s"]
        benchmark.extra_info.update(
            labels,
            device=P.DEVICE,
            operations=amount.flop,
            bytes=amount.bytes,
            gflop_per_s=gflops,
            gb_per_s=gbs,
            share_of_peak=shares[bound],
            nearest_peak=bound,
            first_call_ms=1000 * first_call,
            median_ms=1000 * median,
            p20_ms=1000 * data[len(data) // 5],
            p80_ms=1000 * data[4 * len(data) // 5],
        )

    return timed
