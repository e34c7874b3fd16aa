"""What the paper's theorems and figures claim, measured: sharpness of trained heads, chains against their targets, novelty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from mcdi_fast.evaluate import generate
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks import TaskBatch

_NOVELTY_CHUNK = 500  # rows compared at a time


def largest_eigenvalue(
    gradient: Callable[[Tensor], Tensor], theta: Tensor, iterations: int = 200, tolerance: float = 1e-4
) -> Tensor:
    """Largest eigenvalue of each task's Hessian, [B], by power iteration over all tasks at once.

    The Hessian must be positive semidefinite, as softmax regression's is: then its largest eigenvalue is the one of largest magnitude. Stops
    when no task's Rayleigh quotient moves by more than `tolerance` of itself.

    Args:
        gradient: of each task's loss, [B, N, D] -> [B, N, D]. theta: float64 [B, N, D].
    """
    v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=theta.dtype).to(theta.device)
    value = torch.zeros_like(theta[:, 0, 0])
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, 1, 1)
        product = jvp(gradient, (theta,), (v,))[1]
        before, value = value, (v * product).sum((1, 2))
        if bool(((value - before).abs() <= tolerance * value.abs()).all()):
            break
        v = product
    return value


def target_distances(
    generator: WeightGenerator, tasks: TaskBatch, targets: Tensor, seed: int, eta_noise: float, measure: Normalizer
) -> list[list[float]]:
    """Theorem 1: root mean square distance of x_t to each local target along the chain, mean over tasks.

    Args:
        targets: [B, k, N, D], of the same tasks. measure: distances are between weights that this normalises.

    Returns:
        [T + 1][k]; a chain that does what the theorem says is nearest to target i at t = e_i.
    """
    goals = measure.normalize(targets)
    curve: list[list[float]] = []

    def note(t: int, x: Tensor) -> None:
        x = x / generator.schedule.carry[t].item()  # what was reached, not what the chain goes on with
        x = measure.normalize(generator.normalizer.denormalize(x))
        curve.append((x.unsqueeze(1) - goals).square().mean((2, 3)).sqrt().mean(0).tolist())

    generate(Sampler(generator, targets.device), tasks, seed, eta_noise=eta_noise, callback=note)
    return curve


def weight_error(generator: WeightGenerator, heads: Tensor, targets: Tensor) -> float:
    """Root mean square error to theta_M in normalised weights, mean over tasks. heads, targets: [B, N, D]."""
    error = generator.normalizer.normalize(heads) - generator.normalizer.normalize(targets)
    return float(error.square().mean((1, 2)).sqrt().double().mean())


def nearest_row_distance(rows: Tensor, bank: Tensor, skip: int = 0) -> Tensor:
    """Root mean square distance of each row to the nearest row of the bank but for `skip` nearer ones: [n, D], [m, D] -> [n]."""
    parts = [torch.cdist(part, bank).kthvalue(skip + 1).values for part in rows.split(_NOVELTY_CHUNK)]
    return torch.cat(parts) / rows.shape[1] ** 0.5


def novelty(generator: WeightGenerator, generated: Tensor, targets: Tensor, training: Tensor) -> dict[str, Any]:
    """Are generated heads of new tasks copies of training targets? Row by row (a row is a class's weights), in normalised weights.

    Args:
        generated, targets: [B, N, D], of new tasks. training: [n, N, D], the last targets of training tasks.

    Returns:
        Median and least distance to the nearest training row: of generated rows, of the new tasks' own trained rows (what a generator
        that does not memorise should look like), of training rows to another training row. A copy has distance 0.
    """
    every, made, trained = (
        generator.normalizer.normalize(x.cpu()).flatten(0, 1) for x in (training, generated, targets)
    )
    some = every[torch.linspace(0, len(every) - 1, min(len(every), len(made))).long()]
    found = {
        "generated": nearest_row_distance(made, every),
        "trained": nearest_row_distance(trained, every),
        "training": nearest_row_distance(some, every, skip=1),  # the nearest is the row itself
    }
    distances = {name: {"median": float(d.double().median()), "least": float(d.min())} for name, d in found.items()}
    return {"training_rows": len(every), **distances}
