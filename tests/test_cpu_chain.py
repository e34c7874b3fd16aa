"""The compiled chain against the reference in float64, and when the sampler takes it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast import Sampler, backend
from mcdi_fast.config import DiffusionConfig
from mcdi_fast.denoiser import ChainDenoiser, FoldedDenoiser, denoise, init_parameters
from mcdi_fast.diffusion import chain_table, make_objective, make_schedule, sample_chain
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import Normalizer, WeightGenerator
from mcdi_fast.heads import head_layout
from mcdi_fast.noise import box_muller, philox_normal
from mcdi_fast.weights import WeightLayout

pytest.importorskip("numba")

from test_cpu_tiles import nudged

from mcdi_fast import cpu_chain, cpu_core, cpu_noise, cpu_tiles


def parameters(d, c, steps, hidden, depth, seed=0):
    """None of them zero."""
    g = torch.Generator().manual_seed(seed)
    shapes = init_parameters(d, c, steps, hidden, depth, 0)
    return {name: torch.randn(v.shape, generator=g) / len(v) ** 0.5 for name, v in shapes.items()}


def chain_of(phi, schedule, c, mask=None, precision="tf32"):
    """The compiled chain of phi, with nothing to normalise."""
    d = len(phi["in.token"])
    normal = [Normalizer(torch.zeros(1, n), torch.ones(1, n)) for n in (c, d)]
    position = torch.zeros(1, len(phi["in.condition"]) - c)
    generator = SimpleNamespace(
        folded=lambda: FoldedDenoiser(phi),
        condition_normalizer=normal[0],
        normalizer=normal[1],
        layout=SimpleNamespace(position=lambda: position),
    )
    return cpu_chain.PackedChain(generator, mask, precision)


def start(seeds, tokens, d):
    return philox_normal(seeds, tokens * d).view(len(seeds), tokens, d)


def by_steps(phi, schedule, x, condition, num_steps, mask):
    """The chain by the network as it is written, in x's precision."""
    objective = make_objective(schedule, "local-consistency")
    skip, scale = objective.skip.tolist(), objective.scale.tolist()

    def f(x, t):
        net = denoise(phi, x.unsqueeze(-3), torch.full((len(x), 1), t), condition).squeeze(-3)
        return (skip[t] * x + scale[t] * net) * mask

    return sample_chain(f, x * mask, schedule, num_steps=num_steps)


def rounding(phi, schedule, x, condition, num_steps=None, mask=1.0, precision="tf32"):
    """The chain in float64, and how far from it one may be in float32, or by tile units: eight times as far as torch, for another order of sums."""
    wide = {name: value.double() for name, value in phi.items()}
    given = schedule, x.double(), condition.double(), num_steps, mask
    expected = by_steps(wide, *given)
    others = [by_steps(phi, schedule, x, condition, num_steps, mask)]
    if precision != "ieee" and cpu_tiles.available:
        for seed in range(3):
            others.append(by_steps({n: nudged(v, seed) for n, v in wide.items()}, *given))
    return expected, 8 * max(float((other - expected).abs().max()) for other in others)


def run(phi, schedule, seeds, condition, num_steps=None, mask=None, precision="tf32"):
    steps, coefficients = chain_table(schedule, make_objective(schedule, "local-consistency"), num_steps)
    packed = chain_of(phi, schedule, condition.shape[-1], mask, precision)
    return packed.sample(seeds, condition, steps, coefficients.float())


def poison(size):  # what is read before it is written shows
    found = cpu_core.aligned(size)
    found[:] = np.nan
    return found


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setattr(cpu_chain, "aligned", poison)
    monkeypatch.setattr(cpu_chain, "kept", poison)


@settings(max_examples=40, deadline=None)
@given(
    tasks=st.integers(1, 4),
    tokens=st.integers(1, 7),
    d=st.integers(1, 19),
    c=st.integers(1, 9),
    hidden=st.integers(1, 40),
    depth=st.integers(1, 4),
    total=st.integers(3, 9),
    seed=st.integers(0, 2**31),
    masked=st.booleans(),
    precision=st.sampled_from(["ieee", "tf32"]),
)
def test_against_float64(tasks, tokens, d, c, hidden, depth, total, seed, masked, precision):
    phi, schedule = parameters(d, c, total, hidden, depth, seed), make_schedule(total, 3)
    g = torch.Generator().manual_seed(seed + 1)
    condition, seeds = torch.randn(32, tokens, c, generator=g), list(range(seed, seed + 32))
    x = start(seeds, tokens, d)
    mask = (torch.rand(tokens, d, generator=g) < 0.7).float() if masked else torch.ones(tokens, d)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_chain, "aligned", poison)
        patch.setattr(cpu_chain, "kept", poison)
        found = run(phi, schedule, seeds[:tasks], condition[:tasks], 3, mask if masked else None, precision)
    # of the worst of 32 tasks: of one alone rounding may be nothing, by luck
    expected, most = rounding(phi, schedule, x, condition, 3, mask, precision)
    assert float((found - expected[:tasks]).abs().max()) <= most


