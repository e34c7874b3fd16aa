"""Products of compiled code against NumPy's in float64, of any views; shares of tasks."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from mcdi_fast import cpu_core


def matrix(draw, rows, columns, extra, turned=False):
    """A view of a larger one, or the transpose of such."""
    if turned:
        return matrix(draw, columns, rows, extra).T
    return draw.standard_normal((rows, columns + extra)).astype(np.float32)[:, extra // 2 : extra // 2 + columns]


def alone(view):
    """The same view, NaN beside it: nobody may read that."""
    numbers = view.copy()
    view.base[:] = np.nan
    view[:] = numbers
    return view


def products(longest, betas):
    """Sizes m, k, n, which factors are transposed, how much wider the matrices are that all are views of, beta, a seed."""
    sizes, turned = st.tuples(*[st.integers(1, longest)] * 3), st.tuples(*[st.booleans()] * 2)
    return given(sizes, turned, st.integers(0, 3), st.sampled_from(betas), st.integers(0, 2**31))


def check_product(product, shape, turned, extra, beta, seed, left_out=0.0):
    """product(a, b, out, beta) against float64; left_out: of the sum of |a| |b|, beside float32's rounding."""
    (m, k, n), draw = shape, np.random.default_rng(seed)
    a, b = (alone(matrix(draw, *size, extra, turn)) for size, turn in zip(((m, k), (k, n)), turned, strict=True))
    out = matrix(draw, m, n, extra)
    expected = a.astype(np.float64) @ b.astype(np.float64) + beta * out.astype(np.float64)
    size = abs(a).astype(np.float64) @ abs(b)
    rounding = 2.0**-23 * (k + 2) * (size + abs(beta * out))
    beside = out.base.copy()
    if beta == 0:
        out[:] = np.nan
    product(a, b, out, np.float32(beta))
    assert (abs(out - expected) <= left_out * size + rounding).all()
    beside[:, extra // 2 : extra // 2 + n] = out
    assert np.array_equal(out.base, beside)  # what stands beside it is untouched


@settings(deadline=None)
@products(20, [0.0, 1.0, -0.5])
def test_product_of_any_views(shape, turned, extra, beta, seed):
    check_product(cpu_core.product, shape, turned, extra, beta, seed)


def test_shares_cover_all_tasks_once():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for tasks in (1, 2, 7):
                found = cpu_core.by_threads(lambda first, end: list(range(first, end)), tasks)
                assert [task for part in found for task in part] == list(range(tasks))
                assert len(found) == min(threads, tasks)
        assert len(cpu_core.by_threads(lambda first, end: None, 7, least=4)) == 1
    finally:
        torch.set_num_threads(before)


def test_an_error_of_a_share_is_raised():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            cpu_core.by_threads(lambda first, end: 1 // (first == 0), 2)
    finally:
        torch.set_num_threads(before)


def test_products_of_a_thread_take_one_thread_of_any_blas():
    class OpenMP:
        threads = 4

        def omp_get_max_threads(self):
            return self.threads

        def omp_set_num_threads(self, count):
            self.threads = count

    library = OpenMP()
    swap = cpu_core._threads_of_products(library)
    assert swap(1) == 4
    assert library.threads == 1
    assert swap(4) == 1
    assert library.threads == 4
    assert cpu_core._threads_of_products(object())(1) == 1  # one that has threads of its own mind
    before = cpu_core._own_threads(1)
    assert cpu_core._own_threads(before) == 1


def test_memory_starts_at_a_cache_line():
    for size in (0, 1, 17, 1000):
        found = cpu_core.aligned(size)
        assert len(found) == size
        assert found.ctypes.data % 64 == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_shares_after_a_fork():
    """The threads of the parent are not the child's."""
    code = (
        "import os, torch; from mcdi_fast import cpu_core; torch.set_num_threads(3);"
        "run = lambda: sum(cpu_core.by_threads(lambda first, end: end - first, 7)); assert run() == 7; child = os.fork();"
        "(os._exit(0 if run() == 7 else 1) if child == 0 else None); assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_exponential():
    from numba import njit

    @njit
    def of(values):
        return np.array([cpu_core.exp(v) for v in values])

    x = np.concatenate([np.linspace(-87, 87, 20001), np.linspace(-1e-3, 1e-3, 101), [0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(of(x) / exact - 1).max() < 2 * 2.0**-23
    assert of(np.array([-1e9, -np.inf], np.float32)).max() < 2e-38
    assert np.isfinite(of(np.array([1e9, np.inf], np.float32))).all()


def test_no_folder_to_keep_what_is_compiled(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function")
        return lambda function: ("compiled", function)

    monkeypatch.setattr(cpu_core, "njit", njit)
    assert cpu_core.compiled(abs) == ("compiled", abs)
