"""The inner loops of Reptile on a CPU in compiled code (numba, the extra `cpu`): `inner.inner_loop`.

Tasks go together until they have `_FEW_ROWS` rows a step: enough for a product with phi to run at its full rate, few enough that what they need
stays in a core's cache. By torch's operations a step is some hundreds of calls that each read and write the rows of all tasks. The forms of a linear
map are those of inner.py: rows of the earlier steps, or a weight of the task's own. A thread takes a share of the tasks. They do not meet but in
delta. Gradients are those of -rate times the loss: the steps themselves. The condition is the same in all steps, so the sum of its gradients does for
it: c W = c phi + c c' (sum of the earlier gradients).

Where the processor has tile units and `precision` allows for them, products are theirs (cpu_tiles.py); phi is packed once a call.

The first call on a machine compiles, for some seconds; numba keeps the result. Change this file with cpu_core.py, cpu_vectors.py and cpu_tiles.py,
whose functions it compiles in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mcdi_fast import cpu_tiles
from mcdi_fast.backend import DEFAULT_PRECISION, one_thread
from mcdi_fast.cpu_core import FAST, aligned, bare, by_threads, compiled, copy, exp, kept, lines, matrix, product, take
from mcdi_fast.denoiser import Parameters, depth_of
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.outer import flattened, named_views

if TYPE_CHECKING:
    from mcdi_fast.inner import Form

_f32 = np.float32
_FEW_ROWS = 160
_TILES = cpu_tiles.assembled  # a constant, by which numba leaves out what is not

# columns of a plan, a row a map; in and out, and their rows, are told apart by a side. Rows are kept of so many steps
_IN, _OUT, _ROWS, _OWN, _STEPS, _PHI, _INPUTS, _GRADIENTS, _WEIGHT, _PANELS = range(10)
_INTO, _OUT_OF = range(2)  # the sides: what goes into a map, gradients of what comes out of it


@njit
def _rows(p, side, rows, tasks, r):
    """Rows of all tasks on a side of the map p in step r, [tasks rows, in or out]. Those of the steps that are kept follow each other."""
    count, width = tasks * p[_ROWS], p[_IN + side]
    return matrix(rows, p[_INPUTS + side] + r % p[_STEPS] * count * width, count, width)


@njit
def _product(a, b, out, add, space):
    """out = a b (+ out), on tile units where there is a workspace for them and they are quicker."""
    if _TILES and len(space) and cpu_tiles.worth(len(a), *b.shape):
        cpu_tiles.product(a, b, out, add, space)
    else:
        product(a, b, out, add)


@njit
def _through(p, side, phi, panels, rows, own, scores, space, tasks, r, out, add):
    """out = the rows on a side of the map in step r, times each task's weights (+ out): what comes out, or the gradient of what went in."""
    now = _rows(p, side, rows, tasks, r)
    if p[_OWN] and r:  # the first step is phi's
        for t in range(tasks):
            mine = slice(t * p[_ROWS], (t + 1) * p[_ROWS])
            weight = _weight(p, own, t)
            if side == _INTO:
                _product(now[mine], weight, out[mine], add, space)
            else:
                _product(now[mine], weight.T, out[mine], add, space)
        return
    weight = matrix(phi, p[_PHI], p[_IN], p[_OUT])
    if _TILES and len(space):
        cpu_tiles.times(now, panels[p[_PANELS + side] :], out, add, space)
    elif side == _INTO:
        product(now, weight, out, add)
    else:
        product(now, weight.T, out, add)
    if r:
        _low_rank(p, side, rows, scores, space, tasks, r, out)


@njit
def _low_rank(p, side, rows, scores, space, tasks, r, out):
    """out += (now before') values of the steps before r, of each task by itself. Scores are made transposed: `now` is packed once for all."""
    now, s = _rows(p, side, rows, tasks, r), matrix(scores, 0, p[_ROWS], p[_ROWS])
    tiles = _TILES and len(space) and cpu_tiles.worth_of_scores(p[_ROWS], p[_IN + side])
    packed = space[cpu_tiles.workspace_of_left(p[_IN + side]) :]
    for t in range(tasks):
        mine = slice(t * p[_ROWS], (t + 1) * p[_ROWS])
        if _TILES and tiles:
            cpu_tiles.pack(now[mine], False, packed, space)
        for before in range(min(r, p[_STEPS])):
            then, values = _rows(p, side, rows, tasks, before)[mine], _rows(p, 1 - side, rows, tasks, before)[mine]
            if _TILES and tiles:
                cpu_tiles.times(then, packed, s, False, space)
            else:
                product(then, now[mine].T, s, False)
            _product(s.T, values, out[mine], True, space)


