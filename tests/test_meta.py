"""`fit` and MetaTrainer: what a bank gives them, checkpoints, going on. Whole runs: test_train.py; implementations: test_same_result.py."""

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import error_of
from torch import nn

from mcdi_fast import store
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.meta import MetaTrainer, fit
from mcdi_fast.outer import flattened, named_views
from mcdi_fast.sampler import Sampler
from mcdi_fast.weights import WeightLayout

LAYOUT = WeightLayout.from_module(nn.Linear(4, 3), exchangeable=True)  # N = 3, D = 5
K, C = 3, 2
META = MetaConfig(steps=20, meta_batch=4)
RECIPE = DiffusionConfig(steps=12), DenoiserConfig(width=8)


def make_bank(folder, tasks=16, seed=0, layout=LAYOUT, rows=None):
    """rows: of a condition, 1 or N."""
    g = torch.Generator().manual_seed(seed)
    bank = TrajectoryBank.create(folder, layout, K, C)
    targets = torch.randn(tasks, K, layout.num_tokens, layout.width, generator=g) * layout.mask
    bank.append(targets, torch.randn(tasks, rows or layout.num_tokens, C, generator=g))
    return bank


def test_a_condition_of_the_task_is_that_of_each_token(tmp_path):
    one = make_bank(tmp_path / "one", rows=1)
    targets, condition = one.gather(range(16))
    each = TrajectoryBank.create(tmp_path / "each", LAYOUT, K, C)
    each.append(targets, condition.expand(-1, 3, -1))
    found, expected = (fit(bank, META, *RECIPE) for bank in (one, each))
    assert found.condition_normalizer.mean.shape[0] == 1
    for name, value in expected.phi.items():
        torch.testing.assert_close(found.phi[name], value, rtol=1e-4, atol=1e-6)
    tokens = [Sampler(generator).sample(torch.ones(2, C), [0, 1]).tokens for generator in (found, expected)]
    torch.testing.assert_close(*tokens, rtol=1e-3, atol=1e-4)


def test_matrices_that_lie_in_a_row_are_flat_already():
    flat, shapes = torch.randn(40)[5:], {"a": (2, 3), "b": (4, 5), "c": (9, 1)}
    found = flattened(named_views(flat, shapes))
    assert torch.equal(found, flat)
    assert found.data_ptr() == flat.data_ptr()
    views = named_views(flat, shapes)
    others = (
        {name: value.clone() for name, value in views.items()},
        {name: views[name] for name in ("b", "a", "c")},
        {name: views[name] for name in ("a", "c")},
        views | {"b": views["b"].reshape(5, 4).T},
    )
    for case in others:
        found = flattened(case)
        assert torch.equal(found, torch.cat([value.flatten() for value in case.values()]))
        assert found.data_ptr() != flat.data_ptr()


def test_positions_tell_tokens_apart(tmp_path):
    """Units whose targets differ by their place alone. Exchangeable ones all come out as their mean."""
    errors = {}
    for exchangeable in (False, True):
        layout = WeightLayout.from_module(nn.Linear(4, 3), exchangeable=exchangeable)
        bank = TrajectoryBank.create(tmp_path / str(exchangeable), layout, K, C)
        g = torch.Generator().manual_seed(0)
        place = torch.randn(3, 5, generator=g)
        bank.append(place + 0.1 * torch.randn(40, K, 3, 5, generator=g), torch.randn(40, C, generator=g))
        trainer = MetaTrainer(bank, MetaConfig(steps=200, meta_batch=8), *RECIPE)
        batch = trainer.batch(0)
        condition = trainer.condition_normalizer.normalize(bank.gather(trainer.draws(0).task)[1])
        assert torch.equal(batch.condition[..., :C], condition.expand(-1, 3, -1))
        assert torch.equal(batch.condition[..., C:], layout.position().expand(8, -1, -1))
        while trainer.step < trainer.meta.steps:
            trainer.outer_step()
        tokens = Sampler(trainer.generator()).sample(torch.zeros(4, C), range(4)).tokens
        errors[exchangeable] = float((tokens - place).square().mean().sqrt() / place.std(0).mean())
    assert errors[False] < 0.4
    assert errors[True] > 0.7


def same(one, two):
    return all(torch.equal(one.phi[name], two.phi[name]) for name in two.phi)


