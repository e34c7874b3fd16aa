"""Weight preparation, Adam + SAM on linear heads: all tasks of a chunk at once against a loop over tasks and batched eager torch."""

from dataclasses import replace

import providers as P
import pytest

SIZES = {"8 tasks": (8, 100), "100 tasks": (100, 100), "500 tasks": (500, 100), "500 tasks, 25 rows": (500, 25)}
LOOP_TASKS = 8  # a loop's cost is linear in tasks: 500 of them take a minute
PREPARE = P.prepare_providers()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", PREPARE)
def test_prepare(benchmark, measure, provider, size):
    benchmark.group = f"weight preparation, {size}"
    tasks, rows = SIZES[size]
    if provider in ("loop", "pytorch_optimizer") and (tasks > LOOP_TASKS and rows == 100):
        pytest.skip(f"timed at {LOOP_TASKS} tasks: linear in tasks")
    if provider == "vmap" and tasks > 100:
        pytest.skip("timed at fewer tasks: seconds a call")
    done = min(tasks, LOOP_TASKS) if provider in ("loop", "pytorch_optimizer") else tasks
    case = P.prepare_case(done, rows)
    work = P.WORK["head_trajectory"].work(replace(P.DEFAULT, heads=done, rows=rows))
    measure(
        lambda: PREPARE[provider](*case), P.prepare_check(*case), work, what="preparation", provider=provider, size=size, work=done
    )  # fmt: skip
    benchmark.extra_info["ms_per_task"] = benchmark.extra_info["median_ms"] / done
