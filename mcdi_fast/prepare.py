"""Weight preparation: the trajectories of many classification heads at once, by Adam + SAM from Gaussian starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import PrepareConfig, TaskConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.heads import head_gradient, head_layout, support_condition
from mcdi_fast.impl import DEFAULT_PRECISION, resolve
from mcdi_fast.noise import check_seed
from mcdi_fast.ranks import ALONE, Ranks
from mcdi_fast.tasks import sample_episodes

SAM_TINY = 1e-12  # least norm: float32 squares of smaller entries underflow, and a norm of 0 must not make the step larger than rho
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults, of every Adam here
SHARD_TASKS = 500  # tasks trained together and appended as one shard: large products, and little lost by a kill


def sam_perturbation(theta: Tensor, gradient: Tensor, rho: float) -> Tensor:
    """theta_b + rho * g_b / (||g_b|| + tiny), one norm a task (method, section 3). theta, gradient: [B, ...]."""
    norm = gradient.flatten(1).norm(dim=1).clamp_min(SAM_TINY)
    return theta + (rho / norm).view(-1, *[1] * (theta.ndim - 1)) * gradient


def adam_scalars(step: int, rate: float) -> tuple[float, float]:
    """(rate / (1 - beta1^step), sqrt(1 - beta2^step)); `step` counts from 1. In double precision: in float32 1 - 0.999 has lost four digits."""
    return rate / (1 - ADAM_BETAS[0] ** step), (1 - ADAM_BETAS[1] ** step) ** 0.5


def adam_step(theta: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: float, root: float) -> None:
    """One Adam step in place, with bias correction. Same arithmetic as torch.optim.Adam. rate, root: of `adam_scalars`.

    The gradient is used up as scratch: for phi, fresh memory every time made an outer step 7 times slower (8.7 against 1.3 ms).
    """
    first.lerp_(gradient, 1 - ADAM_BETAS[0])
    second.mul_(ADAM_BETAS[1]).addcmul_(gradient, gradient, value=1 - ADAM_BETAS[1])
    theta.addcdiv_(first, torch.sqrt(second, out=gradient).div_(root).add_(ADAM_EPS), value=-rate)


def head_trajectory(
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    record: int = 1,
    pick: Tensor | None = None,
    row_weight: Tensor | None = None,
    *,
    impl: str = "auto",
    precision: str = DEFAULT_PRECISION,
) -> Tensor:
    """Adam + SAM on the heads of B tasks from given starts; every random draw is made beforehand.

    Args:
        start: [B, ways, F + 1]. features: [A, B, R, F], A versions of each row. labels: int64 [B, R] in [0, ways).
        record: k, a divisor of config.steps M; theta_d, theta_2d, …, theta_kd = theta_M are kept, d = M / k.
        pick: integer [M, B, R] in [0, A): the version of every row in every step; version 0 by default.
        row_weight: [R], the share of each row in the loss, summing to 1; equal shares by default.
        impl: impl.py. Heads that are too large for the one-launch kernel go step by step, through SAM's and Adam's kernels.

    Returns:
        [B, k, ways, F + 1]
    """
    ascend, step_adam = sam_perturbation, adam_step
    if resolve(impl, start.device) == "triton":
        from mcdi_fast.kernels import head_trajectory as fused
        from mcdi_fast.kernels import sam_adam

        if fused.fits(*start.shape[1:]):
            return fused.head_trajectory(start, features, labels, config, record, pick, row_weight, precision=precision)
        ascend, step_adam = sam_adam.sam_ascent, sam_adam.adam_step_
    theta, kept = start.clone(), []
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    x = features[0]
    picked = None if pick is None else torch.empty_like(features[:1])  # once: fresh rows cost page faults in every step
    for step in range(1, config.steps + 1):
        if pick is not None:
            x = torch.gather(features, 0, pick[step - 1, None, :, :, None].long().expand(1, *x.shape), out=picked)[0]
        gradient = head_gradient(theta, x, labels, config.weight_decay, row_weight)
        if config.rho > 0:
            above = ascend(theta, gradient, config.rho)
            gradient = head_gradient(above, x, labels, config.weight_decay, row_weight)
        step_adam(theta, gradient, first, second, *adam_scalars(step, config.learning_rate))
        if step % (config.steps // record) == 0:
            kept.append(theta.clone())
    return torch.stack(kept, 1)


def train_heads(
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    generator: torch.Generator,
    ways: int,
    *,
    record: int = 1,
    row_weight: Tensor | None = None,
    impl: str = "auto",
    precision: str = DEFAULT_PRECISION,
) -> Tensor:
    """Train the heads of B tasks together: the weight-preparation stage.

    Args:
        features: float [A, B, R, F], A augmented copies of each task's R rows; every step picks one of them a row.
        labels: int64 [B, R] in [0, ways).
        config: steps M, learning rate, rho (0: plain Adam, one gradient a step), start deviation.
        generator: draws the Gaussian start and the copies, on the CPU wherever the features are: the same draws on every device.
        row_weight: [R], the share of each row in the loss, summing to 1; equal shares by default.
        record: k; the heads after steps d, 2d, …, kd = M are kept, d = M / k.
        impl, precision: impl.py.

    Returns:
        [B, k, ways, F + 1], the local targets theta_d … theta_M, where the features are.

    Raises:
        McdiError: k does not divide M; features that are not finite.
    """
    check_prepare(config, record)
    if not features.isfinite().all():
        raise McdiError(
            "preparation features: found NaN or infinity, expected finite numbers; look at the backbone that made them"
        )
    copies, num_tasks, rows, width = features.shape
    device = features.device
    start = torch.randn(num_tasks, ways, width + 1, generator=generator, dtype=features.dtype) * config.start_deviation
    pick = None
    if copies > 1:  # int32 on the way to a GPU
        pick = torch.randint(copies, (config.steps, num_tasks, rows), generator=generator).int().to(device)
    return head_trajectory(
        start.to(device), features, labels, config, record, pick, row_weight, impl=impl, precision=precision
    )


def train_task_heads(
    images: Tensor,
    shots: int,
    config: PrepareConfig,
    generator: torch.Generator,
    segments: int,
    impl: str = "auto",
    precision: str = DEFAULT_PRECISION,
) -> Tensor:
    """The preparation's heads of few-shot tasks.

    Args:
        images: features [copies, B, ways, drawers, F]; the first `shots` of each class are the support.

    Returns:
        [B, k, ways, F + 1]
    """
    _, num_tasks, ways, drawers, _ = images.shape
    label = torch.arange(ways, device=images.device).repeat_interleave(drawers).repeat(num_tasks, 1)
    weight = None
    if config.support_share is not None and shots < drawers:
        weight = images.new_full((ways, drawers), (1 - config.support_share) / (ways * (drawers - shots)))
        weight[:, :shots] = config.support_share / (ways * shots)
        weight = weight.flatten()
    rows = images.flatten(2, 3)
    return train_heads(
        rows, label, config, generator, ways, record=segments, row_weight=weight, impl=impl, precision=precision
    )


def check_prepare(config: PrepareConfig, segments: int) -> None:
    """Raise McdiError, naming the option, for a value out of range."""
    for name in ("tasks", "steps", "copies"):
        if getattr(config, name) < 1:
            raise McdiError(f"--prepare.{name} = {getattr(config, name)}: expected at least 1")
    for name in ("rho", "weight_decay", "start_deviation"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise McdiError(f"--prepare.{name.replace('_', '-')} = {getattr(config, name)}: expected 0 or more")
    if config.support_share is not None and not 0 <= config.support_share <= 1:
        raise McdiError(f"--prepare.support-share = {config.support_share}: expected 0 to 1")
    if not 0 < config.learning_rate < float("inf"):
        raise McdiError(f"--prepare.learning-rate = {config.learning_rate}: expected a positive number")
    if segments < 1 or config.steps % segments:
        raise McdiError(
            f"preparation steps M = {config.steps} (--prepare.steps) are not divisible by the segments k = {segments} "
            f"(--diffusion.segments): raise M to {-(-config.steps // max(segments, 1)) * max(segments, 1)}"
        )


def prepare_bank(
    folder: Path,
    features: Tensor,
    task: TaskConfig,
    config: PrepareConfig,
    segments: int,
    seed: int,
    *,
    meta: dict[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_tasks: Callable[[int], None] | None = None,
    impl: str = "auto",
    precision: str = DEFAULT_PRECISION,
    ranks: Ranks = ALONE,
) -> TrajectoryBank:
    """Train the heads of many tasks and keep their trajectories; where the folder holds part of the same bank, make the rest.

    The targets of a task use every image of its classes, its condition only the support. Shard j is a function of (seed, j).

    Args:
        features: float32 [copies, classes, drawers, F], of the training classes: the images and augmented ones, on the device that is
            to do the work.
        meta: provenance, part of the bank's identity.
        on_start: called with the tasks there already. on_tasks: called with the number of tasks after each shard.
        impl, precision: impl.py.
        ranks: the processes that share the work, a shard each in turn; each calls this alike, and rank 0 writes the same bank as one process.

    Raises:
        McdiError: bad settings; another bank in the folder; a full disk; another process that has ended.
    """
    check_prepare(config, segments)
    check_seed(seed)
    width = features.shape[-1]
    layout = head_layout(task.ways, width)
    bank = TrajectoryBank.create(folder, layout, segments, width + 1, meta) if ranks.leads else None
    done, shard = (ranks.number_from_lead(number) for number in ((len(bank), bank.num_shards) if bank else (0, 0)))
    if on_start:
        on_start(done)
    # one set of rows for all shards: freed and taken anew, they fragment the heap, and memory grows with the tasks
    copies, _, drawers, _ = features.shape
    space = features.new_empty(copies, min(SHARD_TASKS, config.tasks) * task.ways * drawers, width)
    while done < config.tasks:
        # rank r makes shard + r, then rank 0 writes all of them in order
        start = done + ranks.rank * SHARD_TASKS
        count = min(SHARD_TASKS, config.tasks - start)
        if count > 0:
            made = _make_shard(
                features, space, task, config, segments, seed, shard + ranks.rank, start, count, impl, precision
            )
        for rank in range(ranks.size):
            count = min(SHARD_TASKS, config.tasks - done)
            if count <= 0:
                break
            if bank is not None:
                if rank:
                    made = (
                        ranks.receive(torch.empty(count, segments, layout.num_tokens, layout.width), rank),
                        ranks.receive(torch.empty(count, layout.num_tokens, width + 1), rank),
                    )
                bank.append(*made)
            elif rank == ranks.rank:
                for tensor in made:
                    ranks.to_lead(tensor.cpu().contiguous())
            done, shard = done + count, shard + 1
            if on_tasks:
                on_tasks(count)
    ranks.number_from_lead(done)  # only now is everything written
    return TrajectoryBank.open(folder) if bank is None else bank


def _make_shard(
    features: Tensor,
    space: Tensor,
    task: TaskConfig,
    config: PrepareConfig,
    segments: int,
    seed: int,
    shard: int,
    start: int,
    count: int,
    impl: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Targets [count, k, ways, F + 1] and condition [count, ways, F + 1] of the tasks from `start` on.

    space: [copies, rows of the largest shard, F], for their features.
    """
    copies, classes, drawers, width = features.shape
    episodes = sample_episodes(
        classes,
        drawers,
        ways=task.ways,
        shots=task.shots,
        queries=drawers - task.shots,
        seed=seed,
        start=start,
        count=count,
    )
    drawer = torch.cat([episodes.support, episodes.query], 2)
    index = (episodes.classes.unsqueeze(-1) * drawers + drawer).flatten()
    rows = space if len(index) == space.shape[1] else space.new_empty(copies, len(index), width)
    torch.index_select(features.flatten(1, 2), 1, index.to(features.device), out=rows)
    x = rows.view(copies, count, *drawer.shape[1:], width)
    generator = torch.Generator().manual_seed((seed << 32) + (1 << 31) + shard)
    targets = train_task_heads(x, task.shots, config, generator, segments, impl, precision)
    return targets, support_condition(x[0, :, :, : task.shots])
