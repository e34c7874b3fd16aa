"""Heads of new tasks: latency of one, throughput of thousands, beside the gradient fine-tuning they replace, with both accuracies.

The generator is trained here for half a minute on Gaussian classes, so that the accuracies mean something; the times do not depend on it.
"""

from dataclasses import replace

import providers as P
import pytest
import torch

from mcdi_fast import Sampler
from mcdi_fast.backend import Backend
from mcdi_fast.config import DenoiserConfig, MetaConfig, PrepareConfig
from mcdi_fast.denoiser import denoise
from mcdi_fast.evaluate import finetune
from mcdi_fast.heads import head_trajectory
from mcdi_fast.meta import fit
from mcdi_fast.noise import philox_normal
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions

SIZE = replace(P.DEFAULT, depth=1)  # of the main job on drawings
STEPS = SIZE.steps
TASKS = [1, 4, 32, 600, 4096]
FEWEST = 3  # one a segment
BACKEND, TORCH = Backend.at_door(), Backend.at_door(impl="torch")
FINETUNE_STEPS, FINETUNE_RATES = (5, 10, 20, 50, 100), (0.01, 0.05, 0.2)


def gaussian_classes(classes, drawers, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(classes, 1, P.DEFAULT.features, generator=g) + 1.6 * torch.randn(
        classes, drawers, P.DEFAULT.features, generator=g
    )
    return torch.nn.functional.normalize(images, dim=-1)


def trained(folder, meta_steps=400, tasks=2000, width=256):
    splits = {"train": gaussian_classes(400, 20, 0), "test": gaussian_classes(200, 20, 1)}
    family = HeadFamily({name: ClassRows.of_grid(grid) for name, grid in splits.items()}, HeadOptions())
    bank = prepare_bank(folder, family, PrepareConfig(tasks=tasks), 3, 0)
    generator = fit(bank, MetaConfig(steps=meta_steps, ema=0.99), denoiser=DenoiserConfig(width, depth=1))
    return generator, family, family.tasks("test", 0, 600, 7)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("bench") / "bank")


def start_of(condition):
    """What the sampler starts from for the seeds 0, 1, …"""
    tasks, tokens, _ = condition.shape
    return philox_normal(range(tasks), tokens * P.DEFAULT.width).view(tasks, tokens, -1).to(condition.device)


def providers(generator, condition):
    """Chains from the same start: ours, in T and in 3 steps, without tile units, and by torch alone; the network as it is written; the same
    compiled; one task after the other."""
    every, start = range(len(condition)), start_of(condition)
    compiled = torch.compile(denoise, dynamic=False)
    sampler, exact, plain = Sampler(generator), Sampler(generator, precision="ieee"), Sampler(generator, impl="torch")

    @torch.no_grad()
    def chain(rows=slice(None), network=denoise):
        return P.chain(generator, condition[rows], start[rows], network=network)

    return {
        "ours": lambda: sampler.sample(condition, every, num_steps=STEPS).tokens,
        "ieee": lambda: exact.sample(condition, every, num_steps=STEPS).tokens,
        "torch": lambda: plain.sample(condition, every, num_steps=STEPS).tokens,
        "3 steps": lambda: sampler.sample(condition, every, num_steps=FEWEST).tokens,
        "eager": chain,
        "compiled": lambda: chain(network=compiled),
        "loop": lambda: torch.cat([chain(slice(i, i + 1)) for i in every]),
    }


@torch.no_grad()
def reference(generator, condition, steps):
    """Heads in float64."""
    return P.chain(generator, condition, start_of(condition).double(), steps)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("provider", ["ours", "ieee", "torch", "3 steps", "eager", "compiled", "loop"])
def test_sampling(benchmark, measure, setup, provider, tasks):
    benchmark.group = f"sampling, {tasks} tasks, T = 20"
    own_code = P.DEVICE == "cpu" and P.OPTIONAL["numba"]  # ours is other code than torch's
    if (
        (provider == "loop" and tasks not in (32,))
        or (provider == "compiled" and tasks != 1)
        or (provider in ("ieee", "torch") and not own_code)
    ):
        pytest.skip("timed at fewer sizes")
    generator, family, test = setup
    condition = test.condition[torch.arange(tasks) % len(test)].to(P.DEVICE)
    found = providers(P.on_device(generator), condition)
    steps = FEWEST if provider == "3 steps" else STEPS
    every = Sampler(generator).sample(test.condition, range(len(test)), num_steps=steps).tokens
    measure(
        found[provider],
        P.close_to(reference(P.on_device(generator), condition, steps), 1e-3),
        P.WORK["run_chain"].work(replace(SIZE, chains=tasks, steps=steps)),
        what="sampling",
        provider=provider,
        size=f"{tasks} tasks",
        work=tasks,
        accuracy=100 * float(family.scores(every, test.query).mean()),
    )


@pytest.mark.parametrize("tasks", [1, 600])
@pytest.mark.parametrize("provider", ["fine-tuning", "fine-tuning compiled"])
def test_finetuning(benchmark, measure, setup, provider, tasks):
    """The fewest Adam steps, at the best rate, that reach the accuracy of the generated heads; 100 where none does. By torch, all tasks at once; and
    by the compiled code of preparation, where numba is installed."""
    benchmark.group = f"sampling, {tasks} tasks, T = 20"
    generator, family, test = setup
    generated = family.scores(Sampler(generator).sample(test.condition, range(len(test))).tokens, test.query).mean()
    tried = [
        (float(family.scores(finetune(family, test, steps, rate, 0.0, BACKEND), test.query).mean()), steps, rate)
        for steps in FINETUNE_STEPS
        for rate in FINETUNE_RATES
    ]
    reached = [entry for entry in tried if entry[0] >= generated]
    accuracy, steps, rate = min(reached, key=lambda entry: entry[1]) if reached else max(tried)
    some = test[:tasks]
    recipe = PrepareConfig(steps=steps, learning_rate=rate, rho=0.0, weight_decay=0.0)
    x, zero = family.features(some.support)[None].double(), torch.zeros(tasks, *family.layout.mask.shape).double()
    expected = head_trajectory(zero, x, some.support["label"], recipe)[:, -1]
    measure(
        lambda: finetune(family, some, steps, rate, 0.0, BACKEND if provider == "fine-tuning compiled" else TORCH),
        P.close_to(expected, 1e-3),
        P.WORK["head_trajectory"].work(replace(P.DEFAULT, heads=tasks, rows=x.shape[2], adam_steps=steps)),
        what="sampling",
        provider=provider,
        size=f"{tasks} tasks",
        work=tasks,
        accuracy=100 * accuracy,
        generated_accuracy=100 * float(generated),
        adam_steps=steps,
        reached=bool(reached),
    )
