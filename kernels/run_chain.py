"""The whole noise-free sampling chain in one launch: `diffusion.sample_chain`, by the kernel that suits the number of tasks."""

from __future__ import annotations

from torch import Tensor

from mcdi_fast.kernels.chain_weights import ChainWeights
from mcdi_fast.kernels.launch import compiled
from mcdi_fast.kernels.resident_chain import fits, resident_chain
from mcdi_fast.kernels.streamed_chain import streamed_chain


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
    return streamed_chain(weights, x, condition, steps, coefficients, mask, out=out, precision=precision)
