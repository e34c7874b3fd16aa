"""A chain of few tasks on a CPU in one compiled call (numba, the extra `cpu`): the steps of `denoiser.ChainDenoiser` for a handful of rows.

A library's product packs its matrix for rows that are not there, and a step takes a dozen calls. Here a product reads eight rows of its matrix
at a time, and every row of x adds their share to what the cache holds already (docs/performance.md). Tasks do not meet: each one's result is
the same to the bit whatever the others are.

The first call on a machine compiles, for about five seconds; numba keeps the result beside this file or in the user's cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast.noise import box_muller

if TYPE_CHECKING:
    from mcdi_fast.generator import WeightGenerator

_f32 = np.float32
# Said in words, because a function that says nothing takes over the fastmath of whatever calls it first.
_exactly = njit(fastmath=False)
_box_muller = _exactly(box_muller)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)  # of Philox4x64
_KEY_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


@njit(inline="always")
def _exp(v):
    """e^v of a float32 to two units in the last place (Cephes expf), in operations that fill vector registers."""
    v = min(max(v, _f32(-87.0)), _f32(87.0))
    n = np.floor(v * _f32(1.44269504) + _f32(0.5))
    r = v - n * _f32(0.693359375) + n * _f32(2.12194440e-4)
    p = _f32(1.9875691500e-4)
    p = p * r + _f32(1.3981999507e-3)
    p = p * r + _f32(8.3334519073e-3)
    p = p * r + _f32(4.1665795894e-2)
    p = p * r + _f32(1.6666665459e-1)
    p = p * r + _f32(5.0000001201e-1)
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)  # 2^n, by the exponent's bits
    return (p * r * r + r + _f32(1.0)) * power


@njit(fastmath={"contract"})
def _product(rows, matrix, out):
    """out += rows[:, :width] @ matrix [width, columns]."""
    width, columns = matrix.shape
    whole = width - width % 8
    for k in range(0, whole, 8):
        w0, w1, w2, w3 = matrix[k], matrix[k + 1], matrix[k + 2], matrix[k + 3]
        w4, w5, w6, w7 = matrix[k + 4], matrix[k + 5], matrix[k + 6], matrix[k + 7]
        for i in range(len(rows)):
            x, o = rows[i], out[i]
            x0, x1, x2, x3, x4, x5, x6, x7 = x[k], x[k + 1], x[k + 2], x[k + 3], x[k + 4], x[k + 5], x[k + 6], x[k + 7]
            for j in range(columns):
                o[j] += ((x0 * w0[j] + x1 * w1[j]) + (x2 * w2[j] + x3 * w3[j])) + (
                    (x4 * w4[j] + x5 * w5[j]) + (x6 * w6[j] + x7 * w7[j])
                )
    for k in range(whole, width):
        w = matrix[k]
        for i in range(len(rows)):
            x0, o = rows[i, k], out[i]
            for j in range(columns):
                o[j] += x0 * w[j]


def _compile(function):
    try:
        return njit(cache=True, nogil=True, fastmath={"contract"})(function)
    except RuntimeError:  # no folder to keep it in
        return njit(nogil=True, fastmath={"contract"})(function)


@njit(fastmath={"contract"})
def _mean(rows, tokens, start, width, out):
    """Columns start to width of out [B, any]: the mean over the tokens of each task, of rows [B tokens, any]."""
    share = _f32(1.0 / tokens)
    for b in range(len(rows) // tokens):
        o = out[b]
        for j in range(start, width):
            o[j] = 0
        for i in range(b * tokens, b * tokens + tokens):
            row = rows[i]
            for j in range(start, width):
                o[j] += share * row[j]


@njit
def _add_to_each(rows, tokens, b, own):
    """Add own to the first columns of every row of task b."""
    for i in range(b * tokens, b * tokens + tokens):
        row = rows[i]
        for j in range(len(own)):
            row[j] += own[j]


@njit
def _take(scratch, rows, columns):
    """The first rows x columns of scratch as a matrix, and the rest of scratch."""
    return scratch[: rows * columns].reshape(rows, columns), scratch[rows * columns :]


@njit(fastmath={"contract"})
def _chain(x, tokens, condition, mask, by_token, by_mean, matrices, step_rows, steps, coefficients, scratch):
    """x [R, D] becomes the chain's end, from condition [R, C]. mask: [N or 1, D], 0 where a token is padded."""
    rows, d = x.shape
    depth, _, h = step_rows.shape
    tasks = rows // tokens
    cond_bias, scratch = _take(scratch, rows, depth * h + d)
    task_cond_bias, scratch = _take(scratch, 1, depth * h)
    columns, scratch = _take(scratch, rows, d + depth * h)
    mean, scratch = _take(scratch, tasks, max(d + depth * h, condition.shape[1]))
    own, scratch = _take(scratch, 1, h)
    u, scratch = _take(scratch, rows, h)
    out, scratch = _take(scratch, rows, d)
    cond_bias[:] = 0
    _product(condition, by_token, cond_bias)
    _mean(condition, tokens, 0, condition.shape[1], mean)
    for b in range(tasks):
        task_cond_bias[:] = 0
        _product(mean[b : b + 1], by_mean, task_cond_bias)
        _add_to_each(cond_bias, tokens, b, task_cond_bias[0])
    for s in range(len(steps)):
        for i in range(rows):
            for j in range(d):
                columns[i, j] = x[i, j]
        at = 0
        for layer in range(depth):
            start, width = (d + (layer - 1) * h if layer else 0), d + layer * h
            pair = matrices[at : at + 2 * width * h].reshape(2, width, h)
            token, sample = pair[0], pair[1]
            _mean(columns, tokens, start, width, mean)
            for i in range(rows):
                for j in range(h):
                    u[i, j] = cond_bias[i, layer * h + j]
            for b in range(tasks):
                for j in range(h):
                    own[0, j] = step_rows[layer, steps[s], j]
                _product(mean[b : b + 1], sample, own)
                _add_to_each(u, tokens, b, own[0])
            _product(columns, token, u)
            for i in range(rows):
                for j in range(h):
                    v = u[i, j]
                    columns[i, width + j] = v / (_f32(1.0) + _exp(-v))
            at += 2 * width * h
        for i in range(rows):
            for j in range(d):
                out[i, j] = cond_bias[i, depth * h + j]
        _product(columns, matrices[at:].reshape(d + depth * h, d), out)
        keep, skip, scale = coefficients[s, 0], coefficients[s, 1], coefficients[s, 2]
        for i in range(rows):
            for j in range(d):
                x[i, j] = keep * x[i, j] + mask[i % tokens % len(mask), j] * (skip * x[i, j] + scale * out[i, j])


