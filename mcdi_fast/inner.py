"""The inner loops of Reptile, batched over tasks: K plain SGD steps from phi on each task's own loss.

One function, `inner_loop`, and four implementations of it that agree:

- `reference`: a Python loop over tasks, plain autograd, any dtype. Written to be read; the oracle.
- `vmap`: `torch.func.vmap(grad(...))`. Second oracle, and the baseline of every benchmark.
- `torch`: forward and backward by hand over stacked tasks, no per-task weights in memory (see `_LowRankLinear`).
- `auto`: the same in compiled code (cpu_inner.py), in float32 on a CPU where numba is installed; elsewhere `torch`.

The kernels have it too (kernels/inner_loop.py); `meta.MetaTrainer` chooses.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.func import grad_and_value, vmap

from mcdi_fast.backend import DEFAULT_PRECISION, numba_module
from mcdi_fast.denoiser import Parameters, denoise, depth_of, full_precision
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.errors import McdiError

ORACLES = ("reference", "vmap")
_CROSSOVER = 1.2  # of torch's operations, for stacked_is_cheaper


class Form(NamedTuple):
    """How a linear map is computed. rows: of a task and step. own: whether the task keeps a weight of its own, not the low-rank terms."""

    rows: int
    own: bool


@full_precision
def inner_loop(
    phi: Parameters,
    batch: InnerBatch,
    inner_lr: float,
    impl: str = "auto",
    stacked: bool | None = None,
    precision: str = DEFAULT_PRECISION,
) -> tuple[Parameters, Tensor]:
    """Run every task's K SGD steps and return the Reptile difference. Computes in the dtype it is given, in `torch.autocast` too.

    Args:
        phi: shared start of all tasks. inner_lr: eta.
        impl: "auto", "torch", or one of `ORACLES`.
        stacked: for the first two, whether to keep per-task weights (True) or the low-rank form (False); None chooses for
            each linear map the cheaper (`stacked_is_cheaper`).
        precision: of compiled code's products: "ieee", or "tf32" for those of tile units, where a processor has them (cpu_tiles.py).

    Returns:
        delta: mean over tasks of (phi_b - phi), a dict like phi (paper, algorithm 1: phi <- phi + zeta * delta).
        losses: [B, K], the loss of each task before each of its steps.

    Raises:
        McdiError: a tensor of `batch` with the wrong shape, dtype or device; a step out of range (on a CPU); an unknown implementation.
    """
    batch.check(phi)
    if impl == "vmap":
        return _vmap(phi, batch, inner_lr)
    if impl == "reference":
        return _reference(phi, batch, inner_lr)
    if impl not in ("auto", "torch"):
        raise McdiError(f"inner loop impl = {impl!r}: expected one of {', '.join(('auto', 'torch', *ORACLES))}")
    plain = impl == "auto" and batch.x.device.type == "cpu" and batch.x.dtype == torch.float32
    code = numba_module("cpu_inner") if plain else None
    _, k, s, n, _ = batch.x.shape
    forms = []
    for name, value in phi.items():
        rows = n if name == "in.condition" else s if name.endswith(".sample") else s * n
        crossover = code.crossover(rows, precision) if code else _CROSSOVER
        forms.append(Form(rows, stacked_is_cheaper(value, k, rows, crossover) if stacked is None else stacked))
    return code.inner_loop(phi, batch, inner_lr, forms, precision) if code else _fused(phi, batch, inner_lr, forms)


def task_loss(
    phi: Parameters,
    x: Tensor,
    step: Tensor,
    condition: Tensor,
    gain: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """One task, one inner step: x, target [S, N, D], step, gain [S], condition [N, C], mask [N, D] or None -> scalar."""
    error = gain[:, None, None] * denoise(phi, x, step, condition) - target
    if mask is None:
        return error.square().mean()
    return (error * mask).square().mean() * (mask.numel() / mask.sum())  # over real entries only


def _reference(phi: Parameters, batch: InnerBatch, inner_lr: float) -> tuple[Parameters, Tensor]:
    num_tasks, num_inner = batch.x.shape[:2]
    delta = {name: torch.zeros_like(value) for name, value in phi.items()}
    losses = batch.x.new_zeros(num_tasks, num_inner)
    for b in range(num_tasks):
        phi_b = {name: value.detach().clone().requires_grad_() for name, value in phi.items()}
        for r in range(num_inner):
            data = batch.x[b, r], batch.step[b, r], batch.condition[b], batch.gain[b, r], batch.target[b, r]
            loss = task_loss(phi_b, *data, batch.mask)
            gradients = torch.autograd.grad(loss, list(phi_b.values()))
            losses[b, r] = loss.detach()
            phi_b = {
                name: (value - inner_lr * gradient).detach().requires_grad_()
                for (name, value), gradient in zip(phi_b.items(), gradients, strict=True)
            }
        for name, value in phi.items():
            delta[name] += (phi_b[name].detach() - value) / num_tasks
    return delta, losses


def _vmap(phi: Parameters, batch: InnerBatch, inner_lr: float) -> tuple[Parameters, Tensor]:
    def one_task(x, step, condition, gain, target):
        phi_b, losses = phi, []
        for r in range(len(x)):
            data = x[r], step[r], condition, gain[r], target[r]
            gradients, loss = grad_and_value(task_loss)(phi_b, *data, batch.mask)
            phi_b = {name: value - inner_lr * gradients[name] for name, value in phi_b.items()}
            losses.append(loss)
        return {name: phi_b[name] - value for name, value in phi.items()}, torch.stack(losses)

    with torch.no_grad():
        deltas, losses = vmap(one_task)(batch.x, batch.step, batch.condition, batch.gain, batch.target)
    return {name: value.mean(0) for name, value in deltas.items()}, losses


_workspace = threading.local()  # the fused form's rows, one set a thread


def _buffer(name: str, what: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised rows that stay from call to call, one set a thread: fresh ones cost page faults in every meta-step."""
    buffers, key = vars(_workspace), f"{name} {what}"
    buffer = buffers.get(key)
    if buffer is None or buffer.shape != shape or buffer.dtype != like.dtype or buffer.device != like.device:
        buffer = buffers[key] = like.new_empty(shape)
    return buffer


