"""Stage 1, weight preparation: a family's trajectories, shard by shard, into a bank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.backend import Backend
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.noise import PREPARATION, check_seed, draw_generator
from mcdi_fast.ranks import ALONE, Ranks
from mcdi_fast.tasks import TaskFamily

SHARD_TASKS = 500  # tasks trained together and appended as one shard: large products, and little lost by a kill


def check_segments(steps: int, segments: int) -> None:
    """Raise McdiError unless the k local targets divide the M steps of a trajectory."""
    if steps % segments:
        raise McdiError(
            f"preparation steps M = {steps} (--prepare.steps) are not divisible by the segments k = {segments} "
            f"(--diffusion.segments): raise M to {-(-steps // segments) * segments}"
        )


def prepare_bank(
    folder: str | Path,
    family: TaskFamily,
    config: PrepareConfig,
    segments: int,
    seed: int,
    *,
    meta: dict[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_tasks: Callable[[int], None] | None = None,
    backend: Backend = Backend(),  # noqa: B008 (a constant)
    ranks: Ranks = ALONE,
) -> TrajectoryBank:
    """Train many tasks and keep their trajectories; where the folder holds part of the same bank, make the rest.

    Shard j is a function of (family, seed, j).

    Args:
        meta: provenance, part of the bank's identity.
        on_start: called with the tasks there already. on_tasks: called with the number of tasks after each shard.
        ranks: the processes that share the work, a shard each in turn. Each calls this alike, and rank 0 writes the same bank as one process.

    Raises:
        McdiError: k does not divide M; another bank in the folder; trajectories that are not finite; a full disk; another process that has ended.
    """
    check_segments(config.steps, segments)
    check_seed(seed)
    layout, one = family.layout, family.tasks("train", 0, 1, seed).condition[0]
    bank = TrajectoryBank.create(folder, layout, segments, one.shape[-1], meta) if ranks.is_main else None
    done, shard = (ranks.broadcast_number(number) for number in ((len(bank), bank.num_shards) if bank else (0, 0)))
    if on_start:
        on_start(done)
    made: tuple[Tensor, Tensor] | None = None
    while done < config.tasks:
        # rank r makes shard + r, then rank 0 writes all of them in order
        start = done + ranks.rank * SHARD_TASKS
        count = min(SHARD_TASKS, config.tasks - start)
        if count > 0:
            tasks = family.tasks("train", start, count, seed)
            generator = draw_generator(seed, PREPARATION, shard + ranks.rank)
            made = family.trajectories(tasks.train, config, segments, generator, backend), tasks.condition
        for rank in range(ranks.size):
            count = min(SHARD_TASKS, config.tasks - done)
            if count <= 0:
                break
            if bank is not None:
                if rank:
                    shapes = (count, segments, layout.num_tokens, layout.width), (count, *one.shape)
                    made = ranks.receive(torch.empty(shapes[0]), rank), ranks.receive(torch.empty(shapes[1]), rank)
                assert made is not None
                bank.append(*made)
            elif rank == ranks.rank:
                assert made is not None
                for tensor in made:
                    ranks.send_to_main(tensor.cpu().contiguous())
            done, shard = done + count, shard + 1
            if on_tasks:
                on_tasks(count)
    ranks.broadcast_number(done)  # only now is everything written
    return TrajectoryBank.open(folder) if bank is None else bank
