"""The operations of the kernels' registry: all tasks at once, as this device runs them, against a call of torch a task."""

from dataclasses import replace

import providers as P
import pytest

NAMES = [  # the others are benchmarks of their own, or another width of the same
    "noise_batch", "normal_noise", "task_linear loss", "task_linear token", "task_linear token stacked", "reptile_delta_", "sgd_step_",
    "sam_ascent", "adam_step_",
]  # fmt: skip


def piece(operation, z, tasks):
    """(all tasks at once, one after the other, a check of the first), each on inputs of its own."""

    def sized(count):
        return operation.inputs(replace(z, tasks=count, heads=count, chains=count), P.Maker(P.DEVICE))

    at_once, single, run = sized(tasks), sized(1), operation.run if P.DEVICE == "cuda" else operation.reference
    check = P.close_to(operation.exact(at_once), 1e-4)
    return (
        lambda: operation.results(run, at_once),
        lambda: [operation.results(operation.reference, single) for _ in range(tasks)],
        check,
    )


@pytest.mark.parametrize("tasks", [32, 128])
@pytest.mark.parametrize("provider", ["ours", "loop"])
@pytest.mark.parametrize("name", NAMES)
def test_piece(benchmark, measure, name, provider, tasks):
    benchmark.group = f"{name}, {tasks} tasks"
    at_once, one_by_one, check = piece(P.WORK[name], P.DEFAULT, tasks)
    work = P.WORK[name].work(replace(P.DEFAULT, tasks=tasks, heads=tasks, chains=tasks))
    run, check = (at_once, check) if provider == "ours" else (one_by_one, lambda _: None)
    measure(run, check, work, what=name, provider=provider, size=f"{tasks} tasks", work=tasks)
