"""The outer step in one pass, unless this or an earlier step has failed: `outer.outer_update`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.kernels.launch import check_rank, check_tensor, element_block, launch
from mcdi_fast.kernels.sam_adam import adam_update
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS
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
    rate, root = tl.load(scalars), tl.load(scalars + 1)
    gain, mix = tl.load(scalars + 2), tl.load(scalars + 3)
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
        delta: float32 [P]. scalars: float32 [4], an OuterScalars. good: int32 [1]; 0: nothing happens.
        outer: "adam" or "reptile".

    Raises:
        McdiError: naming the tensor.
    """
    (count,) = check_rank("phi", state.phi, "P")
    device = state.phi.device
    for name in ("phi", "average", "exp_avg", "exp_avg_sq"):
        check_tensor(name, getattr(state, name), (count,), (torch.float32,), device)
    check_tensor("delta", delta, (count,), (torch.float32,), device)
    check_tensor("scalars", scalars, (4,), (torch.float32,), device)
    check_tensor("good", good, (1,), (torch.int32,), device)
    block = element_block(count)
    launch(
        "outer_update_", outer_update_kernel, (triton.cdiv(count, block),), device, None,
        phi=state.phi, average=state.average, exp_avg=state.exp_avg, exp_avg_sq=state.exp_avg_sq, delta=delta, scalars=scalars, good=good,
        keep_first=1 - ADAM_BETAS[0], keep_second=1 - ADAM_BETAS[1], eps=ADAM_EPS, count=count, ADAM=outer == "adam", BLOCK=block,
    )  # fmt: skip