def test_the_default_size_as_exactly_as_torch(poisoned):
    phi, schedule = parameters(65, 65, 20, 256, 2), make_schedule(20, 3)
    condition = torch.randn(4, 5, 65, generator=torch.Generator().manual_seed(1))
    x = start(range(4), 5, 65)
    wide = {name: value.double() for name, value in phi.items()}
    expected = by_steps(wide, schedule, x.double(), condition.double(), None, 1.0)
    objective = make_objective(schedule, "local-consistency")
    skip, scale = objective.skip.tolist(), objective.scale.tolist()
    torch_error = sample_chain(ChainDenoiser(FoldedDenoiser(phi), condition, skip, scale), x, schedule) - expected
    error = run(phi, schedule, [0, 1, 2, 3], condition, precision="ieee") - expected
    assert float(error.square().mean()) <= 4 * float(torch_error.square().mean())


def set_threads(monkeypatch, count):
    monkeypatch.setattr(cpu_core.torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(cpu_chain, "_WORTH", 0)  # as many shares as there are threads


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("d", "depth"), [(11, 2), (65, 1), (70, 2)])  # the last: wide
def test_a_task_is_the_same_to_the_bit_in_any_batch_and_on_any_number_of_threads(
    d, depth, alike, poisoned, monkeypatch
):
    """Together or, where a BLAS does not round rows alike in any number, one by one."""
    if not alike:
        monkeypatch.setattr(cpu_chain, "rows_alike", lambda *shape: False)
    phi, schedule = parameters(d, 3, 6, 32, depth), make_schedule(6, 3)
    seeds, condition = list(range(41)), torch.randn(41, 5, 3)
    whole = run(phi, schedule, seeds, condition)
    for threads in (1, 2, 3, 5):
        set_threads(monkeypatch, threads)
        for rows in ([40], [3, 4], list(range(40, -1, -1)), [7] * 5, list(range(41))):
            found = run(phi, schedule, [seeds[row] for row in rows], condition[rows])
            assert torch.equal(found, whole[rows])


@pytest.mark.parametrize("alike", [True, False])
def test_how_many_tasks_come_together(alike, monkeypatch):
    """As many as there are, or one, where a BLAS does not round rows alike; this one may, so the bits would not tell."""
    together, sample = [], cpu_chain._sample
    monkeypatch.setattr(cpu_chain, "rows_alike", lambda *shape: alike)
    monkeypatch.setattr(cpu_chain, "_sample", lambda *given: together.append(given[-4]) or sample(*given))
    set_threads(monkeypatch, 1)
    for tasks in (1, 2, 9):
        run(
            parameters(11, 3, 6, 24, 2),
            make_schedule(6, 3),
            list(range(tasks)),
            torch.randn(tasks, 5, 3),
            precision="ieee",
        )
    assert together == ([1, 2, 9] if alike else [1, 1, 1])


@pytest.mark.parametrize("tokens", [1, 2])
def test_tasks_of_one_row_and_those_of_large_matrices_too(tokens, poisoned, monkeypatch):
    """Where rows are alike: these are together wherever they are not."""
    sizes = (
        (3, 118),
        (3, 48),
        (70, 24),
        (94, 24),
        (118, 24),
        (118, 70),
        (24, 70),
    )  # of the condition's matrices and a step's
    if not all(cpu_chain.rows_alike(k, n, step, 80) for k, n in sizes for step in {1, tokens}):
        pytest.skip("this BLAS rounds a row as the number of rows has it")
    monkeypatch.setattr(cpu_chain, "_IN_CACHE", 0)
    phi, schedule = parameters(70, 3, 6, 24, 2), make_schedule(6, 3)
    seeds, condition = list(range(200)), torch.randn(200, tokens, 3)
    whole = run(phi, schedule, seeds, condition)
    for rows in ([199], [3, 4], list(range(99)), list(range(199, -1, -1))):
        assert torch.equal(run(phi, schedule, [seeds[row] for row in rows], condition[rows]), whole[rows])


def test_rows_that_differ_are_found():
    a, b = np.ones((4, 3), np.float32), np.ones((3, 2), np.float32)
    out, whole = np.empty((2, 4, 2), np.float32)
    assert not cpu_chain._differ(a, b, out, 1, whole)
    a[1] = np.nan  # is not even like itself
    assert cpu_chain._differ(a, b, out, 1, whole)


