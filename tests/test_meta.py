"""`fit` and MetaTrainer: what a bank gives them, checkpoints, going on. Whole runs: test_train.py; implementations: test_same_result.py."""

import torch
from torch import nn

from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig
from mcdi_fast.meta import MetaTrainer, fit
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
