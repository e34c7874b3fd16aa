"""The denoiser f_phi(x_t, t, c): a residual network over tokens, as pure functions of a dict of parameters.

    h_0     = x W_in + c W_condition
    u_l     = silu(h_l W_token + [mean over tokens of h_l | onehot(t)] W_sample)
    h_{l+1} = h_l + u_l W_out
    net     = h_L W_last,          f = skip_t x + scale_t net          (schedule.py)

Tokens meet only through their mean, so permuting the tokens permutes the output. There are no separate biases: the one-hot
step picks a row of W_sample, a bias of its own for every layer and step. Every parameter is thus the matrix of a linear map of
some rows, which is what lets the inner loop treat all of them alike (inner.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdi_fast.errors import McdiError

Parameters = dict[str, Tensor]
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def full_precision(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Inside `torch.autocast` the function computes as outside of it, in the precision of its tensors."""

    @functools.wraps(function)
    def call(*args: _Args.args, **options: _Args.kwargs) -> _Result:
        on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not on:
            return function(*args, **options)
        with contextlib.ExitStack() as stack:
            for device in on:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **options)

    return call


def parameter_shapes(
    token_width: int, condition_width: int, num_steps: int, width: int, depth: int
) -> dict[str, tuple[int, int]]:
    """The matrices of phi, [in, out] each, by name.

    Args:
        token_width: D. condition_width: C. num_steps: T. width: H, the hidden width. depth: L, the number of residual blocks.

    Raises:
        McdiError: one of them below 1.
    """
    for name, value in {
        "token_width": token_width,
        "condition_width": condition_width,
        "num_steps": num_steps,
        "width": width,
        "depth": depth,
    }.items():
        if value < 1:
            raise McdiError(f"denoiser {name} = {value}: expected at least 1")
    shapes = {"in.token": (token_width, width), "in.condition": (condition_width, width)}
    for layer in range(depth):
        shapes[f"block{layer}.token"] = (width, width)
        shapes[f"block{layer}.sample"] = (width + num_steps, width)
        shapes[f"block{layer}.out"] = (width, width)
    return shapes | {"out.token": (width, token_width)}


def init_parameters(
    token_width: int, condition_width: int, num_steps: int, width: int, depth: int, seed: int, dtype=torch.float32
) -> Parameters:
    """Draw phi: deviation 1/sqrt(in); step rows, block outputs and the last matrix start at 0, so net = 0. Sizes as `parameter_shapes`."""
    generator = torch.Generator().manual_seed(seed)
    phi = {}
    for name, (rows, columns) in parameter_shapes(token_width, condition_width, num_steps, width, depth).items():
        phi[name] = torch.zeros(rows, columns, dtype=dtype, device="cpu")
        if not name.endswith(".out") and name != "out.token":
            drawn = width if name.endswith(".sample") else rows
            normal = torch.randn(drawn, columns, generator=generator, dtype=torch.float64, device="cpu")
            phi[name][:drawn] = normal / drawn**0.5
    return phi


def token_condition(condition: Tensor, position: Tensor) -> Tensor:
    """What the network is given of each token: [B, N or 1, C] (normalised) beside position [N, P], as [B, N, C + P]."""
    tokens = len(position) if position.shape[1] else condition.shape[1]
    condition = condition.expand(-1, tokens, -1)
    return torch.cat([condition, position.expand(len(condition), -1, -1)], -1) if position.shape[1] else condition


def depth_of(phi: Iterable[str]) -> int:
    """L, the number of residual blocks of parameters, by their names."""
    return sum(name.endswith(".out") for name in phi)


