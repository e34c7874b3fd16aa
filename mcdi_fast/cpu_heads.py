"""Trajectories of linear heads on a CPU, one task after the other in compiled code (numba, the extra `cpu`): `heads.head_trajectory`.

All of a task stays in a core's cache for all of its steps: its rows, twice (as they are and transposed, so that both products run along memory),
its head and Adam's moments. A thread takes some of the tasks. Tasks do not meet, so each one's result is the same to the bit whatever the others
and the threads are.

SAM asks for the logits of the perturbed head, X (theta + c g)' with c = rho / ||g||. They are X theta' + c X g', and with g = P X + decay theta both
X g' = (X X') P' + decay X theta' and ||g||^2 come from the products of the rows with each other, X X': where rows are fewer than features
that spares two of a step's four products.

The first call on a machine compiles, for some seconds; numba keeps the result. Change this file with cpu_chain.py, whose functions it compiles in.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast.config import PrepareConfig
from mcdi_fast.cpu_chain import _exp, _product
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS, SAM_TINY, adam_scalars

_f32 = np.float32
_FAST: dict[str, Any] = {
    "fastmath": {"contract"},
    "error_model": "numpy",
}  # numpy's: a division that looks for zeros is not vectorised
_FEW = 5
_LANES = 16  # rows and columns come in multiples of these: what is over goes one by one
_CANCELLED = 1e-6  # share of ||g||^2 in the sizes of its terms, below which their rounding shows in rho
_BETA1, _BETA2 = (_f32(1 - beta) for beta in ADAM_BETAS)
_KEEP2, _EPS = _f32(ADAM_BETAS[1]), _f32(ADAM_EPS)


def _compile(function):
    try:
        return njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in
        return njit(nogil=True, fastmath={"contract"}, error_model="numpy")(function)


@njit(fastmath={"contract"}, error_model="numpy")  # numpy's: a division that looks for zeros is not vectorised
def _add_product(rows, matrix, out):
    """out += rows @ matrix, five rows at a time: four rows of the matrix are read for twenty products."""
    width, columns = matrix.shape
    whole = len(rows) - len(rows) % _FEW
    for i in range(0, whole, _FEW):
        a, b, c, d, e = rows[i], rows[i + 1], rows[i + 2], rows[i + 3], rows[i + 4]
        oa, ob, oc, od, oe = out[i], out[i + 1], out[i + 2], out[i + 3], out[i + 4]
        for k in range(0, width, 4):
            w0, w1, w2, w3 = matrix[k], matrix[k + 1], matrix[k + 2], matrix[k + 3]
            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
            b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            c0, c1, c2, c3 = c[k], c[k + 1], c[k + 2], c[k + 3]
            d0, d1, d2, d3 = d[k], d[k + 1], d[k + 2], d[k + 3]
            e0, e1, e2, e3 = e[k], e[k + 1], e[k + 2], e[k + 3]
            for j in range(columns):
                x0, x1, x2, x3 = w0[j], w1[j], w2[j], w3[j]
                oa[j] += (a0 * x0 + a1 * x1) + (a2 * x2 + a3 * x3)
                ob[j] += (b0 * x0 + b1 * x1) + (b2 * x2 + b3 * x3)
                oc[j] += (c0 * x0 + c1 * x1) + (c2 * x2 + c3 * x3)
                od[j] += (d0 * x0 + d1 * x1) + (d2 * x2 + d3 * x3)
                oe[j] += (e0 * x0 + e1 * x1) + (e2 * x2 + e3 * x3)
    _product(rows[whole:], matrix, out[whole:])


@njit(fastmath={"contract"}, error_model="numpy")
def _errors(logits, labels, share, top, total, p):
    """p becomes the gradient of the loss with respect to logits [ways, rows]."""
    ways, rows = logits.shape
    top[:] = logits[0]
    total[:] = 0
    for w in range(1, ways):
        row = logits[w]
        for r in range(rows):
            top[r] = max(top[r], row[r])
    for w in range(ways):
        row, q = logits[w], p[w]
        for r in range(rows):
            q[r] = _exp(row[r] - top[r])
            total[r] += q[r]
    for r in range(rows):
        total[r] = share[r] / total[r]
    for w in range(ways):
        q = p[w]
        for r in range(rows):
            q[r] *= total[r]
    for r in range(rows):
        p[labels[r], r] -= share[r]


@njit(fastmath={"contract", "reassoc"})
def _dot(a, b):
    """Sum of the products of all entries, in double precision."""
    found = 0.0
    for i in range(len(a)):
        x, y = a[i], b[i]
        for j in range(len(x)):
            found += np.float64(x[j]) * np.float64(y[j])
    return found


@njit(fastmath={"contract"}, error_model="numpy")
def _scaled_sum(a, x, b, y, out):
    """out = a x + b y."""
    for i in range(len(out)):
        xi, yi, oi = x[i], y[i], out[i]
        for j in range(len(oi)):
            oi[j] = a * xi[j] + b * yi[j]


@njit(fastmath={"contract"}, error_model="numpy")
def _adam(theta, gradient, first, second, rate, root):
    """`optim.adam_step`; root: its inverse."""
    for i in range(len(theta)):
        t, g, m, v = theta[i], gradient[i], first[i], second[i]
        for j in range(len(t)):
            m[j] += (g[j] - m[j]) * _BETA1
            v[j] = v[j] * _KEEP2 + g[j] * g[j] * _BETA2
            t[j] -= rate * m[j] / (np.sqrt(v[j]) * root + _EPS)


@njit(fastmath={"contract"}, error_model="numpy")
def _by_products_of_rows(p, logits, gram, theta, decay, slope):
    """slope [ways, rows] becomes X g'. Returns ||g||^2, or -1 where its terms cancel so far that it must be taken from g itself."""
    slope[:] = 0
    _add_product(p, gram, slope)
    double = np.float64(decay)
    square = _dot(p, slope) + 2 * double * _dot(p, logits) + double * double * _dot(theta, theta)
    size = 0.0
    for w in range(len(p)):
        reach = double * math.sqrt(_dot(theta[w : w + 1], theta[w : w + 1]))
        for r in range(len(gram)):
            reach += abs(p[w, r]) * math.sqrt(gram[r, r])
        size += reach * reach
    _scaled_sum(_f32(1), slope, decay, logits, slope)
    return square if _CANCELLED * size < square < np.inf else -1.0


