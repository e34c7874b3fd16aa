"""Other people's ways in: the hub (offline), diffusers, compiled code, the examples."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import error_of
from test_sampler import PADDED, PLAIN, conditions, make

from mcdi_fast import Sampler, StaticSampler, WeightGenerator
from mcdi_fast.config import DiffusionConfig
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.diffusion import sample_chain
from mcdi_fast.errors import McdiError

ROOT = Path(__file__).parents[1]


# --- the hub ---


def same(one, two):
    return all(torch.equal(value, two.phi[name]) for name, value in one.phi.items()) and one.layout == two.layout


def test_hub_round_trip_and_model_card(tmp_path):
    hub = pytest.importorskip("mcdi_fast.hub", exc_type=McdiError)
    generator = make(PADDED)
    hub.HubGenerator(generator).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    found = hub.HubGenerator.from_pretrained(tmp_path)
    assert same(generator, found.generator)
    assert same(generator, WeightGenerator.from_pretrained(tmp_path))  # the files are the generator's own
    condition, seeds = conditions(generator, 3), torch.arange(3)
    expected = Sampler(generator).sample(condition, seeds).tokens
    assert torch.equal(found(condition, seeds).tokens, expected)
    card = (tmp_path / "README.md").read_text()
    for text in ("library_name: mcdi_fast", "license: mit", "5 tokens of width 5", "`0.weight` [3, 4]", "T = 9, k = 3"):
        assert text in card
    hub.HubGenerator(generator).save_pretrained(tmp_path)  # over itself


def test_a_hub_id_from_the_cache_without_a_network(tmp_path, monkeypatch):
    """As the hub's own cache lays it out."""
    hub = pytest.importorskip("mcdi_fast.hub", exc_type=McdiError)
    monkeypatch.chdir(tmp_path)
    sha = "0123456789" * 4
    place = tmp_path / "cache" / "models--somebody--heads"
    make(PLAIN).save_pretrained(place / "snapshots" / sha)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(sha)
    found = hub.HubGenerator.from_pretrained("somebody/heads", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same(make(PLAIN), found.generator)
    code = "import sys; from mcdi_fast import WeightGenerator as W; print(W.from_pretrained(sys.argv[1]).layout.num_tokens)"

    def read(name):
        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", code, name]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    assert read("somebody/heads").stdout == "3\n"
    missing = read("somebody/else")
    assert "hub repository 'somebody/else': cannot be read" in missing.stderr.splitlines()[-1]


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(PLAIN).save_pretrained("runs/generator")
    assert same(make(PLAIN), WeightGenerator.from_pretrained("runs/generator"))
    assert "runs/none/config.json" in error_of(WeightGenerator.from_pretrained, "runs/none")


def test_without_the_extra_it_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "mcdi_fast.hub", raising=False)
    assert "pip install 'mcdi_fast[hub]'" in error_of(WeightGenerator.from_pretrained, "somebody/heads")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "mcdi_fast.diffusers_scheduler", raising=False)
    with pytest.raises(McdiError, match=r"mcdi_fast\[diffusers\]"):
        importlib.import_module("mcdi_fast.diffusers_scheduler")


# --- diffusers ---


