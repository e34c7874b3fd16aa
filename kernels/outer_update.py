"""The outer step in one pass, unless this or an earlier step has failed: `outer.outer_update`; and the launch that says whether it has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.kernels.launch import Turn, check_rank, check_tensor, element_block, launch, turn_arguments
from mcdi_fast.kernels.sam_adam import ADAM, adam_update
from mcdi_fast.outer import OuterScalars, OuterState, outer_update


def outer_update_ref(state: OuterState, delta: Tensor, scalars: Tensor, good: Tensor, outer: str) -> None:
    """As `outer_update_`, in any dtype; waits for the device."""
    if int(good):
        outer_update(state, delta.clone(), OuterScalars(*scalars.tolist()), outer)


@triton.jit
def outer_update_kernel(
    phi, average, exp_avg, exp_avg_sq, delta, scalars, good, keep_first, keep_second, eps, count,
    ADAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place, every element read and written once; nothing is written where `good` is 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < count) & (tl.load(good) != 0)
    rate, root = tl.load(scalars).to(tl.float32), tl.load(scalars + 1).to(tl.float32)
    gain, mix = tl.load(scalars + 2).to(tl.float32), tl.load(scalars + 3).to(tl.float32)
    p, d = tl.load(phi + at, mask=inside), tl.load(delta + at, mask=inside)
    if ADAM:
        m, v = tl.load(exp_avg + at, mask=inside), tl.load(exp_avg_sq + at, mask=inside)
        p, m, v = adam_update(p, gain * d, m, v, rate, root, keep_first, keep_second, eps)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
    else:
        p += rate * d
    a = tl.load(average + at, mask=inside)
    tl.store(phi + at, p, mask=inside)
    tl.store(average + at, a + mix * (p - a), mask=inside)


def outer_update_(state: OuterState, delta: Tensor, scalars: Tensor, good: Tensor, outer: str) -> None:
    """mcdi_fast.outer.outer_update with everything that changes from step to step on the device, so that a CUDA graph can hold it.

    Args:
        delta: float32 [P]. scalars: float64 [4], an OuterScalars. good: int32 [1]; 0: nothing happens.
        outer: "adam" or "reptile".

    Raises:
        McdiError: naming the tensor.
    """
    (count,) = check_rank("phi", state.phi, "P")
    device = state.phi.device
    for name in ("phi", "average", "exp_avg", "exp_avg_sq"):
        check_tensor(name, getattr(state, name), (count,), (torch.float32,), device)
    check_tensor("delta", delta, (count,), (torch.float32,), device)
    check_tensor("scalars", scalars, (4,), (torch.float64,), device)
    check_tensor("good", good, (1,), (torch.int32,), device)
    block = element_block(count)
    launch(
        "outer_update_", outer_update_kernel, (triton.cdiv(count, block),), device, None,
        phi=state.phi, average=state.average, exp_avg=state.exp_avg, exp_avg_sq=state.exp_avg_sq, delta=delta, scalars=scalars, good=good,
        **ADAM, count=count, ADAM=outer == "adam", BLOCK=block,
    )  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What the device knows of the steps so far, and of this one.

    Attributes:
        loss: float32 [1], mean over base learners before their first inner step. good: int32 [1], whether phi may move.
        failed: int64 [1], the first step that was not finite, -1 without. failed_losses: float32 [K, B], its losses.
        skipped: int64 [1], how many were not finite and were passed over. scalars: float64 [4], an OuterScalars, for `outer_update_`.
    """

    loss: Tensor
    good: Tensor
    failed: Tensor
    failed_losses: Tensor
    skipped: Tensor
    scalars: Tensor

    @classmethod
    def start(cls, losses: Tensor) -> Verdict:
        """Of no step. losses: for its shape [K, B]."""
        new = losses.new_zeros
        whole = torch.int64
        return cls(
            new(1), new(1, dtype=torch.int32), new(1, dtype=whole) - 1, new(losses.shape), new(1, dtype=whole), new(4, dtype=torch.float64)
        )  # fmt: skip