@pytest.mark.parametrize("tokens", [1, 2])
def test_tasks_together_do_not_meet(tokens, poisoned, monkeypatch):
    """Tasks of one row, and those of large matrices, share products."""
    monkeypatch.setattr(cpu_chain, "_IN_CACHE", 0)
    monkeypatch.setattr(cpu_chain, "_ROWS", 4)
    phi, schedule = parameters(70, 3, 6, 24, 2), make_schedule(6, 3)
    seeds, condition = list(range(11)), torch.randn(11, tokens, 3, generator=torch.Generator().manual_seed(0))
    expected, most = rounding(phi, schedule, start(seeds, tokens, 70), condition)
    for threads in (1, 2, 3):
        set_threads(monkeypatch, threads)
        whole = run(phi, schedule, seeds, condition)
        assert float((whole - expected).abs().max()) <= most
        damaged = condition.clone()
        damaged[4] = torch.nan
        found, rest = run(phi, schedule, seeds, damaged), [i for i in range(11) if i != 4]
        assert found[4].isnan().all()
        assert torch.equal(found[rest], whole[rest])


def test_a_nan_stays_in_its_task(poisoned):
    phi, schedule = parameters(11, 3, 6, 24, 2), make_schedule(6, 3)
    seeds, condition = [5, 2**63, 0, 7, 5], torch.randn(5, 3, 3)
    together = run(phi, schedule, seeds, condition)
    for i in range(5):
        assert torch.equal(run(phi, schedule, seeds[i : i + 1], condition[i : i + 1])[0], together[i])
    condition[2] = torch.nan
    again = run(phi, schedule, seeds, condition)
    assert again[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert torch.equal(again[rest], together[rest])


def draw(seeds, out):
    scratch = cpu_core.aligned(cpu_noise.SCRATCH)
    for seed, row in zip(seeds, out, strict=True):
        scratch[:] = np.nan
        cpu_noise.draw(np.uint64(seed), np.uint64(0), row, scratch)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3), st.one_of(st.integers(1, 40), st.integers(500, 1100))
)
def test_the_noise_is_philox_normal_to_the_bit(seeds, count):
    found = np.full((len(seeds), count), np.nan, np.float32)
    draw(seeds, found)
    assert found.tobytes() == philox_normal(seeds, count).numpy().tobytes()


def test_the_noise_of_any_stream():
    seeds, streams = [0, 5, 2**64 - 1, 5, 7], [0, 1, 2**40 + 3, 2**64 - 1, 9]
    found = cpu_noise.philox_normal(seeds, 1003, streams)
    assert found.numpy().tobytes() == philox_normal(seeds, 1003, streams).contiguous().numpy().tobytes()


def test_the_noise_of_a_machine_that_compiles_first(tmp_path):
    """Compiled inside the chain, whose products may be contracted, the noise is the same bits."""
    code = (
        "import numpy as np, torch; from test_cpu_chain import draw, parameters, run; from mcdi_fast import noise;"
        "from mcdi_fast.diffusion import make_schedule;"
        "run(parameters(4, 2, 3, 8, 1), make_schedule(3, 1), [1], torch.zeros(1, 2, 2));"
        "keys = np.arange(100, dtype=np.uint64); found = np.empty((100, 1000), np.float32); draw(keys, found);"
        "assert found.tobytes() == noise.philox_normal(keys, 1000).numpy().tobytes()"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parent)


def test_a_million_normals_to_the_bit():
    """Every octant and exponent, and the largest and smallest integers."""
    keys = np.arange(1000, dtype=np.uint64)
    found = np.empty((1000, 1000), np.float32)
    draw(keys, found)
    assert found.tobytes() == philox_normal(keys, 1000).numpy().tobytes()
    ends = np.array([0, 1, -1, 2**31 - 1, -(2**31), 2**28, 2**29, 3 * 2**28, 2**30, 5 * 2**28, 7 * 2**28], np.int32)
    a, b = (part.ravel() for part in np.meshgrid(ends, ends))
    expected = np.stack(box_muller(a, b), 1)
    assert np.isfinite(expected).all()
    one_by_one = np.array([cpu_noise._box_muller(x, y) for x, y in zip(a, b, strict=True)], np.float32)
    assert one_by_one.tobytes() == expected.tobytes()


