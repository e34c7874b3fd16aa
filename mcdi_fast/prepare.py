"""Weight preparation: the trajectories of many classification heads at once, by Adam + SAM from Gaussian starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast import heads
from mcdi_fast.backend import DEFAULT_PRECISION, resolve
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import PrepareConfig, TaskConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.heads import head_layout, support_condition
from mcdi_fast.noise import PREPARATION, check_seed, draw_generator
from mcdi_fast.ranks import ALONE, Ranks
from mcdi_fast.tasks import sample_episodes

SHARD_TASKS = 500  # tasks trained together and appended as one shard: large products, and little lost by a kill


def head_trajectory(*data: Any, impl: str = "auto", precision: str = DEFAULT_PRECISION, **options: Any) -> Tensor:
    """`heads.head_trajectory`, through the kernels where they run: one launch, or SAM's and Adam's kernels for heads too large for it."""
    start = data[0]
    if resolve(impl, start.device) == "torch":
        return heads.head_trajectory(*data, **options)
    from mcdi_fast.kernels import head_trajectory as fused
    from mcdi_fast.kernels import sam_adam

    if fused.fits(*start.shape[1:]):
        return fused.head_trajectory(*data, **options, precision=precision)
    return heads.head_trajectory(*data, **options, ascend=sam_adam.sam_ascent, update=sam_adam.adam_step_)


def train_heads(
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    generator: torch.Generator,
    ways: int,
    *,
    segments: int = 1,
    sample_weight: Tensor | None = None,
    impl: str = "auto",
    precision: str = DEFAULT_PRECISION,
) -> Tensor:
    """Train the heads of B tasks together: the weight-preparation stage.

    Args:
        features: float [A, B, R, F], A augmented copies of each task's R rows; every step picks one of them a row.
        labels: int64 [B, R] in [0, ways).
        config: steps M, learning rate, rho (0: plain Adam, one gradient a step), start deviation.
        generator: draws the Gaussian start and the copies, on the CPU wherever the features are: the same draws on every device.
        sample_weight: [R], the share of each row in the loss, summing to 1; equal shares by default.
        segments: k; the heads after steps d, 2d, …, kd = M are kept, d = M / k.
        impl, precision: backend.py.

    Returns:
        [B, k, ways, F + 1], the local targets theta_d … theta_M, where the features are.

    Raises:
        McdiError: k does not divide M; features that are not finite.
    """
    check_prepare(config, segments)
    if not features.isfinite().all():
        raise McdiError(
            "preparation features: found NaN or infinity, expected finite numbers; look at the backbone that made them"
        )
    copies, num_tasks, rows, width = features.shape
    device = features.device
    start = torch.randn(num_tasks, ways, width + 1, generator=generator, dtype=features.dtype) * config.start_std
    pick = None
    if copies > 1:  # int32 on the way to a GPU
        pick = torch.randint(copies, (config.steps, num_tasks, rows), generator=generator).int().to(device)
    return head_trajectory(
        start.to(device), features, labels, config, segments, pick, sample_weight, impl=impl, precision=precision
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
        images: features [copies, B, ways, images_per_class, F]; the first `shots` of each class are the support.

    Returns:
        [B, k, ways, F + 1]
    """
    _, num_tasks, ways, images_per_class, _ = images.shape
    label = torch.arange(ways, device=images.device).repeat_interleave(images_per_class).repeat(num_tasks, 1)
    weight = None
    if config.support_loss_weight is not None and shots < images_per_class:
        weight = images.new_full(
            (ways, images_per_class), (1 - config.support_loss_weight) / (ways * (images_per_class - shots))
        )
        weight[:, :shots] = config.support_loss_weight / (ways * shots)
        weight = weight.flatten()
    rows = images.flatten(2, 3)
    return train_heads(
        rows, label, config, generator, ways, segments=segments, sample_weight=weight, impl=impl, precision=precision
    )


def check_prepare(config: PrepareConfig, segments: int) -> None:
    """Raise McdiError, naming the option, for a value out of range."""
    for name in ("tasks", "steps", "copies"):
        if getattr(config, name) < 1:
            raise McdiError(f"--prepare.{name} = {getattr(config, name)}: expected at least 1")
    for name in ("rho", "weight_decay", "start_std"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise McdiError(f"--prepare.{name.replace('_', '-')} = {getattr(config, name)}: expected 0 or more")
    if config.support_loss_weight is not None and not 0 <= config.support_loss_weight <= 1:
        raise McdiError(f"--prepare.support-loss-weight = {config.support_loss_weight}: expected 0 to 1")
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
        features: float32 [copies, classes, images_per_class, F], of the training classes: the images and augmented ones, on the device that is
            to do the work.
        meta: provenance, part of the bank's identity.
        on_start: called with the tasks there already. on_tasks: called with the number of tasks after each shard.
        impl, precision: backend.py.
        ranks: the processes that share the work, a shard each in turn; each calls this alike, and rank 0 writes the same bank as one process.

    Raises:
        McdiError: bad settings; another bank in the folder; a full disk; another process that has ended.
    """
    check_prepare(config, segments)
    check_seed(seed)
    width = features.shape[-1]
    layout = head_layout(task.ways, width)
    bank = TrajectoryBank.create(folder, layout, segments, width + 1, meta) if ranks.is_main else None
    done, shard = (ranks.broadcast_number(number) for number in ((len(bank), bank.num_shards) if bank else (0, 0)))
    if on_start:
        on_start(done)
    # one set of rows for all shards: freed and taken anew, they fragment the heap, and memory grows with the tasks
    copies, _, images_per_class, _ = features.shape
    space = features.new_empty(copies, min(SHARD_TASKS, config.tasks) * task.ways * images_per_class, width)
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
                    ranks.send_to_main(tensor.cpu().contiguous())
            done, shard = done + count, shard + 1
            if on_tasks:
                on_tasks(count)
    ranks.broadcast_number(done)  # only now is everything written
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
    copies, classes, images_per_class, width = features.shape
    episodes = sample_episodes(
        classes,
        images_per_class,
        ways=task.ways,
        shots=task.shots,
        queries=images_per_class - task.shots,
        seed=seed,
        start=start,
        count=count,
    )
    image = torch.cat([episodes.support, episodes.query], 2)
    index = (episodes.classes.unsqueeze(-1) * images_per_class + image).flatten()
    rows = space if len(index) == space.shape[1] else space.new_empty(copies, len(index), width)
    torch.index_select(features.flatten(1, 2), 1, index.to(features.device), out=rows)
    x = rows.view(copies, count, *image.shape[1:], width)
    generator = draw_generator(seed, PREPARATION, shard)
    targets = train_task_heads(x, task.shots, config, generator, segments, impl, precision)
    return targets, support_condition(x[0, :, :, : task.shots])
