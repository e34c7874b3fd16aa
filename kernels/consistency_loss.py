"""The loss of each task and its gradient with respect to the network's output, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_runs
from mcdi_fast.kernels.launch import check_rank, check_tensor, element_block, on_device, output


def consistency_loss_ref(net: Tensor, gain: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As `consistency_loss`, in any dtype."""
    error = gain[..., None, None] * net - target
    return error.square().mean((1, 2, 3)), (2 / net[0].numel()) * gain[..., None, None] * error


@triton.jit
def consistency_loss_kernel(
    net, gain, target, loss, gradient, samples, per_sample, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a task: no atomics, so a task's loss is the same to the bit whatever stands beside it."""
    task = tl.program_id(0).to(tl.int64)
    count = samples * per_sample
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    scale = 2.0 / count
    for first in range(0, count, BLOCK):
        inside = first + columns < count
        at = task * count + first + columns
        weight = tl.load(gain + task * samples + (first + columns) // per_sample, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(net + at, mask=inside, other=0.0).to(tl.float32)
        error = weight * value - tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
        total += error * error
        tl.store(gradient + at, scale * weight * error, mask=inside)
    tl.store(loss + task, tl.sum(total, 0) / count)


def consistency_loss(
    net: Tensor, gain: Tensor, target: Tensor, *, loss: Tensor | None = None, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """loss_b = mean_{s,n,d} (gain net - target)^2 and its gradient 2 gain (gain net - target) / (S N D).

    Args:
        net, target: [B, S, N, D]. gain: [B, S]. float32 or bfloat16, contiguous.
        loss, gradient: float32 outputs, made where not given.

    Returns:
        loss: float32 [B]. gradient: float32 [B, S, N, D].

    Raises:
        McdiError: naming the tensor.
    """
    b, s, n, d = check_rank("net", net, "BSND")
    check_tensor("net", net, (b, s, n, d))
    check_tensor("gain", gain, (b, s), device=net.device)
    check_tensor("target", target, (b, s, n, d), device=net.device)
    loss = output("loss", loss, (b,), net.device)
    gradient = output("gradient", gradient, (b, s, n, d), net.device)
    check_runs(net.device, "consistency_loss")
    with on_device(net.device):
        consistency_loss_kernel[(b,)](net, gain, target, loss, gradient, s, n * d, element_block(s * n * d))
    return loss, gradient