# --- checkpoints ---


def test_a_checkpoint_is_of_one_bank_seed_and_setting(tmp_path):
    """What differs is said in words: another bank of the same shape, and each setting."""
    bank, path = make_bank(tmp_path / "bank"), tmp_path / "fit.safetensors"
    first = fit(bank, META, *RECIPE, checkpoint=path)
    steps = []
    again = fit(bank, META, *RECIPE, checkpoint=path, on_step=lambda *_: steps.append(1))
    assert same(again, first)
    assert not steps
    kept = path.read_bytes()
    other, grown = make_bank(tmp_path / "other", seed=1), make_bank(tmp_path / "grown", tasks=17)
    settings = {"meta": META, "diffusion": RECIPE[0], "denoiser": RECIPE[1]}
    for words, options in {
        "a bank of other contents than": {"bank": other},
        "a bank of 16 tasks": {"bank": grown},
        "another seed (0, now 7)": {"seed": 7},
        "another meta.steps (20, now 30)": {"meta": replace(META, steps=30)},
        "another meta.inner_lr (0.005, now 0.01)": {"meta": replace(META, inner_lr=0.01)},
        "another diffusion.carry ('scaled', now 'full')": {"diffusion": replace(RECIPE[0], carry="full")},
        "another denoiser.width (8, now 9)": {"denoiser": replace(RECIPE[1], width=9)},
        "without a start": {"start": first},
    }.items():
        message = error_of(fit, **{"bank": bank, "checkpoint": path} | settings | options)
        assert words in message
        assert "fit.safetensors" in message
        assert path.read_bytes() == kept
    free = replace(META, checkpoint_every=3, on_bad_step="skip")
    assert same(fit(bank, free, *RECIPE, checkpoint=path), first)
    tensors, meta = store.load_tensors(path, "meta-checkpoint")
    for stranger in (
        {"identity": "0123456789abcdef"},
        {"made_from": 3},
        {"made_from": meta["made_from"] | {"recipe": 4}},
    ):
        store.save_tensors(path, tensors, {"step": 3, "skipped": 0} | stranger, "meta-checkpoint")
        assert "made by another version of mcdi_fast" in error_of(fit, bank, META, *RECIPE, checkpoint=path)


def test_where_a_checkpoint_goes(tmp_path, monkeypatch):
    """As text, with ~, in a folder that is made; what cannot be written is said before any step, and leftovers of a kill are gone."""
    bank = make_bank(tmp_path / "bank")
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = fit(bank, META, *RECIPE)
    (tmp_path / "new").mkdir()
    leftover = tmp_path / "new" / ".fit.safetensors.0123abcd.tmp"
    leftover.write_bytes(b"half")
    for place in ("~/new/fit.safetensors", str(tmp_path / "a" / "b" / "fit"), tmp_path / "c" / "fit"):
        assert same(fit(bank, META, *RECIPE, checkpoint=place), expected)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"fit.safetensors"}
    (tmp_path / "plain").write_bytes(b"")
    for place, words in (
        (tmp_path, "it is a folder, expected a file"),
        (tmp_path / "plain" / "fit", "plain"),
        (tmp_path / "nul\0", "null"),
        (tmp_path / ("x" * 300), "too long"),
        ("~nobody-of-this-name/fit", "home"),
    ):
        steps = []
        message = error_of(fit, bank, META, *RECIPE, checkpoint=place, on_step=lambda *_: steps.append(1))  # noqa: B023
        assert words in message
        assert not steps


# --- going on from a generator ---


def test_going_on_from_a_generator(tmp_path):
    """Its phi and normalisers are the start; the bank may have grown; diffusion and denoiser are its own unless given."""
    bank = make_bank(tmp_path / "bank")
    first = fit(bank, META, *RECIPE)
    bank.append(*make_bank(tmp_path / "more", tasks=5, seed=3).gather(range(5)))
    trainer = MetaTrainer(bank, META, seed=1, start=first)
    for name, value in trainer.phi.items():
        assert torch.equal(value, first.phi[name])
    assert (trainer.diffusion, trainer.denoiser) == RECIPE
    assert not trainer.state.exp_avg.any()
    assert int(trainer.draws(0).task.max()) < 21
    path = tmp_path / "fit.safetensors"
    second = fit(bank, META, *RECIPE, seed=1, start=first, checkpoint=path)
    assert not same(second, first)
    for name in ("normalizer", "condition_normalizer"):
        assert torch.equal(getattr(second, name).mean, getattr(first, name).mean)
    assert same(fit(bank, META, seed=1, start=first, checkpoint=path), second)  # the checkpoint at the end
    assert "made from another start" in error_of(fit, bank, META, seed=1, start=second, checkpoint=path)
    first.save_pretrained(tmp_path / "generator")
    kept = WeightGenerator.from_pretrained(tmp_path / "generator")
    assert same(fit(bank, META, seed=1, start=kept), second)


