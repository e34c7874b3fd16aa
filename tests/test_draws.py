"""Two seeds differ in every draw: torch's generator looks at 32 bits of its seed alone, which once made all seeds train on the same tasks."""

import pytest
import torch

from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig, PrepareConfig
from mcdi_fast.heads import head_layout
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.noise import draw_generator
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions


@pytest.fixture
def bank(tmp_path):
    made = TrajectoryBank.create(tmp_path / "bank", head_layout(3, 4), num_segments=3, condition_width=5)
    made.append(torch.randn(200, 3, 3, 5), torch.randn(200, 3, 5))
    return made


def test_meta_training(bank):
    one, two = (
        MetaTrainer(bank, MetaConfig(meta_batch=32), DiffusionConfig(), DenoiserConfig(8, 1), s) for s in (0, 1)
    )
    for step in (0, 1, 999):
        for name, ours, theirs in zip(one.draws(step)._fields, one.draws(step), two.draws(step), strict=True):
            if name != "streams":  # the noise has the seed as its key
                assert not torch.equal(ours, theirs), name
        assert not torch.equal(one.batch(step).x, two.batch(step).x)
    assert not torch.equal(one.phi["in.token"], two.phi["in.token"])
    assert all(map(torch.equal, one.draws(5), MetaTrainer(bank, denoiser=DenoiserConfig(8, 1)).draws(5)))


@pytest.mark.parametrize("copies", [1, 3])
def test_preparation(tmp_path, copies):
    """With the same images for every task: what differs are the starts and the picked versions."""
    features = torch.randn(copies, 1, 1, 4, 6).expand(-1, 8, 1, 4, 6).reshape(copies, 8, 4, 6)
    family = HeadFamily({"train": ClassRows.of_grid(features)}, HeadOptions(2, 3, 1))
    config = PrepareConfig(tasks=4, steps=3, start_std=1.0)
    found = []
    for seed in (0, 1):
        prepared = prepare_bank(tmp_path / f"bank{seed}", family, config, 3, seed)
        found.append(prepared.gather(torch.arange(4))[0])
    assert not (found[0] == found[1]).any()


def test_every_key_gives_a_generator_of_its_own():
    keys = [(seed, purpose, number) for seed in (0, 1, 7, 2**31 - 1) for purpose in range(3) for number in range(50)]
    assert len({float(torch.rand((), generator=draw_generator(*key), dtype=torch.float64)) for key in keys}) == len(
        keys
    )
