import math
from fractions import Fraction

import pytest
import torch
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast.config import DiffusionConfig
from mcdi_fast.diffusion import OBJECTIVES, consistency_loss, diffusion_tables, make_objective, make_schedule, noising

SIZES = [(20, 3), (20, 1), (6, 3), (7, 3), (10, 4), (5, 5), (1, 1), (50, 7)]


def product(alpha, start, end):
    """prod_{j=start}^{end-1} alpha_j in plain Python; the empty product is 1."""
    result = 1.0
    for j in range(start, end):
        result *= float(alpha[j])
    return result


@pytest.mark.parametrize(("steps", "segments"), SIZES)
def test_tables_are_the_products_of_the_formula(steps, segments):
    schedule = make_schedule(steps, segments)
    assert (schedule.num_steps, schedule.num_segments) == (steps, segments)
    assert schedule.abar.shape == (steps + 1,)
    assert schedule.abar_segment.shape == (segments, steps + 1)
    for table in (schedule.alpha, schedule.abar, schedule.abar_segment):
        assert table.dtype == torch.float64
    assert schedule.ends[-1] == steps
    for t in range(steps + 1):
        assert float(schedule.abar[t]) == pytest.approx(product(schedule.alpha, t, steps), rel=1e-14)
        for i, end in enumerate(schedule.ends):
            expected = product(schedule.alpha, t, end) if t <= end else 1.0
            assert float(schedule.abar_segment[i, t]) == pytest.approx(expected, rel=1e-14)
    assert torch.equal(schedule.abar, schedule.abar_segment[-1])  # abar^k = abar
    assert schedule.abar[-1] == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_sizes(data):
    steps = data.draw(st.integers(1, 60))
    segments = data.draw(st.integers(1, steps))
    high = data.draw(st.floats(0.02, 0.99))
    low = data.draw(st.floats(0.001, 0.99)) * high
    schedule = make_schedule(steps, segments, high, low)
    assert ((schedule.alpha > 0) & (schedule.alpha < 1)).all()
    assert (schedule.alpha.diff() > 0).all()
    assert list(schedule.ends) == sorted(set(schedule.ends))  # each segment has a step
    assert schedule.ends[0] >= 1
    segment = schedule.next_segment()
    assert segment.dtype == torch.int64
    assert segment.tolist() == [next(i for i, e in enumerate(schedule.ends) if t < e) for t in range(steps)]
    for name in OBJECTIVES:
        objective = make_objective(schedule, name)
        for i in objective.targets:
            end = int(objective.ends[i])
            for table in (objective.signal, objective.noise, objective.f_weight, objective.eps_weight):
                assert table[i, :end].isfinite().all()
                assert (table[i, :end] > 0).all()


def test_ends_round_half_to_even():
    assert make_schedule(20, 3).ends == (7, 13, 20)
    assert make_schedule(7, 3).ends == (2, 5, 7)
    assert make_schedule(10, 4).ends == (2, 5, 8, 10)  # 2.5, 5, 7.5, 10
    assert make_schedule(5, 5).ends == (1, 2, 3, 4, 5)
    for steps, segments in SIZES:
        expected = tuple(round(Fraction(i * steps, segments)) for i in range(1, segments + 1))
        assert make_schedule(steps, segments).ends == expected


def test_the_default_betas_start_from_noise():
    schedule = make_schedule(20, 3)
    assert float(schedule.alpha[0]) == pytest.approx(0.2)
    assert float(schedule.alpha[-1]) == pytest.approx(0.99)
    assert float(schedule.abar_segment[0, 0]) == pytest.approx(0.0003, abs=5e-5)
    assert make_schedule(1, 1).alpha.tolist() == [pytest.approx(0.2)]


def test_errors():
    assert "k = 0" in error_of(make_schedule, 20, 0)
    message = error_of(make_schedule, 3, 4)
    assert "k = 4" in message
    assert "T = 3" in message
    error_of(make_schedule, 0, 1)
    for high, low in (
        (0.01, 0.8),
        (0.5, 0.5),
        (1.0, 0.1),
        (1.5, 0.1),
        (0.5, 0.0),
        (0.5, -0.1),
        (math.nan, 0.1),
        (0.5, math.nan),
    ):
        message = error_of(make_schedule, 20, 3, high, low)
        assert f"beta_start = {high}" in message
        assert f"beta_end = {low}" in message
    message = error_of(make_objective, make_schedule(20, 3), "local")
    assert "'local'" in message
    for name in OBJECTIVES:
        assert name in message


@pytest.mark.parametrize(("steps", "segments"), SIZES)
def test_skip_and_scale(steps, segments):
    schedule = make_schedule(steps, segments)
    segment = schedule.next_segment()
    objective = make_objective(schedule, "local-consistency")
    assert objective.skip.shape == objective.scale.shape == (steps,)
    for t in range(steps):
        abar = product(schedule.alpha, t, steps)
        a = product(schedule.alpha, t, schedule.ends[int(segment[t])])
        assert float(objective.skip[t]) == pytest.approx(math.sqrt(1 - abar), rel=1e-13)
        assert float(objective.scale[t]) == pytest.approx(math.sqrt((1 - abar) * a / (1 - a)), rel=1e-12)


