"""The inner loops of meta-training through the kernels: the same (delta, losses) as mcdi_fast.inner.inner_loop."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mcdi_fast.backend import check_precision, check_runs
from mcdi_fast.denoiser import Parameters, depth_of
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import inner_loop, prefer_stacked
from mcdi_fast.kernels.consistency_loss import consistency_loss
from mcdi_fast.kernels.denoiser import Broadcast, task_linear
from mcdi_fast.kernels.inner_update import reptile_delta, sgd_step_

inner_loop_triton_ref = inner_loop


class _Linear:
    """A linear map of every task, low rank or stacked (inner.py); the caller fills `inputs[r]` and `gradients[r]`."""

    def __init__(self, weight: Tensor, shape: tuple[int, int, int], stacked: bool, precision: str):
        """shape: K, B, rows of a task."""
        self.inputs, self.gradients = (weight.new_empty(*shape, width) for width in weight.shape)
        self.shared, self.stacked, self.precision = weight, stacked, precision
        self.weight = weight.new_empty(shape[1], *weight.shape) if stacked else weight

    def start(self, inner_lr: float) -> None:
        """Before the first inner step."""
        self.inner_lr = inner_lr
        if self.stacked:
            self.weight.copy_(self.shared)

    def forward(self, r: int, **fused) -> None:
        """`inputs[r]` times the task's weights, and what task_linear fuses behind it."""
        earlier = None if self.stacked else (self.inputs[:r], self.gradients[:r])
        task_linear(self.inputs[r], self.weight, earlier, self.inner_lr, precision=self.precision, **fused)

    def backward(self, r: int, **fused) -> None:
        """The gradient of `inputs[r]`, from `gradients[r]`."""
        earlier = None if self.stacked else (self.gradients[:r], self.inputs[:r])
        task_linear(self.gradients[r], self.weight.mT, earlier, self.inner_lr, precision=self.precision, **fused)

    def update(self, r: int) -> None:
        """The SGD step; the last one is not needed, for delta comes from the rows."""
        if self.stacked and r + 1 < len(self.inputs):
            sgd_step_(self.weight, self.inputs[r], self.gradients[r], self.inner_lr, precision=self.precision)


class InnerLoop:
    """The K inner steps of B tasks for one set of shapes, every tensor made beforehand: `run` allocates nothing that lasts and can be
    captured in a CUDA graph.

    Attributes:
        delta: mean over tasks of (phi_b - phi), a dict like phi. losses: float32 [K, B], before each step. Of the last `run`.
    """

    def __init__(
        self, phi: Parameters, batch: InnerBatch, *, stacked: bool, precision: str, delta: Parameters | None = None
    ):
        """phi: contiguous, read at every run. batch: whose shapes the runs will have. delta: where to put it."""
        b, k, s, n, d = self.shape = batch.x.shape
        self.depth, self.width = depth_of(phi), phi["out.token"].shape[0]
        self.linear = {}
        for name, value in phi.items():
            rows = n if name == "in.condition" else s if name.endswith(".sample") else s * n
            self.linear[name] = _Linear(value, (k, b, rows), stacked, precision)
        self.precision = precision
        new = phi["out.token"].new_empty
        self.gain, self.target, self.losses = new(k, b, s), new(k, b, s, n, d), new(k, b)
        self.from_condition, self.from_sample = new(b, n, self.width), new(b, s, self.width)
        self.to_sample, self.to_mean = new(b, s, phi["block0.sample"].shape[0]), new(b, s, self.width)
        self.before = [new(b, s * n, self.width) for _ in range(self.depth)]
        self.net = new(b, s * n, d)
        self.delta = {name: torch.empty_like(value) for name, value in phi.items()} if delta is None else delta

    def run(self, batch: InnerBatch, inner_lr: float) -> None:
        """Fill `delta` and `losses`."""
        b, k, s, n, _ = self.shape
        width, linear = self.width, self.linear
        blocks = [
            tuple(linear[f"block{layer}.{name}"] for name in ("token", "sample", "out")) for layer in range(self.depth)
        ]
        tokens, conditions, last = linear["in.token"], linear["in.condition"], linear["out.token"]
        for member in linear.values():
            member.start(inner_lr)
        tokens.inputs.copy_(rearrange(batch.x, "b k s n d -> k b (s n) d"))
        conditions.inputs.copy_(batch.condition.expand(k, b, n, -1))
        for _, sample, _ in blocks:  # not F.one_hot, which looks at its values on the host
            sample.inputs[..., width:].zero_().scatter_(-1, batch.step.transpose(0, 1).unsqueeze(-1), 1.0)
        self.gain.copy_(batch.gain.transpose(0, 1))
        self.target.copy_(batch.target.transpose(0, 1))

        def per_token(rows: Tensor) -> Tensor:
            return rows.view(b, s, n, -1)

        for r in range(k):
            conditions.forward(r, out=self.from_condition)
            h = blocks[0][0].inputs[r]
            tokens.forward(r, broadcast=Broadcast(self.from_condition), out=h)
            for layer, (token, sample, out) in enumerate(blocks):
                torch.mean(per_token(h), 2, out=sample.inputs[r][..., :width])
                sample.forward(r, out=self.from_sample)
                token.forward(
                    r, broadcast=Broadcast(self.from_sample, divide=n), activation="silu",
                    before=self.before[layer], out=out.inputs[r],
                )  # fmt: skip
                above = (last if layer + 1 == self.depth else blocks[layer + 1][0]).inputs[r]
                out.forward(r, add_to=h, out=above)
                h = above
            last.forward(r, out=self.net)
            consistency_loss(
                per_token(self.net), self.gain[r], self.target[r],
                loss=self.losses[r], gradient=per_token(last.gradients[r]),
            )  # fmt: skip

            g = blocks[-1][2].gradients[r]
            last.backward(r, out=g)
            for layer in reversed(range(self.depth)):
                token, sample, out = blocks[layer]
                out.backward(r, activation="silu_backward", before=self.before[layer], out=token.gradients[r])
                torch.sum(per_token(token.gradients[r]), 2, out=sample.gradients[r])
                sample.backward(r, out=self.to_sample)
                self.to_mean.copy_(self.to_sample[..., :width])
                below = (blocks[layer - 1][2] if layer else tokens).gradients[r]
                token.backward(r, add_to=g, broadcast=Broadcast(self.to_mean, divide=n, scale=1 / n), out=below)
                g = below
            torch.sum(per_token(g), 1, out=conditions.gradients[r])
            for member in linear.values():
                member.update(r)
        for name, member in linear.items():
            reptile_delta(
                member.inputs, member.gradients, inner_lr, out=self.delta[name], precision=self.precision
            )  # fmt: skip


@torch.no_grad()
def inner_loop_triton(
    phi: Parameters, batch: InnerBatch, inner_lr: float, *, stacked: bool | None = None, precision: str = "ieee"
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
    stacked = prefer_stacked(batch, phi) if stacked is None else stacked
    loop = InnerLoop(
        {name: value.contiguous() for name, value in phi.items()}, batch, stacked=stacked, precision=precision
    )
    loop.run(batch, inner_lr)
    return loop.delta, loop.losses.T
