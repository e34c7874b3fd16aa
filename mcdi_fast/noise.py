"""Counter-based normal noise: one seed a sample, so that a draw never depends on the batch it is drawn in.

Philox4x32-10 (Salmon et al., SC 2011) with the uniform and Box-Muller steps of Triton's `tl.randn4x`, so that a kernel can draw the
same numbers. torch.Generator has no per-sample seed, and one generator a sample costs more than the whole chain.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from mcdi_fast.errors import McdiError

_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_A, _KEY_B = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox_normal(seeds: Sequence[int] | np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """Draw `count` standard normals for each seed.

    Args:
        seeds: B integers in [0, 2^64). stream: an independent sequence of the same seed (0: start of a chain, t + 1: its noise at t).

    Returns:
        float32 [B, count]; row b depends on (seeds[b], stream) alone, entry j not on `count`.

    Raises:
        McdiError: a seed that is no integer in [0, 2^64).
    """
    numbers = [_seed(seed) for seed in seeds]
    seed = np.array(numbers, np.uint64)[:, None]
    blocks = (count + 3) // 4
    c0 = np.broadcast_to(np.arange(blocks, dtype=np.uint64), (len(seed), blocks))
    c1, c2, c3 = np.full_like(c0, stream), np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & _LOW, seed >> _SHIFT
    for _ in range(10):
        a, b = _ROUND_A * c0, _ROUND_B * c2  # 32 x 32 bits fit 64
        c0, c1, c2, c3 = (b >> _SHIFT) ^ c1 ^ k0, b & _LOW, (a >> _SHIFT) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    bits = np.stack([c0, c1, c2, c3], -1).astype(np.uint32).view(np.int32)
    uniform = np.where(bits < 0, -bits - 1, bits).astype(np.float32) * np.float32(4.6566127342e-10)
    radius = np.sqrt(np.float32(-2) * np.log(np.maximum(uniform[..., 0::2], np.float32(1e-7))))
    angle = np.float32(6.283185307179586) * uniform[..., 1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return normal.reshape(len(seed), 4 * blocks)[:, :count]


def _seed(value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise McdiError(f"seed {value!s:.40}: expected an integer in [0, 2^64)")
    return number