def test_inputs_are_left_alone():
    phi, schedule = parameters(5, 3, 6, 8, 1), make_schedule(6, 3)
    condition, seeds = torch.randn(2, 3, 3), torch.tensor([3, -1])
    before = condition.clone()
    first = run(phi, schedule, seeds, condition)
    assert torch.equal(condition, before)
    assert seeds.tolist() == [3, -1]
    assert torch.equal(run(phi, schedule, seeds, condition), first)
    assert torch.equal(run(phi, schedule, [3, 2**64 - 1], condition), first)
    for other in (condition.expand(2, 3, 3), condition.repeat(1, 1, 2)[..., :3], condition.requires_grad_()):
        assert torch.equal(run(phi, schedule, seeds, other), first)


@pytest.fixture
def generator():
    layout = head_layout(5, 8)
    phi = parameters(layout.width, 4, 6, 16, 2)
    normal = [Normalizer(torch.zeros(5, n), torch.ones(5, n)) for n in (layout.width, 4)]
    return WeightGenerator(phi, layout, *normal, DiffusionConfig(steps=6), {})


@pytest.fixture
def taken(monkeypatch):
    """How many tasks each call of the compiled chain had."""
    calls = []
    inner = cpu_chain.PackedChain.sample
    monkeypatch.setattr(
        cpu_chain.PackedChain, "sample", lambda self, x, *rest: calls.append(len(x)) or inner(self, x, *rest)
    )
    monkeypatch.delenv("MCDI_IMPL", raising=False)
    return calls


def test_the_sampler_takes_it_for_chains_without_noise(generator, taken, monkeypatch):
    condition = torch.randn(700, 5, 4)
    auto, plain = Sampler(generator, precision="ieee"), Sampler(generator, impl="torch")
    for tasks in (1, 9, 700):
        found, expected = (s.sample(condition[:tasks], range(tasks)).tokens for s in (auto, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    short = [s.sample(condition[:1], [3], num_steps=3).tokens for s in (auto, plain)]
    torch.testing.assert_close(*short, rtol=1e-4, atol=1e-5)
    assert taken == [1, 9, 700, 1]
    taken.clear()
    auto.sample(condition[:1], [0], eta_noise=0.5)
    auto.sample(condition[:1], [0], callback=lambda t, x: None)
    monkeypatch.setenv("MCDI_IMPL", "torch")
    Sampler(generator).sample(condition[:1], [0])
    assert taken == []


def test_threads_share_a_sampler(generator, taken):
    auto, condition = Sampler(generator), torch.randn(4, 5, 4)

    def one(i):
        return auto.sample(condition[i : i + 1], [i]).tokens

    expected = [one(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(one, [0, 1, 2, 3] * 25)):
            assert torch.equal(found, expected[i % 4])


def test_padding_stays_as_by_torch(taken):
    layout = WeightLayout.from_module(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)))
    assert not layout.mask.all()
    shape = (layout.num_tokens, layout.width)
    phi = parameters(layout.width, 4 + layout.num_tokens, 6, 16, 2)
    normal = Normalizer(torch.zeros(shape), torch.ones(shape))
    raw_normal = Normalizer(torch.zeros(layout.num_tokens, 4), torch.ones(layout.num_tokens, 4))
    made = WeightGenerator(phi, layout, normal, raw_normal, DiffusionConfig(steps=6), {})
    condition = torch.randn(2, layout.num_tokens, 4)
    found, expected = (
        Sampler(made, impl=impl, precision="ieee").sample(condition, [0, 1]).tokens for impl in ("auto", "torch")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert taken == [2]


def test_it_follows_a_phi_that_is_still_trained(generator, taken):
    auto, condition = (
        Sampler(generator, precision="ieee"),
        torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)),
    )
    before = auto.sample(condition, [0]).tokens
    for value in generator.phi.values():
        value.mul_(1.5)
    after = auto.sample(condition, [0]).tokens
    assert not torch.equal(before, after)
    torch.testing.assert_close(
        after, Sampler(generator, impl="torch").sample(condition, [0]).tokens, rtol=1e-4, atol=1e-4
    )
    assert taken == [1, 1]


def test_weights_that_are_not_finite_are_refused(generator):
    huge = replace(generator, phi={name: value * 1e30 for name, value in generator.phi.items()})
    with pytest.raises(McdiError, match="not finite"):
        Sampler(huge).sample(torch.randn(1, 5, 4), [0])


@pytest.fixture
def fresh():
    backend.numba_module.cache_clear()
    yield
    backend.numba_module.cache_clear()


def test_without_numba_torch_samples(generator, taken, fresh, monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    Sampler(generator).sample(torch.randn(1, 5, 4), [0])
    assert taken == []


def test_a_numba_that_cannot_be_imported_is_named_and_torch_samples(generator, taken, fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "mcdi_fast.cpu_chain", None)
    with pytest.warns(UserWarning, match="numba is installed but cannot be used"):
        Sampler(generator).sample(torch.randn(1, 5, 4), [0])
    assert taken == []