@njit
def _learn(p, phi, rows, own, space, tasks, r, last, update, delta):
    """The SGD step of tasks that keep a weight each, and delta's. Nobody reads the weights after the last step."""
    a, e = _rows(p, _INTO, rows, tasks, r), _rows(p, _OUT_OF, rows, tasks, r)
    whole = matrix(delta, p[_PHI], p[_IN], p[_OUT])
    step = matrix(update, 0, p[_IN], p[_OUT])
    for t in range(tasks):
        mine = slice(t * p[_ROWS], (t + 1) * p[_ROWS])
        if last:
            _product(a[mine].T, e[mine], whole, True, space)
        else:
            _product(a[mine].T, e[mine], step, False, space)
            weight = _weight(p, own, t)
            if r == 0:
                copy(matrix(phi, p[_PHI], p[_IN], p[_OUT]), weight)
            _add_step(step, weight, whole)


@njit(**FAST)
def _add_step(step, weight, delta):
    for i in range(len(step)):
        s, w, d = step[i], weight[i], delta[i]
        for j in range(len(s)):
            w[j] += s[j]
            d[j] += s[j]


@njit
def _weight(p, own, t):
    """The weight of task t, of a map that keeps one a task."""
    size = p[_IN] * p[_OUT]
    return matrix(own, p[_WEIGHT] + t * size, p[_IN], p[_OUT])


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


