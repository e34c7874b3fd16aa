"""Normal noise on a CPU in compiled code (numba, the extra `cpu`): `noise.philox_normal`, the same bits in a third of the time.

Change this file with noise.py, whose `box_muller` it compiles in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast.cpu_core import aligned, compiled
from mcdi_fast.noise import box_muller

# Said in words, because a function that says nothing takes over the fastmath of whatever calls it first.
_exactly = njit(fastmath=False, error_model="numpy")
_box_muller = _exactly(box_muller)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)  # of Philox4x64
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_DRAWN = 512  # normals at a time, a multiple of a block of 8
SCRATCH = 2 * _DRAWN  # float32 that `draw` needs


@_exactly
def _words(key, stream, first, out):
    """Philox4x64-10: the blocks from `first` of a stream of a seed (noise.py), uint64 [blocks, 4]."""
    for block in range(len(out)):
        c0, c1, c2, c3 = np.uint64(first + block + 1), stream, np.uint64(0), np.uint64(0)
        k0, k1 = key, np.uint64(0)
        for _ in range(10):
            high0, low0 = _high(_MULTIPLIERS[0], c0), _MULTIPLIERS[0] * c0
            high1, low1 = _high(_MULTIPLIERS[1], c2), _MULTIPLIERS[1] * c2
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
        out[block, 0], out[block, 1], out[block, 2], out[block, 3] = c0, c1, c2, c3


@_exactly
def _high(a, b):
    """The upper 64 bits of a product."""
    a0, a1, b0, b1 = a & _LOW, a >> _32, b & _LOW, b >> _32
    middle = a1 * b0 + (a0 * b0 >> _32)
    return a1 * b1 + (middle >> _32) + (a0 * b1 + (middle & _LOW) >> _32)


@_exactly
def draw(key, stream, out, scratch):
    """out [any] becomes `noise.philox_normal([key], any, stream)`: nothing here may be contracted. scratch: [SCRATCH]."""
    normals, words = scratch[:_DRAWN], scratch[_DRAWN:SCRATCH].view(np.uint64)
    for first in range(0, len(out), _DRAWN):
        mine = out[first : first + _DRAWN]
        blocks = (len(mine) + 7) // 8
        _words(key, stream, first // 8, words[: 4 * blocks].reshape(blocks, 4))
        halves = words.view(np.int32)
        for pair in range(4 * blocks):
            normals[2 * pair], normals[2 * pair + 1] = _box_muller(halves[2 * pair], halves[2 * pair + 1])
        for i in range(len(mine)):
            mine[i] = normals[i]


@compiled
def _draw_rows(keys, streams, out, scratch):
    for b in range(len(out)):
        draw(keys[b], streams[b], out[b], scratch)


def philox_normal(seeds: Sequence[int], count: int, streams: Sequence[int]) -> Tensor:
    """`noise.philox_normal` of seeds in [0, 2^64), each with its stream: float32 [B, count]. On one thread: others spin behind torch's operations."""
    found = np.empty((len(seeds), count), np.float32)
    _draw_rows(np.array(seeds, np.uint64), np.array(streams, np.uint64), found, aligned(SCRATCH))
    return torch.from_numpy(found)
