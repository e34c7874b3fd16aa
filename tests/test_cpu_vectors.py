"""Our own float32 products against NumPy's in float64, of any views. What is made of them: test_cpu_inner.py and its like."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from numba import njit
from test_cpu_tiles import matrix

from mcdi_fast import cpu_vectors


@njit
def product(a, b, out, beta):
    left, right = (a.ctypes.data, *a.strides), (b.ctypes.data, *b.strides)
    cpu_vectors.product_at(*left, *right, out.ctypes.data, out.strides[0], *out.shape, a.shape[1], beta)


pytestmark = pytest.mark.skipif(not cpu_vectors.assembled, reason="no AVX512 here")


@settings(deadline=None, max_examples=300)
@given(
    st.tuples(*[st.integers(1, 70)] * 3),
    st.tuples(*[st.booleans()] * 2),
    st.integers(0, 3),
    st.sampled_from([0.0, -0.0, 1.0, -0.5]),
    st.integers(0, 2**31),
)
def test_product_of_any_views(shape, turned, extra, beta, seed):
    (m, k, n), draw = shape, np.random.default_rng(seed)
    a, b, out = (
        matrix(draw, m, k, extra, turned[0]), matrix(draw, k, n, extra, turned[1]), matrix(draw, m, n, extra)
    )  # fmt: skip
    for view in (a, b):  # what stands beside a factor is read by nobody
        if extra:
            beside = view.copy()
            (view.base if view.base.base is None else view.base.base)[:] = np.nan
            view[:] = beside
    expected = a.astype(np.float64) @ b.astype(np.float64) + beta * out.astype(np.float64)
    size = abs(a).astype(np.float64) @ abs(b) + abs(beta * out)
    around = out.base.copy() if extra else None
    if beta == 0:
        out[:] = np.nan
    product(a, b, out, np.float32(beta))
    assert (abs(out - expected) <= 2.0**-23 * (k + 2) * size).all()
    if extra:
        around[:, extra // 2 : extra // 2 + n] = out
        assert np.array_equal(out.base, around)  # what stands beside it is untouched


def test_all_blocks_of_the_result():
    """Every number of rows and columns that a block may have."""
    draw = np.random.default_rng(0)
    for m in range(1, 26):
        for n in range(1, 66):
            for turned in (False, True):
                a, b = matrix(draw, m, 19, 0), matrix(draw, 19, n, 0, turned)
                out = np.full((m, n), np.nan, np.float32)
                product(a, b, out, np.float32(0))
                np.testing.assert_allclose(out, a.astype(np.float64) @ b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_a_row_is_the_same_to_the_bit_in_any_company(turned):
    draw = np.random.default_rng(0)
    for k, n in ((7, 5), (65, 256), (256, 65), (300, 33), (64, 2)):
        a, b = matrix(draw, 80, k, 0), matrix(draw, k, n, 0, turned)
        whole = np.empty((80, n), np.float32)
        product(a, b, whole, np.float32(0))
        for first, end in ((0, 1), (79, 80), (3, 20), (5, 45), (16, 80), (0, 79)):
            out = np.full((end - first, n), np.nan, np.float32)
            product(a[first:end], b, out, np.float32(0))
            assert np.array_equal(out, whole[first:end])


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_not_finite_stays_in_its_row(turned):
    draw = np.random.default_rng(0)
    for value in (np.nan, np.inf, -np.inf):
        a, b = matrix(draw, 40, 50, 0), matrix(draw, 50, 60, 0, turned)
        expected, out = np.empty((2, 40, 60), np.float32)
        product(a, b, expected, np.float32(0))
        a[17, 3] = value
        product(a, b, out, np.float32(0))
        assert not np.isfinite(out[17]).any()
        out[17] = expected[17]
        assert np.array_equal(out, expected)


def test_a_factor_that_is_not_finite_is_not_left_out():
    """As sgemm: only by 0 is the result not read."""
    a, b = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
    out = np.ones((3, 5), np.float32)
    product(a, b, out, np.float32(np.nan))
    assert np.isnan(out).all()


def test_factors_of_many_parts():
    """Panels are 256 rows deep, and a right factor above two million numbers is copied to such."""
    draw = np.random.default_rng(0)
    for (m, k, n), ways in {(30, 600, 70): (False, True), (13, 2100, 1003): (False,)}.items():
        for turned, across in itertools.product((False, True), ways):
            a, b, out = matrix(draw, m, k, 1, turned), matrix(draw, k, n, 1, across), matrix(draw, m, n, 1)
            expected = a.astype(np.float64) @ b + out
            product(a, b, out, np.float32(1))
            assert (abs(out - expected) <= 2.0**-23 * (k + 2) * (abs(a) @ abs(b) + 1)).all()