@pytest.mark.parametrize("residual", ["scaled", "none"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_scale_is_the_deviation_of_what_the_network_must_say(name, residual):
    """f - skip x over unit-variance targets and noise, f the exact answer for the target that the objective's chains head for."""
    schedule = make_schedule(20, 3)
    objective = make_objective(schedule, name, residual=residual)
    generator = torch.Generator().manual_seed(0)
    theta, eps = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    for t in (0, 6, 7, 12, 13, 19):
        target = int(schedule.next_segment()[t]) if name == "local-consistency" else 2
        end = int(objective.ends[target])
        a, abar = product(schedule.alpha, t, end), float(schedule.abar[t])
        x = math.sqrt(a) * theta + math.sqrt(1 - a) * eps
        f = math.sqrt(1 - abar) * (x - math.sqrt(a) * theta) / (1 - a)
        rest = f - objective.skip[t] * x
        # the deviation of a deviation over n draws is 1 / sqrt(2 n) = 0.16 %
        assert float(rest.std()) == pytest.approx(float(objective.scale[t]), rel=0.01)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_residual_target_makes_the_network_predict_the_target_itself(name):
    schedule = make_schedule(20, 3)
    objective = make_objective(schedule, name, residual="target")
    segment = schedule.next_segment() if name == "local-consistency" else torch.full((20,), 2)
    theta, eps = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = torch.arange(20)
    a = objective.signal[segment, step].square()
    x = a.sqrt() * theta + (1 - a).sqrt() * eps
    f = (1 - schedule.abar[:-1]).sqrt() * eps / (1 - a).sqrt()  # the exact answer
    torch.testing.assert_close(objective.skip * x + objective.scale * theta, f, rtol=1e-10, atol=1e-12)


def test_scale_of_the_vanilla_chain_is_sqrt_abar():
    """Also where the bank has several targets, of which Mv-Di trains on the last alone: its first segment once had 8 to 11 times too much."""
    schedule = make_schedule(20, 3)
    for name in ("vanilla", "naive-local"):
        torch.testing.assert_close(make_objective(schedule, name).scale, schedule.abar[:-1].sqrt(), rtol=1e-12, atol=0)
    ours = make_objective(schedule, "local-consistency").scale
    assert float((ours / schedule.abar[:-1].sqrt())[:6].min()) > 5
    assert (make_objective(schedule, "local-consistency", residual="unscaled").scale == 1).all()


@pytest.mark.parametrize(("steps", "segments"), SIZES)
def test_objectives_in_closed_form(steps, segments):
    schedule = make_schedule(steps, segments)
    for name in OBJECTIVES:
        objective = make_objective(schedule, name)
        assert objective.name == name
        assert objective.targets == ((segments - 1,) if name == "vanilla" else tuple(range(segments)))
        for i in objective.targets:
            end = schedule.ends[i] if name == "local-consistency" else steps
            assert int(objective.ends[i]) == end
            for t in range(end):
                a, abar = product(schedule.alpha, t, end), product(schedule.alpha, t, steps)
                assert float(objective.signal[i, t]) == pytest.approx(math.sqrt(a), rel=1e-13)
                assert float(objective.noise[i, t]) == pytest.approx(math.sqrt(1 - a), rel=1e-12)
                local = name == "local-consistency"
                assert float(objective.f_weight[i, t]) == pytest.approx(math.sqrt(1 - a) if local else 1, rel=1e-12)
                assert float(objective.eps_weight[i, t]) == pytest.approx(
                    math.sqrt(1 - abar) if local else 1, rel=1e-12
                )


def test_with_one_segment_local_consistency_is_vanilla_times_its_weight():
    schedule = make_schedule(20, 1)
    local, vanilla = make_objective(schedule, "local-consistency"), make_objective(schedule, "vanilla")
    generator = torch.Generator().manual_seed(0)
    f, theta, eps = torch.randn(3, 20, 4, 5, generator=generator, dtype=torch.float64)
    step, segment = torch.arange(20), torch.zeros(20, dtype=torch.int64)
    assert torch.equal(noising(local, theta, segment, step, eps), noising(vanilla, theta, segment, step, eps))
    expected = consistency_loss(vanilla, f, segment, step, eps) * (1 - schedule.abar[:-1])
    torch.testing.assert_close(consistency_loss(local, f, segment, step, eps), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("steps", "segments"), SIZES)
def test_carry(steps, segments):
    assert (make_schedule(steps, segments).carry == 1).all()
    schedule = make_schedule(steps, segments, carry_scaled=True)
    for t in range(steps + 1):
        i = schedule.ends.index(t) if t in schedule.ends[:-1] else None
        expected = 1.0 if i is None else math.sqrt(math.prod(schedule.alpha[t : schedule.ends[i + 1]].tolist()))
        assert float(schedule.carry[t]) == pytest.approx(expected, rel=1e-12)


def test_diffusion_tables():
    for name in OBJECTIVES:
        schedule, objective = diffusion_tables(DiffusionConfig(objective=name, window="segment", carry="scaled"))
        local = name == "local-consistency"
        assert bool((schedule.carry < 1).any()) == local  # the other two have no segments to carry over
        assert objective.starts.tolist() == ([0, 7, 13] if local else [0, 0, 0])
        schedule, objective = diffusion_tables(DiffusionConfig(objective=name, window="whole", carry="full"))
        assert bool((schedule.carry == 1).all())
        assert not objective.starts.any()
    assert "expected full or scaled" in error_of(diffusion_tables, DiffusionConfig(carry="half"))  # type: ignore[arg-type]
    assert "expected whole or segment" in error_of(diffusion_tables, DiffusionConfig(window="all"))  # type: ignore[arg-type]


def test_tables_that_would_fill_the_memory_are_refused():
    for steps, segments in ((2**31, 3), (2**70, 1), (2**19, 3)):
        assert f"T = {steps} times" in error_of(make_schedule, steps, segments)
