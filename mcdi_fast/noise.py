"""Counter-based normal noise: one seed a sample, so that a draw never depends on the batch it is drawn in, nor on who draws it.

Philox4x64-10 (Salmon et al., SC 2011) as NumPy has it, with the uniform and Box-Muller steps of Triton's `tl.randn`: a kernel draws the same
numbers (kernels/normal_noise.py). Not Philox4x32, Triton's own default: NumPy has the 64-bit one in C, and a meta-batch's noise takes 1.5
instead of 4.3 ms (torch.Generator, which no kernel can follow, 0.5 ms).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mcdi_fast.errors import McdiError

PER_BLOCK = 8  # normals a call of Philox: four words of 64 bits, two uniforms each


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
    bits = torch.from_numpy(words.view(np.int32)).view(len(keys), pairs, 2)
    uniform = torch.bitwise_xor(bits, bits >> 31).float().mul_(4.6566127342e-10)  # -1 - x where x < 0
    radius = uniform[..., 0].clamp_min(1e-7).log_().mul_(-2).sqrt_()
    angle = uniform[..., 1] * 6.283185307179586
    normal = torch.stack([angle.cos().mul_(radius), angle.sin_().mul_(radius)], -1)
    return normal.view(len(keys), 2 * pairs)[:, :count]


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
