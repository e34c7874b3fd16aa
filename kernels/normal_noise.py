"""Standard normals from seeds, drawn where they are needed: the numbers of `noise.philox_normal`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import check_rank, check_tensor, element_block, launch, output
from mcdi_fast.noise import philox_normal


def normal_noise_ref(
    seeds: Sequence[int] | Tensor, shape: tuple[int, ...], stream: int = 0, mask: Tensor | None = None
) -> Tensor:
    """As `normal_noise`; drawn on the CPU."""
    device = seeds.device if isinstance(seeds, Tensor) else None
    noise = philox_normal(seeds, math.prod(shape), stream).view(-1, *shape).to(device)
    return noise if mask is None else noise * mask


def noise_options(block: int) -> dict[str, int]:
    """A thread a call of Philox, which makes 8 normals: with more threads than calls some would repeat what others do."""
    return {"num_warps": max(1, min(4, block // (8 * 32)))}


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


@triton.jit(do_not_specialize=["number"])
def normal_noise_kernel(seeds, mask, out, number, count, blocks, BLOCK: tl.constexpr):
    """Program task * blocks + block: BLOCK normals of the task. number: of the stream (Triton takes that word for itself)."""
    task, first = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK
    entry = first + tl.arange(0, BLOCK)
    inside = entry < count
    noise = philox_normal_block(tl.load(seeds + task), number, first, BLOCK)
    if mask is not None:
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
    block = element_block(count)
    blocks = triton.cdiv(count, block)
    launch(
        "normal_noise", normal_noise_kernel, (b * blocks,), device, noise_options(block),
        seeds=seeds, mask=mask, out=out, number=stream, count=count, blocks=blocks, BLOCK=block,
    )  # fmt: skip
    return out
