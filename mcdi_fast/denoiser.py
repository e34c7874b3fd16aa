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

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdi_fast.errors import McdiError

Parameters = dict[str, Tensor]


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
    }.items():
        if value < 1:
            raise McdiError(f"denoiser {name} = {value}: expected at least 1")
    if depth < 1:
        raise McdiError(f"denoiser depth = {depth}: expected at least 1 residual block")
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
        phi[name] = torch.zeros(rows, columns, dtype=dtype)
        if not name.endswith(".out") and name != "out.token":
            drawn = width if name.endswith(".sample") else rows
            phi[name][:drawn] = torch.randn(drawn, columns, generator=generator, dtype=torch.float64) / drawn**0.5
    return phi


def depth_of(phi: Parameters) -> int:
    """L, the number of residual blocks."""
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


def chain_denoiser(
    phi: Parameters, condition: Tensor, skip: list[float], scale: list[float]
) -> Callable[[Tensor, int], Tensor]:
    """f(x, t) = skip_t x + scale_t net(x, t, condition) for a chain whose tasks are all at the same step t.

    The same as `denoise` with the condition's product taken once a chain and scaling, bias and residual folded into the
    matrix products: 14 calls a step instead of 29 at depth 2, which is what a single task's latency consists of.

    Args:
        condition: [B, N, C]. skip, scale: [T].

    Returns:
        f of x [B, N, D] and 0 <= t < T, giving [B, N, D].
    """
    tasks, tokens, _ = condition.shape
    embedded = condition.flatten(0, 1) @ phi["in.condition"]
    width = embedded.shape[1]
    layers = [
        (phi[f"block{i}.token"], phi[f"block{i}.sample"][:width], phi[f"block{i}.sample"][width:], phi[f"block{i}.out"])
        for i in range(depth_of(phi))
    ]

    def f(x: Tensor, t: int) -> Tensor:
        rows = x.reshape(tasks * tokens, -1)
        h = torch.addmm(embedded, rows, phi["in.token"])
        for token, sample, step_rows, out in layers:
            per_task = torch.addmm(step_rows[t], h.view(tasks, tokens, width).mean(1), sample)
            a = h @ token
            a.view(tasks, tokens, width).add_(per_task.unsqueeze(1))
            h = torch.addmm(h, F.silu(a, inplace=True), out)
        return torch.addmm(rows, h, phi["out.token"], beta=skip[t], alpha=scale[t]).view(x.shape)

    return f