def judge_ref(verdict: Verdict, total: Tensor, losses: Tensor, number: Tensor, scalars: Tensor, skip: bool) -> None:
    """As `judge_`, in any dtype; without a turn."""
    verdict.scalars.copy_(scalars)
    losses = losses.sum(-1)
    finite, well = (total + losses.sum()).isfinite(), verdict.failed < 0
    verdict.loss.copy_(losses[0].mean())
    verdict.good.copy_(finite & well)
    if skip:
        verdict.skipped.add_(~finite)
    elif bool(~finite & well):
        verdict.failed_losses.copy_(losses)
        verdict.failed.copy_(number)


@triton.jit
def judge_kernel(
    loss, good, failed, failed_losses, skipped, scalars_out, total, losses, number, scalars, turn,
    pitch, turns, inner, tasks, parts, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. A NaN or infinity anywhere reaches the sum of everything."""
    if turn is not None:
        now = tl.load(turn)
        number += now * pitch
        scalars += now * pitch
        tl.store(turn, (now + 1) % turns)
    four = tl.arange(0, 4)
    tl.store(scalars_out + four, tl.load(scalars + four))
    flat = tl.arange(0, BLOCK)
    inside = flat < inner * tasks
    each = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        each += tl.load(losses + flat * parts + part, mask=inside, other=0.0)
    tl.store(loss, tl.sum(tl.where(flat < tasks, each, 0.0), 0) / tasks)
    everything = tl.load(total) + tl.sum(each, 0)
    finite, well = everything - everything == 0, tl.load(failed) < 0
    tl.store(good, (finite & well).to(tl.int32))
    if SKIP:
        tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))
    else:
        first = (finite == 0) & well
        tl.store(failed_losses + flat, each, mask=inside & first)
        tl.store(failed, tl.load(number), mask=first)


def judge_(
    verdict: Verdict, total: Tensor, losses: Tensor, number: Tensor, scalars: Tensor, skip: bool, turn: Turn | None = None
) -> None:  # fmt: skip
    """Whether step `number` is finite, and what follows.

    Args:
        verdict: written. total: float32 [1], the sum of the difference. losses: float32 [K, B, P], in parts to add. number: int64 [1].
        scalars: float64 [4], passed on.
        skip: a step that is not finite is counted and passed over; otherwise it is remembered, and nothing after it is good.
        turn: of number and scalars; it ends here, and the next launches read the next row.

    Raises:
        McdiError: naming the tensor.
    """
    k, b, parts = check_rank("losses", losses, "KBP")
    device, float32, int64 = losses.device, (torch.float32,), (torch.int64,)
    for name, tensor, shape, dtypes in (
        ("losses", losses, (k, b, parts), float32), ("total", total, (1,), float32), ("number", number, (1,), int64),
        ("loss", verdict.loss, (1,), float32), ("good", verdict.good, (1,), (torch.int32,)), ("failed", verdict.failed, (1,), int64),
        ("failed_losses", verdict.failed_losses, (k, b), float32), ("skipped", verdict.skipped, (1,), int64),
        ("scalars", scalars, (4,), (torch.float64,)), ("verdict.scalars", verdict.scalars, (4,), (torch.float64,)),
    ):  # fmt: skip
        check_tensor(name, tensor, shape, dtypes, device)
    table = turn_arguments(turn, device)
    launch(
        "judge_", judge_kernel, (1,), device, None,
        **{f"{name}_out" if name == "scalars" else name: value for name, value in vars(verdict).items()},
        total=total, losses=losses, number=number, scalars=scalars, **table,
        turns=turn.rows if turn else 1, inner=k, tasks=b, parts=parts, SKIP=skip, BLOCK=triton.next_power_of_2(k * b),
    )  # fmt: skip
