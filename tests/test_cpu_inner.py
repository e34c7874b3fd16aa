"""Compiled inner loops against the reference in float64, on any shape, and when they run. What all forms share: test_inner.py."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_cpu_tiles import nudged
from test_inner import cast, random_case

from mcdi_fast import backend
from mcdi_fast.inner import inner_loop

pytest.importorskip("numba")

from mcdi_fast import cpu_core, cpu_inner, cpu_tiles


def poisoned(size):
    found = cpu_core.aligned(size)
    found[:] = np.nan
    return found


def bounds(phi, batch, rate, precision, seed):
    """The reference in float64; and others, as far from it as one may be: in float32, by tile units what it makes of numbers that are nudged."""
    wide, inputs = cast(phi, batch, torch.float64)
    others = [inner_loop(phi, batch, rate, "reference")]
    for draw in range(3 if cpu_tiles.used(precision) else 0):
        fields = {name: nudged(getattr(inputs, name), draw) for name in ("x", "condition", "gain", "target")}
        moved = {name: nudged(value, seed + draw) for name, value in wide.items()}
        others.append(inner_loop(moved, replace(inputs, **fields), rate, "reference"))
    return inner_loop(wide, inputs, rate, "reference"), others


def agrees(found, exact, others):
    size = sum(float(value.norm()) for value in exact[0].values())
    delta, losses = found
    for name, value in exact[0].items():
        assert delta[name].shape == value.shape
        error, *own = (float((one[name] - value).norm()) for one in (delta, *(other[0] for other in others)))
        assert error <= 4 * max(own) + 1e-6 * (float(value.norm()) + 0.1 * size), name
    own = max(float((other[1] - exact[1]).norm()) for other in others)
    assert float((losses - exact[1]).norm()) <= 4 * own + 1e-6 * float(exact[1].norm())


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*(st.integers(1, high) for high in (9, 4, 5, 6, 20, 9, 6, 40, 3))),
    st.integers(0, 2**31),
    st.floats(1e-4, 0.1),
    st.booleans(),
    st.sampled_from([None, False, True]),
    st.integers(1, 3),
    st.sampled_from([1, 12, 160]),
    st.sampled_from(["ieee", "tf32"]),
)
def test_any_shape_agrees(shape, seed, rate, padded, stacked, threads, few, precision):
    """On memory full of NaN, on any number of threads, whatever share of the tasks is computed at a time, by sgemm and by tile units."""
    phi, batch = random_case(shape, torch.float32, seed, padded)
    exact, others = bounds(phi, batch, rate, precision, seed)
    # a diverging task multiplies rounding by its growth
    assume(float(exact[1].max()) < 3 * float(exact[1][:, 0].max()))
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_inner, "aligned", poisoned)
        patch.setattr(cpu_inner, "kept", poisoned)
        patch.setattr(cpu_inner, "_FEW_ROWS", few)
        try:
            torch.set_num_threads(threads)
            delta, losses = inner_loop(phi, batch, rate, "auto", stacked, precision)
        finally:
            torch.set_num_threads(before)
    agrees((delta, losses), exact, others)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 5, 13, 65, 50, 4, 70, 2), (5, 4, 3, 7, 130, 66, 4, 140, 2)])
def test_large_products_agree(shape, stacked, precision, monkeypatch):
    """Those of a task by itself are tile units' too: the first shape has many rows, the second long scores."""
    monkeypatch.setattr(cpu_inner, "aligned", poisoned)
    monkeypatch.setattr(cpu_inner, "kept", poisoned)
    phi, batch = random_case(shape, torch.float32, padded=True)
    _, _, samples, tokens, _, _, _, width, _ = shape
    rows = samples * tokens
    assert cpu_tiles.worth.py_func(rows, width, width) != cpu_tiles.worth_of_scores.py_func(rows, width)
    exact, others = bounds(phi, batch, 0.01, precision, 0)
    agrees(inner_loop(phi, batch, 0.01, "auto", stacked, precision), exact, others)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_task_hears_neither_of_the_others_nor_of_the_threads(stacked, monkeypatch):
    phi, batch = random_case((9, 3, 4, 5, 13, 9, 7, 16, 2), torch.float32)
    before, threads = torch.get_num_threads(), []
    monkeypatch.setattr(cpu_inner, "_FEW_ROWS", 60)  # three tasks at a time
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            threads.append(inner_loop(phi, batch, 0.1, "auto", stacked))
        finally:
            torch.set_num_threads(before)
    (one, losses), (three, again) = threads
    assert torch.equal(losses, again)
    for name in phi:
        torch.testing.assert_close(one[name], three[name], rtol=0, atol=1e-6 * float(one[name].abs().max()))


def test_who_takes_it(monkeypatch):
    phi, batch = random_case((2, 2, 2, 3, 5, 4, 3, 8, 1), torch.float32)
    taken, code = [], cpu_inner.inner_loop
    monkeypatch.setattr(cpu_inner, "inner_loop", lambda *given: taken.append(1) or code(*given))
    inner_loop(phi, batch, 0.1)
    assert len(taken) == 1
    inner_loop(phi, batch, 0.1, "torch")
    inner_loop(*cast(phi, batch, torch.float64), 0.1)
    leaves = {name: value.requires_grad_() for name, value in phi.items()}
    assert len(taken) == 1
    assert not any(value.requires_grad for value in inner_loop(leaves, batch, 0.1)[0].values())
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "mcdi_fast.cpu_inner")
    backend.numba_module.cache_clear()
    try:
        assert backend.numba_module("cpu_inner") is None
        inner_loop(phi, batch, 0.1)
    finally:
        backend.numba_module.cache_clear()
    assert len(taken) == 2
