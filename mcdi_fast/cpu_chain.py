"""Chains on a CPU in compiled code (numba, the extra `cpu`): the steps of `denoiser.ChainDenoiser`, a share of the tasks a thread.

Products are those of cpu_core.py, and all of a task stays in a core's cache from its noise to its weights. Tasks share
products of up to `_ROWS` rows, but do not meet: each one's result is the same to the bit whatever the others and the threads are. For a BLAS
gives a row the same bits in a product of any number of rows from two on; one row alone is another routine, so none is left alone.
`rows_alike` tries that for the very sizes. Where it does not hold tasks come one after the other, if their matrices fit the cache; if
they do not, results depend on the batch to rounding. Where the processor has tile units and `precision` allows for them, products are theirs
(cpu_tiles.py), of whose rows none hears of another.

The first call on a machine compiles, for some seconds; numba keeps the result beside this file or in the user's cache. Change this file with
cpu_core.py, cpu_vectors.py, cpu_tiles.py and cpu_noise.py, whose functions it compiles in: what is kept is made again when this file changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from mcdi_fast import cpu_tiles
from mcdi_fast.backend import DEFAULT_PRECISION
from mcdi_fast.cpu_core import FAST, aligned, by_threads, compiled, copy, exp, kept, lines, product, take, take_lines
from mcdi_fast.cpu_noise import SCRATCH, draw

if TYPE_CHECKING:
    from mcdi_fast.generator import WeightGenerator

_f32 = np.float32
_TILES = cpu_tiles.assembled  # a constant, by which numba leaves out what is not
_IN_CACHE = 300_000  # numbers of the matrices of a step up to which a core's second-level cache holds them, 1.2 MB
_ROWS = 80  # of tasks together: 600 heads of width 256 in 20 steps take 44 ms of one thread; one by one 53, by 40 rows 47, by 160 47
_WORTH = 10_000_000  # multiplications that a share must have to be worth a thread: two heads in twenty steps


# Rows are sliced one by one: of a slice of all rows the compiler does not know that a row's numbers lie side by side.


@njit(**FAST)
def _mean(rows, first, end, out):
    """Those columns of out [G, any]: their mean over the tokens of each of G tasks, of rows [G N, any]."""
    tokens = len(rows) // len(out)
    share = _f32(1.0 / tokens)
    for g in range(len(out)):
        total = out[g][first:end]
        total[:] = 0
        for i in range(g * tokens, g * tokens + tokens):
            row = rows[i][first:end]
            for j in range(len(total)):
                total[j] += share * row[j]


@njit(**FAST)
def _silu(rows, at, bias, told, own, step_row):
    """The columns u of rows [G N, any] from `at` on become silu(u + those of bias from `told` on + own [G, H] of the task + step_row [H])."""
    tokens, h = len(rows) // len(own), own.shape[1]
    for g in range(len(own)):
        shared = own[g]
        for j in range(h):
            shared[j] += step_row[j]
        for i in range(g * tokens, g * tokens + tokens):
            u, b = rows[i][at : at + h], bias[i][told : told + h]
            for j in range(h):
                v = u[j] + b[j] + shared[j]
                u[j] = v / (_f32(1.0) + exp(-v))


@njit(**FAST)
def _normalise(given, position, of_condition, condition):
    """condition [N, C + P] of a task's raw one, given [N, C], as `WeightGenerator.network_condition`."""
    c = given.shape[1]
    for i in range(len(given)):
        row, raw, place, alike = condition[i], given[i], position[i % len(position)], i % of_condition.shape[1]
        middle, deviation = of_condition[0, alike], of_condition[1, alike]
        for j in range(c):
            row[j] = (raw[j] - middle[j]) / deviation[j]
        told = row[c:]
        for j in range(len(told)):
            told[j] = place[j]


@njit(**FAST)
def _advance(columns, net, bias, told, mask, tokens, coefficients):
    """A step of the sampler: x, the first columns, is moved by what the network says, net and the columns of bias from `told` on."""
    keep, skip, scale = coefficients[0], coefficients[1], coefficients[2]
    for i in range(len(net)):
        x, n, b, m = columns[i], net[i], bias[i][told:], mask[i % tokens % len(mask)]
        for j in range(len(n)):
            x[j] = keep * x[j] + m[j] * (skip * x[j] + scale * (n[j] + b[j]))


@njit
def _times(a, number, table, matrices, out, space):
    """out = a times a matrix: on tile units where there is a workspace for them; then the matrices are packed."""
    k, n, start = table[number]
    if _TILES and len(space):
        cpu_tiles.times(a, matrices[start:], out, False, space)
    else:
        product(a, take_lines(matrices[start:], k, n)[0], out, 0)


