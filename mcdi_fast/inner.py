"""The inner loops of Reptile, batched over tasks: K plain SGD steps from phi on each task's own loss.

One function, `inner_loop`, and three implementations of it that agree:

- `reference`: a Python loop over tasks, plain autograd, any dtype. Written to be read; the oracle.
- `vmap`: `torch.func.vmap(grad(...))`. Second oracle, and the baseline of every benchmark.
- `fused`: forward and backward by hand over stacked tasks, no per-task weights in memory (see `_LowRankLinear`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor
from torch.func import grad_and_value, vmap

from mcdi_fast.denoiser import Parameters, denoise, depth_of
from mcdi_fast.errors import McdiError

IMPLEMENTATIONS = ("reference", "vmap", "fused")


@dataclass(frozen=True)
class InnerBatch:
    """What B base learners see in K inner steps of S noised samples each (`diffusion.make_inner_batch` builds it).

    The loss of task b in step r is `mean_{s,n,d} (gain * net(x, step, condition) - target)^2`, `net` as `denoiser.denoise`.

    Attributes:
        x: [B, K, S, N, D] noised weights. step: int64 [B, K, S]. condition: [B, N, C].
        gain: [B, K, S]. target: [B, K, S, N, D].
    """

    x: Tensor
    step: Tensor
    condition: Tensor
    gain: Tensor
    target: Tensor

    def check(self, phi: Parameters) -> None:
        """Raise McdiError, naming the tensor, what was found and what was expected, unless the shapes and dtypes fit phi."""
        if self.x.ndim != 5 or 0 in self.x.shape:
            raise McdiError(
                f"inner batch x: shape {tuple(self.x.shape)}, expected [B, K, S, N, D] with no empty dimension"
            )
        b, k, s, n, d = self.x.shape
        width, dtype, device = len(phi["in.condition"]), phi["in.token"].dtype, phi["in.token"].device
        expected = {
            "x": (b, k, s, n, len(phi["in.token"])),
            "step": (b, k, s),
            "condition": (b, n, width),
            "gain": (b, k, s),
            "target": (b, k, s, n, d),
        }
        for name, shape in expected.items():
            tensor, want = getattr(self, name), torch.int64 if name == "step" else dtype
            if tuple(tensor.shape) != shape:
                raise McdiError(f"inner batch {name}: shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.dtype != want or tensor.device != device:
                raise McdiError(f"inner batch {name}: {tensor.dtype} on {tensor.device}, expected {want} on {device}")


def inner_loop(
    phi: Parameters, batch: InnerBatch, inner_rate: float, implementation: str = "fused", stacked: bool | None = None
) -> tuple[Parameters, Tensor]:
    """Run every task's K SGD steps and return the Reptile difference.

    Args:
        phi: shared start of all tasks. inner_rate: eta.
        implementation: one of `IMPLEMENTATIONS`.
        stacked: for `fused`, whether to keep per-task weights (True) or the low-rank form (False); None lets the measured
            crossover choose.

    Returns:
        delta: mean over tasks of (phi_b - phi), a dict like phi (paper, algorithm 1: phi <- phi + zeta * delta).
        losses: [B, K], the loss of each task before each of its steps.

    Raises:
        McdiError: a tensor of `batch` with the wrong shape, dtype or device; an unknown implementation.
    """
    batch.check(phi)
    if implementation == "fused":
        return _fused(phi, batch, inner_rate, prefer_stacked(batch, phi) if stacked is None else stacked)
    if implementation == "vmap":
        return _vmap(phi, batch, inner_rate)
    if implementation == "reference":
        return _reference(phi, batch, inner_rate)
    raise McdiError(f"inner loop implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def task_loss(phi: Parameters, x: Tensor, step: Tensor, condition: Tensor, gain: Tensor, target: Tensor) -> Tensor:
    """One task, one inner step: x, target [S, N, D], step, gain [S], condition [N, C] -> scalar."""
    net = denoise(phi, x, step, condition)
    return (gain[:, None, None] * net - target).square().mean()


def _reference(phi: Parameters, batch: InnerBatch, inner_rate: float) -> tuple[Parameters, Tensor]:
    num_tasks, num_inner = batch.x.shape[:2]
    delta = {name: torch.zeros_like(value) for name, value in phi.items()}
    losses = batch.x.new_zeros(num_tasks, num_inner)
    for b in range(num_tasks):
        phi_b = {name: value.detach().clone().requires_grad_() for name, value in phi.items()}
        for r in range(num_inner):
            loss = task_loss(
                phi_b, batch.x[b, r], batch.step[b, r], batch.condition[b], batch.gain[b, r], batch.target[b, r]
            )
            gradients = torch.autograd.grad(loss, list(phi_b.values()))
            losses[b, r] = loss.detach()
            phi_b = {
                name: (value - inner_rate * gradient).detach().requires_grad_()
                for (name, value), gradient in zip(phi_b.items(), gradients, strict=True)
            }
        for name, value in phi.items():
            delta[name] += (phi_b[name].detach() - value) / num_tasks
    return delta, losses


def _vmap(phi: Parameters, batch: InnerBatch, inner_rate: float) -> tuple[Parameters, Tensor]:
    def one_task(x, step, condition, gain, target):
        phi_b, losses = phi, []
        for r in range(len(x)):
            gradients, loss = grad_and_value(task_loss)(phi_b, x[r], step[r], condition, gain[r], target[r])
            phi_b = {name: value - inner_rate * gradients[name] for name, value in phi_b.items()}
            losses.append(loss)
        return {name: phi_b[name] - value for name, value in phi.items()}, torch.stack(losses)

    with torch.no_grad():
        deltas, losses = vmap(one_task)(batch.x, batch.step, batch.condition, batch.gain, batch.target)
    return {name: value.mean(0) for name, value in deltas.items()}, losses


class _LowRankLinear:
    """A linear map whose weights differ by task, without the weights.

    After r plain SGD steps task b holds W - eta * sum_{r' < r} A_r'^T G_r', A: the rows that went in, G: the gradients of what
    came out. So all tasks share one large product with W, and each adds -eta * (A A_r'^T) G_r' over its own earlier rows.

    The caller fills `inputs[r]` before `forward(r)` and `gradients[r]` before `backward(r)`.
    """

    def __init__(self, weight: Tensor, num_inner: int, num_tasks: int, rows: int, inner_rate: float):
        self.weight, self.inner_rate = weight, inner_rate
        self.inputs = weight.new_empty(num_inner, num_tasks, rows, weight.shape[0])
        self.gradients = weight.new_empty(num_inner, num_tasks, rows, weight.shape[1])

    def forward(self, r: int, add_to: Tensor | None = None) -> Tensor:
        """`inputs[r]` times the task's weights, [B, rows, out]; added to `add_to` in place where given."""
        return self._apply(self.inputs, self.gradients, self.weight, r, add_to)

    def backward(self, r: int, add_to: Tensor | None = None) -> Tensor:
        """The gradient of `inputs[r]`, [B, rows, in]: the same with A and G swapped."""
        return self._apply(self.gradients, self.inputs, self.weight.T, r, add_to)

    def _apply(self, query: Tensor, value: Tensor, weight: Tensor, r: int, add_to: Tensor | None) -> Tensor:
        rows = query[r].view(-1, query.shape[-1])
        if add_to is None:
            out = (rows @ weight).view(value[r].shape)
        else:
            add_to.view(-1, add_to.shape[-1]).addmm_(rows, weight)
            out = add_to
        for earlier in range(r):
            out.baddbmm_(query[r] @ query[earlier].mT, value[earlier], alpha=-self.inner_rate)
        return out

    def update(self, r: int) -> None:
        """Take the SGD step: implied by the rows that are kept."""

    def delta(self) -> Tensor:
        """Mean over tasks of W_b - W, [in, out]: one product over all rows of all tasks and steps."""
        a, g = (rows.view(-1, rows.shape[-1]) for rows in (self.inputs, self.gradients))
        return (a.T @ g).mul_(-self.inner_rate / self.inputs.shape[1])


class _StackedLinear(_LowRankLinear):
    """The same map with the weights of every task in memory: cheaper when K * rows is well above the width."""

    def __init__(self, weight: Tensor, num_inner: int, num_tasks: int, rows: int, inner_rate: float):
        super().__init__(weight, num_inner, num_tasks, rows, inner_rate)
        self.weights = weight.expand(num_tasks, -1, -1).clone()

    def forward(self, r: int, add_to: Tensor | None = None) -> Tensor:
        return _product(self.inputs[r], self.weights, add_to)

    def backward(self, r: int, add_to: Tensor | None = None) -> Tensor:
        return _product(self.gradients[r], self.weights.mT, add_to)

    def update(self, r: int) -> None:
        if r + 1 < len(self.inputs):  # nobody reads the weights of the last step: delta comes from the rows
            self.weights.baddbmm_(self.inputs[r].mT, self.gradients[r], alpha=-self.inner_rate)


def _product(rows: Tensor, weights: Tensor, add_to: Tensor | None) -> Tensor:
    return rows @ weights if add_to is None else add_to.baddbmm_(rows, weights)


def prefer_stacked(batch: InnerBatch, phi: Parameters) -> bool:
    """Whether per-task weights are the cheaper form: rows of all K steps of a task against the hidden width."""
    _, k, s, n, _ = batch.x.shape
    return k * s * n > 4 * phi["out.token"].shape[0]


@torch.no_grad()
def _fused(phi: Parameters, batch: InnerBatch, inner_rate: float, stacked: bool) -> tuple[Parameters, Tensor]:
    b, k, s, n, d = batch.x.shape
    kind = _StackedLinear if stacked else _LowRankLinear
    linear = {}
    for name, value in phi.items():
        rows = n if name == "in.condition" else s if name.endswith(".sample") else s * n
        linear[name] = kind(value, k, b, rows, inner_rate)
    depth, width = depth_of(phi), phi["out.token"].shape[0]
    linear["in.token"].inputs.copy_(rearrange(batch.x, "b k s n d -> k b (s n) d"))
    linear["in.condition"].inputs.copy_(batch.condition.expand(k, b, n, -1))
    one_hot = F.one_hot(batch.step, phi["block0.sample"].shape[0] - width).to(batch.x.dtype).transpose(0, 1)
    for layer in range(depth):
        linear[f"block{layer}.sample"].inputs[..., width:] = one_hot
    gain = rearrange(batch.gain, "b k s -> k b s 1 1")
    target = rearrange(batch.target, "b k s n d -> k b s n d")
    losses = batch.x.new_empty(k, b)

    def per_token(rows: Tensor) -> Tensor:
        return rows.view(b, s, n, -1)

    last = linear["out.token"]
    for r in range(k):
        h = linear["in.token"].forward(r)
        per_token(h).add_(linear["in.condition"].forward(r).unsqueeze(1))
        before = []
        for layer in range(depth):
            token, sample, out = (linear[f"block{layer}.{name}"] for name in ("token", "sample", "out"))
            token.inputs[r] = h
            torch.mean(per_token(h), 2, out=sample.inputs[r][..., :width])
            a = token.forward(r)
            per_token(a).add_(sample.forward(r).unsqueeze(2))
            before.append(a)
            torch.ops.aten.silu.out(a, out=out.inputs[r])
            h = out.forward(r, add_to=h)
        last.inputs[r] = h
        error = per_token(last.forward(r)).mul_(gain[r]).sub_(target[r])
        losses[r] = reduce(error.square(), "b s n d -> b", "mean")

        torch.mul(error, gain[r] * (2 / (s * n * d)), out=per_token(last.gradients[r]))
        g = last.backward(r)
        for layer in reversed(range(depth)):
            token, sample, out = (linear[f"block{layer}.{name}"] for name in ("token", "sample", "out"))
            out.gradients[r] = g
            du = out.backward(r)
            torch.ops.aten.silu_backward.grad_input(du, before[layer], grad_input=token.gradients[r])
            torch.sum(per_token(token.gradients[r]), 2, out=sample.gradients[r])
            token.backward(r, add_to=g)
            per_token(g).add_(sample.backward(r)[..., :width].div_(n).unsqueeze(2))
        linear["in.token"].gradients[r] = g
        torch.sum(per_token(g), 1, out=linear["in.condition"].gradients[r])
        for member in linear.values():
            member.update(r)
    return {name: member.delta() for name, member in linear.items()}, losses.T
