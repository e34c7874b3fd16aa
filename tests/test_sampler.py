import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import error_of
from torch import nn

from mcdi_fast import sampler as sampler_module
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.diffusion import chain_table, diffusion_tables, draw_steps, sample_chain, sampling_steps
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_layout
from mcdi_fast.meta import fit
from mcdi_fast.noise import philox_normal
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.sampler import Sampler
from mcdi_fast.weights import WeightLayout

C, T = 6, 9
PLAIN = nn.Linear(4, 3)  # N = 3, D = 5
PADDED = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))  # N = 5, D = 5; two tokens are 4 wide


def make(module, objective="local-consistency", rows=None, seed=0):
    layout = module if isinstance(module, WeightLayout) else WeightLayout.from_module(module)
    g = torch.Generator().manual_seed(seed)
    shapes = init_parameters(layout.width, C + layout.position_width, T, 16, 2, 0)
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
    sampler = Sampler(generator, precision="ieee")
    found = sampler.sample(condition, seeds, num_steps=num_steps, eta_noise=eta_noise)

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
    sampler = Sampler(generator, impl="torch")
    whole = sampler.sample(condition, seeds, eta_noise=eta_noise).tokens
    monkeypatch.setattr(sampler_module, "CHUNK", 4)
    for given in (seeds, list(seeds), range(11), torch.arange(11)):
        found = sampler.sample(condition, given, eta_noise=eta_noise).tokens
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
    again, _ = path_of(generator, condition, seeds, eta_noise=eta_noise)
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
    for bad in (good[0, 0, :5], good[:0], good[:, :2], good[..., :5], good[None], good[:, 0, :5], torch.tensor(1.0)):
        for given in (bad, bad.numpy()):
            message = error_of(sample, given, [0] * 3)
            assert message.startswith(f"condition: shape {list(bad.shape)}")
            assert "[B, 3, 6], [B, 6] or, for one task, [6]" in message
    for dtype in (torch.int64, torch.bool, torch.complex64):
        assert f"condition: {dtype}" in error_of(sample, good.to(dtype), [0] * 3)
    assert "condition: int64" in error_of(sample, np.zeros((3, 3, 6), int), [0] * 3)
    assert "condition: on meta, expected cpu" in error_of(sample, good.to("meta"), [0] * 3)
    for bad in ([[0.0] * 6, [0.0] * 5], ["a"] * 6, {"x": 1}, [good[0, 0], good[0]]):
        assert f"condition: {type(bad).__name__} that makes no array" in error_of(sample, bad, [0] * 3)
    assert "condition: shape [0]" in error_of(sample, [], [])
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
        assert f"seed {bad}" in error_of(sample, condition, bad)
    assert "seeds: 1, expected 3, one a task" in error_of(sample, condition, 0)
    assert "seeds: shape [3, 1]" in error_of(sample, condition, torch.zeros(3, 1, dtype=torch.int64))
    expected = sample(condition, [4, 5, 6]).tokens
    for seeds in (range(4, 7), (4, 5, 6), np.arange(4, 7), torch.arange(4, 7)):
        assert torch.equal(sample(condition, seeds).tokens, expected)


@pytest.mark.parametrize("num_steps", ["3", 3.0, [3], torch.tensor(3.0)])
@pytest.mark.parametrize("tasks", [1, 9])
def test_num_steps_that_is_no_integer(num_steps, tasks):
    sampler = Sampler(make(PLAIN))
    condition = conditions(sampler.generator, tasks)
    message = error_of(sampler.sample, condition, range(tasks), num_steps=num_steps)
    assert f"sampling steps = {num_steps!r}: expected an integer" in message
    for three in (np.int64(3), torch.tensor(3)):
        found = sampler.sample(condition, range(tasks), num_steps=three).tokens
        assert torch.equal(found, sampler.sample(condition, range(tasks), num_steps=3).tokens)


@pytest.mark.parametrize("eta_noise", [-0.1, 1.01, math.nan, math.inf, "1", None])
def test_eta_noise_errors(eta_noise):
    generator = make(PLAIN)
    assert f"eta_noise = {eta_noise!r}" in error_of(
        Sampler(generator).sample, conditions(generator, 1), [0], eta_noise=eta_noise
    )


