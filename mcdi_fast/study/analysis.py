"""What the paper's theorems and figures claim, measured: sharpness of trained heads, chains against their targets, novelty, health."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.evaluate import FeatureTasks, generate
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_accuracy, head_logits
from mcdi_fast.sampler import Sampler
from mcdi_fast.weights import Normalizer

_NOVELTY_CHUNK = 1024  # training rows compared at a time


def head_hessian_product(
    head: Tensor, features: Tensor, direction: Tensor, weight_decay: float = 0.0, sample_weight: Tensor | None = None
) -> Tensor:
    """Hessian of the mean cross-entropy + weight_decay / 2 ||head||^2 times a direction, by hand; labels do not enter.

    Args:
        head, direction: [B, ways, F + 1]. features: [B, R, F]. sample_weight: [R], summing to 1; equal shares by default.

    Returns:
        [B, ways, F + 1]
    """
    p = head_logits(head, features).softmax(-1)
    u = head_logits(direction, features)  # how the logits move along the direction
    g = p * (u - (p * u).sum(-1, keepdim=True))
    g = g / features.shape[1] if sample_weight is None else g * sample_weight.unsqueeze(-1)
    return torch.cat([g.mT @ features, g.sum(1).unsqueeze(-1)], -1).add_(direction, alpha=weight_decay)


def largest_eigenvalue(
    head: Tensor,
    features: Tensor,
    weight_decay: float = 0.0,
    sample_weight: Tensor | None = None,
    *,
    iterations: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    """Largest eigenvalue of each task's loss Hessian, [B], by power iteration over all tasks at once, in float64.

    The Hessian is positive semidefinite (softmax regression), so the largest eigenvalue is the one of largest magnitude. Stops when no
    task's Rayleigh quotient moves by more than `tolerance` of itself.
    """
    head, features = head.double(), features.double()
    sample_weight = None if sample_weight is None else sample_weight.double()
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(head.shape, generator=generator, dtype=head.dtype)
    value = torch.zeros(len(head), dtype=head.dtype)
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1)
        product = head_hessian_product(head, features, v, weight_decay, sample_weight)
        before, value = value, (v * product).sum((1, 2))
        if bool(((value - before).abs() <= tolerance * value.abs()).all()):
            break
        v = product
    return value


def target_distances(
    generator: WeightGenerator,
    tasks: FeatureTasks,
    targets: Tensor,
    seed: int,
    eta_noise: float = 0.0,
    normalizer: Normalizer | None = None,
) -> list[list[float]]:
    """Theorem 1: root mean square distance (normalised) of x_t to each local target along the chain, mean over tasks.

    Args:
        targets: [B, k, N, D], of the same tasks. normalizer: the measure, the generator's own by default.

    Returns:
        [T + 1][k]; a chain that does what the theorem says is nearest to target i at t = e_i.
    """
    measure = normalizer or generator.normalizer
    goals = measure.normalize(targets)
    curve: list[list[float]] = []

    def note(t: int, x: Tensor) -> None:
        x = x / generator.schedule.carry[t].item()  # what was reached, not what the chain goes on with
        x = measure.normalize(generator.normalizer.denormalize(x))
        curve.append((x.unsqueeze(1) - goals).square().mean((2, 3)).sqrt().mean(0).tolist())

    generate(Sampler(generator), tasks.support, seed, eta_noise=eta_noise, callback=note)
    return curve


def weight_error(generator: WeightGenerator, heads: Tensor, targets: Tensor) -> float:
    """Root mean square error to theta_M in normalised weights, mean over tasks. heads, targets: [B, N, D]."""
    error = generator.normalizer.normalize(heads) - generator.normalizer.normalize(targets)
    return float(error.square().mean((1, 2)).sqrt().double().mean())


def nearest_row_distance(rows: Tensor, bank: Tensor, skip: Tensor | None = None) -> Tensor:
    """Root mean square distance of each row to the nearest row of the bank, [n].

    rows: [n, D]. bank: [m, D]. skip: int64 [n], a bank row each row must not be compared with (itself).
    """
    best = torch.full((len(rows),), float("inf"))
    for start in range(0, len(bank), _NOVELTY_CHUNK):
        distance = torch.cdist(rows, bank[start : start + _NOVELTY_CHUNK])
        if skip is not None:
            inside = (skip >= start) & (skip < start + distance.shape[1])
            distance[inside.nonzero()[:, 0], skip[inside] - start] = float("inf")
        best = torch.minimum(best, distance.amin(1))
    return best / rows.shape[1] ** 0.5


def novelty(generator: WeightGenerator, generated: Tensor, targets: Tensor, training: Tensor) -> dict[str, Any]:
    """Are generated heads of new tasks copies of training targets? Row by row (a row is a class's weights), in normalised weights.

    Args:
        generated, targets: [B, N, D], of new tasks. training: [n, N, D], the last targets of training tasks.

    Returns:
        Median and least distance to the nearest training row: of generated rows, of the new tasks' own trained rows (what a generator
        that does not memorise should look like), of training rows to another training row. A copy has distance 0.
    """
    normalize = generator.normalizer.normalize
    bank = normalize(training).flatten(0, 1)
    some = torch.linspace(0, len(bank) - 1, min(len(bank), generated.shape[0] * generated.shape[1])).long()
    rows = {
        "generated": (normalize(generated).flatten(0, 1), None),
        "trained": (normalize(targets).flatten(0, 1), None),
        "training": (bank[some], some),
    }
    result: dict[str, Any] = {"training_rows": len(bank)}
    for name, (these, skip) in rows.items():
        distance = nearest_row_distance(these, bank, skip).double()
        result[name] = {"median": float(distance.median()), "least": float(distance.min())}
    return result


@dataclass(frozen=True)
class Health:
    """Diagnostics of generated heads that need no query labels.

    Attributes:
        support_accuracy: share of support images the heads get right. chance: 1 / ways. relative_rms: root mean square of the normalised
            heads (1 where they are of the size of training targets). spread: deviation over tasks in normalised weights, as a share of
            that of training targets (1); 0 where every task gets the same head. warnings: what looks wrong, in words.
    """

    support_accuracy: float
    chance: float
    relative_rms: float
    spread: float
    warnings: tuple[str, ...]


def diagnose(generator: WeightGenerator, heads: Tensor, support: Tensor) -> Health:
    """Why are samples at chance? heads: [B, ways, F + 1]. support: [B, ways, shots, F]."""
    x = generator.normalizer.normalize(heads)
    accuracy, chance = float(head_accuracy(heads, support).mean()), 1 / support.shape[1]
    rms = float(x.square().mean().sqrt())
    spread = float(x.std(0).square().mean().sqrt()) if len(x) > 1 else float("nan")
    warnings = []
    if not bool(heads.isfinite().all()):
        warnings.append("heads are not finite: the chain diverged; check the generator's normaliser and eta_noise")
    if rms > 3:
        warnings.append(f"heads are {rms:.1f} times as large as training targets: the chain diverges; train longer")
    if rms < 0.1:
        warnings.append(f"heads are {rms:.2f} of the size of training targets: the chain collapses to their mean")
    if spread < 0.1:
        warnings.append(
            f"heads of different tasks are alike (spread {spread:.2f}, expected about 1): the condition is ignored; are "
            "its values those the generator was trained with, and do its tokens stand in the order of the classes?"
        )
    if accuracy < chance + 0.5 * (1 - chance):
        warnings.append(
            f"support accuracy {100 * accuracy:.0f} %, chance {100 * chance:.0f} %: features or the order of classes differ from "
            "training, or it was far too short"
        )
    return Health(accuracy, chance, rms, spread, tuple(warnings))
