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

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdi_fast.errors import McdiError

Parameters = dict[str, Tensor]


def init_parameters(
    token_width: int, condition_width: int, num_steps: int, width: int, depth: int, seed: int, dtype=torch.float32
) -> Parameters:
    """Draw phi: matrices [in, out], deviation 1/sqrt(in); step rows, block outputs and the last matrix start at 0, so net = 0.

    Args:
        token_width: D. condition_width: C. num_steps: T. width: H, the hidden width. depth: L, the number of residual blocks.
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
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) / rows**0.5).to(dtype)

    phi = {"in.token": normal(token_width, width), "in.condition": normal(condition_width, width)}
    for layer in range(depth):
        phi[f"block{layer}.token"] = normal(width, width)
        phi[f"block{layer}.sample"] = torch.cat([normal(width, width), torch.zeros(num_steps, width, dtype=dtype)])
        phi[f"block{layer}.out"] = torch.zeros(width, width, dtype=dtype)
    phi["out.token"] = torch.zeros(width, token_width, dtype=dtype)
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
