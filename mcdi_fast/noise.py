"""Counter-based normal noise: one seed a sample, so that a draw never depends on the batch it is drawn in, nor on who draws it.

Philox4x64-10 (Salmon et al., SC 2011) as NumPy has it, with the uniform and Box-Muller steps of Triton's `tl.randn`: a kernel draws the same
numbers to its own rounding (kernels/normal_noise.py), compiled code (cpu_noise.py) the same bits. Not Philox4x32, Triton's own default:
NumPy has the 64-bit one in C, and a meta-batch's noise takes 1.5 instead of 4.3 ms (torch.Generator, which no kernel can follow, 0.5 ms).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mcdi_fast.errors import McdiError

_CHUNK = 2**15  # normals at a time: what box_muller makes on its way stays in the cache

# for box_muller: typed, as compiled code takes a bare number for one of 64 bits
_f32, _i32 = np.float32, np.int32
_QUARTER, _HALF, _ONE, _TWO, _FOUR = _f32(0.25), _f32(0.5), _f32(1), _f32(2), _f32(4)
_UNIT, _LEAST, _TURN = _f32(4.6566127342e-10), _f32(1e-7), _f32(6.283185307179586)  # the first is just below 2^-31
_SIGN, _MANTISSA, _ROOT_HALF = _i32(31), _i32(23), _i32(0x3F3504F3)  # the last: bits of sqrt(1/2)
_LN2_HIGH, _LN2_LOW = _f32(6.9313812256e-01), _f32(9.0580006145e-06)
_L1, _L2, _L3, _L4 = _f32(0.66666662693), _f32(0.40000972152), _f32(0.28498786688), _f32(0.24279078841)
_S1, _S2, _S3 = _f32(-1.6666654611e-1), _f32(8.3321608736e-3), _f32(-1.9515295891e-4)
_C1, _C2, _C3 = _f32(4.166664568298827e-2), _f32(-1.388731625493765e-3), _f32(2.443315711809948e-5)


def box_muller(a, b):
    """Two standard normals of two random integers, int32 each: of NumPy's arrays, and compiled (cpu_noise.py) of one pair.

    Each operation is one of IEEE float32, rounded by itself, so that the bits are the same on every machine and in compiled code. Logarithm
    as in FreeBSD's logf, sine and cosine of an eighth of a turn as in Cephes' sinf: each within a unit in the last place. Change cpu_noise.py and
    cpu_chain.py with this function: numba keeps compiled code until those files change.
    """
    u = _f32(np.maximum(_f32(a ^ (a >> _SIGN)) * _UNIT, _LEAST))  # -1 - x where x < 0
    v = _f32(b ^ (b >> _SIGN)) * _UNIT
    bits = u.view(np.int32)
    power = (bits - _ROOT_HALF) >> _MANTISSA
    f = _i32(bits - (power << _MANTISSA)).view(np.float32) - _ONE  # u = 2^power (1 + f), 1 + f near 1
    exponent = _f32(power)
    s = f / (_TWO + f)
    z = s * s
    w = z * z
    h = _HALF * f * f
    r = z * (_L1 + w * _L3) + w * (_L2 + w * _L4)
    log = s * (h + r) + exponent * _LN2_LOW - h + f + exponent * _LN2_HIGH
    radius = np.sqrt(log * -_TWO)
    quarters = np.floor(v * _FOUR + _HALF)
    t = (v - quarters * _QUARTER) * _TURN
    z = t * t
    sin = ((_S3 * z + _S2) * z + _S1) * z * t + t
    cos = ((_C3 * z + _C2) * z + _C1) * z * z - _HALF * z + _ONE
    quarters = quarters - _FOUR * np.floor(quarters * _QUARTER)  # 0 to 3
    halves = np.floor(quarters * _HALF)
    odd = quarters - _TWO * halves
    even = _ONE - odd
    radius = radius - radius * halves * _TWO  # half a turn changes both signs
    return radius * (cos * even - sin * odd), radius * (sin * even + cos * odd)


Seeds = int | Sequence[int] | np.ndarray | Tensor


def philox_normal(seeds: Seeds, count: int, stream: int | Sequence[int] = 0) -> Tensor:
    """Draw `count` standard normals for each seed.

    Args:
        seeds: B integers in [0, 2^64), or one; an int64 tensor stands for their bits.
        stream: in [0, 2^64), one or one a seed: an independent sequence of the same seed (sampling: 0 the start of a chain, t + 1 its
            noise at t).

    Returns:
        float32 [B, count] on the CPU; row b depends on (seeds[b], stream) alone, entry j not on `count`.

    Raises:
        McdiError: a seed that is no integer in [0, 2^64).
    """
    keys = seed_numbers(seeds)
    streams = [stream] * len(keys) if isinstance(stream, int) else list(stream)
    pairs = (count + 1) // 2
    words = np.empty((len(keys), pairs), np.uint64)
    for row, key, number in zip(words, keys, streams, strict=True):
        row[:] = np.random.Philox(key=key, counter=np.array([0, number, 0, 0], np.uint64)).random_raw(pairs)
    bits = words.reshape(-1).view(np.int32)
    normal = np.empty(bits.shape, np.float32)
    for start in range(0, len(bits), _CHUNK):
        part, own = bits[start : start + _CHUNK], normal[start : start + _CHUNK]
        own[::2], own[1::2] = box_muller(part[::2], part[1::2])
    return torch.from_numpy(normal).view(len(keys), 2 * pairs)[:, :count]


def seed_numbers(seeds: Seeds) -> list[int]:
    """The seeds as integers in [0, 2^64); one alone makes a list of one. Raises McdiError, naming the value, for anything else."""
    if isinstance(seeds, Tensor) and seeds.dtype == torch.int64:
        if seeds.ndim > 1:
            raise McdiError(f"seeds: shape {list(seeds.shape)}, expected [B], one a task")
        return [seed % 2**64 for seed in seeds.view(-1).tolist()]
    try:
        given = list(seeds)  # type: ignore[arg-type]
    except TypeError:
        given = [seeds]  # type: ignore[list-item]
    return [_seed(seed) for seed in given]


def seed_bits(seeds: Seeds) -> Tensor:
    """int64 [B], the same 64 bits, as the kernels take seeds. Raises as `seed_numbers`."""
    return torch.from_numpy(np.array(seed_numbers(seeds), np.uint64).view(np.int64))


def _seed(value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise McdiError(f"seed {value!s:.40}: expected an integer in [0, 2^64)")
    return number


META_TRAINING, PREPARATION, REPTILE = range(3)  # what a draw is for


def draw_generator(seed: int, purpose: int, number: int) -> torch.Generator:
    """The generator of draw `number`, another one for every (seed, purpose, number), on the CPU.

    torch's own generator looks at the low 32 bits of its seed alone, so the three are mixed down to those.
    """
    mixed = np.random.SeedSequence((seed, purpose, number)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def check_seed(seed: int) -> int:
    """The seed as Python's integer. Raises McdiError unless a run can take it: its draws are numbered seed * 2^32 + step, in 63 bits."""
    number = int(seed) if isinstance(seed, np.integer) else seed
    if type(number) is not int or not 0 <= number < 2**31:
        raise McdiError(f"seed {seed!r:.40}: expected an integer from 0 to {2**31 - 1}")
    return number