class _LowRankLinear:
    """A linear map whose weights differ by task, without the weights.

    After r plain SGD steps task b holds W - eta * sum_{r' < r} A_r'^T G_r', A: the rows that went in, G: the gradients of what
    came out. So all tasks share one large product with W, and each adds -eta * (A A_r'^T) G_r' over its own earlier rows.

    The caller fills `inputs[r]` before `forward(r)` and `gradients[r]` before `backward(r)`.
    """

    def __init__(self, name: str, weight: Tensor, num_inner: int, num_tasks: int, rows: int, inner_lr: float):
        self.weight, self.inner_lr = weight, inner_lr
        self.all_inputs = _buffer(name, "inputs", weight, (num_inner, num_tasks, rows, weight.shape[0]))
        self.all_gradients = _buffer(name, "gradients", weight, (num_inner, num_tasks, rows, weight.shape[1]))
        # views taken once: a view costs as much as launching a small product
        self.inputs, self.gradients = self.all_inputs.unbind(), self.all_gradients.unbind()
        self._flat_inputs, self._flat_gradients = (
            rows.flatten(1, 2).unbind() for rows in (self.all_inputs, self.all_gradients)
        )
        self._inputs_t, self._gradients_t = self.all_inputs.mT.unbind(), self.all_gradients.mT.unbind()
        self._weight_t = weight.T

    def forward(self, r: int, add_to: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """`inputs[r]` times the task's weights, [B, rows, out], plus `add_to`; written to `out` where given."""
        shared = _shared_product(self._flat_inputs[r], self.weight, add_to, out).view(self.gradients[r].shape)
        for earlier in range(r):
            scores = torch.bmm(self.inputs[r], self._inputs_t[earlier])
            shared.baddbmm_(scores, self.gradients[earlier], alpha=-self.inner_lr)
        return shared

    def backward(self, r: int, add_to: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The gradient of `inputs[r]`, [B, rows, in]: the same with A and G swapped."""
        shared = _shared_product(self._flat_gradients[r], self._weight_t, add_to, out).view(self.inputs[r].shape)
        for earlier in range(r):
            scores = torch.bmm(self.gradients[r], self._gradients_t[earlier])
            shared.baddbmm_(scores, self.inputs[earlier], alpha=-self.inner_lr)
        return shared

    def update(self, r: int) -> None:
        """Take the SGD step: implied by the rows that are kept."""

    def delta(self) -> Tensor:
        """Mean over tasks of W_b - W, [in, out]: one product over all rows of all tasks and steps."""
        a, g = (rows.view(-1, rows.shape[-1]) for rows in (self.all_inputs, self.all_gradients))
        return (a.T @ g).mul_(-self.inner_lr / self.all_inputs.shape[1])


def _shared_product(rows: Tensor, weight: Tensor, add_to: Tensor | None, out: Tensor | None) -> Tensor:
    flat = None if out is None else out.view(-1, out.shape[-1])
    if add_to is None:
        return torch.mm(rows, weight, out=flat)
    return torch.addmm(add_to.view(-1, add_to.shape[-1]), rows, weight, out=flat)


class _StackedLinear(_LowRankLinear):
    """The same map with the weights of every task in memory: cheaper when K * rows is well above the width."""

    def __init__(self, name: str, weight: Tensor, num_inner: int, num_tasks: int, rows: int, inner_lr: float):
        super().__init__(name, weight, num_inner, num_tasks, rows, inner_lr)
        self.weights = weight.expand(num_tasks, -1, -1).clone()

    def forward(self, r: int, add_to: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return _task_product(self.inputs[r], self.weights, add_to, out)

    def backward(self, r: int, add_to: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return _task_product(self.gradients[r], self.weights.mT, add_to, out)

    def update(self, r: int) -> None:
        if r + 1 < len(self.inputs):  # nobody reads the weights of the last step: delta comes from the rows
            self.weights.baddbmm_(self.inputs[r].mT, self.gradients[r], alpha=-self.inner_lr)


def _task_product(rows: Tensor, weights: Tensor, add_to: Tensor | None, out: Tensor | None) -> Tensor:
    if add_to is None:
        return torch.bmm(rows, weights, out=out)
    return torch.baddbmm(add_to, rows, weights, out=out)


def stacked_is_cheaper(weight: Tensor, inner_steps: int, rows: int, crossover: float) -> bool:
    """Whether a map [in, out] of `rows` rows a task and step is cheaper with a weight for each task than as low-rank terms.

    A term costs two products with all earlier rows, a weight of its own one update a step. crossover: K rows / width at which they are level,
    measured: by torch 1.1 to 1.5, in compiled code `cpu_inner.crossover`. K = 1 has no earlier rows.
    """
    fan_in, fan_out = weight.shape
    return inner_steps > 1 and inner_steps * rows * (fan_in + fan_out) > crossover * 2 * fan_in * fan_out


@torch.no_grad()
def _fused(phi: Parameters, batch: InnerBatch, inner_lr: float, forms: list[Form]) -> tuple[Parameters, Tensor]:
    b, k, s, n, d = batch.x.shape
    linear = {}
    for (name, value), form in zip(phi.items(), forms, strict=True):
        linear[name] = (_StackedLinear if form.own else _LowRankLinear)(name, value, k, b, form.rows, inner_lr)
    depth, width = depth_of(phi), phi["out.token"].shape[0]
    tokens, conditions, last = linear["in.token"], linear["in.condition"], linear["out.token"]
    blocks = [tuple(linear[f"block{layer}.{name}"] for name in ("token", "sample", "out")) for layer in range(depth)]
    tokens.all_inputs.copy_(rearrange(batch.x, "b k s n d -> k b (s n) d"))
    conditions.all_inputs.copy_(batch.condition.expand(k, b, n, -1))
    one_hot = F.one_hot(batch.step, phi["block0.sample"].shape[0] - width).transpose(0, 1)
    for _, sample, _ in blocks:
        sample.all_inputs[..., width:] = one_hot
    gain = rearrange(batch.gain, "b k s -> k b s 1 1")
    mask, real = batch.mask, n * d if batch.mask is None else float(batch.mask.sum())
    loss_gain = gain * (2 / (s * real))
    target = rearrange(batch.target, "b k s n d -> k b s n d")
    losses = batch.x.new_empty(k, b)
    mean = batch.x.new_empty(b, s, width)

    def per_token(rows: Tensor) -> Tensor:
        return rows.view(b, s, n, -1)

    for r in range(k):
        h = tokens.forward(r, out=blocks[0][0].inputs[r])
        per_token(h).add_(conditions.forward(r).unsqueeze(1))
        before = []
        for layer, (token, sample, out) in enumerate(blocks):
            torch.mean(per_token(h), 2, out=mean)
            sample.inputs[r][..., :width] = mean
            a = token.forward(r)
            per_token(a).add_(sample.forward(r).unsqueeze(2))
            before.append(a)
            torch.ops.aten.silu.out(a, out=out.inputs[r])
            h = out.forward(r, add_to=h, out=(last if layer + 1 == depth else blocks[layer + 1][0]).inputs[r])
        error = per_token(last.forward(r)).mul_(gain[r]).sub_(target[r])
        if mask is not None:
            error.mul_(mask)  # so neither the loss nor any gradient hears of padding
        losses[r] = error.square().mean((1, 2, 3))

        torch.mul(error, loss_gain[r], out=per_token(last.gradients[r]))
        g = last.backward(r, out=blocks[-1][2].gradients[r])
        for layer in reversed(range(depth)):
            token, sample, out = blocks[layer]
            du = out.backward(r)
            torch.ops.aten.silu_backward.grad_input(du, before[layer], grad_input=token.gradients[r])
            torch.sum(per_token(token.gradients[r]), 2, out=sample.gradients[r])
            g = token.backward(r, add_to=g, out=(blocks[layer - 1][2] if layer else tokens).gradients[r])
            per_token(g).add_(sample.backward(r)[..., :width].unsqueeze(2), alpha=1 / n)
        torch.sum(per_token(g), 1, out=conditions.gradients[r])
        for member in linear.values():
            member.update(r)
    if mask is not None:
        losses.mul_(n * d / real)
    return {name: member.delta() for name, member in linear.items()}, losses.T