def test_weights_that_are_not_finite_are_no_result():
    generator = make(PLAIN)
    huge = {name: value * 1e30 for name, value in generator.phi.items()}
    spoilt = WeightGenerator(
        huge, generator.layout, generator.normalizer, generator.condition_normalizer, generator.diffusion
    )
    assert "weights of task 0 are not finite" in error_of(Sampler(spoilt).sample, conditions(generator, 2), [0, 1])


# --- what people hand over ---


def given_as(condition):
    """A condition [1, 1, C] whose entries half precision holds, in all the ways that mean it."""
    array = condition.numpy()
    yield from (condition, condition[0], condition[0, 0], condition.expand(1, 3, C))
    yield from (
        array,
        array[0],
        array[0, 0],
        array.astype(np.float64),
        array[0].astype(np.float16),
        array[..., ::-1][..., ::-1],
    )
    yield from (
        array.tolist(),
        array[0, 0].tolist(),
        tuple(array[0, 0].tolist()),
        list(array),
        list(condition[0]),
        [list(array[0])],
    )
    yield from (condition.double(), condition.half(), condition.bfloat16(), condition.clone().requires_grad_())


def test_conditions_and_seeds_of_every_kind():
    sampler = Sampler(make(PLAIN))
    condition = torch.tensor([1.0, -0.5, 0.25, 3.0, 0.0, -2.0]).view(1, 1, C)
    expected = sampler.sample(condition.expand(1, 3, C).contiguous(), [7]).tokens
    read_only = condition.numpy().copy()
    read_only.flags.writeable = False
    for given in (*given_as(condition), read_only):
        assert torch.equal(sampler.sample(given, [7]).tokens, expected)
    for seed in (
        7,
        np.int32(7),
        np.uint64(7),
        np.array(7),
        torch.tensor(7),
        torch.tensor([7]),
        (7,),
        torch.tensor(7, dtype=torch.int32),
    ):
        assert torch.equal(sampler.sample(condition, seed).tokens, expected)
    many = conditions(sampler.generator, 30)
    for given in (many.numpy(), many.double(), many.tolist(), list(many)):
        assert torch.equal(sampler.sample(given, np.arange(30)).tokens, sampler.sample(many, range(30)).tokens)


def test_a_generator_by_its_folder(tmp_path, monkeypatch):
    generator = make(PLAIN)
    generator.save_pretrained(tmp_path / "generator")
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "generator", str(tmp_path / "generator"), "~/generator"):
        assert Sampler(place).generator == generator
    assert "none/config.json" in error_of(Sampler, tmp_path / "none")


# --- what surrounds a call ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [PLAIN, PADDED])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_autocast_changes_nothing(dtype, module, impl):
    generator = make(module)
    x = torch.randn(2, generator.layout.num_tokens, generator.layout.width)

    def everything():
        sampler = Sampler(make(module), impl=impl)
        for tasks in (1, 4, 7, 40):
            for options in ({}, {"eta_noise": 1.0}, {"callback": lambda t, x: None}, {"num_steps": 4}):
                yield sampler.sample(conditions(generator, tasks), range(tasks), **options).tokens
        for tasks in (2, 9):
            static = sampler_module.StaticSampler(sampler, tasks)
            static.condition.copy_(conditions(generator, tasks))
            yield static().tokens
        yield make(module).f(conditions(generator, 2))(x, 1)

    expected = list(everything())
    with torch.autocast("cpu", dtype):
        found = list(everything())
        assert (x[0] @ x[0].T).dtype == dtype  # it is on, and still on behind the calls
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


