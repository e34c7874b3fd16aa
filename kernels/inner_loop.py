"""The inner loops of meta-training through the kernels: the same (delta, losses) as mcdi_fast.inner.inner_loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mcdi_fast.denoiser import Parameters, depth_of
from mcdi_fast.errors import McdiError
from mcdi_fast.impl import check_precision, check_runs
from mcdi_fast.inner import InnerBatch, inner_loop, prefer_stacked
from mcdi_fast.kernels.consistency_loss import consistency_loss
from mcdi_fast.kernels.denoiser import Broadcast, task_linear
from mcdi_fast.kernels.inner_update import reptile_delta, sgd_step_

inner_loop_triton_ref = inner_loop


class _Linear:
    """A linear map of every task, low rank or stacked (inner.py); the caller fills `inputs[r]` and `gradients[r]`."""

    def __init__(self, weight: Tensor, shape: tuple[int, int, int], inner_rate: float, stacked: bool, precision: str):
        """shape: K, B, rows of a task."""
        self.inputs, self.gradients = (weight.new_empty(*shape, width) for width in weight.shape)
        self.weight = weight.expand(shape[1], -1, -1).clone() if stacked else weight
        self.inner_rate, self.stacked, self.precision = inner_rate, stacked, precision

    def forward(self, r: int, **fused) -> tuple[Tensor, Tensor | None]:
        """`inputs[r]` times the task's weights, and what task_linear fuses behind it."""
        earlier = None if self.stacked else (self.inputs[:r], self.gradients[:r])
        return task_linear(self.inputs[r], self.weight, earlier, self.inner_rate, precision=self.precision, **fused)

    def backward(self, r: int, **fused) -> Tensor:
        """The gradient of `inputs[r]`, from `gradients[r]`."""
        earlier = None if self.stacked else (self.gradients[:r], self.inputs[:r])
        return task_linear(
            self.gradients[r], self.weight.mT, earlier, self.inner_rate, precision=self.precision, **fused
        )[0]

    def update(self, r: int) -> None:
        """The SGD step; the last one is not needed, for delta comes from the rows."""
        if self.stacked and r + 1 < len(self.inputs):
            sgd_step_(self.weight, self.inputs[r], self.gradients[r], self.inner_rate, precision=self.precision)


@torch.no_grad()
def inner_loop_triton(
    phi: Parameters, batch: InnerBatch, inner_rate: float, *, stacked: bool | None = None, precision: str = "ieee"
) -> tuple[Parameters, Tensor]:
    """Run every task's K SGD steps and return the Reptile difference.

    Args:
        phi: float32. stacked: per-task weights (True), the low-rank form (False), or None: `inner.prefer_stacked` chooses.
        precision: of every product: "ieee", "tf32" or "bf16".

    Returns:
        delta: mean over tasks of (phi_b - phi). losses: [B, K], before each step.

    Raises:
        McdiError: a tensor with the wrong shape, dtype or device; no GPU.
    """
    batch.check(phi)
    check_precision(precision)
    if batch.x.dtype != torch.float32:
        raise McdiError(f"phi: {batch.x.dtype}, expected torch.float32 for the kernels; impl='torch' takes others")
    check_runs(batch.x.device, "inner_loop_triton")
    b, k, s, n, _ = batch.x.shape
    depth, width = depth_of(phi), phi["out.token"].shape[0]
    stacked = prefer_stacked(batch, phi) if stacked is None else stacked
    linear = {}
    for name, value in phi.items():
        rows = n if name == "in.condition" else s if name.endswith(".sample") else s * n
        linear[name] = _Linear(value.contiguous(), (k, b, rows), inner_rate, stacked, precision)
    linear["in.token"].inputs.copy_(rearrange(batch.x, "b k s n d -> k b (s n) d"))
    linear["in.condition"].inputs.copy_(batch.condition.expand(k, b, n, -1))
    one_hot = F.one_hot(batch.step, phi["block0.sample"].shape[0] - width).float().transpose(0, 1)
    for layer in range(depth):
        linear[f"block{layer}.sample"].inputs[..., width:] = one_hot
    gain = batch.gain.transpose(0, 1).contiguous()
    target = rearrange(batch.target, "b k s n d -> k b s n d").contiguous()
    losses = batch.x.new_empty(k, b)

    def per_token(rows: Tensor) -> Tensor:
        return rows.view(b, s, n, -1)

    last = linear["out.token"]
    for r in range(k):
        from_condition, _ = linear["in.condition"].forward(r)
        h, _ = linear["in.token"].forward(r, broadcast=Broadcast(from_condition))
        before = []
        for layer in range(depth):
            token, sample, out = (linear[f"block{layer}.{name}"] for name in ("token", "sample", "out"))
            token.inputs[r] = h
            torch.mean(per_token(h), 2, out=sample.inputs[r][..., :width])
            from_sample, _ = sample.forward(r)
            _, a = token.forward(r, broadcast=Broadcast(from_sample, divide=n), activation="silu", out=out.inputs[r])
            before.append(a)
            h, _ = out.forward(r, add_to=h, out=h)
        last.inputs[r] = h
        net, _ = last.forward(r)
        consistency_loss(
            per_token(net), gain[r], target[r], loss=losses[r], gradient=per_token(last.gradients[r])
        )  # fmt: skip

        g = last.backward(r)
        for layer in reversed(range(depth)):
            token, sample, out = (linear[f"block{layer}.{name}"] for name in ("token", "sample", "out"))
            out.gradients[r] = g
            out.backward(r, activation="silu_backward", before=before[layer], out=token.gradients[r])
            torch.sum(per_token(token.gradients[r]), 2, out=sample.gradients[r])
            to_mean = sample.backward(r)[..., :width].contiguous()
            g = token.backward(r, add_to=g, broadcast=Broadcast(to_mean, divide=n, scale=1 / n), out=g)
        linear["in.token"].gradients[r] = g
        torch.sum(per_token(g), 1, out=linear["in.condition"].gradients[r])
        for member in linear.values():
            member.update(r)
    delta = {
        name: reptile_delta(member.inputs, member.gradients, inner_rate, precision=precision)
        for name, member in linear.items()
    }
    return delta, losses.T
