"""Same seed, same result: across thread counts, batch sizes, restarts and implementations. Processes: test_ranks.py; kills: test_train.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mcdi_fast import (
    DenoiserConfig,
    DiffusionConfig,
    MetaConfig,
    Sampler,
    TrajectoryBank,
    WeightGenerator,
    WeightLayout,
    fit,
    store,
)
from mcdi_fast.config import PrepareConfig
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions

META = MetaConfig(steps=10, meta_batch=8, samples=2, outer="reptile", outer_lr=0.3)
RECIPE = DiffusionConfig(steps=9), DenoiserConfig(32, 2)


def make_bank(folder):
    features = torch.randn(2, 20, 12, 16, generator=torch.Generator().manual_seed(0)) / 4
    family = HeadFamily({"train": ClassRows.of_grid(features)}, HeadOptions(queries=5))
    return prepare_bank(folder, family, PrepareConfig(tasks=60, steps=30), 3, seed=0)


def whole(folder):
    """Preparation, training and samples of one process."""
    folder = Path(folder)
    bank = make_bank(folder / "bank")
    generator = fit(bank, META, *RECIPE, seed=5)
    targets, condition = bank.gather(torch.arange(60))
    tokens = Sampler(generator).sample(condition, range(60)).tokens
    store.save_tensors(folder / "result", {"targets": targets, "tokens": tokens, **generator.phi}, {}, "result")
    return store.load_tensors(folder / "result", "result")[0]


@pytest.fixture(scope="module")
def one_thread(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return folder, whole(folder)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_thread_counts(tmp_path, one_thread, threads):
    """With as many threads to the bit, in another process; with others to rounding, the whole way from trajectories to samples."""
    code = f"import torch; torch.set_num_threads({threads}); import sys, test_same_result; test_same_result.whole(sys.argv[1])"
    environment = (
        {"GOMP_SPINCOUNT": "100000"}
        | os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=300)
    found = store.load_tensors(tmp_path / "result", "result")[0]
    for name, expected in one_thread[1].items():
        if threads == 1:
            assert torch.equal(found[name], expected), name
        scale = float(expected.abs().max())
        assert float((found[name] - expected).abs().max()) <= 1e-4 * scale, name


def test_implementations(one_thread):
    bank = TrajectoryBank.open(one_thread[0] / "bank")
    states = {}
    for impl in ("torch", "reference", "vmap"):
        trainer = MetaTrainer(bank, META, *RECIPE, seed=5, impl=impl)
        for _ in range(5):
            trainer.outer_step()
        states[impl] = trainer.state.phi.clone()
    for impl in ("reference", "vmap"):
        torch.testing.assert_close(states["torch"], states[impl], rtol=1e-4, atol=1e-5)


def test_restarts_and_batches(tmp_path, one_thread):
    """Training stopped after any step goes on to the same bits; a sample is the same alone, in a batch and from a saved generator."""
    bank = TrajectoryBank.open(one_thread[0] / "bank")
    whole_run = fit(bank, META, *RECIPE, seed=5)
    trainer = MetaTrainer(bank, META, *RECIPE, seed=5)
    for step in range(META.steps):
        trainer.outer_step()
        if step % 7 == 0:
            trainer.save(tmp_path / "checkpoint")
            trainer = MetaTrainer(bank, META, *RECIPE, seed=5)
            trainer.restore(tmp_path / "checkpoint")
    generator = trainer.generator()
    assert all(torch.equal(generator.phi[name], value) for name, value in whole_run.phi.items())
    generator.save_pretrained(tmp_path / "generator")
    again = WeightGenerator.from_pretrained(tmp_path / "generator")
    condition = bank.gather(torch.arange(60))[1]
    together = Sampler(again).sample(condition, range(60)).tokens
    scale = float(together.abs().max())
    for size in (1, 7, 59):
        part = Sampler(generator).sample(condition[:size], range(size)).tokens
        assert float((part - together[:size]).abs().max()) <= 2e-5 * scale


def test_embedding_changes_no_global_state(one_thread):
    """Neither random state nor threads nor default dtype."""
    bank = TrajectoryBank.open(one_thread[0] / "bank")
    head = nn.Linear(16, 5)  # whose own start is drawn from torch's global generator
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    generator = fit(bank, MetaConfig(steps=2), *RECIPE)
    Sampler(generator).sample(bank.gather(torch.arange(2))[1], [0, 1], eta_noise=1.0).load_into(head, 0)
    WeightLayout.from_module(head)
    after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
