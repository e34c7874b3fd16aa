"""Samplers in other processes: what torch moves when it sends a tensor must leave nothing behind that reads the old memory."""

import multiprocessing
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from test_sampler import PADDED, PLAIN, conditions, make
from torch.utils.data import DataLoader, Dataset

from mcdi_fast import Sampler, StaticSampler, cpu_chain


def draw(sampler):
    return [sampler.sample(conditions(sampler.generator, count), range(count)).tokens.numpy() for count in (1, 9)]


def work(sampler, static):
    torch.set_num_threads(1)  # a forked process must not use its parent's OpenMP threads
    return [*draw(sampler), static().tokens.numpy()]


def spoil_free_memory():
    """What was freed is used again, by numbers that show."""
    return [torch.full((256,), 1e30) for _ in range(3000)]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_sent_to_a_worker(method):
    torch.set_num_threads(1)
    samplers = [Sampler(make(module), impl=impl) for module in (PLAIN, PADDED) for impl in ("auto", "torch")]
    statics = [StaticSampler(sampler, 3) for sampler in samplers]
    pairs = list(zip(samplers, statics, strict=True))
    for sampler, static in pairs:
        static.condition.copy_(conditions(sampler.generator, 3))
    before = [[*draw(sampler), static().tokens.numpy().copy()] for sampler, static in pairs]
    addresses = [static.weights.tokens.data_ptr() for static in statics]
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = [pool.starmap(work, pairs) for _ in "ab"]
    junk = spoil_free_memory()
    for static in statics:
        static.condition.fill_(7.0)
    for found in (*there, [[*draw(sampler), static.weights.tokens.numpy()] for sampler, static in pairs]):
        for one, two in zip(chain(*found), chain(*before), strict=True):
            np.testing.assert_array_equal(one, two)
    assert [static.weights.tokens.data_ptr() for static in statics] == addresses
    assert junk


class Weights(Dataset):
    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.sampler.sample(conditions(self.sampler.generator, 1), [i]).tokens[0]


def test_in_the_workers_of_a_data_loader():
    sampler = Sampler(make(PLAIN))
    data = Weights(sampler)
    expected = torch.stack([data[i] for i in range(3)])
    loader = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    for _ in range(2):
        assert torch.equal(next(iter(loader)), expected)
    junk = spoil_free_memory()
    assert torch.equal(torch.stack([data[i] for i in range(3)]), expected)
    assert junk


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_phi_may_move(impl):
    """`share_memory_`, as a module's `share_memory` calls it, and a new tensor behind the old name."""
    sampler = Sampler(make(PLAIN), impl=impl)
    before = draw(sampler)
    for value in sampler.generator.phi.values():
        value.share_memory_()
    junk = spoil_free_memory()
    for one, two in zip(draw(sampler), before, strict=True):
        np.testing.assert_array_equal(one, two)
    assert junk
    for value in sampler.generator.phi.values():
        value.data = value.data * 1.5
    fresh = draw(Sampler(make(PLAIN), impl=impl))
    for one, two, unchanged in zip(draw(sampler), draw(Sampler(sampler.generator, impl=impl)), fresh, strict=True):
        np.testing.assert_array_equal(one, two)
        assert not np.array_equal(one, unchanged)


def test_caches_stay_behind():
    sampler = Sampler(make(PADDED))
    draw(sampler)
    size = len(pickle.dumps(Sampler(make(PADDED))))
    assert len(pickle.dumps(sampler)) == size
    assert sampler.generator.folded() is sampler.generator.folded()
    again = pickle.loads(pickle.dumps(sampler))
    assert again.generator == sampler.generator
    for one, two in zip(draw(again), draw(sampler), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_compiled_chain_owns_its_memory():
    pytest.importorskip("numba")
    generator = make(PADDED)
    folded, mask = generator.folded(), generator.layout.mask.float()
    packed = cpu_chain.PackedChain(generator, mask)
    tensors = [folded.condition_token, folded.condition_mean, *folded.last, *folded.token, *folded.sample]
    tensors += [mask, generator.layout.position(), generator.normalizer.mean, generator.condition_normalizer.std]
    for kept in (*packed._given, packed._step_rows, *packed._matrices_of(True), *packed._matrices_of(False)):
        assert not any(np.shares_memory(kept, tensor.numpy()) for tensor in tensors)