def denoise(phi: Parameters, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
    """The network's own output `net` for one task, or for many with the same phi (leading dimensions are batched).

    Args:
        phi: as `init_parameters` makes it; float64 works too.
        x: [..., S, N, D]. step: int64 [..., S]. condition: [..., N, C], the same for all S samples.

    Returns:
        [..., S, N, D]
    """
    h = x @ phi["in.token"] + (condition @ phi["in.condition"]).unsqueeze(-3)
    for layer in range(depth_of(phi)):
        token, sample, out = (phi[f"block{layer}.{name}"] for name in ("token", "sample", "out"))
        width = len(token)
        per_sample = h.mean(-2) @ sample[:width] + F.embedding(step, sample[width:])
        h = h + F.silu(h @ token + per_sample.unsqueeze(-2)) @ out
    return h @ phi["out.token"]


class FoldedDenoiser:
    """What `ChainDenoiser` needs of phi alone: every pair of matrices with nothing but a sum between them, multiplied.

    h_l is linear in x, c and the u_j before it, so what reads it reads those instead and h_l is never made:

        u_l = silu([x u_0 … u_{l-1}] token_l + mean over tokens of the same sample_l + what c and t give)
        net = [x u_0 … u_{L-1}] last + what c gives

    At the default depth of two that is half of the operations and 45 % fewer bytes of matrices a step than `denoise` takes. The work grows with the
    square of the depth: four blocks cost as much as unfolded ones, more of them more. Where tokens are wide, D > 2 H, as one token that is a whole
    network, `last` stays in two factors: their product [D, D] would be larger than both.
    """

    @full_precision
    @torch.no_grad()
    def __init__(self, phi: Parameters):
        """phi: as `init_parameters` makes it."""
        self._made_of = [(value, value.untyped_storage(), _version(value)) for value in phi.values()]
        wide = {name: value.double() for name, value in phi.items()}  # rounded once, at the end
        depth, (width, self.token_width) = depth_of(phi), phi["out.token"].shape
        self.width, condition, dtype = width, wide["in.condition"], phi["out.token"].dtype
        self.step_rows = [phi[f"block{i}.sample"][width:].unsqueeze(1).unbind() for i in range(depth)]
        self.token, self.sample, by_token, by_mean = [], [], [], []
        into_h = wide["in.token"]  # [x u_0 … u_{l-1}] into_h = h_l, but for the condition's share
        for layer in range(depth):
            token, sample = wide[f"block{layer}.token"], wide[f"block{layer}.sample"][:width]
            self.token.append((into_h @ token).to(dtype))
            self.sample.append((into_h @ sample).to(dtype))
            by_token.append(condition @ token)
            by_mean.append(condition @ sample)
            into_h = torch.cat([into_h, wide[f"block{layer}.out"]])
        by_token.append(condition @ wide["out.token"])
        self.condition_token, self.condition_mean = (torch.cat(parts, 1).to(dtype) for parts in (by_token, by_mean))
        last = (into_h, wide["out.token"]) if self.token_width > 2 * width else (into_h @ wide["out.token"],)
        self.last = tuple(matrix.to(dtype) for matrix in last)  # in this order

    def cond_bias(self, condition: Tensor) -> Tensor:
        """What a condition [B, N, C] gives: [B N, L H + D], a share of each u_l before silu and of net."""
        rows = torch.matmul(condition, self.condition_token)
        rows[..., : -self.token_width] += torch.matmul(condition.mean(1, keepdim=True), self.condition_mean)
        return rows.flatten(0, 1)

    def is_of(self, phi: Parameters) -> bool:
        """Whether phi still holds the tensors this was made of, none of them written to since (by this process) or given other `.data`."""
        made_of = self._made_of
        return len(phi) == len(made_of) and all(
            value is tensor and value.untyped_storage() is storage and _version(value) == version
            for value, (tensor, storage, version) in zip(phi.values(), made_of, strict=True)
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors are not counted


_FEW_TASKS = 8  # up to which sums over tokens are cheaper as products with zeros and ones


class ChainDenoiser:
    """f(x, t) = skip_t x + scale_t net(x, t, condition) for a chain whose tasks are all at the same step t.

    The same function as `denoise`, arranged for latency: at one task a step is a dozen small calls, and each costs more to issue and to
    read its matrix than to compute (docs/performance.md). The products are those of `FoldedDenoiser`; what does not depend on x is taken
    once a chain; the residual and the sampler's coefficients ride in addmm.

    It keeps scratch rows, so one object serves one thread at a time; what it returns is never written again.
    """

    @full_precision
    @torch.no_grad()
    def __init__(self, folded: FoldedDenoiser, condition: Tensor, skip: list[float], scale: list[float]):
        """condition: [B, N, C]. skip, scale: [T]."""
        tasks, tokens, _ = condition.shape
        self.skip, self.scale, self._rows, self._tokens = skip, scale, tasks * tokens, tokens
        self._folded = folded
        cond_bias = folded.cond_bias(condition)
        self._cond_bias = cond_bias.split([folded.width] * len(folded.token) + [folded.token_width], 1)

        # all columns [x | u_0 | …] and their sums over tokens, with all views taken once: a view costs as much as a small product
        ends = [folded.token_width + layer * folded.width for layer in range(len(folded.token) + 1)]
        self._columns = cond_bias.new_empty(self._rows, ends[-1])
        sums = cond_bias.new_empty(tasks, ends[-1])
        self._seen, self._seen_sums = ([rows[:, :end] for end in ends[:-1]] for rows in (self._columns, sums))
        blocks = list(zip([0, *ends[:-1]], ends, strict=True))
        self._x, *self._u = (self._columns[:, start:end] for start, end in blocks)
        self._sums = [sums[:, start:end] for start, end in blocks]
        self._per_task = cond_bias.new_empty(tasks, folded.width)
        self._few = None
        if tasks <= _FEW_TASKS:
            self._few = torch.eye(tasks, dtype=cond_bias.dtype, device=cond_bias.device).repeat_interleave(tokens, 0)
            self._few_t = self._few.T.contiguous()

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """f of x [B, N, D] and 0 <= t < T: [B, N, D]."""
        return self.advance(x, t, 0.0, 1.0)

    def _sum(self, rows: Tensor, out: Tensor) -> None:
        """Over the tokens of a task: [B * N, any] -> [B, any]."""
        if self._few is not None:
            torch.mm(self._few_t, rows, out=out)
        else:
            torch.sum(rows.unflatten(0, (-1, self._tokens)), 1, out=out)

    @full_precision
    @torch.no_grad()
    def advance(self, x: Tensor, t: int, a: float, b: float) -> Tensor:
        """a x + b f(x, t), what a sampler's step is, in the calls of f alone."""
        folded, per_task = self._folded, self._per_task
        rows = x.reshape(self._rows, -1)
        self._x.copy_(rows)
        self._sum(rows, self._sums[0])
        for layer, u in enumerate(self._u):
            if layer:
                self._sum(self._u[layer - 1], self._sums[layer])
            row = folded.step_rows[layer][t]
            torch.addmm(row, self._seen_sums[layer], folded.sample[layer], alpha=1 / self._tokens, out=per_task)
            torch.addmm(self._cond_bias[layer], self._seen[layer], folded.token[layer], out=u)
            if self._few is not None:
                u.addmm_(self._few, per_task)
            else:
                u.unflatten(0, (-1, self._tokens)).add_(per_task.unsqueeze(1))
            F.silu(u, inplace=True)
        scale = b * self.scale[t]
        *first, last = folded.last
        columns = self._columns @ first[0] if first else self._columns
        end = torch.addmm(rows, columns, last, beta=a + b * self.skip[t], alpha=scale)
        return end.add_(self._cond_bias[-1], alpha=scale).view(x.shape)
