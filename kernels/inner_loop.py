"""The inner loops of meta-training through the kernels: `inner.inner_loop`."""

from __future__ import annotations

import torch
from torch import Tensor

from mcdi_fast.backend import check_precision
from mcdi_fast.denoiser import Parameters, depth_of
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels.launch import padded
from mcdi_fast.kernels.task_linear import MAX_TOKENS, Residual, loss_parts, task_linear
from mcdi_fast.kernels.weight_update import delta_table, reptile_delta_, sgd_step_
from mcdi_fast.outer import named_views


def inner_loop_ref(phi: Parameters, batch: InnerBatch, inner_lr: float) -> tuple[Parameters, Tensor]:
    """As `inner_loop_triton`, in any dtype: autograd, a task at a time."""
    return inner_loop(phi, batch, inner_lr, "reference")


def prefer_stacked(sizes: tuple[int, ...], width: int) -> bool:
    """Whether per-task weights are the cheaper form on a GPU, by operation counts: rows of all K steps of a task against the hidden width.

    sizes: B, K, S, N, D.
    """
    _, k, s, n, _ = sizes
    return k * s * n > 4 * width


class _Linear:
    """A linear map of every task, low rank or stacked (inner.py); the caller fills `inputs[r]` and `gradients[r]`.

    Both are padded to multiples of launch.PAD; so is a copy of the weights where a product reads them along a width that is not.
    """

    def __init__(self, weight: Tensor, inputs: Tensor, gradients: Tensor, stacked: bool, precision: str):
        """inputs, gradients: [K, B, rows, padded], zeros."""
        self.shared, self.inputs, self.gradients = weight, inputs, gradients
        self.stacked, self.precision = stacked, precision
        i, o = weight.shape
        self.weight = weight
        if stacked or o != padded(o):
            tasks = (inputs.shape[1],) if stacked else ()
            self.weight = weight.new_zeros(*tasks, i, padded(o))

    def start(self, inner_lr: float) -> None:
        """Before the first inner step."""
        self.inner_lr = inner_lr
        if self.weight is not self.shared:
            self.weight[..., : self.shared.shape[1]].copy_(self.shared)

    def forward(self, r: int, padding: bool = False, **fused) -> None:
        """`inputs[r]` times the task's weights, and what task_linear fuses behind it; padding: also the weights' zeros, for wider copies."""
        earlier = None if self.stacked else (self.inputs[:r], self.gradients[:r])
        weight = self.weight if padding else self.weight[..., : self.shared.shape[1]]
        task_linear(self.inputs[r], weight, earlier, self.inner_lr, precision=self.precision, **fused)

    def backward(self, r: int, first: int, last: int, **fused) -> None:
        """The gradient of the columns first … last - 1 of `inputs[r]`, from `gradients[r]`."""
        earlier = None if self.stacked else (self.gradients[:r], self.inputs[:r, ..., first:].contiguous())
        weight = self.weight[..., first:last, :].mT
        task_linear(self.gradients[r], weight, earlier, self.inner_lr, precision=self.precision, **fused)

    def update(self, r: int) -> None:
        """The SGD step; the last one is not needed, for delta comes from the rows."""
        if self.stacked and r + 1 < len(self.inputs):
            sgd_step_(self.weight, self.inputs[r], self.gradients[r], self.inner_lr, precision=self.precision)


def _maps(phi: Parameters) -> dict[str, tuple[str, ...]]:
    """The linear maps of a token's row: matrices of phi whose inputs stand side by side, [x, condition] and [h, mean of h, one-hot step]."""
    maps: dict[str, tuple[str, ...]] = {"in": ("in.token", "in.condition")}
    for layer in range(depth_of(phi)):
        maps |= {f"{layer}": (f"block{layer}.token", f"block{layer}.sample"), f"{layer} out": (f"block{layer}.out",)}
    return maps | {"last": ("out.token",)}