@njit(**(FAST | {"fastmath": {"contract", "reassoc"}}))  # so that the sum fills vector registers
def _errors(net, target, mask, gain, scale, out):
    """The sum of squared errors; out = scale / 2 times its gradient by net [S N, D]. target [S, N, D], mask [N, D], gain [S]."""
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
def _run(
    plan,
    phi,
    x,
    step,
    condition,
    gain,
    target,
    mask,
    sizes,
    rate,
    chunk,
    rows,
    own,
    scratch,
    panels,
    space,
    losses,
    delta,
):
    """losses [B, K] and delta [P], summed over the tasks, of x [B, K, S, N, D]. sizes: width, depth, real entries."""
    count, inner, samples, tokens, d = x.shape
    width, depth, real = sizes
    scale, one, share = _f32(-rate * 2.0 / (samples * real)), _f32(1), _f32(1.0 / tokens)
    plan, phi, x, step, condition = bare(plan), bare(phi), bare(x), bare(step), bare(condition)
    gain, target, mask, losses, delta = bare(gain), bare(target), bare(mask), bare(losses), bare(delta)
    rows, own, scratch, panels, space = bare(rows), bare(own), bare(scratch), bare(panels), bare(space)
    delta[:] = 0
    of_x, of_c, of_net = plan[0], plan[1], plan[-1]
    fan_sample = plan[3][_IN]
    if _TILES and len(space):
        cpu_tiles.prepare(space)
        for p in plan:
            weight = matrix(phi, p[_PHI], p[_IN], p[_OUT])
            cpu_tiles.pack(weight.T, False, panels[p[_PANELS + _INTO] :], space)
            cpu_tiles.pack(weight, False, panels[p[_PANELS + _OUT_OF] :], space)
    for begin in range(0, count, chunk):
        tasks = min(chunk, count - begin)
        some = tasks * samples * tokens
        before, rest = take(scratch, some, width)
        du, rest = take(rest, some, width)
        slopes, rest = take(rest, depth * some, width)
        told, rest = take(rest, tasks * tokens, width)
        by_phi, rest = take(rest, tasks * tokens, width)
        per_sample, rest = take(rest, tasks * samples, width)
        into_sample, rest = take(rest, tasks * samples, fan_sample)
        net, rest = take(rest, some, d)
        scores = update = rest  # a map has one or the other
        c, g_told = _rows(of_c, _INTO, rows, tasks, 0), _rows(of_c, _OUT_OF, rows, tasks, 0)
        for t in range(tasks):
            copy(condition[begin + t], c[t * tokens : (t + 1) * tokens])
        _through(of_c, _INTO, phi, panels, rows, own, scores, space, tasks, 0, by_phi, False)
        for r in range(inner):
            for t in range(tasks):
                size = samples * tokens
                copy(x[begin + t, r].reshape(size, d), _rows(of_x, _INTO, rows, tasks, r)[t * size : (t + 1) * size])
            h = _rows(plan[2], _INTO, rows, tasks, r)
            _through(of_x, _INTO, phi, panels, rows, own, scores, space, tasks, r, h, False)
            copy(by_phi, told)
            if r:
                _low_rank(of_c, _INTO, rows, scores, space, tasks, r, told)
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
                _through(of_token, _INTO, phi, panels, rows, own, scores, space, tasks, r, before, False)
                _through(of_sample, _INTO, phi, panels, rows, own, scores, space, tasks, r, per_sample, False)
                _add_each(per_sample, tokens, one, before)
                _silu(before, _rows(of_u, _INTO, rows, tasks, r), slopes[layer * some : (layer + 1) * some])
                then = _rows(plan[5 + 3 * layer], _INTO, rows, tasks, r)
                copy(h, then)
                _through(of_u, _INTO, phi, panels, rows, own, scores, space, tasks, r, then, True)
                h = then
            _through(of_net, _INTO, phi, panels, rows, own, scores, space, tasks, r, net, False)
            for t in range(tasks):
                b, mine = begin + t, slice(t * samples * tokens, (t + 1) * samples * tokens)
                errors = _rows(of_net, _OUT_OF, rows, tasks, r)[mine]
                losses[b, r] = _errors(net[mine], target[b, r], mask, gain[b, r], scale, errors) / (samples * real)
            g = _rows(plan[-2], _OUT_OF, rows, tasks, r)
            _through(of_net, _OUT_OF, phi, panels, rows, own, scores, space, tasks, r, g, False)
            for layer in range(depth - 1, -1, -1):
                of_token, of_sample, of_u = plan[2 + 3 * layer], plan[3 + 3 * layer], plan[4 + 3 * layer]
                _through(of_u, _OUT_OF, phi, panels, rows, own, scores, space, tasks, r, du, False)
                g_token = _rows(of_token, _OUT_OF, rows, tasks, r)
                _multiply(du, slopes[layer * some : (layer + 1) * some], g_token)
                _sum_tokens(g_token, tokens, one, _rows(of_sample, _OUT_OF, rows, tasks, r))
                then = _rows(plan[1 + 3 * layer] if layer else of_x, _OUT_OF, rows, tasks, r)
                copy(g, then)
                _through(of_token, _OUT_OF, phi, panels, rows, own, scores, space, tasks, r, then, True)
                _through(of_sample, _OUT_OF, phi, panels, rows, own, scores, space, tasks, r, into_sample, False)
                _add_each(into_sample, tokens, share, then)
                g = then
            for i in range(tasks * samples):
                t, mine = i // samples, g[i * tokens : (i + 1) * tokens]
                if r or i % samples:
                    _add_each(mine, 1, one, g_told[t * tokens : (t + 1) * tokens])
                else:
                    copy(mine, g_told[t * tokens : (t + 1) * tokens])
            for p in plan:
                if p[_OWN]:
                    _learn(p, phi, rows, own, space, tasks, r, r + 1 == inner, update, delta)
        for p in plan:
            if not p[_OWN]:
                a, e = _rows(p, _INTO, rows, p[_STEPS] * tasks, 0), _rows(p, _OUT_OF, rows, p[_STEPS] * tasks, 0)
                _product(a.T, e, matrix(delta, p[_PHI], p[_IN], p[_OUT]), True, space)


def crossover(rows: int, precision: str) -> float:
    """Of `inner.stacked_is_cheaper`, for so many rows of a task and step.

    Measured on one thread of Intel and on two of AMD, widths 64 to 256, K = 2, 3 and 5: in float32 0.55 to 0.65; by tile units the same from the rows
    on that they take a task's products, 0.75 to 0.95 below, as the low-rank terms' scores are theirs before.
    """
    return 0.9 if cpu_tiles.used(precision) and rows < cpu_tiles.ROWS else 0.6


