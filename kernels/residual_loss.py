"""The loss of each task and its gradient with respect to the network's output, in one pass: `inner.task_loss` of given outputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.kernels.launch import check_rank, check_tensor, element_block, launch, output


def residual_loss_ref(
    net: Tensor, gain: Tensor, target: Tensor, mask: Tensor | None = None, real: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `residual_loss`, in any dtype."""
    error = gain[..., None, None] * net[..., : target.shape[-1]] - target
    if mask is not None:
        error = error * mask
    count = target.shape[1] * (real or target[0, 0].numel())
    gradient = net.new_zeros(net.shape)
    gradient[..., : target.shape[-1]] = (2 / count) * gain[..., None, None] * error
    return error.square().sum((1, 2, 3)) / count, gradient


@triton.jit
def residual_loss_kernel(
    net, gain, target, mask, loss, gradient, samples, tokens, width, pitch, share, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a task: no atomics, so a task's loss is the same to the bit whatever stands beside it. pitch: of net's rows."""
    task = tl.program_id(0).to(tl.int64)
    rows = samples * tokens
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows * pitch, BLOCK):
        flat = first + columns
        inside = flat < rows * pitch
        row, column = flat // pitch, flat % pitch
        real = inside & (column < width)
        weight = tl.load(gain + task * samples + row // tokens, mask=real, other=0.0).to(tl.float32)
        value = tl.load(net + task * rows * pitch + flat, mask=real, other=0.0).to(tl.float32)
        at = task * rows * width + row * width + column
        error = weight * value - tl.load(target + at, mask=real, other=0.0).to(tl.float32)
        if mask is not None:
            error *= tl.load(mask + row % tokens * width + column, mask=real, other=0.0)
        total += error * error
        tl.store(gradient + task * rows * pitch + flat, 2.0 * share * weight * error, mask=inside)
    tl.store(loss + task, tl.sum(total, 0) * share)


def residual_loss(
    net: Tensor,
    gain: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    real: int | None = None,
    *,
    loss: Tensor | None = None,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """loss_b = mean_{s,n,d} (gain net - target)^2 over real entries, and its gradient 2 gain (gain net - target) / (S * real entries).

    Args:
        net: [B, S, N, D or more]; columns behind D are padding, whose gradient is 0. gain: [B, S]. target: [B, S, N, D]. All float32 or
            bfloat16, contiguous.
        mask: float32 [N, D], 1 at real entries, 0 at padding. real: how many ones it has; counting them here would wait for the GPU.
        loss, gradient: float32 outputs, made where not given.

    Returns:
        loss: float32 [B]. gradient: float32, as net.

    Raises:
        McdiError: naming the tensor.
    """
    b, s, n, d = check_rank("target", target, "BSND")
    pitch, device = max(d, net.shape[-1]), net.device
    check_tensor("net", net, (b, s, n, pitch))
    check_tensor("gain", gain, (b, s), device=device)
    check_tensor("target", target, (b, s, n, d), device=device)
    if mask is not None:
        check_tensor("mask", mask, (n, d), device=device)
        assert real, "residual_loss: a mask without its number of ones"
    loss = output("loss", loss, (b,), device)
    gradient = output("gradient", gradient, (b, s, n, pitch), device)
    launch(
        "residual_loss", residual_loss_kernel, (b,), device, None,
        net=net, gain=gain, target=target, mask=mask, loss=loss, gradient=gradient,
        samples=s, tokens=n, width=d, pitch=pitch, share=1 / (s * (real or n * d)), BLOCK=element_block(s * n * pitch),
    )  # fmt: skip
    return loss, gradient
