"""Weight preparation: all tasks of a chunk at once against a Python loop over tasks with torch.optim.Adam and SAM by autograd."""

import pytest
import torch
import torch.nn.functional as F

from mcdi_fast.config import PrepareConfig
from mcdi_fast.prepare import train_heads

WAYS, FEATURES, ROWS = 5, 64, 100
RECIPE = PrepareConfig(steps=90, copies=1, learning_rate=0.05)
LOOP_TASKS = 8  # the loop's cost is linear in tasks: 500 of them take a minute


def case(tasks):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(tasks, ROWS, FEATURES, generator=g) / FEATURES**0.5
    return features, torch.arange(WAYS).repeat_interleave(ROWS // WAYS).expand(tasks, -1)


def loop(features, labels, start):
    """What published code does: one task after the other, autograd, an optimizer object each."""
    heads = []
    for x, y, theta in zip(features, labels, start, strict=True):
        head = torch.nn.Parameter(theta.clone())
        optimizer = torch.optim.Adam([head], lr=RECIPE.learning_rate, weight_decay=0.0)

        def gradient(weights, x=x, y=y):
            loss = F.cross_entropy(x @ weights[:, :-1].T + weights[:, -1], y)
            return torch.autograd.grad(loss + RECIPE.weight_decay / 2 * weights.square().sum(), weights)[0]

        for _ in range(RECIPE.steps):
            g = gradient(head)
            perturbed = (head.detach() + RECIPE.rho * g / g.norm()).requires_grad_()
            head.grad = gradient(perturbed)
            optimizer.step()
        heads.append(head.detach())
    return torch.stack(heads)


def ours(features, labels):
    return train_heads(features.unsqueeze(0), labels, RECIPE, torch.Generator().manual_seed(0), WAYS)[:, 0]


def starts(tasks):
    g = torch.Generator().manual_seed(0)
    return torch.randn(tasks, WAYS, FEATURES + 1, generator=g) * RECIPE.start_deviation


@pytest.mark.parametrize("provider", ["loop", "ours"])
@pytest.mark.parametrize("tasks", [8, 500])
def test_prepare(benchmark, provider, tasks):
    benchmark.group = "weight preparation, ms a task"
    done = LOOP_TASKS if provider == "loop" else tasks
    if provider == "loop" and tasks > LOOP_TASKS:
        pytest.skip(f"timed at {LOOP_TASKS} tasks: linear in tasks")
    features, labels = case(done)
    few = slice(0, 4)
    expected = loop(features[few].double(), labels[few], starts(done)[few].double())
    found = loop(features[few], labels[few], starts(done)[few]) if provider == "loop" else ours(features, labels)[few]
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    run = (lambda: loop(features, labels, starts(done))) if provider == "loop" else (lambda: ours(features, labels))
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
    benchmark.extra_info["tasks"] = done
    benchmark.extra_info["ms_per_task"] = 1000 * benchmark.stats.stats.median / done