@pytest.mark.parametrize("num_steps", [None, 4])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "chain", [("local-consistency", "scaled"), ("local-consistency", "full"), ("vanilla", "scaled")]
)
def test_the_scheduler_is_the_native_sampler(tmp_path, num_steps, eta, chain):
    module = pytest.importorskip("mcdi_fast.diffusers_scheduler", exc_type=McdiError)
    objective, carry = chain
    generator = make(PLAIN, objective)
    generator = replace(generator, diffusion=replace(generator.diffusion, carry=carry))
    scheduler = module.McdiScheduler.from_generator(generator)
    scheduler.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["clip_sample"] is False
    scheduler = module.McdiScheduler.from_pretrained(tmp_path)
    f, start = generator.f(conditions(generator, 2)), 5 * torch.randn(2, 3, 5)  # far outside [-1, 1]
    noise = {t: torch.randn(2, 3, 5) for t in range(9)}
    options = {"num_steps": num_steps, "eta_noise": eta, "noise": noise.get, "ends": generator.objective.ends}
    expected = sample_chain(lambda x, t: f(x, t), start, generator.schedule, **options)
    scheduler.set_timesteps(num_steps)
    assert len(scheduler.timesteps) == (num_steps or 9)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = f(scheduler.scale_model_input(x, t), int(t))
        x = scheduler.step(output, t, x, eta=eta, variance_noise=noise[int(t)]).prev_sample
    assert torch.equal(x, expected)
    assert x.abs().max() > 1
    if not eta:  # and the sampler's own chain, in its normalised weights
        seen = []
        Sampler(generator).sample(
            conditions(generator, 2), [0, 1], num_steps=num_steps, callback=lambda t, x: seen.append(x.clone())
        )
        x = seen[0]
        for t in scheduler.timesteps:
            x = scheduler.step(f(x, int(t)), t, x).prev_sample
        torch.testing.assert_close(x, seen[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["from_config", "save_pretrained"])
def test_the_scheduler_keeps_its_settings(tmp_path, how):
    module = pytest.importorskip("mcdi_fast.diffusers_scheduler", exc_type=McdiError)
    settings = {"steps": 12, "segments": 2, "objective": "vanilla", "beta_start": 0.7, "beta_end": 0.1, "carry": "full"}
    generator = replace(make(PLAIN), phi=init_parameters(5, 6 + 3, 12, 16, 2, 0), diffusion=DiffusionConfig(**settings))
    one = module.McdiScheduler.from_generator(generator)
    if how == "from_config":
        two = module.McdiScheduler.from_config(one.config)
    else:
        one.save_pretrained(tmp_path)
        two = module.McdiScheduler.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert two.config["num_train_timesteps" if name == "steps" else name] == value
    for table in ("alpha", "abar", "abar_segment", "carry"):
        assert torch.equal(getattr(two.schedule, table), getattr(one.schedule, table))
    assert torch.equal(two.objective.ends, one.objective.ends)
    with pytest.raises(TypeError, match="positional"):  # which diffusers would take for defaults
        module.McdiScheduler(12)


def test_the_scheduler_s_noise_and_errors():
    module = pytest.importorskip("mcdi_fast.diffusers_scheduler", exc_type=McdiError)
    generator = make(PLAIN)
    scheduler = module.McdiScheduler(num_train_timesteps=9)  # the defaults are the configuration's
    x, eps, t = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.tensor([0, 3, 5, 8])
    objective = make(PLAIN, "naive-local").objective  # towards the last target at every step
    expected = objective.signal[2, t].float().view(-1, 1, 1) * x + objective.noise[2, t].float().view(-1, 1, 1) * eps
    torch.testing.assert_close(scheduler.add_noise(x, eps, t), expected)
    assert torch.equal(scheduler.schedule.abar, generator.schedule.abar)
    assert torch.equal(scheduler.schedule.carry, generator.schedule.carry)
    assert "clip_sample" in error_of(module.McdiScheduler, clip_sample=True)
    assert "carry 'half'" in error_of(module.McdiScheduler, carry="half")
    scheduler.set_timesteps(3)
    assert "timestep 1" in error_of(scheduler.step, x, 1, x)
    assert "steps = 2" in error_of(scheduler.set_timesteps, 2)
    assert len(scheduler) == 9
    draws = [
        scheduler.step(x, 0, x, eta=1.0, generator=torch.Generator().manual_seed(3), return_dict=False)[0] for _ in "ab"
    ]
    assert torch.equal(*draws)


# --- fixed shapes, compiled code ---


def test_static_sampling_into_the_same_memory():
    generator = make(PADDED)
    sampler = Sampler(generator)
    static = StaticSampler(sampler, tasks=3, num_steps=4)
    address = static.weights.tokens.data_ptr()
    for seed in (1, 2**62):
        condition = conditions(generator, 3, seed % 1000)
        static.condition.copy_(condition)
        static.seeds.copy_(torch.tensor([seed, 5, -1]))
        assert static() is static.weights
        expected = sampler.sample(condition, [seed, 5, 2**64 - 1], num_steps=4).tokens
        assert torch.equal(static.weights.tokens, expected)
        assert static.weights.tokens.data_ptr() == address
    assert "tasks = 0" in error_of(StaticSampler, sampler, 0)
    assert "steps = 1" in error_of(StaticSampler, sampler, 1, 1)


def test_torch_compile_goes_around_the_sampler():
    """Compiled once, the same numbers as without."""
    from torch._dynamo.testing import CompileCounter

    generator = make(PLAIN)
    sampler, head, seeds = Sampler(generator), torch.nn.Linear(4, 3), torch.arange(4)
    static = StaticSampler(sampler, tasks=4)

    def plain(condition, x):
        weights = sampler.sample(condition * 0.5, seeds)
        return torch.relu(weights.functional_call(head, x)) * 2

    def fixed(condition, x):
        static.condition.copy_(condition * 0.5)
        static.seeds.copy_(seeds)
        return torch.relu(static().functional_call(head, x)) * 2

    for function in (plain, fixed):
        counter = CompileCounter()
        compiled = torch.compile(function, backend=counter)
        frames = None
        for seed in range(4):
            condition, x = conditions(generator, 4, seed), torch.randn(4, 7, 4)
            torch.testing.assert_close(compiled(condition, x), plain(condition, x))
            frames = frames or counter.frame_count
        assert counter.frame_count == frames > 0


# --- the examples ---


def example(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


def test_example_training_loop(tmp_path, monkeypatch):
    main = example("training_loop", monkeypatch).main
    history = main(["--folder", str(tmp_path), "--episodes", "60"])
    assert sum(history[-20:]) > sum(history[:20]) + 1  # the features learn through generated heads; chance is 4
    bank = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["--folder", str(tmp_path), "--episodes", "5"]) == history[:5]  # again, on the bank that is there
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == bank


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_example_lightning(tmp_path_factory, monkeypatch, precision):
    """In one folder, one after the other: the second finds the trajectories of the first."""
    lightning = pytest.importorskip("lightning")
    folder = tmp_path_factory.getbasetemp() / "lightning"
    monkeypatch.setattr(lightning, "Trainer", functools.partial(lightning.Trainer, precision=precision))
    module = example("lightning_module", monkeypatch).main(["--folder", str(folder), "--steps", "60"])
    assert sum(module.history[-20:]) > sum(module.history[:20]) + 1
    assert not any(name.startswith("generator") for name in module.state_dict())


def test_example_own_network(tmp_path, monkeypatch):
    arguments = ["--folder", str(tmp_path / "waves"), "--steps", "250", "--tasks", "150"]
    error, guess = example("own_network", monkeypatch).main(arguments)
    assert error < 0.9 * guess