@_compile
def _trajectories(start, features, labels, share, scalars, rho, decay, by_gram, every, found):
    """found [B, k, ways, F + 1] from start [B, ways, F + 1], features [B, R, F], labels [B, R], share [R] and `optim.adam_scalars` [M, 2]."""
    tasks, ways, width = start.shape
    rows = features.shape[1]
    r, d = (rows + _LANES - 1) // _LANES * _LANES, (width + _LANES - 1) // _LANES * _LANES
    x, xt = np.zeros((r, d), _f32), np.zeros((d, r), _f32)  # the last column of the rows is 1: the bias is a weight
    gram = np.zeros((r, r) if by_gram else (0, 0), _f32)
    logits, p, slope, q = (
        np.zeros((ways, r), _f32),
        np.zeros((ways, r), _f32),
        np.zeros((ways, r), _f32),
        np.zeros((ways, r), _f32),
    )
    theta, g, first, second = (
        np.zeros((ways, d), _f32),
        np.zeros((ways, d), _f32),
        np.zeros((ways, d), _f32),
        np.zeros((ways, d), _f32),
    )
    top, total, label, part = np.empty(r, _f32), np.empty(r, _f32), np.zeros(r, np.int64), np.zeros(r, _f32)
    part[:rows] = share
    for b in range(tasks):
        first[:] = 0
        second[:] = 0
        theta[:] = 0  # what is over too: a task before may have left NaN there
        theta[:, :width] = start[b]
        label[:rows] = labels[b]
        for i in range(rows):
            x[i, : width - 1] = features[b, i]
            x[i, width - 1] = 1
        for i in range(0, rows, _LANES):
            for j in range(width):
                for k in range(i, i + _LANES):
                    xt[j, k] = x[k, j]
        if by_gram:
            gram[:] = 0
            _add_product(x, xt, gram)
        for step in range(len(scalars)):
            logits[:] = 0
            _add_product(theta, xt, logits)
            _errors(logits, label, part, top, total, p)
            if rho > 0:
                square = _by_products_of_rows(p, logits, gram, theta, decay, slope) if by_gram else -1.0
                direct = square < 0
                if direct:
                    _scaled_sum(decay, theta, _f32(0), theta, g)
                    _add_product(p, x, g)
                    square = _dot(g, g)
                    slope[:] = 0
                    _add_product(g, xt, slope)
                c = _f32(rho / max(math.sqrt(square), SAM_TINY))
                _scaled_sum(_f32(1), logits, c, slope, slope)
                _errors(slope, label, part, top, total, q)
                if direct:
                    _scaled_sum(decay, theta, c * decay, g, g)
                else:
                    _scaled_sum(decay + c * decay * decay, theta, _f32(0), theta, g)
                    _scaled_sum(_f32(1), q, c * decay, p, q)
                _add_product(q, x, g)
            else:
                _scaled_sum(decay, theta, _f32(0), theta, g)
                _add_product(p, x, g)
            _adam(theta, g, first, second, _f32(scalars[step, 0]), _f32(1 / scalars[step, 1]))
            if (step + 1) % every == 0:
                found[b, step // every] = theta[:, :width]


def fits(start: Tensor, features: Tensor, labels: Tensor) -> bool:
    """Whether these heads can be trained here: on a CPU, in float32, one version of every row, labels that are ways."""
    tensors = start, features, labels
    return (
        all(tensor.device.type == "cpu" for tensor in tensors)
        and start.dtype == features.dtype == torch.float32
        and len(features) == 1
        and labels.numel() > 0
        and int(labels.min()) >= 0
        and int(labels.max()) < start.shape[1]
    )


def head_trajectory(
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    segments: int = 1,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`heads.head_trajectory` of what `fits`: [B, k, ways, F + 1]. On as many threads as torch has."""
    tasks, rows = labels.shape
    found = start.new_empty(tasks, segments, *start.shape[1:])
    share = start.new_full((rows,), 1 / rows) if sample_weight is None else sample_weight.to(start)
    given = [tensor.detach().contiguous().numpy() for tensor in (start, features[0], labels, share)]
    scalars = np.array([adam_scalars(step + 1, config.learning_rate) for step in range(config.steps)])
    by_gram = config.rho > 0 and 2 * rows < start.shape[-1]
    rest = scalars, config.rho, _f32(config.weight_decay), by_gram, config.steps // segments
    threads = min(torch.get_num_threads(), tasks)

    def some(number: int) -> None:
        mine = slice(number * tasks // threads, (number + 1) * tasks // threads)
        *by_task, weights = given
        _trajectories(*(array[mine] for array in by_task), weights, *rest, found.numpy()[mine])

    if threads == 1:
        some(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, range(threads)))
    return found
