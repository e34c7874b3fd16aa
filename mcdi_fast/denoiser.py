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


class FoldedDenoiser:
    """What `ChainDenoiser` needs of phi alone: W_in multiplied into the first block's matrices and W_last into the last block's."""

    @torch.no_grad()
    def __init__(self, phi: Parameters):
        """phi: as `init_parameters` makes it."""
        depth, width = depth_of(phi), phi["out.token"].shape[0]
        self._made_of = [(value, _version(value)) for value in phi.values()]
        self.blocks = [
            (phi[f"block{i}.token"], phi[f"block{i}.sample"][:width], phi[f"block{i}.out"]) for i in range(depth)
        ]
        self.step_rows = [phi[f"block{i}.sample"][width:].unsqueeze(1).unbind() for i in range(depth)]
        token, sample, _ = self.blocks[0]
        self.first = torch.cat([phi["in.token"], phi["in.token"] @ token], 1)  # x -> [h_0 | h_0 W_token]
        self.first_sample = phi["in.token"] @ sample
        self.last = torch.cat(
            [phi["out.token"], self.blocks[-1][2] @ phi["out.token"]]
        )  # [h | u] of the last block -> net

    def is_of(self, phi: Parameters) -> bool:
        """Whether phi still holds the tensors this was made of, none of them written to since."""
        made_of = self._made_of
        return len(phi) == len(made_of) and all(
            value is tensor and _version(value) == version
            for value, (tensor, version) in zip(phi.values(), made_of, strict=True)
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors are not counted


class ChainDenoiser:
    """f(x, t) = skip_t x + scale_t net(x, t, condition) for a chain whose tasks are all at the same step t.

    The same function as `denoise`, arranged for latency: at one task a step is a dozen small calls, and each costs more to issue and to
    read its matrix than to compute. What does not depend on x is taken once a chain (the condition's products); W_in is multiplied into
    the first block's matrices and W_last into the last block's, so that the first and the last product of a step do two matrices' work
    each (29 % fewer operations at the default size); scaling, bias, residual and the sampler's coefficients ride in addmm.

    It keeps scratch rows, so one object serves one thread at a time; what it returns is never written again.
    """

    def __init__(
        self,
        phi: Parameters,
        condition: Tensor,
        skip: list[float],
        scale: list[float],
        folded: FoldedDenoiser | None = None,
    ):
        """phi: as `init_parameters` makes it. condition: [B, N, C]. skip, scale: [T]. folded: of the same phi, to spare its making."""
        tasks, tokens, _ = condition.shape
        self.skip, self.scale, self._rows, self._tokens = skip, scale, tasks * tokens, tokens
        folded = folded or FoldedDenoiser(phi)
        depth, width = depth_of(phi), phi["out.token"].shape[0]
        embedded = condition.flatten(0, 1) @ phi["in.condition"]
        token, sample, _ = folded.blocks[0]
        self._first, self._first_sample, self._last = folded.first, folded.first_sample, folded.last
        self._weights, self._step_rows = folded.blocks, folded.step_rows
        self._first_bias = torch.cat([embedded, embedded @ token], 1)
        self._first_sample_bias = embedded.view(tasks, tokens, width).mean(1) @ sample
        # [h_l | u_l] of every block, with all views taken once: a view costs as much as a small product
        self._both = [embedded.new_empty(tasks * tokens, 2 * width) for _ in range(depth)]
        self._h, self._u = ([both[:, half] for both in self._both] for half in (slice(width), slice(width, None)))
        self._h_tokens, self._u_tokens = (
            [rows.view(tasks, tokens, width) for rows in half] for half in (self._h, self._u)
        )
        self._sum, self._per_task = embedded.new_empty(tasks, width), embedded.new_empty(tasks, width)
        self._per_token = self._per_task.unsqueeze(1)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """f of x [B, N, D] and 0 <= t < T: [B, N, D]."""
        return self.advance(x, t, 0.0, 1.0)

    @torch.no_grad()
    def advance(self, x: Tensor, t: int, a: float, b: float) -> Tensor:
        """a x + b f(x, t), what a sampler's step is, in the calls of f alone."""
        share = 1 / self._tokens
        rows = x.reshape(self._rows, -1)
        torch.addmm(self._first_bias, rows, self._first, out=self._both[0])
        torch.addmm(self._first_sample_bias, x.sum(1), self._first_sample, alpha=share, out=self._per_task)
        self._per_task.add_(self._step_rows[0][t])
        for layer, (token, sample, _) in enumerate(self._weights):
            if layer:
                torch.addmm(self._h[layer - 1], self._u[layer - 1], self._weights[layer - 1][2], out=self._h[layer])
                torch.sum(self._h_tokens[layer], 1, out=self._sum)
                torch.addmm(self._step_rows[layer][t], self._sum, sample, alpha=share, out=self._per_task)
                torch.mm(self._h[layer], token, out=self._u[layer])
            self._u_tokens[layer].add_(self._per_token)
            F.silu(self._u[layer], inplace=True)
        end = torch.addmm(rows, self._both[-1], self._last, beta=a + b * self.skip[t], alpha=b * self.scale[t])
        return end.view(x.shape)