class _Plan(NamedTuple):
    """maps: a row for each, of the columns above. parts: float32 of the workspace's parts, `ends` of them in memory. size: of phi."""

    maps: np.ndarray
    parts: tuple[int, ...]
    ends: list[int]
    size: int


@lru_cache(maxsize=16)
def _planned(
    shapes: tuple[tuple[str, tuple[int, int]], ...], forms: tuple[Form, ...], batch: tuple[int, ...], tiles: bool
) -> _Plan:
    """Of phi's matrices by name and x [tasks at a time, K, S, N, D]."""
    chunk, k, s, n, d = batch
    maps, held, weights, size, panels, summed, right = np.zeros((len(shapes), 11), np.int64), 0, 0, 0, 0, 0, 0
    for row, (name, (fan_in, fan_out)), (count, own) in zip(maps, shapes, forms, strict=True):
        constant = name == "in.condition"
        own, steps = own and not constant, 1 if own or constant else k
        every = chunk * count * steps  # rows that are kept
        inputs, gradients = lines(every * fan_in), lines(every * fan_out)
        into, out_of = (cpu_tiles.packed(*sides) for sides in ((fan_in, fan_out), (fan_out, fan_in)))
        row[:] = fan_in, fan_out, count, own, steps, size, held, held + inputs, weights, panels, panels + into
        held += inputs + gradients
        weights += lines(chunk * fan_in * fan_out) if own else 0
        size += fan_in * fan_out
        panels += into + out_of
        summed = max(summed, every, fan_in, fan_out)
        right = max(
            right, *(cpu_tiles.packed(*sides) for sides in ((every, fan_in), (every, fan_out), (fan_in, fan_out)))
        )
    sizes = dict(shapes)
    depth, (width, _), (fan_sample, _) = depth_of(sizes), sizes["out.token"], sizes["block0.sample"]
    rows, told, samples = chunk * s * n * width, chunk * n * width, chunk * s
    blocks = (rows, rows, depth * rows, told, told, samples * width, samples * fan_sample, chunk * s * n * d)
    products = max(*(form.rows**2 for form in forms), *(fan_in * fan_out for _, (fan_in, fan_out) in shapes))
    for_tiles = (panels, cpu_tiles.workspace(summed, right)) if tiles else (0, 0)
    parts = (held, weights, sum(map(lines, blocks)) + products, *for_tiles)
    return _Plan(maps, parts, np.cumsum([0, *map(lines, parts)]).tolist(), size)


@torch.no_grad()
def inner_loop(
    phi: Parameters, batch: InnerBatch, inner_lr: float, forms: Sequence[Form], precision: str = DEFAULT_PRECISION
) -> tuple[Parameters, Tensor]:
    """`inner.inner_loop` in float32 on a CPU, on as many threads as torch has.

    forms: of each map of phi, in its order. precision: "ieee" for none by tile units.
    """
    b, k, s, n, d = batch.x.shape
    chunk = max(1, _FEW_ROWS // (s * n))
    shapes = {name: (value.shape[0], value.shape[1]) for name, value in phi.items()}
    maps, parts, ends, size = _planned(
        tuple(shapes.items()), tuple(forms), (chunk, k, s, n, d), cpu_tiles.used(precision)
    )
    with one_thread(
        True
    ):  # behind a parallel operation of torch its threads spin for a while, on the cores that are wanted here
        flat = flattened(phi).numpy()
    mask = torch.ones(n, d, dtype=torch.float32, device="cpu") if batch.mask is None else batch.mask.contiguous()
    arrays = [t.contiguous().numpy() for t in (batch.x, batch.step, batch.condition, batch.gain, batch.target)]
    losses, sizes = np.empty((b, k), _f32), np.array([shapes["out.token"][0], depth_of(phi), int(mask.sum())])

    def run(first: int, end: int) -> np.ndarray:
        mine, delta, memory = [array[first:end] for array in arrays], aligned(size), kept(ends[-1])
        space = [memory[start : start + count] for start, count in zip(ends, parts, strict=False)]
        _run(maps, flat, *mine, mask.numpy(), sizes, _f32(inner_lr), chunk, *space, losses[first:end], delta)
        return delta

    first, *others = by_threads(run, b)
    for other in others:
        first += other
    first /= b
    return named_views(torch.from_numpy(first), shapes), torch.from_numpy(losses)
