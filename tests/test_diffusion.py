import itertools
import math

import pytest
import torch
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast.denoiser import denoise, init_parameters
from mcdi_fast.diffusion import (
    OBJECTIVES,
    consistency_loss,
    draw_steps,
    make_inner_batch,
    make_objective,
    make_schedule,
    noising,
    sample_chain,
    sampler_coefficients,
    sampling_steps,
)
from mcdi_fast.inner import task_loss

SIZES = [(20, 3), (6, 3), (7, 3), (10, 4), (5, 5), (20, 1), (1, 1), (50, 7)]  # T / k an integer and not


def draws(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def exact_f(schedule, targets):
    """f of the next target: sqrt(1 - abar_t) u_t / (1 - abar^i_t), u_t = x_t - sqrt(abar^i_t) theta_{id}."""
    segment = schedule.next_segment()

    def f(x, t):
        i = int(segment[t])
        a, abar = schedule.abar_segment[i, t], schedule.abar[t]
        return (1 - abar).sqrt() * (x - a.sqrt() * targets[i]) / (1 - a)

    return f


def mixture_f(schedule, targets):
    """The exact minimiser of the loss for one known trajectory: a posterior mixture over the targets still ahead."""

    def f(x, t):
        abar = schedule.abar[t]
        logits, above, below = [], [], []
        for i, end in enumerate(schedule.ends):
            if t >= end:
                continue
            a = schedule.abar_segment[i, t]
            u = x - a.sqrt() * targets[i]
            logits.append(-math.log(end) - 0.5 * (u.square() / (1 - a)).sum(-1) - 0.5 * x.shape[-1] * (1 - a).log())
            above.append((1 - abar).sqrt() * u)
            below.append(1 - a)
        r = torch.stack(logits).softmax(0)
        return (r.unsqueeze(-1) * torch.stack(above)).sum(0) / (r * torch.stack(below)[:, None]).sum(0).unsqueeze(-1)

    return f


def path_of(f, start, schedule, **options):
    seen = {}
    end = sample_chain(f, start, schedule, callback=lambda t, x: seen.__setitem__(t, x), **options)
    assert torch.equal(seen[schedule.num_steps], end)
    return seen


@pytest.mark.parametrize(("steps", "segments"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 0.0])
def test_theorem_1_the_noise_free_chain_hits_every_target_at_its_step(steps, segments, scale):
    schedule = make_schedule(steps, segments)
    targets = draws(segments, 3, 4, seed=1)
    seen = path_of(exact_f(schedule, targets), draws(3, 4, scale=scale), schedule)
    assert list(seen) == list(range(steps + 1))
    for i, end in enumerate(schedule.ends):
        # the start is amplified by at most prod 1/sqrt(alpha) on the way; 1e-11 leaves four digits for that
        torch.testing.assert_close(seen[end], targets[i], rtol=0, atol=1e-11 * max(1, scale))
        if end > 1:
            assert (seen[end - 1] - targets[i]).abs().max() > 1e-3  # and not before


def mixture_misses(targets):
    """Distance (root mean square, worst of five starts) from each target at its step, under the exact minimiser."""
    schedule = make_schedule(20, 3)
    seen = path_of(mixture_f(schedule, targets), draws(5, targets.shape[-1], seed=2), schedule)
    ends = zip(schedule.ends, targets, strict=True)
    return [float((seen[end] - target).square().mean(-1).sqrt().max()) for end, target in ends]


@pytest.mark.parametrize("dimension", [65, 325])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_theorem_1_with_the_exact_minimiser(dimension, seed):
    """It knows neither the segment nor the next target, and still the noise-free chain hits all three of a trajectory."""
    trajectory = draws(3, dimension, seed=seed).cumsum(0) / torch.tensor([[1], [2], [3]]).sqrt()
    assert max(mixture_misses(trajectory)) < 5e-5


def test_the_exact_minimiser_may_pass_over_a_target_unlike_the_one_before():
    """Independent targets are no trajectory: at e_1 the residual theta_1 - sqrt(abar^i) theta_i looks more like noise for i = 3."""
    first, second, last = mixture_misses(draws(3, 65, seed=1))
    assert first < 5e-5
    assert second > 0.5
    assert last < 5e-5


def test_the_exact_minimiser_minimises_the_loss():
    """A Monte Carlo mean of the loss at one t: no constant factor or shift of f* does better."""
    schedule = make_schedule(20, 3)
    objective = make_objective(schedule, "local-consistency")
    targets, t, n = draws(3, 2, seed=1), 4, 60_000
    weight = torch.tensor([1 / end for end in schedule.ends], dtype=torch.float64)  # t is uniform in [0, e_i)
    segment = torch.multinomial(weight, n, replacement=True, generator=torch.Generator().manual_seed(3))
    step, eps = torch.full((n,), t), draws(n, 1, 2, seed=4)
    x = noising(objective, targets[segment].unsqueeze(1), segment, step, eps)
    best = mixture_f(schedule, targets)(x[:, 0], t).unsqueeze(1)

    def loss(f):
        return float(consistency_loss(objective, f, segment, step, eps).mean())

    for factor in (0.95, 1.05):
        assert loss(factor * best) > loss(best)
    for shift in (-0.1, 0.1):
        assert loss(best + shift) > loss(best)
    assert loss(exact_f(schedule, targets)(x, t)) > loss(best)  # the next target alone is not the minimiser


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noising_and_loss_are_the_formulas(name):
    schedule = make_schedule(7, 3)
    objective = make_objective(schedule, name)
    theta, eps, f = draws(3, 4, 2, 5)
    segment, step = torch.tensor([2, 2, 2, 2]), torch.tensor([0, 3, 5, 6])
    if name != "vanilla":
        segment, step = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 4, 6, 0])
    x, loss = noising(objective, theta, segment, step, eps), consistency_loss(objective, f, segment, step, eps)
    assert loss.shape == (4,)
    for b, (i, t) in enumerate(zip(segment.tolist(), step.tolist(), strict=True)):
        a = float(schedule.abar_segment[i if name == "local-consistency" else -1, t])
        expected = math.sqrt(a) * theta[b] + math.sqrt(1 - a) * eps[b]
        torch.testing.assert_close(x[b], expected, rtol=1e-13, atol=1e-14)
        of_f, of_eps = 1.0, 1.0
        if name == "local-consistency":
            of_f, of_eps = math.sqrt(1 - a), math.sqrt(1 - float(schedule.abar[t]))
        expected = sum(float(e) ** 2 for e in (of_f * f[b] - of_eps * eps[b]).flatten()) / 10
        assert float(loss[b]) == pytest.approx(expected, rel=1e-12)


