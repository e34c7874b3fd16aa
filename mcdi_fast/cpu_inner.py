"""The inner loops of Reptile on a CPU in compiled code (numba, the extra `cpu`): `inner.inner_loop`.

Tasks go together until they have `_FEW_ROWS` rows a step: enough for a product with phi to run at its full rate, few enough that what they need
stays in a core's cache. By torch's operations a step is some hundreds of calls that each read and write the rows of all tasks. The forms of a linear
map are those of inner.py: rows of the earlier steps, or a weight of the task's own. A thread takes a share of the tasks. They do not meet but in
delta.

The first call on a machine compiles, for some seconds; numba keeps the result. Change this file with cpu_core.py, whose functions it compiles in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast.cpu_core import FAST, aligned, by_threads, compiled, copy, exp, lines, product, take
from mcdi_fast.denoiser import Parameters, depth_of
from mcdi_fast.diffusion import InnerBatch

if TYPE_CHECKING:
    from mcdi_fast.inner import Form

_f32 = np.float32
_FEW_ROWS = 160

# columns of a plan, a row a map; in and out, and their rows, are told apart by a side
_IN, _OUT, _ROWS, _OWN, _PHI, _INPUTS, _GRADIENTS, _WEIGHT = range(8)
_INTO, _OUT_OF = range(2)  # the sides: what goes into a map, gradients of what comes out of it


@njit
def _matrix(flat, at, rows, columns):
    return flat[at : at + rows * columns].reshape(rows, columns)


@njit
def _rows(p, side, rows, tasks, r):
    """Rows of all tasks on a side of the map p in step r, [tasks rows, in or out]. Those of all steps follow each other."""
    count, width = tasks * p[_ROWS], p[_IN + side]
    return _matrix(rows, p[_INPUTS + side] + r * count * width, count, width)


@njit
def _times(a, weight, side, out, beta):
    """out = a weight + beta out, or with the weight transposed for gradients, which go back."""
    if side == _INTO:
        product(a, weight, out, _f32(1), beta)
    else:
        product(a, weight.T, out, _f32(1), beta)


@njit
def _through(p, side, phi, rows, own, scores, tasks, r, rate, out, beta):
    """out = the rows on a side of the map in step r, times each task's weights, + beta out: what comes out, or the gradient of what went in."""
    now = _rows(p, side, rows, tasks, r)
    if p[_OWN]:
        for t in range(tasks):
            mine = slice(t * p[_ROWS], (t + 1) * p[_ROWS])
            _times(now[mine], _weight(p, own, t), side, out[mine], beta)
        return
    _times(now, _matrix(phi, p[_PHI], p[_IN], p[_OUT]), side, out, beta)
    for before in range(r):
        then, other = _rows(p, side, rows, tasks, before), _rows(p, 1 - side, rows, tasks, before)
        _low_rank(p, scores, tasks, rate, now, then, other, out)


@njit
def _low_rank(p, scores, tasks, rate, now, before, values, out):
    """out -= rate (now before') values, of each task by itself."""
    s = _matrix(scores, 0, p[_ROWS], p[_ROWS])
    for t in range(tasks):
        mine = slice(t * p[_ROWS], (t + 1) * p[_ROWS])
        product(now[mine], before[mine].T, s, _f32(1), _f32(0))
        product(s, values[mine], out[mine], -rate, _f32(1))


@njit
def _weight(p, own, t):
    """The weight of task t, of a map that keeps one a task."""
    size = p[_IN] * p[_OUT]
    return _matrix(own, p[_WEIGHT] + t * size, p[_IN], p[_OUT])


