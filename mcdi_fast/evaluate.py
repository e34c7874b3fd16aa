"""The protocol: every method on the same test tasks, its score with an interval, and the time one new task takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from mcdi_fast.backend import Backend
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import EvaluateConfig, PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks import TaskBatch, TaskFamily
from mcdi_fast.threads import latency

TEST_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # added to a run's seed: far from the seeds of training tasks
OBJECTIVE_TITLES = {"local-consistency": "Mc-Di", "vanilla": "Mv-Di", "naive-local": "Tw-Di"}
WHAT = {
    "finetune": "Adam on the support, from the start of the trajectories",
    "finetune-decay": "the same with weight decay",
    "bank-mean": "the mean of the bank's trained weights",
    "nearest-task": "the trained weights of the training task with the nearest condition",
    "nearest-prototype": "nearest class mean",
    "trained-target": "trained as a training task is (ceiling)",
}
GRADIENTS = ("finetune", "finetune-decay", "trained-target")  # methods that take gradients on the new task
_STEP_COUNTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
_CHAIN_SEEDS = 12
_PLANE_POINTS = 41
_PICTURED = 4  # tasks a family may draw
_CHUNK = 2000  # tasks of a bank at a time

Adapt = Callable[[TaskBatch], Tensor]
"""A method: tasks -> weights [B, N, D]."""


def finetune(family: TaskFamily, tasks: TaskBatch, steps: int, lr: float, decay: float, backend: Backend) -> Tensor:
    """Adam on each task's support alone, from the trajectories' start without its noise: [B, N, D]."""
    recipe = PrepareConfig(steps=steps, learning_rate=lr, rho=0.0, weight_decay=decay, start_std=0.0)
    return family.trajectories(tasks.support, recipe, 1, torch.Generator(), backend)[:, -1]


def trained_targets(
    family: TaskFamily, tasks: TaskBatch, recipe: PrepareConfig, segments: int, seed: int, backend: Backend
) -> Tensor:
    """What preparation would make for these tasks: [B, k, N, D]."""
    return family.trajectories(tasks.train, recipe, segments, torch.Generator().manual_seed(seed), backend)


def generate(sampler: Sampler, tasks: TaskBatch, first_seed: int, **options: Any) -> Tensor:
    """Weights [B, N, D] for tasks by sampling, task b with the seed first_seed + b."""
    return sampler.sample(tasks.condition, range(first_seed, first_seed + len(tasks)), **options).tokens


def bank_methods(bank: TrajectoryBank, sampler: Sampler) -> dict[str, Adapt]:
    """What the bank alone gives: its mean, and the weights of the training task whose (normalised) condition is nearest."""
    normalizer, conditions = sampler.generator.condition_normalizer, []
    total = torch.zeros(bank.layout.mask.shape, dtype=torch.float64)
    for first in range(0, len(bank), _CHUNK):
        targets, condition = bank.gather(torch.arange(first, min(first + _CHUNK, len(bank))))
        total = total + targets[:, -1].double().sum(0)
        conditions.append(normalizer.normalize(condition.to(sampler.device)).flatten(1))
    every = torch.cat(conditions)
    mean = (total / len(bank)).float().to(sampler.device)

    def nearest(tasks: TaskBatch) -> Tensor:
        found = torch.cdist(normalizer.normalize(tasks.condition).flatten(1), every).argmin(1)
        return bank.gather(found.cpu())[0][:, -1].to(sampler.device)

    return {"bank-mean": lambda tasks: mean.expand(len(tasks), -1, -1), "nearest-task": nearest}


def interval(values: Tensor) -> float:
    """Half the 95 % confidence interval of the mean over tasks (normal approximation)."""
    return 1.96 * float(values.double().std()) / len(values) ** 0.5


def timed(adapt: Adapt, tasks: TaskBatch) -> dict[str, Any]:
    """What the weights of one task take, its condition given: `threads.latency`."""
    device = tasks.condition.device
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    return latency(lambda i: adapt(tasks[slice(i % len(tasks), i % len(tasks) + 1)]), wait)


def latency_ms(adapt: Adapt, tasks: TaskBatch) -> float:
    """The lower quartile of `timed`, however busy the machine."""
    return timed(adapt, tasks)["latency_quartile_ms"]


def step_counts(generator: WeightGenerator) -> list[int]:
    """Numbers of sampling steps that are tried: some from one a segment to T, and the generator's own."""
    fewest, most = len(set(generator.objective.ends.tolist())), generator.diffusion.steps
    some = {*_STEP_COUNTS, most, generator.num_steps or most}
    return sorted(count for count in some if fewest <= count <= most)