def test_noising_broadcasts_the_target_and_keeps_the_dtype():
    objective = make_objective(make_schedule(20, 3), "local-consistency")
    theta, eps = draws(2, 1, 3, 4).float(), draws(2, 6, 3, 4).float()
    segment, step = torch.ones(2, 6, dtype=torch.int64), torch.arange(12).view(2, 6)
    x = noising(objective, theta, segment, step, eps)
    assert x.dtype == torch.float32
    assert x.shape == eps.shape
    exact = noising(objective, theta.double(), segment, step, eps.double())
    torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("steps", "segments"), [(20, 3), (7, 3), (5, 5), (4, 1)])
def test_the_inner_batch_states_the_same_loss_in_the_network_s_output(name, steps, segments):
    """gain net - target = f_weight f - eps_weight eps with f = skip x + scale net."""
    b, k, s, n, d, c = 5, 2, 3, 4, 6, 2
    schedule = make_schedule(steps, segments)
    objective = make_objective(schedule, name)
    generator = torch.Generator().manual_seed(0)
    choices = torch.tensor(objective.targets)
    segment = choices[torch.randint(len(choices), (b,), generator=generator)]
    step = draw_steps(objective, segment, k, s, generator)
    target, condition, eps = draws(b, n, d, seed=1), draws(b, n, c, seed=2), draws(b, k, s, n, d, seed=3)
    batch = make_inner_batch(objective, target, condition, segment, step, eps)
    phi = {name: draws(*v.shape, seed=4) for name, v in init_parameters(d, c, steps, 5, 1, 0).items()}
    batch.check(phi)
    net = denoise(phi, batch.x.flatten(1, 2), step.flatten(1), condition).view_as(eps)
    skip, scale = (table[step][..., None, None] for table in (objective.skip, objective.scale))
    f = skip * batch.x + scale * net
    segments = segment[:, None, None].expand(b, k, s)
    assert torch.equal(batch.x, noising(objective, target[:, None, None], segments, step, eps))
    f_weight, eps_weight = (
        table[segments, step][..., None, None] for table in (objective.f_weight, objective.eps_weight)
    )
    torch.testing.assert_close(
        batch.gain[..., None, None] * net - batch.target, f_weight * f - eps_weight * eps, rtol=1e-11, atol=1e-12
    )
    expected = consistency_loss(objective, f, segments, step, eps).mean(-1)
    for i in range(b):
        for r in range(k):
            found = task_loss(phi, batch.x[i, r], step[i, r], condition[i], batch.gain[i, r], batch.target[i, r])
            torch.testing.assert_close(found, expected[i, r], rtol=1e-11, atol=1e-13)