@njit(**FAST)
def _add_each(part, tokens, scale, out):
    """Row s of part, times scale, is added to the rows of sample s of out; only the columns that out has."""
    for i in range(len(out)):
        a, o = part[i // tokens], out[i]
        for j in range(len(o)):
            o[j] += scale * a[j]


@njit(**FAST)
def _sum_tokens(rows, tokens, scale, out):
    """The first columns of row s of out become scale times the sum over the tokens of sample s."""
    for s in range(len(out)):
        o = out[s]
        for j in range(rows.shape[1]):
            o[j] = 0
        for i in range(s * tokens, (s + 1) * tokens):
            a = rows[i]
            for j in range(rows.shape[1]):
                o[j] += a[j]
        for j in range(rows.shape[1]):
            o[j] *= scale


@njit(**FAST)
def _multiply(a, b, out):
    for i in range(len(out)):
        x, y, o = a[i], b[i], out[i]
        for j in range(len(o)):
            o[j] = x[j] * y[j]


@njit(**FAST)
def _silu(before, out, slope):
    """out = silu(before), slope its derivative."""
    for i in range(len(out)):
        v, o, d = before[i], out[i], slope[i]
        for j in range(len(o)):
            share = _f32(1) / (_f32(1) + exp(-v[j]))
            o[j] = v[j] * share
            d[j] = share + o[j] * (_f32(1) - share)


@njit(**FAST)
def _errors(net, target, mask, gain, scale, out):
    """out = the gradient of the loss with respect to net [S N, D]; returns the sum of squared errors. target [S, N, D], mask [N, D], gain [S]."""
    total = np.float64(0)
    tokens = len(mask)
    for i in range(len(net)):
        s, n = i // tokens, i % tokens
        v, t, real, o, g = net[i], target[s, n], mask[n], out[i], gain[s]
        part = _f32(0)
        for j in range(len(v)):
            error = (g * v[j] - t[j]) * real[j]
            part += error * error
            o[j] = error * g * scale
        total += part
    return total


@compiled
def _run(plan, phi, x, step, condition, gain, target, mask, sizes, rate, chunk, rows, own, scratch, losses, delta):
    """losses [B, K] and delta [P], of the tasks of x [B, K, S, N, D]. sizes: width, depth, real entries, all tasks."""
    count, inner, samples, tokens, d = x.shape
    width, depth, real, every = sizes
    scale, zero, one, share = _f32(2.0 / (samples * real)), _f32(0), _f32(1), _f32(1.0 / tokens)
    of_x, of_c, of_net = plan[0], plan[1], plan[-1]
    fan_sample = plan[3][_IN]
    for begin in range(0, count, chunk):
        tasks = min(chunk, count - begin)
        some = tasks * samples * tokens
        before, rest = take(scratch, some, width)
        du, rest = take(rest, some, width)
        slopes, rest = take(rest, depth * some, width)
        told, rest = take(rest, tasks * tokens, width)
        per_sample, rest = take(rest, tasks * samples, width)
        into_sample, rest = take(rest, tasks * samples, fan_sample)
        net, scores = take(rest, some, d)
        for p in plan:
            if p[_OWN]:
                for t in range(tasks):
                    copy(_matrix(phi, p[_PHI], p[_IN], p[_OUT]), _weight(p, own, t))
        for r in range(inner):
            for t in range(tasks):
                size = samples * tokens
                copy(x[begin + t, r].reshape(size, d), _rows(of_x, _INTO, rows, tasks, r)[t * size : (t + 1) * size])
                copy(condition[begin + t], _rows(of_c, _INTO, rows, tasks, r)[t * tokens : (t + 1) * tokens])
            h = _rows(plan[2], _INTO, rows, tasks, r)
            _through(of_x, _INTO, phi, rows, own, scores, tasks, r, rate, h, zero)
            _through(of_c, _INTO, phi, rows, own, scores, tasks, r, rate, told, zero)
            for i in range(tasks * samples):
                t = i // samples
                _add_each(told[t * tokens : (t + 1) * tokens], 1, one, h[i * tokens : (i + 1) * tokens])
            for layer in range(depth):
                of_token, of_sample, of_u = plan[2 + 3 * layer], plan[3 + 3 * layer], plan[4 + 3 * layer]
                mean = _rows(of_sample, _INTO, rows, tasks, r)
                _sum_tokens(h, tokens, share, mean)
                for i in range(tasks * samples):
                    for j in range(width, fan_sample):
                        mean[i, j] = 0
                    mean[i, width + step[begin + i // samples, r, i % samples]] = 1
                _through(of_token, _INTO, phi, rows, own, scores, tasks, r, rate, before, zero)
                _through(of_sample, _INTO, phi, rows, own, scores, tasks, r, rate, per_sample, zero)
                _add_each(per_sample, tokens, one, before)
                _silu(before, _rows(of_u, _INTO, rows, tasks, r), slopes[layer * some : (layer + 1) * some])
                then = _rows(plan[5 + 3 * layer], _INTO, rows, tasks, r)
                copy(h, then)
                _through(of_u, _INTO, phi, rows, own, scores, tasks, r, rate, then, one)
                h = then
            _through(of_net, _INTO, phi, rows, own, scores, tasks, r, rate, net, zero)
            for t in range(tasks):
                b, mine = begin + t, slice(t * samples * tokens, (t + 1) * samples * tokens)
                errors = _rows(of_net, _OUT_OF, rows, tasks, r)[mine]
                losses[b, r] = _errors(net[mine], target[b, r], mask, gain[b, r], scale, errors) / (samples * real)
            g = _rows(plan[-2], _OUT_OF, rows, tasks, r)
            _through(of_net, _OUT_OF, phi, rows, own, scores, tasks, r, rate, g, zero)
            for layer in range(depth - 1, -1, -1):
                of_token, of_sample, of_u = plan[2 + 3 * layer], plan[3 + 3 * layer], plan[4 + 3 * layer]
                _through(of_u, _OUT_OF, phi, rows, own, scores, tasks, r, rate, du, zero)
                g_token = _rows(of_token, _OUT_OF, rows, tasks, r)
                _multiply(du, slopes[layer * some : (layer + 1) * some], g_token)
                _sum_tokens(g_token, tokens, one, _rows(of_sample, _OUT_OF, rows, tasks, r))
                then = _rows(plan[1 + 3 * layer] if layer else of_x, _OUT_OF, rows, tasks, r)
                copy(g, then)
                _through(of_token, _OUT_OF, phi, rows, own, scores, tasks, r, rate, then, one)
                _through(of_sample, _OUT_OF, phi, rows, own, scores, tasks, r, rate, into_sample, zero)
                _add_each(into_sample, tokens, share, then)
                g = then
            g_told = _rows(of_c, _OUT_OF, rows, tasks, r)
            for i in range(tasks * samples):
                t, mine = i // samples, g[i * tokens : (i + 1) * tokens]
                if i % samples:
                    _add_each(mine, 1, one, g_told[t * tokens : (t + 1) * tokens])
                else:
                    copy(mine, g_told[t * tokens : (t + 1) * tokens])
            if r + 1 < inner:  # nobody reads the weights of the last step: delta comes from the rows
                for p in plan:
                    if p[_OWN]:
                        a, e = _rows(p, _INTO, rows, tasks, r), _rows(p, _OUT_OF, rows, tasks, r)
                        for t in range(tasks):
                            mine = slice(t * p[_ROWS], (t + 1) * p[_ROWS])
                            product(a[mine].T, e[mine], _weight(p, own, t), -rate, one)
        for p in plan:
            a, e = _rows(p, _INTO, rows, inner * tasks, 0), _rows(p, _OUT_OF, rows, inner * tasks, 0)
            whole = _matrix(delta, p[_PHI], p[_IN], p[_OUT])
            product(a.T, e, whole, -rate / _f32(every), one if begin else zero)


@torch.no_grad()
def inner_loop(phi: Parameters, batch: InnerBatch, inner_lr: float, forms: Sequence[Form]) -> tuple[Parameters, Tensor]:
    """`inner.inner_loop` in float32 on a CPU, on as many threads as torch has.

    forms: of each map of phi, in its order.
    """
    b, k, s, n, d = batch.x.shape
    depth, width = depth_of(phi), phi["out.token"].shape[0]
    chunk = max(1, _FEW_ROWS // (s * n))
    plan, held, weights, size = np.zeros((len(phi), 8), np.int64), 0, 0, 0
    for row, value, (count, own) in zip(plan, phi.values(), forms, strict=True):
        fan_in, fan_out = value.shape
        inputs, gradients = lines(chunk * k * count * fan_in), lines(chunk * k * count * fan_out)
        row[:] = fan_in, fan_out, count, own, size, held, held + inputs, weights
        held += inputs + gradients
        weights += lines(chunk * fan_in * fan_out) if own else 0
        size += fan_in * fan_out
    rows = chunk * s * n
    blocks = [rows * width] * 2 + [
        depth * rows * width,
        chunk * n * width,
        chunk * s * width,
        chunk * s * len(phi["block0.sample"]),
        rows * d,
    ]
    scratch = sum(map(lines, blocks)) + max(form.rows for form in forms) ** 2
    # by NumPy: behind a parallel operation of torch its threads spin for a while, on the cores that are wanted here
    flat = aligned(size)
    np.concatenate([value.numpy().ravel() for value in phi.values()], out=flat)
    mask = torch.ones(n, d, dtype=torch.float32, device="cpu") if batch.mask is None else batch.mask.contiguous()
    arrays = [t.contiguous().numpy() for t in (batch.x, batch.step, batch.condition, batch.gain, batch.target)]
    losses, sizes = np.empty((b, k), _f32), np.array([width, depth, int(mask.sum()), b])

    def run(first: int, end: int) -> np.ndarray:
        mine = [array[first:end] for array in arrays]
        *space, delta = (aligned(count) for count in (held, weights, scratch, size))
        given = plan, flat, *mine, mask.numpy(), sizes, _f32(inner_lr), chunk
        _run(*given, *space, losses[first:end], delta)
        return delta

    first, *others = by_threads(run, b)
    for other in others:
        first += other
    delta = torch.from_numpy(first).split([value.numel() for value in phi.values()])
    made = {name: part.view(value.shape) for (name, value), part in zip(phi.items(), delta, strict=True)}
    return made, torch.from_numpy(losses)