def choose_steps(family: TaskFamily, sampler: Sampler, validation: TaskBatch, seed: int, eta_noise: float) -> int:
    """The fewest sampling steps that are level with the best on the validation tasks.

    Level: the mean score, paired over tasks, is less than one standard error of the difference below the best's. seed: of the chains.
    """
    sign = 1 if family.metric.higher_is_better else -1
    scores = {}
    for count in step_counts(sampler.generator):
        theta = generate(sampler, validation, seed, num_steps=count, eta_noise=eta_noise)
        # a chain that diverged is never level
        scores[count] = (sign * family.scores(theta, validation.query).double()).nan_to_num(nan=-torch.inf)
    best = max(scores.values(), key=lambda one: float(one.mean()))

    def is_level(one: Tensor) -> bool:
        behind = best - one
        return float(behind.mean()) <= float(behind.std()) / len(behind) ** 0.5

    return next((count for count, one in scores.items() if is_level(one)), sampler.generator.diffusion.steps)


def evaluate(
    family: TaskFamily,
    sampler: Sampler,
    bank: TrajectoryBank,
    test: TaskBatch,
    validation: TaskBatch,
    config: EvaluateConfig,
    recipe: PrepareConfig,
    seed: int,
    backend: Backend = Backend(),  # noqa: B008 (a constant)
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Run every method on the test tasks.

    Args:
        recipe: how the targets were made. seed: of chains and of the targets' starts.
        on_stage: called with the name of each of the four parts before it runs.

    Returns:
        JSON-able: `metric`, `methods` (mean, ci95, `threads.latency`, what validation chose), `sampling_steps`, `norms`, `plane` (report.py);
        and `figures`, the family's own.
    """
    generator, metric = sampler.generator, family.metric
    objective, num_steps = generator.diffusion.objective, generator.num_steps or generator.diffusion.steps
    sample = {"num_steps": num_steps, "eta_noise": config.eta_noise}
    better = 1 if metric.higher_is_better else -1

    def shown(values: Tensor) -> dict[str, float]:
        return {"mean": metric.factor * float(values.double().mean()), "ci95": metric.factor * interval(values)}

    on_stage("fine-tuning")

    def choose(decays: tuple[float, ...]) -> tuple[Adapt, dict[str, Any]]:
        """The best fine-tuning recipe on the validation tasks."""
        tried = []
        for steps, lr, decay in itertools.product(config.finetune_steps, config.finetune_lrs, decays):
            theta = finetune(family, validation, steps, lr, decay, backend)
            score = better * float(family.scores(theta, validation.query).mean())
            if score == score:  # a rate that diverges gives NaN
                tried.append((score, steps, lr, decay))
        if not tried:
            raise McdiError("--evaluate.finetune-lrs: every one diverged on the validation tasks; give smaller ones")
        score, steps, lr, decay = max(tried)
        chosen = {"steps": steps, "lr": lr, "weight_decay": decay, "validation": metric.factor * better * score}
        return lambda tasks: finetune(family, tasks, steps, lr, decay, backend), chosen

    adapters: dict[str, Adapt] = {objective: lambda tasks: generate(sampler, tasks, seed, **sample)}
    chosen: dict[str, dict[str, Any]] = {objective: {"steps": num_steps}}
    adapters["finetune"], chosen["finetune"] = choose((0.0,))
    adapters["finetune-decay"], chosen["finetune-decay"] = choose(config.finetune_decays)
    adapters |= family.baselines()
    if not generator.layout.exchangeable:  # of exchangeable tokens, such as a head's classes, neither means anything
        adapters |= bank_methods(bank, sampler)
    adapters["trained-target"] = lambda tasks: trained_targets(family, tasks, recipe, 1, seed, backend)[:, -1]

    on_stage("methods")
    targets = trained_targets(family, test, recipe, generator.diffusion.segments, seed, backend)
    methods: dict[str, Any] = {}
    scores: dict[str, Tensor] = {}
    drawn: dict[str, Tensor] = {}
    for name, adapt in adapters.items():
        theta = targets[:, -1] if name == "trained-target" else adapt(test)
        scores[name], drawn[name] = family.scores(theta, test.query), theta[:_PICTURED]
        methods[name] = {**shown(scores[name]), **timed(adapt, test), **chosen.get(name, {})}
        if name not in (objective, "trained-target"):
            difference = shown(scores[objective] - scores[name])
            methods[name] |= {
                "generated_minus_this": difference["mean"],
                "generated_minus_this_ci95": difference["ci95"],
            }

    on_stage("sampling steps")
    last = generator.normalizer.normalize(targets[:, -1])
    curve = []
    for count in step_counts(generator):
        theta = generate(sampler, test, seed, num_steps=count, eta_noise=config.eta_noise)
        error = (generator.normalizer.normalize(theta) - last).square().mean((1, 2)).sqrt()
        curve.append(
            {"steps": count, **shown(family.scores(theta, test.query)), "weight_error": float(error.double().mean())}
        )

    on_stage("chains")
    generated = generate(sampler, test, seed, **sample)
    pictured, chain = test[:_PICTURED], list[tuple[int, Tensor]]()
    stepwise = Sampler(generator, sampler.device, impl="torch")

    def keep(t: int, x: Tensor) -> None:
        chain.append((t, generator.normalizer.denormalize(x)))

    generate(stepwise, pictured, seed, eta_noise=config.eta_noise, callback=keep)
    return {
        "metric": metric._asdict(),
        "methods": methods,
        "sampling_steps": curve,
        "norms": {
            "generated": generated.flatten(1).norm(dim=1).tolist(),
            "target": targets[:, -1].flatten(1).norm(dim=1).tolist(),
        },
        "plane": chain_plane(family, sampler, test[:1], targets[0], seed, config.eta_noise),
        "figures": family.figures(pictured, drawn, chain),
    }


def chain_plane(
    family: TaskFamily, sampler: Sampler, task: TaskBatch, targets: Tensor, seed: int, eta_noise: float
) -> dict[str, Any]:
    """Figure 1 of the paper: sampling chains of one task in a plane of (normalised) weight space, over the task's loss.

    The plane holds the last target and the main two directions of the chains' points and the targets. targets: [k, N, D].

    Returns:
        `chains` [seeds][T + 1][2], `targets` [k][2], axes `x`, `y` and `log_loss` [y][x] of the query.
    """
    generator, path = sampler.generator, list[Tensor]()
    stepwise = Sampler(generator, sampler.device, impl="torch")  # the one-launch kernel shows no points on the way
    stepwise.sample(
        task.condition.expand(_CHAIN_SEEDS, -1, -1),
        range(seed, seed + _CHAIN_SEEDS),
        eta_noise=eta_noise,
        callback=lambda t, x: path.append(x.flatten(1).double().cpu()),
    )
    chains = torch.stack(path, 1)  # [seeds, T + 1, N D]
    goals = generator.normalizer.normalize(targets).flatten(1).double().cpu()
    origin = goals[-1]
    points = torch.cat([chains.mean(0), goals]) - origin
    noise = (chains[:, 0] - chains[:, 0].mean(0))[:1]  # one start's own direction, so that chains spread
    axes = torch.linalg.svd(torch.cat([points, noise]), full_matrices=False).Vh[:2]
    flat = (chains - origin) @ axes.T
    flat_goals = (goals - origin) @ axes.T
    low = torch.minimum(flat.flatten(0, 1).amin(0), flat_goals.amin(0))
    high = torch.maximum(flat.flatten(0, 1).amax(0), flat_goals.amax(0))
    margin = 0.08 * (high - low).clamp_min(1e-6)
    x, y = (
        torch.linspace(float(a), float(b), _PLANE_POINTS, dtype=torch.float64)
        for a, b in zip(low - margin, high + margin, strict=True)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
    theta = generator.normalizer.denormalize(
        (origin + grid @ axes).float().view(-1, *targets.shape[1:]).to(targets.device)
    )
    query = {name: value[0] for name, value in task.query.items()}
    with torch.no_grad():
        loss = vmap(family.loss, (0, None), randomness="same", chunk_size=256)(theta, query)
    return {
        "chains": flat.tolist(),
        "targets": flat_goals.tolist(),
        "x": x.tolist(),
        "y": y.tolist(),
        "log_loss": loss.nan_to_num(posinf=1e6).clamp_min(1e-6).log10().view(len(y), len(x)).tolist(),
    }