@_exactly
def _words(key, block):
    """Philox4x64-10: the four words of a block of the stream 0 of a seed (noise.py)."""
    c0, c1, c2, c3 = np.uint64(block + 1), np.uint64(0), np.uint64(0), np.uint64(0)
    k0, k1 = key, np.uint64(0)
    for _ in range(10):
        high0, low0 = _high(_MULTIPLIERS[0], c0), _MULTIPLIERS[0] * c0
        high1, low1 = _high(_MULTIPLIERS[1], c2), _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
    return c0, c1, c2, c3


@_exactly
def _high(a, b):
    """The upper 64 bits of a product."""
    a0, a1, b0, b1 = a & _LOW, a >> _32, b & _LOW, b >> _32
    middle = a1 * b0 + (a0 * b0 >> _32)
    return a1 * b1 + (middle >> _32) + (a0 * b1 + (middle & _LOW) >> _32)


@_exactly
def _draw(keys, out):
    """out [B, any] becomes `noise.philox_normal(keys, any)`, to the bit: nothing here may be contracted."""
    count = out.shape[1]
    for b in range(len(keys)):
        o = out[b]
        for block in range((count + 7) // 8):
            at = 8 * block
            for word in _words(keys[b], block):
                cos, sin = _box_muller(np.int32(word & _LOW), np.int32(word >> _32))
                if at < count:
                    o[at] = cos
                if at + 1 < count:
                    o[at + 1] = sin
                at += 2


@_compile
def _sample(
    keys,
    condition,
    position,
    mask,
    of_condition,
    of_weights,
    by_token,
    by_mean,
    matrices,
    step_rows,
    steps,
    coefficients,
    scratch,
    x,
):
    """x [B, N, D] becomes weights, from seeds [B] and raw conditions [B, N, C].

    position: [N, P] or [1, 0]. of_condition, of_weights: mean and deviation [2, N or 1, C or D]. The rest as of `_chain`.
    """
    tasks, tokens, d = x.shape
    rows, c, own = tasks * tokens, condition.shape[2], of_condition.shape[1]
    _draw(keys, x.reshape(tasks, tokens * d))
    x, condition = x.reshape(rows, d), condition.reshape(rows, c)
    told, scratch = _take(scratch, rows, c + position.shape[1])
    for i in range(rows):
        token = i % tokens
        for j in range(c):
            told[i, j] = (condition[i, j] - of_condition[0, token % own, j]) / of_condition[1, token % own, j]
        for j in range(position.shape[1]):
            told[i, c + j] = position[token, j]
        for j in range(d):
            x[i, j] *= mask[token % len(mask), j]
    _chain(x, tokens, told, mask, by_token, by_mean, matrices, step_rows, steps, coefficients, scratch)
    own = of_weights.shape[1]
    for i in range(rows):
        for j in range(d):
            x[i, j] = x[i, j] * of_weights[1, i % tokens % own, j] + of_weights[0, i % tokens % own, j]


class PackedChain:
    """What a generator is made of as the compiled chain reads it: copies of its own.

    A view would not do: torch moves a tensor's memory when the tensor is sent to another process, and frees the old.
    """

    def __init__(self, generator: WeightGenerator, mask: Tensor | None):
        """generator: on the CPU. mask: float32 [N, D], 0 for padding; None where none is."""
        folded = generator.folded()
        last, *factors = folded.last
        for factor in factors:  # of wide tokens: for a few rows one product is quicker, though larger
            last = (last.double() @ factor.double()).float()
        pairs = zip(folded.token, folded.sample, strict=True)
        parts = [matrix.flatten() for pair in pairs for matrix in pair] + [last.flatten()]
        normalizers = [torch.stack([n.mean, n.std]) for n in (generator.condition_normalizer, generator.normalizer)]
        step_rows = torch.stack([torch.cat(rows) for rows in folded.step_rows])
        mask = torch.ones(1, folded.token_width, dtype=torch.float32, device="cpu") if mask is None else mask
        every = mask, *normalizers, folded.condition_token, folded.condition_mean, torch.cat(parts), step_rows
        self._constants = tuple(np.array(tensor.numpy()) for tensor in (generator.layout.position(), *every))
        self._width, (self._depth, _, self._hidden) = folded.token_width, step_rows.shape

    def sample(self, seeds: list[int] | Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor) -> Tensor:
        """Weights [B, N, D] by the noise-free chain.

        Args:
            seeds: as `noise.seed_numbers` makes them, or an int64 tensor of their bits. condition: float32 [B, N, C], raw.
            steps, coefficients: of `diffusion.chain_table`, float32.
        """
        if isinstance(seeds, Tensor):
            keys = seeds.cpu().contiguous().numpy().view(np.uint64)
        else:
            keys = np.array(seeds, np.uint64)
        tasks, tokens, c = condition.shape
        rows, d, units = tasks * tokens, self._width, self._depth * self._hidden
        told = c + self._constants[0].shape[1]
        size = rows * (told + 2 * (units + d) + self._hidden + d) + units + tasks * max(d + units, told) + self._hidden
        x = np.empty((tasks, tokens, d), np.float32)
        given = condition.detach().contiguous().numpy()
        tables = steps.numpy(), coefficients.numpy()
        _sample(keys, given, *self._constants, *tables, np.empty(size, np.float32), x)
        return torch.from_numpy(x)