@pytest.fixture
def other_defaults(defaults):
    """As scientific code and loaders of large models set them."""
    if defaults == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def with_defaults(generator, condition, folder):
    """What this project makes, by name."""
    schedule, objective = diffusion_tables(DiffusionConfig(T, 3))
    steps = draw_steps(
        objective, torch.zeros(2, dtype=torch.int64, device="cpu"), 3, 4, torch.Generator().manual_seed(0)
    )
    yield from (schedule.abar_segment, schedule.carry, objective.skip, objective.scale, schedule.next_segment(), steps)
    yield from chain_table(schedule, objective, 4)
    yield from init_parameters(5, C, T, 16, 2, 0).values()
    yield philox_normal([1, 2], 9)
    generator.save_pretrained(folder)
    sampler = Sampler(folder)
    yield Sampler(folder, impl="torch").sample(condition, range(9)).tokens
    for tasks in (1, 9):
        for options in ({}, {"eta_noise": 1.0}, {"callback": lambda t, x: None}):
            yield sampler.sample(condition[:tasks], range(tasks), **options).tokens
        static = sampler_module.StaticSampler(sampler, tasks)
        static.condition.copy_(condition[:tasks])
        yield static().tokens
    yield sampler.sample(condition[0].numpy().astype(np.float64)[0], 3).tokens
    yield pickle.loads(pickle.dumps(sampler)).sample(condition[:1], 3).tokens


@pytest.mark.parametrize("defaults", ["float64", "meta"])
def test_default_dtype_and_device_change_nothing(defaults, request, tmp_path):
    generator = make(PADDED)
    condition = conditions(generator, 9)
    expected = list(with_defaults(generator, condition, tmp_path / "one"))
    request.getfixturevalue("other_defaults")
    found = list(with_defaults(generator, condition, tmp_path / "two"))
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        assert one.device.type == "cpu"
        assert torch.equal(one, two)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_sampled_in_inference_mode_then_outside(impl):
    sampler = Sampler(make(PADDED), impl=impl)
    condition = conditions(sampler.generator, 9)
    expected = Sampler(make(PADDED), impl=impl).sample(condition, range(9)).tokens
    with torch.inference_mode():
        static = sampler_module.StaticSampler(sampler, 9)
        assert torch.equal(sampler.sample(condition, range(9)).tokens, expected)
        sampler.sample(condition[:1], 0)
    assert torch.equal(sampler.sample(condition, range(9)).tokens, expected)
    static.condition.copy_(condition)
    static.seeds.copy_(torch.arange(9))
    assert torch.equal(static().tokens, expected)
    assert sampler.sample(condition[:1], 0).functional_call(PADDED, torch.randn(1, 2, 4)).requires_grad is False


# --- another number of tokens ---


def head_generator(ways=5, rows=None):
    return make(head_layout(ways, 7), rows=rows)


@pytest.mark.parametrize("rows", [1, 5])
def test_exchangeable_tokens_come_in_any_number(rows, tmp_path):
    """The chain of N tokens is that of a generator made for N; whatever N, a permutation of the conditions permutes what is written."""
    if rows == 1:
        generator = head_generator(rows=1)
    else:  # as older files have them: a row a token, all alike
        one = head_generator(rows=1)
        every = [
            Normalizer(n.mean.expand(5, -1), n.std.expand(5, -1)) for n in (one.normalizer, one.condition_normalizer)
        ]
        generator = WeightGenerator(one.phi, one.layout, *every, one.diffusion)
        assert generator == one
    generator.save_pretrained(tmp_path)
    sampler = Sampler(tmp_path, precision="ieee")
    assert sampler.generator == generator
    for ways in (1, 2, 5, 10, 20, 70):
        own = head_generator(ways, rows=1)
        own = WeightGenerator(
            generator.phi, own.layout, generator.normalizer, generator.condition_normalizer, generator.diffusion
        )
        for tasks in (1, 6):
            condition = torch.randn(tasks, ways, C, generator=torch.Generator().manual_seed(ways))
            if ways == 1:  # the same vector for every token
                condition = condition.expand(tasks, 5, C)
                own = generator
            found = sampler.sample(condition, range(tasks))
            expected = Sampler(own, precision="ieee").sample(condition, range(tasks))
            assert torch.equal(found.tokens, expected.tokens)
            assert found.layout == expected.layout
            slow = Sampler(generator, impl="torch").sample(condition, range(tasks)).tokens
            torch.testing.assert_close(found.tokens, slow, rtol=1e-4, atol=1e-5)
            x = torch.randn(tasks, 3, 7)
            assert found.functional_call(nn.Linear(7, found.layout.num_tokens), x).shape == (
                tasks,
                3,
                max(ways, 5 if ways == 1 else ways),
            )


