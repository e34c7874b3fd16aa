"""The compiled outer step against `outer.outer_update` in float64, of any length, on any number of threads; and what it refuses."""

import pytest
import torch

from mcdi_fast.outer import OuterScalars, OuterState, outer_update

pytest.importorskip("numba")

from mcdi_fast import cpu_core, cpu_outer


def state_of(count, dtype=torch.float32):
    g = torch.Generator().manual_seed(count)
    phi, average, exp_avg = (torch.randn(count, generator=g) for _ in range(3))
    found = phi, average, exp_avg, torch.rand(count, generator=g)
    return OuterState(*(t.to(dtype) for t in found)), torch.randn(count, generator=g)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 17, 2049, 300_000])
@pytest.mark.parametrize("outer", ["adam", "reptile"])
@pytest.mark.parametrize("mix", [0.01, 0.7, 1.0])
def test_as_the_reference_in_float64(count, outer, mix, threads, monkeypatch):
    monkeypatch.setattr(cpu_core.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu_outer, "_WORTH", 1)
    scalars = OuterScalars(0.003, 0.7, -20.0, mix)
    (exact, delta), (plain, _), (found, _) = state_of(count, torch.float64), state_of(count), state_of(count)
    outer_update(exact, delta.double(), scalars, outer)
    outer_update(plain, delta.clone(), scalars, outer)
    before = delta.clone()
    cpu_outer.outer_update(found, delta, scalars, outer)
    assert torch.equal(delta, before)
    for name, value in vars(exact).items():
        own = float((getattr(plain, name) - value).abs().max())  # float32 as torch rounds it
        assert float((getattr(found, name) - value).abs().max()) <= 3 * own + 2e-7 * float(value.abs().max()), name
    assert torch.equal(found.average, found.phi) == (mix == 1.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_found_anywhere(value, threads, monkeypatch):
    monkeypatch.setattr(cpu_core.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu_outer, "_WORTH", 1)
    delta = torch.randn(1001)
    delta[5], delta[6] = torch.finfo(torch.float32).max, -1e-40
    assert cpu_outer.finite(delta)
    for place in (0, 500, 1000):
        damaged = delta.clone()
        damaged[place] = value
        assert not cpu_outer.finite(damaged)
