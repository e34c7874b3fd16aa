"""Trajectories of linear heads on a CPU, one task after the other in compiled code (numba, the extra `cpu`): `heads.head_trajectory`.

All of a task stays in a core's cache for all of its steps: its rows, twice (as they are and transposed: sgemm is half as quick with five rows
where it has to transpose), its head and Adam's moments. A thread takes some of the tasks. Tasks do not meet, so each one's result is the same
to the bit whatever the others and the threads are.

SAM asks for the logits of the perturbed head, X (theta + c g)' with c = rho / ||g||. They are X theta' + c X g', and with g = P X + decay theta both
X g' = (X X') P' + decay X theta' and ||g||^2 come from the products of the rows with each other, X X': where rows are fewer than half the features
that spares two of a step's four products.

The first call on a machine compiles, for some seconds; numba keeps the result. Change this file with cpu_core.py and
cpu_vectors.py, whose functions it compiles in.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast.config import PrepareConfig
from mcdi_fast.cpu_core import FAST, LINE, aligned, by_threads, compiled, copy, exp, product, take, take_lines
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS, SAM_TINY, adam_scalars

_f32 = np.float32
_REORDERED = FAST | {"fastmath": {"contract", "reassoc"}}  # sums too fill vector registers
_CANCELLED = 1e-6  # share of ||g||^2 in the sizes of its terms, below which their rounding shows in rho
_BETA1, _BETA2 = (_f32(1 - beta) for beta in ADAM_BETAS)
_KEEP2, _EPS = _f32(ADAM_BETAS[1]), _f32(ADAM_EPS)


@njit(**FAST)
def _transpose(x, out):
    rows, width = x.shape
    for first in range(0, rows, LINE):
        for j in range(width):
            for i in range(first, min(first + LINE, rows)):
                out[j, i] = x[i, j]


@njit(**FAST)
def _logits(theta, x, xt, out, keep):
    """out = theta x' + keep out."""
    if len(xt):
        product(theta, xt, out, keep)
    else:
        product(theta, x.T, out, keep)


@njit(**FAST)
def _errors(logits, labels, share, top, total, p):
    """p becomes the gradient of the loss with respect to logits [ways, rows]."""
    ways, rows = logits.shape
    top[:] = -np.inf
    total[:] = 0
    for w in range(ways):
        row = logits[w]
        for r in range(rows):
            top[r] = max(top[r], row[r])
    for w in range(ways):
        row, q = logits[w], p[w]
        for r in range(rows):
            q[r] = exp(row[r] - top[r])
            total[r] += q[r]
    for r in range(rows):
        total[r] = share[r] / total[r]
    for w in range(ways):
        q = p[w]
        for r in range(rows):
            q[r] *= total[r]
    for r in range(rows):
        p[labels[r], r] -= share[r]


@njit(**_REORDERED)
def _square(x):
    """Sum of the squares of all entries, in double precision."""
    x, found = x.ravel(), 0.0
    for i in range(len(x)):
        found += np.float64(x[i]) * np.float64(x[i])
    return found


@njit(**FAST)
def _add(scale, x, out):
    """out += scale x."""
    x, out = x.ravel(), out.ravel()
    for i in range(len(out)):
        out[i] += scale * x[i]


@njit(**FAST)
def _adam(theta, gradient, decay, first, second, rate, root):
    """`optim.adam_step` with gradient + decay theta; root: its inverse."""
    theta, gradient, first, second = theta.ravel(), gradient.ravel(), first.ravel(), second.ravel()
    for i in range(len(theta)):
        g = gradient[i] + decay * theta[i]
        first[i] += (g - first[i]) * _BETA1
        second[i] = second[i] * _KEEP2 + g * g * _BETA2
        theta[i] -= rate * first[i] / (np.sqrt(second[i]) * root + _EPS)


@njit(**_REORDERED)
def _by_products_of_rows(p, logits, offset, gram, length, theta, decay, slope):
    """slope [ways, rows] becomes X g'. Returns ||g||^2, or -1 where its terms cancel so far that it must be taken from g itself."""
    product(p, gram, slope, 0)
    square = size = 0.0
    for w in range(len(p)):
        error, row, apart, found = p[w], logits[w], offset[w], slope[w]
        own = decay * decay * _square(theta[w])
        reach = math.sqrt(own)
        for r in range(len(error)):
            pulled = decay * (row[r] - apart[r])
            own += np.float64(error[r]) * np.float64(found[r] + 2 * pulled)
            reach += abs(error[r]) * length[r]
            found[r] += pulled
        square += own
        size += reach * reach
    return square if _CANCELLED * size < square < np.inf else -1.0


