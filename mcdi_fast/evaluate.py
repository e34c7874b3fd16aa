"""The protocol: every method on the same test tasks, accuracy with its interval, and the time one new task takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.config import EvaluateConfig, PrepareConfig, TaskConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.heads import head_accuracy, head_loss, prototype_head, support_condition
from mcdi_fast.prepare import train_task_heads
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks import sample_episodes

OBJECTIVE_TITLES = {"local-consistency": "Mc-Di", "vanilla": "Mv-Di", "naive-local": "Tw-Di"}
COMPARED = ("head-finetune", "head-finetune-decay", "nearest-prototype")  # paired with the generated heads
_LATENCY_REPEATS = 30
_CHAIN_SEEDS = 12
_PLANE_POINTS = 41


@dataclass(frozen=True)
class FeatureTasks:
    """B tasks in feature space.

    Attributes:
        support: float32 [B, ways, shots, F]. query: [B, ways, Q, F]. every: [B, ways, images_per_class, F], all images of the classes, the
            support first.
    """

    support: Tensor
    query: Tensor
    every: Tensor

    def __len__(self) -> int:
        """B."""
        return len(self.support)

    def to(self, device: torch.device) -> FeatureTasks:
        """The same on another device."""
        return FeatureTasks(**{name: value.to(device) for name, value in vars(self).items()})

    def __getitem__(self, rows: slice) -> FeatureTasks:
        """Some of the tasks."""
        return FeatureTasks(self.support[rows], self.query[rows], self.every[rows])


def draw_tasks(features: Tensor, task: TaskConfig, count: int, seed: int) -> FeatureTasks:
    """The first `count` tasks of the sequence that `seed` starts, out of features [classes, images_per_class, F]."""
    classes, images_per_class = features.shape[:2]
    episodes = sample_episodes(
        classes,
        images_per_class,
        ways=task.ways,
        shots=task.shots,
        queries=images_per_class - task.shots,
        seed=seed,
        start=0,
        count=count,
    )
    support, others = episodes.take(features)
    return FeatureTasks(support, others[:, :, : task.queries], torch.cat([support, others], 2))


def finetune(support: Tensor, steps: int, rate: float, decay: float = 0.0) -> Tensor:
    """Adam on the head from zero, on the support alone. [B, ways, shots, F] -> [B, ways, F + 1]."""
    recipe = PrepareConfig(steps=steps, learning_rate=rate, rho=0.0, weight_decay=decay, start_std=0.0)
    return train_task_heads(support.unsqueeze(0), support.shape[2], recipe, torch.Generator(), 1)[:, -1]


def trained_targets(tasks: FeatureTasks, recipe: PrepareConfig, segments: int, seed: int) -> Tensor:
    """What preparation would make for these tasks, from every image of their classes: [B, k, ways, F + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return train_task_heads(tasks.every.unsqueeze(0), tasks.support.shape[2], recipe, generator, segments)


def generate(sampler: Sampler, support: Tensor, first_seed: int, **options: Any) -> Tensor:
    """Heads for tasks by sampling: [B, ways, shots, F] -> [B, ways, F + 1], on the sampler's device, where the support is."""
    seeds = range(first_seed, first_seed + len(support))
    return sampler.sample(support_condition(support), seeds, **options).tokens


def interval(accuracy: Tensor) -> float:
    """Half the 95 % confidence interval of the mean over tasks (normal approximation)."""
    return 1.96 * float(accuracy.double().std()) / len(accuracy) ** 0.5


def latency_ms(adapt: Callable[[Tensor], Tensor], support: Tensor) -> float:
    """Median milliseconds for the head of one task, after two warm-up calls."""
    times = []
    for i in range(_LATENCY_REPEATS + 2):
        one = support[i % len(support)].unsqueeze(0)
        start = time.perf_counter()
        adapt(one)
        if one.device.type == "cuda":
            torch.cuda.synchronize(one.device)
        times.append(1000 * (time.perf_counter() - start))
    return median(times[2:])


def evaluate(
    sampler: Sampler,
    test: FeatureTasks,
    validation: FeatureTasks,
    config: EvaluateConfig,
    recipe: PrepareConfig,
    seed: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Run every method on the test tasks, where the sampler is.

    Args:
        recipe: how the targets were made. seed: of chains and of the targets' starts.
        on_stage: called with the name of each part before it runs.

    Returns:
        JSON-able: `methods` (accuracy in %, interval, latency), `sampling_steps`, `norms`, `plane` (see `report.py`).
    """
    generator = sampler.generator
    test, validation = test.to(sampler.device), validation.to(sampler.device)
    objective, num_steps = generator.diffusion.objective, config.sampling_steps or generator.diffusion.steps
    sample = {"num_steps": num_steps, "eta_noise": config.eta_noise}

    on_stage("fine-tuning")

    def choose(decays: tuple[float, ...]) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
        """The best fine-tuning recipe on the validation tasks."""
        tried = []
        for rate in config.finetune_lrs:
            for decay in decays:
                head = finetune(validation.support, config.finetune_steps, rate, decay)
                tried.append((float(head_accuracy(head, validation.query).mean()), rate, decay))
        accuracy, rate, decay = max(tried)
        chosen = {"rate": rate, "weight_decay": decay, "validation_accuracy": 100 * accuracy}
        return lambda support: finetune(support, config.finetune_steps, rate, decay), chosen

    plain, plain_recipe = choose((0.0,))
    decayed, decayed_recipe = choose(config.finetune_decays)

    on_stage("methods")
    targets = trained_targets(test, recipe, generator.diffusion.segments, seed)
    ways: dict[str, tuple[Callable[[Tensor], Tensor] | None, Tensor | None]] = {
        objective: (lambda support: generate(sampler, support, seed, **sample), None),
        "head-finetune": (plain, None),
        "head-finetune-decay": (decayed, None),
        "nearest-prototype": (prototype_head, None),
        "trained-target": (None, targets[:, -1]),
    }
    methods: dict[str, Any] = {}
    accuracies: dict[str, Tensor] = {}
    for name, (adapt, head) in ways.items():
        if adapt is not None:
            head = adapt(test.support)
        assert head is not None
        accuracies[name] = head_accuracy(head, test.query)
        methods[name] = {
            "accuracy_mean": 100 * float(accuracies[name].double().mean()),
            "accuracy_ci95": 100 * interval(accuracies[name]),
            "latency_ms": latency_ms(adapt, test.support) if adapt else _target_latency(test, recipe),
        }
    for name in COMPARED:
        difference = accuracies[objective] - accuracies[name]
        methods[name]["generated_minus_this"] = 100 * float(difference.double().mean())
        methods[name]["generated_minus_this_ci95"] = 100 * interval(difference)
    methods["head-finetune"] |= plain_recipe
    methods["head-finetune-decay"] |= decayed_recipe

    on_stage("sampling steps")
    last = generator.normalizer.normalize(targets[:, -1])
    curve = []
    fewest = len(set(generator.objective.ends.tolist()))
    for count in sorted(
        {n for n in (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, num_steps) if fewest <= n <= generator.diffusion.steps}
    ):
        head = generate(sampler, test.support, seed, num_steps=count, eta_noise=config.eta_noise)
        accuracy = head_accuracy(head, test.query)
        error = (generator.normalizer.normalize(head) - last).square().mean((1, 2)).sqrt()
        curve.append(
            {
                "steps": count,
                "accuracy_mean": 100 * float(accuracy.double().mean()),
                "accuracy_ci95": 100 * interval(accuracy),
                "weight_error": float(error.double().mean()),
            }
        )

    on_stage("chains")
    generated = generate(sampler, test.support, seed, **sample)
    return {
        "methods": methods,
        "sampling_steps": curve,
        "norms": {
            "generated": generated.flatten(1).norm(dim=1).tolist(),
            "target": targets[:, -1].flatten(1).norm(dim=1).tolist(),
        },
        "plane": chain_plane(sampler, test[:1], targets[0], seed, config.eta_noise),
    }


def _target_latency(test: FeatureTasks, recipe: PrepareConfig) -> float:
    start = time.perf_counter()
    trained_targets(test[:1], recipe, 1, 0)
    return 1000 * (time.perf_counter() - start)


def chain_plane(sampler: Sampler, task: FeatureTasks, targets: Tensor, seed: int, eta_noise: float) -> dict[str, Any]:
    """Figure 1 of the paper: sampling chains of one task in a plane of (normalised) weight space, over the task's loss.

    The plane holds the last target and the main two directions of the chains' points and the targets. targets: [k, N, D].

    Returns:
        `chains` [seeds][T + 1][2], `targets` [k][2], axes `x`, `y` and `log_loss` [y][x] of the query images.
    """
    generator, path = sampler.generator, list[Tensor]()
    stepwise = Sampler(generator, sampler.device, impl="torch")  # the one-launch kernel shows no points on the way
    support = task.support.expand(_CHAIN_SEEDS, -1, -1, -1)
    generate(
        stepwise, support, seed, eta_noise=eta_noise, callback=lambda t, x: path.append(x.flatten(1).double().cpu())
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
    heads = generator.normalizer.denormalize(
        (origin + grid @ axes).float().view(-1, *targets.shape[1:]).to(targets.device)
    )
    loss = head_loss(heads, task.query.expand(len(heads), -1, -1, -1))
    return {
        "chains": flat.tolist(),
        "targets": flat_goals.tolist(),
        "x": x.tolist(),
        "y": y.tolist(),
        "log_loss": loss.clamp_min(1e-6).log10().view(len(y), len(x)).tolist(),
    }


def check_evaluate(config: EvaluateConfig, num_steps: int, segments: int) -> None:
    """Raise McdiError, naming the option, for a value out of range."""
    for name in ("tasks", "validation_tasks"):
        if getattr(config, name) < 2:
            raise McdiError(
                f"--evaluate.{name.replace('_', '-')} = {getattr(config, name)}: expected at least 2, for an interval"
            )
    if config.finetune_steps < 1:
        raise McdiError(f"--evaluate.finetune-steps = {config.finetune_steps}: expected at least 1")
    if not config.finetune_decays or min(config.finetune_decays) < 0:
        raise McdiError(f"--evaluate.finetune-decays = {config.finetune_decays}: expected one or more, none negative")
    if not config.finetune_lrs or min(config.finetune_lrs) <= 0:
        raise McdiError(f"--evaluate.finetune-lrs = {config.finetune_lrs}: expected one or more positive rates")
    if config.sampling_steps is not None and not segments <= config.sampling_steps <= num_steps:
        raise McdiError(
            f"--evaluate.sampling-steps = {config.sampling_steps}: expected {segments} (one a segment) to T = {num_steps} (--diffusion.steps)"
        )
    if not 0 <= config.eta_noise <= 1:
        raise McdiError(f"--evaluate.eta-noise = {config.eta_noise}: expected 0 (noise-free) to 1 (full noise)")