@compiled
def _sample(
    keys,
    given,
    position,
    mask,
    of_condition,
    of_weights,
    table,
    matrices,
    step_rows,
    steps,
    coefficients,
    together,
    memory,
    space,
    weights,
):
    """weights [B, N, D] of tasks, so many together, from seeds [B] and raw conditions [B, N, C].

    position: [N, P] or [1, 0]. mask: [N or 1, D], 0 where a token is padded. of_condition, of_weights: mean and deviation [2, N or 1, C or D].
    table, matrices: of `PackedChain`. step_rows: [L, T, H]. steps [J], coefficients [J, 3]: of `diffusion.chain_table`.
    """
    _, tokens, d = weights.shape
    (depth, _, h), told = step_rows.shape, table[0, 0]
    units = depth * h
    if _TILES and len(space):
        cpu_tiles.prepare(space)
    for first in range(0, len(weights), together):
        tasks = min(together, len(weights) - first)
        some, rows = max(tasks, 2), max(tasks * tokens, 2)
        condition, scratch = take(memory, rows, told)
        bias, scratch = take(scratch, rows, units + d)
        columns, scratch = take(scratch, rows, d + units)  # x, then the u of each block
        net, scratch = take(scratch, rows, d)
        narrow, scratch = take(scratch, rows, h)
        mean, scratch = take(scratch, some, max(d + units, told))
        shared, scratch = take(scratch, some, units)
        own, scratch = take(scratch, some, h)
        if tasks == 1:  # a second row, so that there are two
            mean[1], condition[-1], columns[-1] = 0, 0, 0
        for b in range(tasks):
            at = b * tokens
            _normalise(given[first + b], position, of_condition, condition[at : at + tokens])
            x = weights[first + b]
            draw(keys[first + b], np.uint64(0), x.reshape(tokens * d), scratch)
            for i in range(tokens):
                row, drawn, m = columns[at + i], x[i], mask[i % len(mask)]
                for j in range(d):
                    row[j] = drawn[j] * m[j]
        _times(condition, 0, table, matrices, bias, space)
        if tokens > 1:
            _mean(condition, 0, told, mean[:tasks])
            _times(mean[:, :told], 1, table, matrices, shared, space)
            for i in range(rows):
                row, of_task = bias[i], shared[i // tokens]
                for j in range(units):
                    row[j] += of_task[j]
        for s in range(len(steps)):
            before, width, number = 0, d, 2
            for layer in range(depth):
                _times(columns[:, :width], number, table, matrices, columns[:, width : width + h], space)
                number += 1
                if tokens > 1:
                    _mean(columns, before, width, mean[:tasks])
                    _times(mean[:, :width], number, table, matrices, own, space)
                    number += 1
                else:
                    own[:] = 0
                _silu(columns, width, bias, layer * h, own[: rows // tokens], step_rows[layer, steps[s]])
                before, width = width, width + h
            if number + 1 < len(table):
                _times(columns, number, table, matrices, narrow, space)
                _times(narrow, number + 1, table, matrices, net, space)
            else:
                _times(columns, number, table, matrices, net, space)
            _advance(columns, net, bias, units, mask, tokens, coefficients[s])
        for i in range(tasks * tokens):
            row, done, alike = columns[i], weights[first + i // tokens, i % tokens], i % tokens % of_weights.shape[1]
            middle, deviation = of_weights[0, alike], of_weights[1, alike]
            for j in range(d):
                done[j] = row[j] * deviation[j] + middle[j]


@compiled
def _differ(a, b, out, step, whole):
    """Whether a row of a b has other bits in a product of fewer rows: of step, 2 step and so on. a [R, k], b [k, n], out and whole [R, n]."""
    product(a, b, whole, 0)
    for count in range(max(step, 2), len(a), step):
        product(a[:count], b, out[:count], 0)
        for i in range(count):
            for j in range(out.shape[1]):
                if out[i, j] != whole[i, j]:
                    return True
    return False


@lru_cache(maxsize=256)
def rows_alike(k: int, n: int, step: int, rows: int) -> bool:
    """Whether a row times a [k, n] matrix has the same bits in products of any multiple of step rows, from two up to so many: tried."""
    random = np.random.default_rng(0)
    a, b = aligned(rows * (k + n)).reshape(rows, k + n), aligned(k * lines(n)).reshape(k, lines(n))
    a[:], b[:] = random.standard_normal(a.shape), random.standard_normal(b.shape)
    out, whole = np.empty((2, rows, n), _f32)
    given = a[:, :k], b[:, :n], out, step, whole
    return not by_threads(lambda first, end: _differ(*given), 1)[0]  # on one thread, as a share is


@compiled
def _lay_out(matrix, out, space):
    """A matrix to rows that each begin a cache line, or to panels."""
    if _TILES and len(space):
        cpu_tiles.prepare(space)
        cpu_tiles.pack(matrix.T, False, out, space)
    else:
        copy(matrix, take_lines(out, *matrix.shape)[0])


class _Plan(NamedTuple):
    table: np.ndarray
    matrices: np.ndarray
    together: int
    """Tasks."""
    work: int
    """Multiplications of a task in a step."""
    scratch: int
    """float32 a task."""
    space: int
    """float32 of the workspace of tile units, 0 without."""


class PackedChain:
    """What a generator is made of as the compiled chain reads it: copies of its own.

    A view would not do: torch moves a tensor's memory when the tensor is sent to another process, and frees the old.
    """

    def __init__(self, generator: WeightGenerator, mask: Tensor | None, precision: str = DEFAULT_PRECISION):
        """generator: on the CPU. mask: float32 [N, D], 0 for padding; None where none is. precision: "ieee" for none by tile units."""
        self._folded = folded = generator.folded()
        normalizers = [torch.stack([n.mean, n.std]) for n in (generator.condition_normalizer, generator.normalizer)]
        mask = torch.ones(1, folded.token_width, dtype=torch.float32, device="cpu") if mask is None else mask
        given = generator.layout.position(), mask, *normalizers
        self._given = tuple(np.array(tensor.numpy(), order="C") for tensor in given)
        self._step_rows = np.array(torch.stack([torch.cat(rows) for rows in folded.step_rows]).numpy())
        self._tiles = cpu_tiles.used(precision)
        self._matrices: dict[bool, tuple[np.ndarray, np.ndarray]] = {}
        self._plans: dict[int, _Plan] = {}

    def _matrices_of(self, alone: bool) -> tuple[np.ndarray, np.ndarray]:
        """A table of in, out and start of each matrix, and the matrices: by token and by mean, each block's token and sample, and `last`.

        A token that is alone is its own mean: it needs the sums of what is by token and by mean.
        """
        if alone not in self._matrices:
            folded = self._folded
            by_token, by_mean = folded.condition_token, folded.condition_mean
            pairs = list(zip(folded.token, folded.sample, strict=True))
            if alone:
                by_token, by_mean = by_token + F.pad(by_mean, (0, folded.token_width)), by_mean[:0]
                hidden = [token + sample for token, sample in pairs]
            else:
                hidden = [matrix for pair in pairs for matrix in pair]
            matrices = [matrix.contiguous().numpy() for matrix in (by_token, by_mean, *hidden, *folded.last)]
            sizes = [cpu_tiles.packed(*m.shape) if self._tiles else len(m) * lines(m.shape[1]) for m in matrices]
            ends = np.cumsum(sizes)
            table = np.array([(*m.shape, end - size) for m, size, end in zip(matrices, sizes, ends, strict=True)])
            flat, space = aligned(ends[-1]), aligned(cpu_tiles.workspace(1) if self._tiles else 0)
            for matrix, size, end in zip(matrices, sizes, ends, strict=True):
                _lay_out(matrix, flat[end - size : end], space)
            self._matrices[alone] = table, flat
        return self._matrices[alone]

    def _plan(self, tokens: int) -> _Plan:
        """Of tasks of so many tokens."""
        if tokens not in self._plans:
            table, flat = self._matrices_of(tokens == 1)
            fan_in, fan_out, _ = table.T
            a_step = int((fan_in * fan_out)[2:].sum())
            told, (depth, _, h), d = int(fan_in[0]), self._step_rows.shape, self._folded.token_width
            columns = depth * h + d
            sizes = *(tokens * n for n in (told, columns, columns, d, h)), max(columns, told), depth * h, h
            together = max(1, _ROWS // tokens)
            if not self._tiles and tokens > 1 and max(a_step, told * columns) <= _IN_CACHE:
                shapes = [(int(k), int(n)) for k, n in zip(fan_in, fan_out, strict=True)]
                of_means = [1, *range(3, 2 + 2 * depth, 2)]
                for number, shape in enumerate(shapes):
                    step = 1 if number in of_means else tokens
                    if not rows_alike(*shape, step, together * step):
                        together = 1
            space = cpu_tiles.workspace(int(max(fan_in))) if self._tiles else 0
            self._plans[tokens] = _Plan(table, flat, together, tokens * a_step, sum(map(lines, sizes)), space)
        return self._plans[tokens]

    def sample(self, seeds: list[int] | Tensor, condition: Tensor, steps: Tensor, coefficients: Tensor) -> Tensor:
        """Weights [B, N, D] by the noise-free chain, on as many threads as torch has.

        Args:
            seeds: as `noise.seed_numbers` makes them, or an int64 tensor of their bits. condition: float32 [B, N, C], raw.
            steps, coefficients: of `diffusion.chain_table`, float32.
        """
        if isinstance(seeds, Tensor):
            keys = seeds.cpu().contiguous().numpy().view(np.uint64)
        else:
            keys = np.array(seeds, np.uint64)
        tasks, tokens, _ = condition.shape
        d, plan = self._folded.token_width, self._plan(tokens)
        weights, given = aligned(tasks * tokens * d).reshape(tasks, tokens, d), condition.detach().contiguous().numpy()
        constants = *self._given, plan.table, plan.matrices, self._step_rows, steps.numpy(), coefficients.numpy()

        def some(first: int, end: int) -> None:
            many = min(plan.together, end - first)
            size = lines(max(2, many) * plan.scratch + SCRATCH)  # one has a second row beside it
            memory = kept(size + plan.space)
            memory, space = memory[:size], memory[size:]
            _sample(keys[first:end], given[first:end], *constants, many, memory, space, weights[first:end])

        by_threads(some, tasks, 1 + _WORTH // (len(steps) * plan.work))
        return torch.from_numpy(weights)
