"""Weight preparation, all tasks at once: Adam + SAM on heads, Adam on whole networks; against loops over tasks and batched eager torch."""

from dataclasses import replace

import providers as P
import pytest
import torch

from mcdi_fast.backend import Backend
from mcdi_fast.config import PrepareConfig
from mcdi_fast.kernels.operations import Work
from mcdi_fast.tasks.waves import WaveFamily, WaveOptions

SIZES = {  # tasks, rows, features
    "8 tasks": (8, 100, 64),
    "100 tasks": (100, 100, 64),
    "500 tasks": (500, 100, 64),
    "500 tasks, 25 rows": (500, 25, 64),
    "100 heads 5 x 1281": (100, 100, 1280),  # on features of an encoder of photos
}
LOOP_TASKS = 8  # a loop's cost is linear in tasks: 500 of them take a minute
PREPARE = P.prepare_providers()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", PREPARE)
def test_prepare(benchmark, measure, provider, size):
    benchmark.group = f"weight preparation, {size}"
    tasks, rows, features = SIZES[size]
    if provider in ("loop", "pytorch_optimizer") and size in ("100 tasks", "500 tasks"):
        pytest.skip(f"timed at {LOOP_TASKS} tasks: linear in tasks")
    if provider == "vmap" and (tasks > 100 or features > 64):
        pytest.skip("timed at fewer tasks: seconds a call")
    done = min(tasks, LOOP_TASKS) if provider in ("loop", "pytorch_optimizer") else tasks
    case = P.prepare_case(done, rows, features)
    work = P.WORK["head_trajectory"].work(replace(P.DEFAULT, heads=done, rows=rows, features=features))
    measure(
        lambda: PREPARE[provider](*case), P.prepare_check(*case), work, what="preparation", provider=provider, size=size, work=done
    )  # fmt: skip
    benchmark.extra_info["ms_per_task"] = benchmark.extra_info["median_ms"] / done


def loop_over_networks(family, data, recipe):
    """What published code does: a module and torch.optim.Adam for each task."""
    found = []
    for x, y in zip(data["x"], data["y"], strict=True):
        module = family.module
        module.load_state_dict(family.layout.unpack(family._initial))
        optimizer = torch.optim.Adam(module.parameters(), lr=recipe.learning_rate)
        for _ in range(recipe.steps):
            optimizer.zero_grad()
            (module(x) - y).square().mean().backward()
            optimizer.step()
        found.append(family.layout.pack(module).detach())
    return torch.stack(found)


@pytest.mark.parametrize("size", ["8 tasks", "500 tasks"])
@pytest.mark.parametrize("provider", ["loop", "ours"])
def test_whole_networks(benchmark, measure, provider, size):
    """Networks 1-32-1 of the family waves, 90 steps of Adam on 100 points, from one start."""
    benchmark.group = f"preparation of networks, {size}"
    tasks = int(size.split()[0])
    if provider == "loop" and tasks > LOOP_TASKS:
        pytest.skip(f"timed at {LOOP_TASKS} tasks: linear in tasks")
    family = WaveFamily(WaveOptions())
    recipe = PrepareConfig(steps=90, learning_rate=0.01, rho=0.0, weight_decay=0.0, start_std=0.0)
    data = family.tasks("train", 0, tasks, 0).train
    expected = loop_over_networks(family, {name: value[:2] for name, value in data.items()}, recipe)
    runs = {
        "loop": lambda: loop_over_networks(family, data, recipe),
        "ours": lambda: family.trajectories(data, recipe, 1, torch.Generator(), Backend())[:, -1],
    }
    check = P.close_to(expected, 2e-2)
    # forward and both products of the backward, two layers of 32 x 1
    operations = 3 * 2 * 2 * 32 * 100 * recipe.steps * tasks
    work = Work(4 * 10 * family.layout.mask.numel() * recipe.steps * tasks, operations)
    measure(
        runs[provider],
        lambda found: check(found[:2]),
        work,
        what="preparation of networks",
        provider=provider,
        size=size,
        work=tasks,
    )