def test_padding_without_noise_stays_zero_in_an_inner_batch():
    schedule = make_schedule(20, 3)
    objective = make_objective(schedule, "local-consistency")
    target, eps = draws(2, 3, 4), draws(2, 1, 5, 3, 4)
    target[:, 1, 2:], eps[..., 1, 2:] = 0, 0
    segment = torch.tensor([0, 2])
    step = torch.tensor([0, 1, 2, 3, 6]).expand(2, 1, 5)
    batch = make_inner_batch(objective, target, draws(2, 3, 1), segment, step, eps)
    assert not batch.x[..., 1, 2:].any()
    assert not batch.target[..., 1, 2:].any()


@pytest.mark.parametrize("window", ["whole", "segment"])
def test_steps_are_drawn_uniformly(window):
    schedule = make_schedule(20, 3)
    for name in OBJECTIVES:
        objective = make_objective(schedule, name, window)
        segment = torch.tensor([i for i in objective.targets for _ in range(20)])
        step = draw_steps(objective, segment, 50, 20, torch.Generator().manual_seed(0))
        assert step.dtype == torch.int64
        assert step.shape == (len(segment), 50, 20)
        for i in objective.targets:
            first, end = int(objective.starts[i]), int(objective.ends[i])
            count = step[segment == i].flatten().bincount(minlength=end)
            assert len(count) == end
            assert not count[:first].any()
            expected = 20_000 / (end - first)
            assert ((count[first:] - expected).abs() < 6 * math.sqrt(expected)).all()  # six deviations
    again = draw_steps(objective, segment, 50, 20, torch.Generator().manual_seed(0))
    assert torch.equal(step, again)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_shorter_chain_visits_every_end(data):
    steps = data.draw(st.integers(1, 40))
    ends = sorted({*data.draw(st.lists(st.integers(1, steps), max_size=6)), steps})
    count = data.draw(st.integers(len(ends), steps))
    schedule = make_schedule(steps, data.draw(st.integers(1, steps)))
    visited = sampling_steps(schedule, tuple(ends), count)
    assert len(visited) == count + 1
    assert visited[0] == 0
    assert visited[-1] == steps
    assert visited == sorted(set(visited))
    assert set(ends) <= set(visited)
    assert sampling_steps(schedule, torch.tensor(ends), count) == visited
    assert sampling_steps(schedule, ends) == list(range(steps + 1))


def test_a_shorter_chain_is_spread_evenly():
    schedule = make_schedule(20, 3)
    assert sampling_steps(schedule, schedule.ends, 3) == [0, 7, 13, 20]
    assert sampling_steps(schedule, (20, 20, 20), 4) == [0, 5, 10, 15, 20]
    assert sampling_steps(schedule, (20,), 1) == [0, 20]
    for count in (2, 21, 0, -1):
        message = error_of(sampling_steps, schedule, schedule.ends, count)
        assert f"steps = {count}" in message
        assert "3 " in message
        assert "20" in message


@pytest.mark.parametrize(("steps", "segments"), SIZES)
def test_coefficients_of_the_full_chain(steps, segments):
    schedule = make_schedule(steps, segments)
    found = sampler_coefficients(schedule, list(range(steps + 1)))
    assert found.dtype == torch.float64
    assert found.shape == (steps, 3)
    for t, (a, b, sigma) in enumerate(found.tolist()):
        alpha, now, then = (float(v) for v in (schedule.alpha[t], schedule.abar[t], schedule.abar[t + 1]))
        assert a == pytest.approx(1 / math.sqrt(alpha), rel=1e-13)
        assert b == pytest.approx(-(1 - alpha) / math.sqrt(1 - now) / math.sqrt(alpha), rel=1e-12)
        assert sigma == pytest.approx(math.sqrt((1 - alpha) * (1 - then) / (1 - now)), rel=1e-12)
    assert float(found[-1, 2]) == 0  # no noise on the weights themselves


@pytest.mark.parametrize(("steps", "segments"), [(20, 3), (7, 3), (10, 4), (20, 1), (50, 7)])
def test_a_shorter_chain_composes_the_single_steps(steps, segments):
    schedule = make_schedule(steps, segments)
    targets, start = draws(segments, 3, 4, seed=1), draws(3, 4)
    f = exact_f(schedule, targets)
    whole = path_of(f, start, schedule)
    for count in range(segments, steps + 1):
        seen = path_of(f, start, schedule, num_steps=count)
        assert len(seen) == count + 1
        for t, x in seen.items():
            torch.testing.assert_close(x, whole[t], rtol=1e-10, atol=1e-11)


