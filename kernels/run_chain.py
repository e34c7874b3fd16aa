"""The whole noise-free sampling chain: `diffusion.sample_chain`, by the kernels that suit the number of tasks and tokens."""

from __future__ import annotations

from torch import Tensor

from mcdi_fast.kernels.chain_weights import ChainWeights
from mcdi_fast.kernels.launch import compiled
from mcdi_fast.kernels.layered_chain import layered_chain
from mcdi_fast.kernels.resident_chain import fits, resident_chain
from mcdi_fast.kernels.streamed_chain import MAX_TOKENS, streamed_chain

LARGE = 2**22
"""Bytes of matrices a step: a multiprocessor takes 40 us to stream them from the L2, three launches 12."""


def prefer_layers(weights: ChainWeights, x: Tensor) -> bool:
    """Whether a launch a layer is the better chain: for more tokens than a program holds, and for few rows and large matrices."""
    tasks, tokens, _ = x.shape
    read = sum(part.numel() * part.element_size() for part in (weights.token, weights.sample, weights.last))
    return tokens > MAX_TOKENS or (tasks <= 32 and read > LARGE)


def run_chain(
    weights: ChainWeights,
    x: Tensor,
    condition: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Noise-free chain from noise to normalised weights: diffusion.sample_chain with f = skip x + scale denoise(x, t, condition).

    Args:
        weights: of `chain_weights.pack_weights`. x: float32 [B, N, D], the start. condition: [B, N, C], normalised.
        steps: int64 [J]. coefficients: float32 [J, 3], both of `diffusion.chain_table`, on the device.
        mask: float32 [N, D], 0 at padding, where f is taken as 0 (sampler.py).

    Returns:
        float32 [B, N, D], in `out` where given (x itself is allowed).

    Raises:
        McdiError: naming the tensor.
    """
    if compiled(x.device) and fits(weights, x, condition):
        return resident_chain(weights, x, condition, steps, coefficients, mask, out=out)
    if prefer_layers(weights, x):
        return layered_chain(weights, x, condition, steps, coefficients, mask, out=out, precision=precision)
    return streamed_chain(weights, x, condition, steps, coefficients, mask, out=out, precision=precision)