def test_a_start_must_fit(tmp_path):
    first = fit(make_bank(tmp_path / "bank"), META, *RECIPE)
    other = make_bank(tmp_path / "other", layout=WeightLayout.from_module(nn.Linear(4, 2), exchangeable=True))
    assert "start: a generator with another layout.num_tokens (3, now 2)" in error_of(fit, other, META, start=first)
    wide = TrajectoryBank.create(tmp_path / "wide", LAYOUT, K, C + 1)
    wide.append(torch.randn(4, K, 3, 5), torch.randn(4, C + 1))
    assert "another condition_width (2, now 3)" in error_of(fit, wide, META, start=first)
    bank = TrajectoryBank.open(tmp_path / "bank")
    assert "diffusion.steps (12, now 6)" in error_of(fit, bank, META, replace(RECIPE[0], steps=6), start=first)
    assert "denoiser.depth (2, now 1)" in error_of(fit, bank, META, None, replace(RECIPE[1], depth=1), start=first)


# --- what surrounds a call ---


def test_autocast_and_other_defaults_change_nothing(tmp_path):
    bank = make_bank(tmp_path)
    expected = fit(bank, META, *RECIPE)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(fit(bank, META, *RECIPE), expected)
        for impl in ("vmap", "reference"):
            assert MetaTrainer(bank, META, *RECIPE, impl=impl).outer_step().dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert same(fit(bank, META, *RECIPE), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_plain_arguments(tmp_path):
    bank = make_bank(tmp_path / "bank")
    expected = fit(bank, META, *RECIPE, seed=3)
    diffusion, denoiser = DiffusionConfig(steps=np.int64(12)), DenoiserConfig(width=np.int32(8))
    found = fit(str(tmp_path / "bank"), replace(META, steps=np.int64(20)), diffusion, denoiser, seed=np.int64(3))
    assert same(found, expected)
    found.save_pretrained(tmp_path / "generator")
    assert "--diffusion.steps = 12.0: expected an integer" in error_of(fit, bank, META, DiffusionConfig(steps=12.0))
    assert "--meta.ema = 1" in error_of(fit, bank, replace(META, ema=1.0))
    for seed in (-1, 2**31, 1.0, "1", None, True):
        assert f"seed {seed!r}" in error_of(fit, bank, META, *RECIPE, seed=seed)


def test_a_bank_that_grows_meanwhile_is_not_seen(tmp_path):
    bank = make_bank(tmp_path / "bank")
    more = make_bank(tmp_path / "more", tasks=30, seed=3).gather(range(30))
    expected = fit(bank, META, *RECIPE)
    found = fit(bank, META, *RECIPE, on_step=lambda trainer, _: trainer.step == 3 and bank.append(*more))
    assert len(bank) == 46
    assert same(found, expected)


@pytest.mark.parametrize(("terminal", "progress"), [(True, None), (False, None), (False, True), (True, False)])
def test_progress(tmp_path, monkeypatch, terminal, progress):
    pytest.importorskip("tqdm")
    bank, said = make_bank(tmp_path), io.StringIO()
    said.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", said)
    fit(bank, META, *RECIPE, progress=progress)
    shown = progress or (terminal and progress is None)
    assert ("meta-training: 100%" in said.getvalue()) == shown
    assert ("20/20" in said.getvalue()) == shown
    assert ("loss=" in said.getvalue()) == shown


def test_without_tqdm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    bank = make_bank(tmp_path)
    fit(bank, META, *RECIPE)
    assert capsys.readouterr() == ("", "")
    assert "tqdm is not installed" in error_of(fit, bank, META, *RECIPE, progress=True)