def test_a_long_harsh_schedule_stays_finite():
    schedule = make_schedule(3000, 3, 0.99, 0.01)
    assert schedule.abar[0] == 0  # underflow, and abar_0 / abar_1 is 0 / 0; the coefficients must not mind
    assert sampler_coefficients(schedule, list(range(3001))).isfinite().all()
    schedule = make_schedule(1000, 3, 0.99, 0.01)
    for count in (3, 10, 1000):
        assert sampler_coefficients(schedule, sampling_steps(schedule, schedule.ends, count)).isfinite().all()


@pytest.mark.parametrize("eta_noise", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [None, 5])
def test_the_chain_is_the_loop_of_the_formula(eta_noise, num_steps):
    schedule = make_schedule(20, 3)
    start, z = draws(2, 3, 4), draws(20, 2, 3, 4, seed=9)
    calls = []

    def f(x, t):
        calls.append(t)
        return torch.tanh(x) * (t + 1) / 20

    found = sample_chain(f, start, schedule, num_steps=num_steps, eta_noise=eta_noise, noise=lambda t: z[t])
    visited = sampling_steps(schedule, schedule.ends, num_steps)
    assert calls == visited[:-1]
    x = start
    for t, then in itertools.pairwise(visited):
        alpha = math.prod(schedule.alpha[t:then].tolist())
        abar, abar_then = float(schedule.abar[t]), float(schedule.abar[then])
        x = (x - (1 - alpha) / math.sqrt(1 - abar) * f(x, t)) / math.sqrt(alpha)
        x = x + eta_noise * math.sqrt((1 - alpha) * (1 - abar_then) / (1 - abar)) * z[t]
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-12)


def test_full_noise_ends_on_the_data_of_a_known_distribution():
    """Weights N(0, 1) and f = E[eps | x_t] = sqrt(1 - abar_t) x_t: the variance follows the affine recursion and stays below 1."""
    schedule = make_schedule(20, 1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(100_000, generator=generator, dtype=torch.float64)
    skip = make_objective(schedule, "local-consistency").skip
    seen = path_of(
        lambda x, t: skip[t] * x,
        start,
        schedule,
        eta_noise=1.0,
        noise=lambda t: torch.randn(100_000, generator=generator, dtype=torch.float64),
    )
    variance = 1.0
    for t in range(20):
        alpha, now, then = (float(v) for v in (schedule.alpha[t], schedule.abar[t], schedule.abar[t + 1]))
        # (x - (1 - alpha) x) / sqrt(alpha) = sqrt(alpha) x, and the posterior noise of a known theta
        variance = alpha * variance + (1 - alpha) * (1 - then) / (1 - now)
        assert float(seen[t + 1].var()) == pytest.approx(variance, rel=0.03)  # six deviations
        assert 0.3 < variance <= 1


def test_chain_errors():
    schedule = make_schedule(20, 3)

    def chain(**options):
        return sample_chain(lambda x, t: x, torch.zeros(2), schedule, **options)

    for eta_noise in (-0.1, 1.1, math.nan, math.inf):
        assert f"eta_noise = {eta_noise}" in error_of(chain, eta_noise=eta_noise, noise=lambda t: torch.zeros(2))
    assert "noise" in error_of(chain, eta_noise=0.5)
    assert "steps = 2" in error_of(chain, num_steps=2)
    chain(ends=(20, 20, 20), num_steps=2)
    chain()


@pytest.mark.parametrize("num_steps", [None, 3, 5, 11])
def test_a_scaled_chain_hits_every_target_and_goes_on_scaled(num_steps):
    """Theorem 1's chain with f for the next target: exact from any start, so from a scaled target too."""
    schedule = make_schedule(20, 3, carry_scaled=True)
    theta = draws(3, 2, 4, seed=1)
    seen = path_of(exact_f(schedule, theta), draws(2, 4), schedule, num_steps=num_steps)
    for i, end in enumerate(schedule.ends):
        torch.testing.assert_close(seen[end] / schedule.carry[end], theta[i], rtol=1e-9, atol=1e-9)
    # what it goes on with has the signal that training shows at that step
    for i, end in enumerate(schedule.ends[:-1]):
        torch.testing.assert_close(seen[end], schedule.abar_segment[i + 1, end].sqrt() * theta[i])
