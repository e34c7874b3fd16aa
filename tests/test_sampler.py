import math

import numpy as np
import pytest
import torch
from torch import nn

from mcdi_fast import sampler
from mcdi_fast.config import DiffusionConfig
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.diffusion import sample_chain, sampling_steps
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.noise import philox_normal
from mcdi_fast.sampler import Sampler
from mcdi_fast.weights import Normalizer, WeightLayout

C, T = 6, 9
PLAIN = nn.Linear(4, 3)  # N = 3, D = 5
PADDED = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))  # N = 5, D = 5; two tokens are 4 wide


def make(module, objective="local-consistency", rows=None, seed=0):
    layout = WeightLayout.from_module(module)
    g = torch.Generator().manual_seed(seed)
    shapes = init_parameters(layout.width, C, T, 16, 2, 0)
    phi = {name: torch.randn(value.shape, generator=g) / len(value) ** 0.5 for name, value in shapes.items()}
    phi["out.token"] *= 0.3  # a trained network says little more than the skip: rounding does not grow along the chain
    rows = rows or layout.num_tokens
    mean, std = torch.randn(rows, layout.width, generator=g), torch.rand(rows, layout.width, generator=g) + 0.5
    if rows > 1:
        mean, std = mean.masked_fill(~layout.mask, 0), std.masked_fill(~layout.mask, 1)
    of_condition = Normalizer(torch.randn(rows, C, generator=g), torch.rand(rows, C, generator=g) + 0.5)
    return WeightGenerator(phi, layout, Normalizer(mean, std), of_condition, DiffusionConfig(T, 3, objective))


