"""What a meta-batch has besides noise: normalised targets, conditions and one-hot steps, from the bank on the device, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import (
    Turn,
    check_apart,
    check_rank,
    check_tensor,
    check_together,
    element_block,
    launch,
    turn_arguments,
)


def load_batch_ref(
    targets: Tensor, conditions: Tensor, row: Tensor, task: Tensor, step: Tensor, mean: Tensor, std: Tensor, condition_mean: Tensor,
    condition_std: Tensor, target: Tensor, enter: Tensor, blocks: Sequence[Tensor], first: int, first_step: int, num_steps: int,
) -> None:  # fmt: skip
    """As `load_batch_`, in any dtype."""
    (b, k, s), n = step.shape, target.shape[1]
    target.copy_((targets[row] - mean) / std)
    condition = ((conditions[task] - condition_mean) / condition_std).expand(b, n, -1)
    enter.view(k, b, s, n, -1)[..., first : first + condition.shape[-1]] = condition[None, :, None]
    at = step.transpose(0, 1)[..., None, None].expand(k, b, s, n, 1)
    for block in blocks:
        block.view(k, b, s, n, -1)[..., first_step : first_step + num_steps].zero_().scatter_(-1, at, 1.0)


@triton.jit
def load_batch_kernel(
    targets, conditions, row, task, step, turn, mean, std, condition_mean, condition_std, target, enter, blocks, starts,
    pitch, tasks, inner, samples, tokens, width, condition_rows, condition_width, first, enter_width, depth, first_step, num_steps, block_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (task, inner step, sample). blocks: the first of `depth` equal tensors, which begin at `starts` behind it."""
    program, flat = tl.program_id(0), tl.arange(0, BLOCK)
    if turn is not None:
        at_row = tl.load(turn) * pitch
        row += at_row
        task += at_row
        step += at_row
    sample, k, b = program % samples, program // samples % inner, (program // samples // inner).to(tl.int64)
    if (k == 0) & (sample == 0):
        for at in range(0, tokens * width, BLOCK):
            entry = at + flat
            inside = entry < tokens * width
            theta = tl.load(targets + tl.load(row + b) * tokens * width + entry, mask=inside, other=0.0)
            theta = (theta - tl.load(mean + entry, mask=inside, other=0.0)) / tl.load(
                std + entry, mask=inside, other=1.0
            )
            tl.store(target + b * tokens * width + entry, theta, mask=inside)
    first_row = ((k * tasks + b) * samples + sample) * tokens
    for at in range(0, tokens * condition_width, BLOCK):
        entry = at + flat
        inside = entry < tokens * condition_width
        token, column = entry // condition_width, entry % condition_width
        source = tl.where(condition_rows == 1, column, entry)
        c = tl.load(conditions + tl.load(task + b) * condition_rows * condition_width + source, mask=inside, other=0.0)
        c = (c - tl.load(condition_mean + source, mask=inside, other=0.0)) / tl.load(
            condition_std + source, mask=inside, other=1.0
        )
        tl.store(enter + (first_row + token) * enter_width + first + column, c, mask=inside)
    t = tl.load(step + (b * inner + k) * samples + sample)
    for layer in range(0, depth):
        begin = blocks + tl.load(starts + layer)
        for at in range(0, tokens * num_steps, BLOCK):
            entry = at + flat
            there = begin + (first_row + entry // num_steps) * block_width + first_step + entry % num_steps
            tl.store(there, tl.where(entry % num_steps == t, 1.0, 0.0), mask=entry < tokens * num_steps)


def block_starts(blocks: Sequence[Tensor]) -> Tensor:
    """int64 [L], where the rows of each block begin behind those of the first; on their device. Build once: it is a copy that waits."""
    starts = [block.storage_offset() - blocks[0].storage_offset() for block in blocks]
    return torch.tensor(starts, dtype=torch.int64).to(blocks[0].device)


def load_batch_(
    targets: Tensor, conditions: Tensor, row: Tensor, task: Tensor, step: Tensor, mean: Tensor, std: Tensor, condition_mean: Tensor,
    condition_std: Tensor, target: Tensor, enter: Tensor, blocks: Sequence[Tensor], first: int, first_step: int, num_steps: int,
    starts: Tensor | None = None, turn: Turn | None = None,
) -> None:  # fmt: skip
    """Fill `target`, and the columns of the rows that noise does not fill.

    Args:
        targets: float32 [n, N, D]. conditions: float32 [m, 1 or N, C]. row, task: int64 [B], where in them. step: int64 [B, K, S].
        mean, std: float32 [N, D]. condition_mean, condition_std: float32, as a condition.
        target: float32 [B, N, D], written. enter: float32 [K, B, S N, any], the condition goes to its columns from `first` on.
        blocks: float32 [K, B, S N, any] each, of one storage; a one-hot row of `num_steps` goes to the columns from `first_step` on.
        starts: of `block_starts`. turn: of row, task and step.

    Indices are not range-checked: that would wait for the GPU.

    Raises:
        McdiError: naming the tensor.
    """
    (b, k, s), (_, n, d) = check_rank("step", step, "BKS"), check_rank("targets", targets, "nND")
    m, rows, c = check_rank("conditions", conditions, "mRC")
    device, floats = targets.device, (torch.float32,)
    if rows not in (1, n):
        raise McdiError(f"conditions: {rows} rows a task, expected 1 or {n}")
    for name, tensor, shape, dtypes in (
        ("targets", targets, targets.shape, floats), ("conditions", conditions, (m, rows, c), floats), ("row", row, (b,), (torch.int64,)),
        ("task", task, (b,), (torch.int64,)), ("step", step, (b, k, s), (torch.int64,)), ("mean", mean, (n, d), floats),
        ("std", std, (n, d), floats), ("condition_mean", condition_mean, (rows, c), floats), ("target", target, (b, n, d), floats),
        ("condition_std", condition_std, (rows, c), floats), ("enter", enter, (k, b, s * n, max(enter.shape[-1], first + c)), floats),
        *(("block", block, (k, b, s * n, max(blocks[0].shape[-1], first_step + num_steps)), floats) for block in blocks),
    ):  # fmt: skip
        check_tensor(name, tensor, shape, dtypes, device)
    table = turn_arguments(turn, device)
    check_together("blocks", blocks)
    numbered = {f"block {number}": block for number, block in enumerate(blocks)}
    check_apart(
        {"target": target, "enter": enter, **numbered},
        {"targets": targets, "conditions": conditions, "row": row, "task": task, "step": step, "mean": mean, "std": std}
        | {"condition_mean": condition_mean, "condition_std": condition_std},
    )
    launch(
        "load_batch_", load_batch_kernel, (b * k * s,), device, None,
        targets=targets, conditions=conditions, row=row, task=task, step=step, mean=mean, std=std,
        condition_mean=condition_mean, condition_std=condition_std, target=target, enter=enter, blocks=blocks[0],
        starts=block_starts(blocks) if starts is None else starts, **table,
        tasks=b, inner=k, samples=s, tokens=n, width=d, condition_rows=rows, condition_width=c, first=first, enter_width=enter.shape[-1],
        depth=len(blocks), first_step=first_step, num_steps=num_steps, block_width=blocks[0].shape[-1], BLOCK=element_block(n * max(c, d)),
    )  # fmt: skip