class InnerLoop:
    """The K inner steps of B tasks for one set of shapes, every tensor made beforehand: `run` allocates nothing that lasts and can be
    captured in a CUDA graph.

    Attributes:
        delta: mean over tasks of (phi_b - phi), a dict like phi. parts: float32 [K, B, P], whose sums are the losses before each step.
            Of the last `run`.
    """

    def __init__(
        self,
        flat: Tensor,
        shapes: dict[str, tuple[int, int]],
        sizes: tuple[int, ...],
        *,
        stacked: bool,
        precision: str,
        mask: Tensor | None = None,
        delta: Tensor | None = None,
    ):
        """Make the buffers.

        Args:
            flat: float32 [P], phi's matrices in a row, of `shapes`; read at every run. sizes: B, K, S, N, D.
            mask: [N, D] on any device, 1 at real numbers. delta: float32 [P], where to put it.
        """
        b, k, s, n, d = self.shape = sizes
        flat_delta = torch.empty_like(flat) if delta is None else delta
        phi, self.delta = named_views(flat, shapes), named_views(flat_delta, shapes)
        self.depth, self.width, rows = depth_of(phi), shapes["out.token"][0], k * b * s * n
        # matrices side by side lie below each other in phi: one map, one product
        maps = {
            name: (sum(shapes[part][0] for part in parts), shapes[parts[0]][1]) for name, parts in _maps(phi).items()
        }
        assert [part for parts in _maps(phi).values() for part in parts] == list(shapes)
        # one storage for what goes into all maps, one for the gradients: the deltas are one launch
        lengths = [[rows * padded(shape[side]) for shape in maps.values()] for side in (0, 1)]
        stored = [[part.view(k, b, s * n, -1) for part in flat.new_zeros(sum(each)).split(each)] for each in lengths]
        weights, self.deltas = named_views(flat, maps), named_views(flat_delta, maps)
        self.linear = {
            name: _Linear(weights[name], inputs, gradients, stacked, precision)
            for name, inputs, gradients in zip(maps, *stored, strict=True)
        }
        self.precision, self.fused = precision, n <= MAX_TOKENS
        self.mask = None if mask is None else mask.float().to(flat.device)
        self.real = None if mask is None else int(mask.sum())  # here, for it waits for the mask's device
        self.table = delta_table(self._layers())
        new = flat.new_empty
        self.gain, self.target = new(k, b, s), new(k, b, s, n, d)
        self.parts = new(k, b, loss_parts(s * n, padded(d)))
        self.enter = self.linear["in"].inputs
        self.blocks = [self.linear[f"{layer}"].inputs for layer in range(self.depth)]
        self.pre_activation = [new(b, s * n, self.width) for _ in range(self.depth)]
        self.of_means = None if self.fused else new(b, s * n, self.width)

    def _layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(member.inputs, member.gradients, self.deltas[name]) for name, member in self.linear.items()]

    def _with_means(self, member: _Linear, r: int, out: Tensor, **fused) -> None:
        """The map's product and, behind it in `out`, its means over tokens."""
        (_, _, _, n, _), width = self.shape, self.width
        if self.fused:
            member.forward(r, out=out, tokens=n, mean_at=width, **fused)
            return
        member.forward(r, out=out, **fused)
        per_token = out.unflatten(1, (-1, n))
        per_token[..., width : 2 * width].copy_(per_token[..., :width].mean(2, keepdim=True).expand(-1, -1, n, -1))

    def _to_tokens(self, member: _Linear, r: int, out: Tensor, add_to: Tensor) -> None:
        """add_to + the gradient of a block's h: its own and, by the mean over tokens, its mean's."""
        (_, _, _, n, _), width = self.shape, self.width
        if self.of_means is None:
            member.backward(r, 0, 2 * width, add_to=add_to, out=out, tokens=n, fold=True)
            return
        member.backward(r, 0, width, add_to=add_to, out=out)
        member.backward(r, width, 2 * width, out=self.of_means)
        out.unflatten(1, (-1, n))[..., :width].add_(self.of_means.unflatten(1, (-1, n)).mean(2, keepdim=True))

    @property
    def losses(self) -> Tensor:
        """float32 [K, B]."""
        return self.parts.sum(-1)

    @property
    def noised(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views [B, K, S, …] of what a run reads: x, the loss's target, its gain."""
        _, _, s, n, d = self.shape
        return (
            self.enter.unflatten(-2, (s, n))[..., :d].transpose(0, 1),
            self.target.transpose(0, 1),
            self.gain.transpose(0, 1),
        )

    def load(self, batch: InnerBatch) -> None:
        """What a run reads, from a batch; `MetaStep` writes it by two launches instead."""
        b, k, s, n, d = self.shape
        for there, here in zip(self.noised, (batch.x, batch.target, batch.gain), strict=True):
            there.copy_(here)
        condition = batch.condition.expand(b, n, -1)
        there = self.enter.unflatten(-2, (s, n))[..., d : d + condition.shape[-1]]
        there.copy_(condition[None, :, None].expand_as(there))
        step = batch.step.transpose(0, 1)[..., None, None].expand(k, b, s, n, 1)
        for block in self.blocks:
            one_hot = block.unflatten(-2, (s, n))[..., 2 * self.width : len(self.linear["0"].shared)]
            one_hot.zero_().scatter_(-1, step, 1.0)

    def run(self, inner_lr: float) -> None:
        """Fill `delta` and `parts`."""
        k, width, linear = self.shape[1], self.width, self.linear
        blocks = [(linear[f"{layer}"], linear[f"{layer} out"]) for layer in range(self.depth)]
        enter, last = linear["in"], linear["last"]
        for member in linear.values():
            member.start(inner_lr)

        for r in range(k):
            self._with_means(enter, r, blocks[0][0].inputs[r])
            for layer, (token, out) in enumerate(blocks):
                token.forward(r, activation="silu", pre_activation=self.pre_activation[layer], out=out.inputs[r])
                h = token.inputs[r]
                if layer + 1 < self.depth:
                    self._with_means(out, r, blocks[layer + 1][0].inputs[r], add_to=h)
                else:
                    out.forward(r, add_to=h, out=last.inputs[r])
            residual = Residual(self.gain[r], self.target[r], self.mask, self.real, self.parts[r])
            last.forward(r, padding=True, residual=residual, out=last.gradients[r])

            g = blocks[-1][1].gradients[r]
            last.backward(r, 0, width, out=g)
            for layer in reversed(range(self.depth)):
                token, out = blocks[layer]
                out.backward(
                    r,
                    0,
                    width,
                    activation="silu_backward",
                    pre_activation=self.pre_activation[layer],
                    out=token.gradients[r],
                )
                below = (blocks[layer - 1][1] if layer else enter).gradients[r]
                self._to_tokens(token, r, below, g)
                g = below
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
    stacked = prefer_stacked(batch.x.shape, phi["out.token"].shape[0]) if stacked is None else stacked
    flat = torch.cat([value.flatten() for value in phi.values()])
    shapes = {name: (len(value), value.shape[1]) for name, value in phi.items()}
    loop = InnerLoop(flat, shapes, batch.x.shape, stacked=stacked, precision=precision, mask=batch.mask)
    loop.load(batch)
    loop.run(inner_lr)
    return loop.delta, loop.losses.T