def conditions(generator, count, seed=5):
    shape = (count, generator.layout.num_tokens, C)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(call, *args, **options):
    with pytest.raises(McdiError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def path_of(generator, condition, seeds, **options):
    seen = []
    weights = Sampler(generator).sample(condition, seeds, callback=lambda t, x: seen.append((t, x.clone())), **options)
    return weights, seen


@pytest.mark.parametrize("module", [PLAIN, PADDED])
@pytest.mark.parametrize("eta_noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [None, 4])
def test_is_the_chain_of_the_generator(module, eta_noise, num_steps):
    generator = make(module)
    layout, condition, seeds = generator.layout, conditions(generator, 4), [3, 2**63 + 1, 0, 17]
    found = Sampler(generator).sample(condition, seeds, num_steps=num_steps, eta_noise=eta_noise)

    def noise(stream):
        flat = philox_normal(seeds, layout.num_tokens * layout.width, stream)
        return flat.view(4, layout.num_tokens, layout.width) * layout.mask

    f = generator.f(condition)
    x = sample_chain(
        lambda x, t: f(x, t) * layout.mask,
        noise(0),
        generator.schedule,
        num_steps=num_steps,
        eta_noise=eta_noise,
        noise=lambda t: noise(t + 1),
    )
    expected = x * generator.normalizer.std + generator.normalizer.mean
    assert found.tokens.shape == (4, layout.num_tokens, layout.width)
    assert found.tokens.dtype == torch.float32
    assert not found.tokens.requires_grad
    assert found.layout == layout
    torch.testing.assert_close(found.tokens * layout.mask, expected * layout.mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta_noise", [0.0, 1.0])
def test_many_tasks_go_in_chunks(eta_noise, monkeypatch):
    generator = make(PADDED)
    condition, seeds = conditions(generator, 11), np.arange(11)
    whole = Sampler(generator).sample(condition, seeds, eta_noise=eta_noise).tokens
    monkeypatch.setattr(sampler, "CHUNK", 4)
    for given in (seeds, list(seeds), range(11), torch.arange(11)):
        found = Sampler(generator).sample(condition, given, eta_noise=eta_noise).tokens
        torch.testing.assert_close(found, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("eta_noise", [0.0, 1.0])
def test_a_sample_depends_on_its_seed_and_condition_alone(eta_noise):
    generator = make(PADDED)
    condition, seeds = conditions(generator, 33), list(range(100, 133))
    whole, path = path_of(generator, condition, seeds, eta_noise=eta_noise)
    size = float(whole.tokens.abs().max())
    for rows in ([0], [32], [5, 6], list(range(32, -1, -1)), [7, 7, 7]):
        part, part_path = path_of(generator, condition[rows], [seeds[r] for r in rows], eta_noise=eta_noise)
        assert torch.equal(part_path[0][1], path[0][1][rows])  # the start, to the bit
        torch.testing.assert_close(part.tokens, whole.tokens[rows], rtol=0, atol=2e-5 * size)
    other = Sampler(generator).sample(condition, [*seeds[:-1], 7], eta_noise=eta_noise)
    torch.testing.assert_close(other.tokens[:-1], whole.tokens[:-1], rtol=0, atol=2e-5 * size)
    assert (other.tokens[-1] - whole.tokens[-1]).abs().max() > 1e-3
    again = Sampler(generator).sample(condition, seeds, eta_noise=eta_noise)
    assert torch.equal(again.tokens, whole.tokens)


def test_the_noise_of_a_step_is_drawn_by_its_number():
    """So that samples agree between full and shortened chains' common start, and no two steps share a draw."""
    generator = make(PLAIN)
    condition = conditions(generator, 1)
    _, full = path_of(generator, condition, [1], eta_noise=1.0)
    _, free = path_of(generator, condition, [1], eta_noise=0.0)
    _, short = path_of(generator, condition, [1], eta_noise=1.0, num_steps=4)
    assert torch.equal(full[0][1], free[0][1])
    assert torch.equal(full[0][1], short[0][1])
    assert (full[1][1] - free[1][1]).abs().max() > 1e-3
    global_state = torch.get_rng_state()
    path_of(generator, condition, [1], eta_noise=1.0)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("objective", ["local-consistency", "vanilla", "naive-local"])
def test_callback_sees_every_step(objective):
    generator = make(PLAIN, objective)
    condition = conditions(generator, 2)
    weights, seen = path_of(generator, condition, [0, 1])
    assert [t for t, _ in seen] == list(range(T + 1))
    assert torch.equal(generator.normalizer.denormalize(seen[-1][1]), weights.tokens)
    for count in range(3, T + 1):
        _, seen = path_of(generator, condition, [0, 1], num_steps=count)
        assert [t for t, _ in seen] == sampling_steps(generator.schedule, generator.objective.ends, count)
        assert len(seen) == count + 1
    shortest = 3 if objective == "local-consistency" else 1
    path_of(generator, condition, [0, 1], num_steps=shortest)
    for count in (shortest - 1, T + 1, -1):
        message = error_of(Sampler(generator).sample, condition, [0, 1], num_steps=count)
        assert f"steps = {count}" in message


@pytest.mark.parametrize("eta_noise", [0.0, 1.0])
@pytest.mark.parametrize("rows", [None, 1])
def test_padding_stays_zero(eta_noise, rows):
    generator = make(PADDED, rows=rows)
    assert not generator.layout.mask.all()
    _, seen = path_of(generator, conditions(generator, 3), [0, 1, 2], eta_noise=eta_noise)
    for _, x in seen:
        assert not x[:, ~generator.layout.mask].any()
        assert x[:, generator.layout.mask].all()


def test_one_condition_for_all_tokens():
    generator = make(PADDED)
    condition = torch.randn(3, C, generator=torch.Generator().manual_seed(0))
    one = Sampler(generator).sample(condition, [0, 1, 2])
    all_of_them = Sampler(generator).sample(condition.unsqueeze(1).repeat(1, 5, 1), [0, 1, 2])
    assert torch.equal(one.tokens, all_of_them.tokens)


def test_the_condition_matters_and_is_not_written_to():
    generator = make(PLAIN)
    condition = conditions(generator, 2).requires_grad_()
    before = condition.detach().clone()
    one = Sampler(generator).sample(condition, [0, 0])
    assert torch.equal(condition, before)
    assert not one.tokens.requires_grad
    assert (one.tokens[0] - one.tokens[1]).abs().max() > 1e-3
    strided = before.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(Sampler(generator).sample(strided, [0, 0]).tokens, one.tokens, rtol=1e-5, atol=1e-5)


def test_condition_errors():
    generator = make(PLAIN)
    sample, good = Sampler(generator).sample, conditions(generator, 3)
    for bad in (good[0, 0], good[:0], good[:, :2], good[..., :5], good[None], good[:, 0, :5], torch.tensor(1.0)):
        message = error_of(sample, bad, [0] * 3)
        assert message.startswith(f"condition: shape {list(bad.shape)}")
        assert "[B, 3, 6] or [B, 6]" in message
    for dtype in (torch.float64, torch.float16, torch.int64):
        assert f"condition: {dtype}" in error_of(sample, good.to(dtype), [0] * 3)
    for value in (math.nan, math.inf, -math.inf):
        bad = good.clone()
        bad[1, 2, 3] = value
        assert "task 1" in error_of(sample, bad, [0] * 3)
        assert "task 1" in error_of(sample, bad[:, 2], [0] * 3)


def test_seed_errors():
    generator = make(PLAIN)
    sample, condition = Sampler(generator).sample, conditions(generator, 3)
    for seeds in ([], [0, 1], range(4)):
        message = error_of(sample, condition, seeds)
        assert f"seeds: {len(seeds)}, expected 3" in message
    for bad in (-1, 2**64, 1.5, "1", None):
        assert f"seed {bad}" in error_of(sample, condition, [0, bad, 1])
    expected = sample(condition, [4, 5, 6]).tokens
    for seeds in (range(4, 7), (4, 5, 6), np.arange(4, 7), torch.arange(4, 7)):
        assert torch.equal(sample(condition, seeds).tokens, expected)


@pytest.mark.parametrize("eta_noise", [-0.1, 1.01, math.nan, math.inf])
def test_eta_noise_errors(eta_noise):
    generator = make(PLAIN)
    assert f"eta_noise = {eta_noise}" in error_of(
        Sampler(generator).sample, conditions(generator, 1), [0], eta_noise=eta_noise
    )


@pytest.mark.parametrize("module", [PLAIN, PADDED])
def test_the_weights_work_in_a_module(module):
    generator = make(module)
    weights = Sampler(generator).sample(conditions(generator, 3), range(3))
    x = torch.randn(3, 7, 4)
    together = weights.functional_call(module, x)
    fresh = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)) if module is PADDED else nn.Linear(4, 3)
    for task in range(3):
        weights.load_into(fresh, task)
        torch.testing.assert_close(fresh(x[task]), together[task], rtol=1e-5, atol=1e-5)
        fresh.load_state_dict(weights.state_dict(task))


def test_a_saved_generator_samples_the_same_bits(tmp_path):
    generator = make(PADDED)
    generator.save_pretrained(tmp_path)
    condition = conditions(generator, 5)
    one = Sampler(generator).sample(condition, range(5), eta_noise=1.0)
    two = Sampler(WeightGenerator.from_pretrained(tmp_path)).sample(condition, range(5), eta_noise=1.0)
    assert torch.equal(one.tokens, two.tokens)


def test_weights_that_are_not_finite_are_no_result():
    generator = make(PLAIN)
    huge = {name: value * 1e30 for name, value in generator.phi.items()}
    spoilt = WeightGenerator(
        huge, generator.layout, generator.normalizer, generator.condition_normalizer, generator.diffusion
    )
    assert "weights of task 0 are not finite" in error_of(Sampler(spoilt).sample, conditions(generator, 2), [0, 1])