def test_other_numbers_of_tokens_are_refused_where_tokens_have_places():
    generator = make(PLAIN)
    assert "expected [B, 3, 6]" in error_of(Sampler(generator).sample, torch.zeros(2, 4, C), [0, 1])
    apart = head_generator(rows=5)  # exchangeable, but every token with a normaliser of its own
    assert "expected [B, 5, 6]" in error_of(Sampler(apart).sample, torch.zeros(2, 4, C), [0, 1])
    assert "expected [B, any N, such as 5, 6]" in error_of(
        Sampler(head_generator(rows=1)).sample, torch.zeros(2, 5, 3), [0, 1]
    )


def test_a_generator_of_five_ways_writes_heads_of_two_to_twenty(tmp_path):
    """End to end: heads that are a function of their conditions, learned at five ways, are right at others."""
    width, layout = 4, head_layout(5, 3)
    condition = torch.randn(400, 5, width, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    bank = TrajectoryBank.create(tmp_path, layout, num_segments=2, condition_width=width)
    bank.append(torch.stack([0.5 * condition @ turn, condition @ turn], 1), condition)
    meta = MetaConfig(steps=250, meta_batch=16, outer_lr=0.01)
    sampler = Sampler(fit(bank, meta, DiffusionConfig(6, 2), DenoiserConfig(32, 1)))
    for ways in (2, 5, 10, 20):
        for tasks in (1, 30):
            new = torch.randn(tasks, ways, width, generator=torch.Generator().manual_seed(ways))
            weights = sampler.sample(new, range(tasks))
            assert weights.tokens.shape == (tasks, ways, 4)
            assert float((weights.tokens - new @ turn).square().mean()) < 0.1, ways  # of a variance of 1


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_few_tasks_by_torch_wait_for_no_thread(two_threads):
    sampler, seen = Sampler(make(PLAIN)), []
    few = sampler_module.ONE_THREAD_ROWS // 3
    for tasks in (1, few, few + 1):
        seen.clear()
        sampler.sample(
            conditions(sampler.generator, tasks),
            range(tasks),
            callback=lambda t, x: seen.append(torch.get_num_threads()),
        )
        assert set(seen) == {1 if tasks <= few else 2}
        assert torch.get_num_threads() == 2

    def stop(t, x):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sampler.sample(conditions(sampler.generator, 1), 0, callback=stop)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("module", [PLAIN, PADDED, head_layout(5, 7)])
def test_through_the_kernel(module):
    """In Triton's interpreter: positions, padding and other numbers of tokens reach it as they reach torch."""
    pytest.importorskip("triton")
    generator = make(module, rows=1)
    kernel, plain = Sampler(generator, impl="triton", precision="ieee"), Sampler(generator, impl="torch")
    for tokens in (2, 5, 10, 70) if generator.any_number_of_tokens else (generator.layout.num_tokens,):
        condition = torch.randn(2, tokens, C, generator=torch.Generator().manual_seed(tokens))
        found, expected = (sampler.sample(condition, [0, 1], num_steps=3) for sampler in (kernel, plain))
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
        assert found.layout == expected.layout
    if generator.any_number_of_tokens:
        assert "at most 4096 tokens, here are 4097" in error_of(kernel.sample, torch.zeros(1, 4097, C), 0)
    for value in generator.phi.values():  # a phi that is still trained
        value.mul_(0.9)
    found, expected = (sampler.sample(condition, [0, 1], num_steps=3).tokens for sampler in (kernel, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tasks", [1, 40])
def test_the_generators_own_number_of_steps(tasks):
    plain = make(PLAIN)
    short = dataclasses.replace(plain, num_steps=4)
    condition = conditions(plain, tasks)
    found = Sampler(short).sample(condition, range(tasks)).tokens
    assert torch.equal(found, Sampler(plain).sample(condition, range(tasks), num_steps=4).tokens)
    assert torch.equal(
        Sampler(short).sample(condition, range(tasks), num_steps=T).tokens,
        Sampler(plain).sample(condition, range(tasks)).tokens,
    )
