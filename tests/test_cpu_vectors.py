"""Our own float32 products against NumPy's in float64, of any views. What is made of them: test_cpu_inner.py and its like."""

import itertools

import numpy as np
import pytest
from hypothesis import settings

pytest.importorskip("numba")

from numba import njit
from test_cpu_core import check_product, matrix, products

from mcdi_fast import cpu_vectors


@njit
def product(a, b, out, beta):
    left, right = (a.ctypes.data, *a.strides), (b.ctypes.data, *b.strides)
    cpu_vectors.product_at(*left, *right, out.ctypes.data, out.strides[0], *out.shape, a.shape[1], beta)


pytestmark = pytest.mark.skipif(not cpu_vectors.assembled, reason="no AVX512 here")


@settings(deadline=None, max_examples=300)
@products(70, [0.0, -0.0, 1.0, -0.5])
def test_product_of_any_views(shape, turned, extra, beta, seed):
    check_product(product, shape, turned, extra, beta, seed)


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
    for shape, ways in {(30, 600, 70): (False, True), (13, 2100, 1003): (False,)}.items():
        for turned in itertools.product((False, True), ways):
            check_product(product, shape, turned, 1, -0.5, 0)
