"""A chain of few tasks on a CPU in one compiled call (numba, the extra `cpu`): the steps of `denoiser.ChainDenoiser` for a handful of rows.

A library's product packs its matrix for rows that are not there, and a step takes a dozen calls. Here a product reads eight rows of its matrix
at a time, and every row of x adds their share to what the cache holds already (docs/performance.md). Tasks do not meet: each one's result is
the same to the bit whatever the others are.

The first call on a machine compiles, for about five seconds; numba keeps the result beside this file or in the user's cache.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast.denoiser import FoldedDenoiser

_f32 = np.float32


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


@_compile
def _chain(
    x,
    condition,
    mask,
    by_token,
    by_mean,
    matrices,
    step_rows,
    steps,
    coefficients,
    cond_bias,
    task_cond_bias,
    columns,
    mean,
    own,
    u,
    out,
):
    """x [R, D] becomes the chain's end, from condition [R, C].

    Scratch: cond_bias [R, L H + D], task_cond_bias [1, L H], columns [R, D + L H], mean [B, D + L H or C], own [1, H], u [R, H], out [R, D].
    """
    rows, d = x.shape
    tasks, h = len(mean), u.shape[1]
    depth, tokens = len(step_rows), rows // tasks
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
                x[i, j] = keep * x[i, j] + mask[i % tokens, j] * (skip * x[i, j] + scale * out[i, j])


class PackedChain:
    """The matrices of a generator as the compiled chain reads them: copies of its own.

    A view would not do: torch moves a tensor's memory when the tensor is sent to another process, and frees the old.
    """

    def __init__(self, folded: FoldedDenoiser):
        """folded: on the CPU, float32."""
        self.width = folded.width
        pairs = zip(folded.token, folded.sample, strict=True)
        parts = [matrix.flatten() for pair in pairs for matrix in pair] + [folded.last.flatten()]
        by_condition = folded.condition_token, folded.condition_mean
        self._matrices = tuple(matrix.numpy().copy() for matrix in (*by_condition, torch.cat(parts)))
        self._step_rows = torch.stack([torch.cat(rows) for rows in folded.step_rows]).numpy().copy()

    def run(self, x: Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor, mask: Tensor | None) -> Tensor:
        """The end of the chain from x.

        Args:
            x: float32 [B, N, D]. condition: normalised, [B, N, C]. steps, coefficients: of `diffusion.chain_table`, float32.
            mask: float32 [N, D], 0 where a token is padded.
        """
        tasks, tokens, d = x.shape
        rows, hidden, depth = tasks * tokens, self.width, len(self._step_rows)
        width = d + depth * hidden
        end = x.reshape(rows, d).clone()
        allowed = np.ones((tokens, d), np.float32) if mask is None else mask.numpy()
        given = condition.reshape(rows, -1).contiguous().numpy()
        widest = max(width, given.shape[1])
        shapes = (rows, width), (1, width - d), (rows, width), (tasks, widest), (1, hidden), (rows, hidden), (rows, d)
        _chain(
            end.numpy(),
            given,
            allowed,
            *self._matrices,
            self._step_rows,
            steps.numpy(),
            coefficients.numpy(),
            *(np.empty(shape, np.float32) for shape in shapes),
        )
        return end.view(tasks, tokens, d)
