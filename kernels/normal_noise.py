"""Standard normals from seeds, drawn where they are needed: the numbers of mcdi_fast.noise.philox_normal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_runs
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import check_rank, check_tensor, element_block, on_device, output
from mcdi_fast.noise import philox_normal


def normal_noise_ref(
    seeds: Sequence[int] | Tensor, shape: tuple[int, ...], stream: int = 0, mask: Tensor | None = None
) -> Tensor:
    """As `normal_noise`, on the CPU."""
    noise = philox_normal(seeds, math.prod(shape), stream).view(-1, *shape)
    return noise if mask is None else noise * mask


@triton.jit
def _two_normals(word):
    low = tl.uint_to_uniform_float((word & 0xFFFFFFFF).to(tl.uint32))
    high = tl.uint_to_uniform_float((word >> 32).to(tl.uint32))
    return tl.pair_uniform_to_normal(low, high)


@triton.jit
def philox_normal_block(seed, stream, first, BLOCK: tl.constexpr):
    """Entries first … first + BLOCK - 1 of a row of philox_normal; first and BLOCK are multiples of 8."""
    # NumPy counts before it draws: its first block has counter 1
    counter = (first // 8 + 1 + tl.arange(0, BLOCK // 8)).to(tl.uint64)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + stream.to(tl.uint64), zero, zero)
    n0, n1 = _two_normals(w0)
    n2, n3 = _two_normals(w1)
    n4, n5 = _two_normals(w2)
    n6, n7 = _two_normals(w3)
    even = tl.interleave(tl.interleave(n0, n4), tl.interleave(n2, n6))
    odd = tl.interleave(tl.interleave(n1, n5), tl.interleave(n3, n7))
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["stream"])
def normal_noise_kernel(seeds, mask, out, stream, count, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Program (task, block): BLOCK normals of the task."""
    task, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    entry = first + tl.arange(0, BLOCK)
    inside = entry < count
    noise = philox_normal_block(tl.load(seeds + task), stream, first, BLOCK)
    if HAS_MASK:
        noise *= tl.load(mask + entry, mask=inside, other=0.0)
    tl.store(out + task * count + entry, noise, mask=inside)


def normal_noise(
    seeds: Tensor, shape: tuple[int, ...], stream: int = 0, mask: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Standard normals of B tasks.

    Args:
        seeds: int64 [B], the bits of unsigned 64-bit seeds. shape: of a task's noise. stream: in [0, 2^63).
        mask: float32 of that shape, 0 at padding, whose noise is 0 then.

    Returns:
        float32 [B, *shape]

    Raises:
        McdiError: naming the argument.
    """
    (b,) = check_rank("seeds", seeds, "B")
    device, count = seeds.device, math.prod(shape)
    check_tensor("seeds", seeds, (b,), (torch.int64,))
    if not 0 < count < 2**31:
        raise McdiError(f"shape = {tuple(shape)}: {count} numbers a task, expected 1 to 2^31 - 1")
    if not 0 <= stream < 2**63:
        raise McdiError(f"stream = {stream}: expected an integer in [0, 2^63)")
    if mask is not None:
        check_tensor("mask", mask, tuple(shape), (torch.float32,), device)
    out = output("out", out, (b, *shape), device)
    check_runs(device, "normal_noise")
    block = element_block(count)
    with on_device(device):
        normal_noise_kernel[(b, triton.cdiv(count, block))](
            seeds, out if mask is None else mask, out, stream, count, mask is not None, block
        )
    return out