@compiled
def _trajectories(
    start, features, pick, labels, share, base, trust, scalars, rho, decay, by_gram, every, found, first, end, scratch
):
    """Tasks first to end - 1 of found [B, k, ways, F + 1]. All as of `head_trajectory`, but scalars: `optim.adam_scalars` [M, 2]."""
    ways, width = start.shape[1:]
    rows = labels.shape[1]
    x, scratch = take_lines(scratch, rows, width)  # the last column of the rows is 1: the bias is a weight
    # other rows in every step are not worth transposing
    xt, scratch = take_lines(scratch, 0 if len(pick) else width, rows)
    gram, scratch = take_lines(scratch, rows if by_gram else 0, rows)
    theta, scratch = take(scratch, ways, width)
    g, scratch = take(scratch, ways, width)
    mean, scratch = take(scratch, ways, width)
    square_mean, scratch = take(scratch, ways, width)
    offset, scratch = take(scratch, ways, rows)
    logits, scratch = take(scratch, ways, rows)
    slope, scratch = take(scratch, ways, rows)
    p, scratch = take(scratch, ways, rows)
    q, scratch = take(scratch, ways, rows)
    top, total, length = np.empty(rows, _f32), np.empty(rows, _f32), np.empty(rows, _f32)
    offset[:] = 0
    for b in range(first, end):
        copy(start[b], theta)
        mean[:] = 0
        square_mean[:] = 0
        for step in range(len(scalars)):
            if step == 0 or len(pick):
                x[:, width - 1] = 1
                for i in range(rows):
                    version = pick[step, b, i] if len(pick) else 0
                    copy(features[version, b, i : i + 1], x[i : i + 1])
                if len(base):  # theta (trust x)' + base x' are the logits of base + trust theta
                    copy(base[b], g)  # to where it lies alike for every task
                    product(g, x.T, offset, 0)
                    x *= trust[b]
                if len(xt):
                    _transpose(x, xt)
                if by_gram:
                    product(x, xt, gram, 0)
                    for i in range(rows):
                        length[i] = math.sqrt(gram[i, i])
            copy(offset, logits)
            _logits(theta, x, xt, logits, 1)
            _errors(logits, labels[b], share, top, total, p)
            keep = decay
            if rho > 0:
                square = _by_products_of_rows(p, logits, offset, gram, length, theta, decay, slope) if by_gram else -1.0
                direct = square < 0
                if direct:
                    product(p, x, g, 0)
                    _add(decay, theta, g)
                    square = _square(g)
                    _logits(g, x, xt, slope, 0)
                c = _f32(rho / max(math.sqrt(square), SAM_TINY))
                _add(c, slope, logits)
                _errors(logits, labels[b], share, top, total, q)
                # q x + decay (theta + c g)
                if direct:
                    product(q, x, g, c * decay)
                else:
                    _add(c * decay, p, q)
                    product(q, x, g, 0)
                    keep += c * decay * decay
            else:
                product(p, x, g, 0)
            _adam(theta, g, keep, mean, square_mean, _f32(scalars[step, 0]), _f32(1 / scalars[step, 1]))
            if (step + 1) % every == 0:
                copy(theta, found[b, step // every])


def fits(start: Tensor, features: Tensor, labels: Tensor, pick: Tensor | None = None) -> bool:
    """Whether these heads can be trained here: on a CPU, in float32, labels that are ways and picks that are versions."""
    return (
        all(tensor.device.type == "cpu" for tensor in (start, features, labels))
        and start.dtype == features.dtype == torch.float32
        and _within(labels, start.shape[1])
        and (pick is None or _within(pick, len(features)))
    )


def _within(numbers: Tensor, end: int) -> bool:
    return numbers.numel() > 0 and int(numbers.min()) >= 0 and int(numbers.max()) < end


def head_trajectory(
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    segments: int = 1,
    pick: Tensor | None = None,
    sample_weight: Tensor | None = None,
    base: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`heads.head_trajectory` of what `fits`: [B, k, ways, F + 1]. On as many threads as torch has."""
    (tasks, rows), (ways, width) = labels.shape, start.shape[1:]
    found = start.new_empty(tasks, segments, ways, width)
    if pick is None:
        pick, features = labels.new_empty(0, 1, 1), features[:1]
    share = start.new_full((rows,), 1 / rows) if sample_weight is None else sample_weight
    about, trust = (start.new_empty(0, 1, 1), start.new_empty(0)) if base is None else base
    scalars = np.array([adam_scalars(step + 1, config.learning_rate) for step in range(config.steps)])
    # few rows, and not so small that a product costs less than what is around it
    by_gram = config.rho > 0 and not len(pick) and 2 * rows < width and rows * width > 4096
    recipe = scalars, float(config.rho), _f32(config.weight_decay), by_gram, config.steps // segments
    share, about, trust = (value.to(start) for value in (share, about, trust.flatten()))
    given = (
        value.detach().contiguous().numpy() for value in (start, features, pick.int(), labels, share, about, trust)
    )
    sizes = [rows * (width + LINE), width * (rows + LINE), rows * (rows + LINE) * by_gram]
    scratch = sum(sizes) + 4 * (ways * width + LINE) + 5 * (ways * rows + LINE)
    arguments = *given, *recipe, found.numpy()
    by_threads(lambda first, end: _trajectories(*arguments, first, end, aligned(scratch)), tasks)
    return found
