"""Every provider against the reference: a wrong one is not timed. Used by the benchmarks and, at tiny sizes, by tests/test_bench.py."""

from __future__ import annotations

import providers as P
import torch

from mcdi_fast.inner import inner_loop


def meta_check(phi, batch, tolerance=1e-3):
    """A check of (delta, losses) against the Python loop."""
    delta, losses = inner_loop(phi, batch, P.RATE, "reference")

    def check(found):
        torch.testing.assert_close(found[1], losses, rtol=tolerance, atol=tolerance)
        for name, value in delta.items():
            error = (found[0][name] - value).norm() / value.norm()
            assert error <= tolerance, f"{name}: relative error {error:.1e}, expected at most {tolerance}"

    return check


def prepare_check(features, labels, start, count=4, tolerance=2e-3):
    """A check of the first heads against the loop in float64."""
    few = slice(0, count)
    expected = P.prepare_loop(features[few].double(), labels[few], start[few].double())

    def check(found):
        error = (found[few].double() - expected).norm() / expected.norm()
        assert error <= tolerance, f"heads: relative error {error:.1e}, expected at most {tolerance}"

    return check


def close_to(expected, tolerance=1e-4):
    """A check of one tensor, relative to the norm of the expected one."""

    def check(found):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error <= tolerance, f"relative error {error:.1e}, expected at most {tolerance}"

    return check
