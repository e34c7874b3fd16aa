"""Products of tile units against NumPy's in float64, of any views; who takes them. What is made of them: test_cpu_inner.py, test_cpu_chain.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from test_cpu_core import check_product, matrix, products
from test_inner import random_case

from mcdi_fast.inner import inner_loop

pytest.importorskip("numba")

from numba import njit

from mcdi_fast import cpu_core, cpu_tiles

needs_tiles = pytest.mark.skipif(not cpu_tiles.available, reason="no tile units here")

product, times, pack, prepare = (
    njit(getattr(cpu_tiles, name).py_func) for name in ("product", "times", "pack", "prepare")
)


def poisoned(summed, columns=0):
    """Workspace of a product of so many numbers summed, and of so many columns of a factor that is to be packed."""
    space = cpu_core.aligned(cpu_tiles.workspace(summed, cpu_tiles.packed(summed, columns)))
    space[:] = np.nan
    prepare(space)
    return space


def nudged(value, seed):
    """A float64 tensor whose numbers are moved by 2^-16 of each, up or down: what the two bfloat16 of a number leave out moves results as much."""
    sign = torch.randint(2, value.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return value * (1 + sign * 2.0**-16)


@needs_tiles
@settings(deadline=None, max_examples=200)
@products(100, [0.0, 1.0])
def test_product_of_any_views(shape, turned, extra, beta, seed):
    def by_tiles(a, b, out, beta):
        product(a, b, out, bool(beta), poisoned(*b.shape))

    check_product(by_tiles, shape, turned, extra, beta, seed, left_out=3 * 2.0**-16)  # what hi and lo do not hold


@needs_tiles
def test_a_row_is_the_same_to_the_bit_in_any_company():
    draw = np.random.default_rng(0)
    for k, n in ((7, 5), (65, 256), (256, 65), (300, 33)):
        a, b = matrix(draw, 80, k, 0), matrix(draw, k, n, 0)
        right = cpu_core.aligned(cpu_tiles.packed(k, n))
        right[:] = np.nan
        pack(b.T, False, right, poisoned(1))
        whole = np.empty((80, n), np.float32)
        times(a, right, whole, False, poisoned(k))
        for first, end in ((0, 1), (79, 80), (3, 20), (5, 45), (16, 80), (0, 79)):
            out = np.full((end - first, n), np.nan, np.float32)
            times(a[first:end], right, out, False, poisoned(k))
            assert np.array_equal(out, whole[first:end])


@needs_tiles
def test_what_is_not_finite_stays_in_its_row():
    draw = np.random.default_rng(0)
    for value in (np.nan, np.inf, -np.inf):
        a, b = matrix(draw, 40, 50, 0), matrix(draw, 50, 60, 0)
        expected = np.empty((40, 60), np.float32)
        space = poisoned(50, 60)
        product(a, b, expected, False, space)
        a[17, 3] = value
        out = np.empty_like(expected)
        product(a, b, out, False, space)
        assert not np.isfinite(out[17]).any()
        out[17] = expected[17]
        assert np.array_equal(out, expected)


@needs_tiles
def test_numbers_of_any_size():
    """Nothing is lost of numbers whose lower half is tiny but normal, and what is below float32's normal numbers counts as zero."""
    scales = np.float32(2.0) ** np.arange(-100, 101, 10, dtype=np.float32)
    draw = np.random.default_rng(0)
    a, b = matrix(draw, 40, 50, 0), matrix(draw, 50, 60, 0)
    exact, size = a.astype(np.float64) @ b, abs(a).astype(np.float64) @ abs(b)
    for scale in scales:
        out = np.empty((40, 60), np.float32)
        product(a * scale, b, out, False, poisoned(50, 60))
        assert (abs(out / np.float64(scale) - exact) <= 2.0**-14 * size).all()


def test_who_takes_them(monkeypatch):
    """Those that ask for less than float32, on a processor that has them."""
    phi, batch = random_case((8, 2, 4, 9, 33, 20, 3, 64, 1), torch.float32)
    exact = inner_loop(phi, batch, 0.1, precision="ieee")
    default, tiles = inner_loop(phi, batch, 0.1), cpu_tiles.available
    monkeypatch.setattr(cpu_tiles, "available", False)
    without = inner_loop(phi, batch, 0.1)
    assert torch.equal(without[1], exact[1])
    for name in phi:
        assert torch.equal(without[0][name], exact[0][name])
    assert torch.equal(default[1], exact[1]) != tiles
    assert torch.equal(inner_loop(phi, batch, 0.1, precision="bf16")[1], exact[1])  # none here now


def test_where_nothing_can_be_assembled(tmp_path):
    """Another processor compiles the same code without them."""
    code = (
        "import torch; from test_inner import random_case; from mcdi_fast import cpu_tiles, cpu_inner; from mcdi_fast.inner import inner_loop;"
        "from test_cpu_chain import parameters, run; from mcdi_fast.diffusion import make_schedule;"
        "assert not cpu_tiles.available; phi, batch = random_case((2, 2, 2, 3, 5, 4, 3, 8, 1), torch.float32);"
        "found, expected = (inner_loop(phi, batch, 0.1, impl) for impl in ('auto', 'torch'));"
        "torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6);"
        "run(parameters(4, 2, 3, 8, 1), make_schedule(3, 1), [1], torch.zeros(1, 2, 2))"
    )
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent)
