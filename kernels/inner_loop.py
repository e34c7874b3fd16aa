"""The inner loops of meta-training through the kernels: `inner.inner_loop`."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mcdi_fast.backend import check_precision
from mcdi_fast.denoiser import Parameters, depth_of
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels.launch import padded
from mcdi_fast.kernels.residual_loss import residual_loss
from mcdi_fast.kernels.task_linear import Broadcast, task_linear
from mcdi_fast.kernels.weight_update import delta_table, reptile_delta_, sgd_step_
from mcdi_fast.outer import named_views


def inner_loop_ref(phi: Parameters, batch: InnerBatch, inner_lr: float, *, stacked: bool | None = None) -> tuple[Parameters, Tensor]:  # fmt: skip
    """As `inner_loop_triton`, in any dtype: autograd, a task at a time."""
    return inner_loop(phi, batch, inner_lr, "reference", stacked)


def prefer_stacked(batch: InnerBatch, phi: Parameters) -> bool:
    """Whether per-task weights are the cheaper form on a GPU, by operation counts: rows of all K steps of a task against the hidden width."""
    _, k, s, n, _ = batch.x.shape
    return k * s * n > 4 * phi["out.token"].shape[0]


class _Linear:
    """A linear map of every task, low rank or stacked (inner.py); the caller fills `inputs[r]` and `gradients[r]`.

    Both are padded to multiples of launch.PAD; so is a copy of the weights where a product reads them along a width that is not.
    """

    def __init__(self, weight: Tensor, inputs: Tensor, gradients: Tensor, back: int, stacked: bool, precision: str):
        """inputs, gradients: [K, B, rows, padded], zeros. back: width of the input's gradient; 0 where nobody asks for it."""
        self.shared, self.inputs, self.gradients = weight, inputs, gradients
        self.stacked, self.precision, self.back = stacked, precision, back
        i, o = weight.shape
        self.weight = weight
        if stacked or o != padded(o) or back > i:
            tasks = (inputs.shape[1],) if stacked else ()
            self.weight = weight.new_zeros(*tasks, max(i, back), padded(o))

    def start(self, inner_lr: float) -> None:
        """Before the first inner step."""
        self.inner_lr = inner_lr
        if self.weight is not self.shared:
            self.weight[..., : self.shared.shape[0], : self.shared.shape[1]].copy_(self.shared)

    def forward(self, r: int, **fused) -> None:
        """`inputs[r]` times the task's weights, and what task_linear fuses behind it."""
        earlier = None if self.stacked else (self.inputs[:r], self.gradients[:r])
        task_linear(self.inputs[r], self.weight, earlier, self.inner_lr, precision=self.precision, **fused)

    def backward(self, r: int, **fused) -> None:
        """The gradient of the first `back` columns of `inputs[r]`, from `gradients[r]`."""
        earlier = None if self.stacked else (self.gradients[:r], self.inputs[:r])
        weight = self.weight[..., : self.back, :].mT
        task_linear(self.gradients[r], weight, earlier, self.inner_lr, precision=self.precision, **fused)

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
        self,
        phi: Parameters,
        batch: InnerBatch,
        *,
        stacked: bool,
        precision: str,
        delta: Tensor | None = None,
        real: int | None = None,
    ):
        """Make the buffers.

        Args:
            phi: contiguous, read at every run. batch: whose shapes and mask the runs will have. delta: float32 [P] in phi's order, where to put it.
            real: how many ones the mask has, where it has one.
        """
        b, k, s, n, d = self.shape = batch.x.shape
        self.depth, self.width = depth_of(phi), phi["out.token"].shape[0]
        self.wide = wide = padded(self.width)
        flat = phi["out.token"].new_empty(sum(value.numel() for value in phi.values())) if delta is None else delta
        self.delta = named_views(flat, {name: (len(value), value.shape[1]) for name, value in phi.items()})
        self.precision, self.linear = precision, {}
        rows = {name: n if name == "in.condition" else s if name.endswith(".sample") else s * n for name in phi}
        # one storage for what goes into all layers, one for the gradients: the deltas are one launch
        inputs, gradients = (
            flat.new_zeros(sum(k * b * rows[name] * padded(value.shape[side]) for name, value in phi.items()))
            for side in (0, 1)
        )
        starts = [0, 0]
        for name, value in phi.items():
            parts = []
            for side, storage in enumerate((inputs, gradients)):
                shape = (k, b, rows[name], padded(value.shape[side]))
                parts.append(storage.narrow(0, starts[side], k * b * shape[2] * shape[3]).view(shape))
                starts[side] += parts[-1].numel()
            back = 0 if name.startswith("in.") else self.width if name.endswith(".sample") else wide
            self.linear[name] = _Linear(value, parts[0], parts[1], back, stacked, precision)
        self.table = delta_table(self._layers())
        new = flat.new_empty
        self.real = real
        self.gain, self.target, self.losses = new(k, b, s), new(k, b, s, n, d), new(k, b)
        self.from_condition, self.from_sample = new(b, n, wide), new(b, s, wide)
        self.to_mean = flat.new_zeros(b, s, wide)
        self.to_sample = self.to_mean if wide == self.width else new(b, s, self.width)
        self.pre_activation = [new(b, s * n, wide) for _ in range(self.depth)]
        self.net = new(b, s * n, padded(d))

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(member.inputs, member.gradients, self.delta[name]) for name, member in self.linear.items()]

    def run(self, batch: InnerBatch, inner_lr: float) -> None:
        """Fill `delta` and `losses`."""
        b, k, s, n, d = self.shape
        width, linear = self.width, self.linear
        blocks = [
            tuple(linear[f"block{layer}.{name}"] for name in ("token", "sample", "out")) for layer in range(self.depth)
        ]
        tokens, conditions, last = linear["in.token"], linear["in.condition"], linear["out.token"]
        for member in linear.values():
            member.start(inner_lr)
        tokens.inputs[..., :d].copy_(rearrange(batch.x, "b k s n d -> k b (s n) d"))
        conditions.inputs[..., : batch.condition.shape[-1]].copy_(batch.condition.expand(k, b, n, -1))
        for _, sample, _ in blocks:  # not F.one_hot, which looks at its values on the host
            one_hot = sample.inputs[..., width : len(sample.shared)]
            one_hot.zero_().scatter_(-1, batch.step.transpose(0, 1).unsqueeze(-1), 1.0)
        self.gain.copy_(batch.gain.transpose(0, 1))
        self.target.copy_(batch.target.transpose(0, 1))

        def per_token(rows: Tensor) -> Tensor:
            return rows.view(b, s, n, -1)

        for r in range(k):
            conditions.forward(r, out=self.from_condition)
            h = blocks[0][0].inputs[r]
            tokens.forward(r, broadcast=Broadcast(self.from_condition), out=h)
            for layer, (token, sample, out) in enumerate(blocks):
                torch.mean(per_token(h)[..., :width], 2, out=sample.inputs[r][..., :width])
                sample.forward(r, out=self.from_sample)
                token.forward(
                    r, broadcast=Broadcast(self.from_sample, divide=n), activation="silu",
                    pre_activation=self.pre_activation[layer], out=out.inputs[r],
                )  # fmt: skip
                above = (last if layer + 1 == self.depth else blocks[layer + 1][0]).inputs[r]
                out.forward(r, add_to=h, out=above)
                h = above
            last.forward(r, out=self.net)
            residual_loss(
                per_token(self.net), self.gain[r], self.target[r], batch.mask, self.real,
                loss=self.losses[r], gradient=per_token(last.gradients[r]),
            )  # fmt: skip

            g = blocks[-1][2].gradients[r]
            last.backward(r, out=g)
            for layer in reversed(range(self.depth)):
                token, sample, out = blocks[layer]
                out.backward(
                    r, activation="silu_backward", pre_activation=self.pre_activation[layer], out=token.gradients[r]
                )
                torch.sum(per_token(token.gradients[r]), 2, out=sample.gradients[r])
                sample.backward(r, out=self.to_sample)
                if self.to_sample is not self.to_mean:
                    self.to_mean[..., :width].copy_(self.to_sample)
                below = (blocks[layer - 1][2] if layer else tokens).gradients[r]
                token.backward(r, add_to=g, broadcast=Broadcast(self.to_mean, divide=n, scale=1 / n), out=below)
                g = below
            torch.sum(per_token(g), 1, out=conditions.gradients[r])
            for member in linear.values():
                member.update(r)
        reptile_delta_(self._layers(), inner_lr, self.table, precision=self.precision)


@torch.no_grad()
def inner_loop_triton(
    phi: Parameters, batch: InnerBatch, inner_lr: float, *, stacked: bool | None = None, precision: str = "ieee"
) -> tuple[Parameters, Tensor]:
    """Run every task's K SGD steps and return the Reptile difference.

    Args:
        phi: float32. stacked: per-task weights (True), the low-rank form (False), or None: `prefer_stacked` chooses.
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
    stacked = prefer_stacked(batch, phi) if stacked is None else stacked
    phi = {name: value.contiguous() for name, value in phi.items()}
    real = None if batch.mask is None else int(batch.mask.sum())
    loop = InnerLoop(phi, batch, stacked=stacked, precision=precision, real=real)
    loop.run(batch, inner_lr)
    return loop.delta, loop.losses.T
