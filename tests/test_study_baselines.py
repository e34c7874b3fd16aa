"""Reptile against plain loops with torch.optim.Adam; families with other conditions and targets against their definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcdi_fast.backbone import conv4, to_float
from mcdi_fast.config import PrepareConfig
from mcdi_fast.heads import head_accuracy, prototype_head, support_condition
from mcdi_fast.noise import REPTILE, draw_generator
from mcdi_fast.study.baselines import (
    ChangedHeads,
    ReptileConfig,
    Start,
    adapt,
    minibatches,
    reptile_step,
    whole_network,
)
from mcdi_fast.tasks import check_family
from mcdi_fast.tasks.drawings import ClassImages, DrawingOptions, FewShotData
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions, draw_episodes

WAYS, WIDTH = 3, 6
SMALL = ReptileConfig(inner_steps=3, inner_batch=4)


def plain_adam(parameters, lr, seconds, steps):
    """torch.optim.Adam on parameters, with second moments and a step count that came from elsewhere."""
    parameters = [p.clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.999))
    for p, second in zip(parameters, seconds, strict=True) if steps else ():
        state = {"step": torch.tensor(float(steps)), "exp_avg": torch.zeros_like(p), "exp_avg_sq": second.clone()}
        optimizer.state[p] = state
    return parameters, optimizer


def take(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def head_loss(head, x, label):
    return F.cross_entropy(x @ head[:, :-1].T + head[:, -1], label)


def make_heads(options, versions=1, classes=8, what=None):
    shape = (versions, classes, 6, WIDTH)
    train = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    splits = {"train": train, "val": train[:1] + 1, "test": train[:1] - 1}
    rows = {name: ClassRows.of_grid(grid) for name, grid in splits.items()}
    family = (HeadFamily if what is None else ChangedHeads)(rows, options)
    if what is not None:
        family.what = what
    return family, train


def test_minibatches_see_every_row_once_a_pass():
    picks = minibatches(6, 2, 6, 5, torch.Generator().manual_seed(0))
    assert picks.shape == (6, 5, 2)
    for task in range(5):
        for half in (picks[:3, task], picks[3:, task]):
            assert sorted(half.flatten().tolist()) == list(range(6))
    assert minibatches(3, 10, 2, 1, torch.Generator()).shape == (2, 1, 3)


def test_reptile_of_heads_against_a_plain_loop():
    family, train = make_heads(HeadOptions(WAYS, 3, 1))
    zero = torch.zeros(WAYS, WIDTH + 1)
    found = Start(zero, zero.clone(), 0, 0.05)
    phi, second, steps = zero, zero, 0
    label = torch.arange(WAYS).repeat_interleave(3)
    for outer in range(4):
        reptile_step(family, found, SMALL, outer, batch=2, steps=4, seed=7)
        rows = draw_episodes(torch.full((8,), 6), WAYS, 6, 7, 2 * outer, 2)[:, :, :3].flatten(1)
        picks = minibatches(9, 4, 3, 2, draw_generator(7, REPTILE, outer))
        heads, seconds = [], []
        for task in range(2):
            x = train[0].flatten(0, 1)[rows[task]]
            (head,), optimizer = plain_adam([phi], 0.05, [second], steps)
            for pick in picks[:, task]:
                take(optimizer, head_loss(head, x[pick], label[pick]))
            heads.append(head.detach())
            seconds.append(optimizer.state[head]["exp_avg_sq"])
        phi = phi + (1 - outer / 4) * (torch.stack(heads).mean(0) - phi)
        second, steps = torch.stack(seconds).mean(0), steps + 3
    torch.testing.assert_close(found.theta, phi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.exp_avg_sq, second, rtol=1e-4, atol=1e-7)
    assert found.steps == steps == 12


def test_adapting_heads_against_a_plain_loop():
    family, _ = make_heads(HeadOptions(WAYS, 2, 1))
    generator = torch.Generator().manual_seed(4)
    start = Start(torch.randn(WAYS, WIDTH + 1, generator=generator), torch.full((WAYS, WIDTH + 1), 1e-4), 12, 0.05)
    tasks = family.tasks("test", 0, 2, 1)
    found = adapt(family, start, tasks.support, (1, 5))
    for task in range(2):
        (head,), optimizer = plain_adam([start.theta], 0.05, [start.exp_avg_sq], 12)
        for i in range(1, 6):
            take(optimizer, head_loss(head, family.features(tasks.support)[task], tasks.support["label"][task]))
            if i in (1, 5):
                torch.testing.assert_close(found[i == 5][task], head.detach(), rtol=1e-4, atol=1e-5)


def test_reptile_of_heads_learns():
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(30, 1, WIDTH, generator=generator) + 0.1 * torch.randn(30, 8, WIDTH, generator=generator)
    family = HeadFamily(
        {"train": ClassRows.of_grid(grid[:20]), "test": ClassRows.of_grid(grid[20:])}, HeadOptions(3, 1, 4)
    )
    zero = torch.zeros(3, WIDTH + 1)
    start = Start(zero, zero.clone(), 0, 0.05)
    for outer in range(10):
        reptile_step(family, start, SMALL, outer, 8, 10, 0)
    tasks = family.tasks("test", 0, 20, 0)
    assert family.scores(adapt(family, start, tasks.support, (20,))[0], tasks.query).mean() > 0.9


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    splits = [ClassImages(rng.integers(0, 255, (6, 5, 28, 28), np.uint8)) for _ in range(3)]
    return FewShotData("random", *splits, "random")


@pytest.fixture(scope="module")
def backbone(images):
    torch.manual_seed(0)
    net = conv4()
    net.train()
    with torch.no_grad():
        net(to_float(torch.from_numpy(images.train.images)))  # some running statistics
    return net.eval()


@pytest.fixture(scope="module")
def network(images, backbone):
    return whole_network(backbone, images, DrawingOptions(WAYS, 2, 2), 3)


def begin(family):
    theta = family.start(1, PrepareConfig(start_std=0.0), torch.Generator())[0]
    return Start(theta, torch.zeros_like(theta), 0, 0.001)


def test_reptile_of_the_whole_network_against_a_plain_loop(images, backbone, network):
    statistics = {n: b.clone() for n, b in network.module.named_buffers()}
    start = begin(network)
    reptile_step(network, start, SMALL, 0, batch=2, steps=4, seed=5)

    net = torch.nn.Sequential(conv4(), torch.nn.Linear(64, WAYS)).eval()
    net[0].load_state_dict(backbone.state_dict())
    torch.nn.init.zeros_(net[1].weight)
    torch.nn.init.zeros_(net[1].bias)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    rows = draw_episodes(torch.full((6,), 5), WAYS, 4, 5, 0, 2)[:, :, :3].flatten(1)
    picks = minibatches(9, 4, 3, 2, draw_generator(5, REPTILE, 0))
    label, ends = torch.arange(WAYS).repeat_interleave(3), []
    for task in range(2):
        net.load_state_dict(before, strict=False)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.001, betas=(0.0, 0.999))
        x = to_float(torch.from_numpy(images.train.images).flatten(0, 1)[rows[task]])
        for pick in picks[:, task]:
            take(optimizer, F.cross_entropy(net(x[pick]), label[pick]))
        ends.append({name: p.detach().clone() for name, p in net.named_parameters()})
    found = network.layout.unpack(start.theta)
    for name in before:
        torch.testing.assert_close(found[name], (ends[0][name] + ends[1][name]) / 2, rtol=1e-3, atol=1e-5)
    for name, value in network.module.named_buffers():
        assert torch.equal(value, statistics[name]), f"{name} moved: a query could see another"


def test_reptile_resumes_to_the_same_bits(network, tmp_path):
    start = begin(network)
    reptile_step(network, start, SMALL, 0, 2, 4, 5)
    start.save(tmp_path / "start.safetensors")
    other = Start.load(tmp_path / "start.safetensors")
    for one in (start, other):
        reptile_step(network, one, SMALL, 1, 2, 4, 5)
    assert torch.equal(start.theta, other.theta)
    assert torch.equal(start.exp_avg_sq, other.exp_avg_sq)
    assert start.steps == other.steps == 6
    tasks = network.tasks("test", 0, 1, 0)
    before = start.theta.clone()
    first, last = adapt(network, start, tasks.support, (1, 3))
    assert not torch.equal(first, last)
    assert torch.equal(start.theta, before)


def test_other_conditions():
    def condition(what):
        return make_heads(HeadOptions(WAYS, 2, 1), what=what)[0]

    family = condition("")
    support = family.support_features(family.tasks("train", 0, 4, 0))
    usual = support_condition(support)
    assert torch.equal(condition("residual").condition(support), usual)
    assert torch.equal(condition("prototypes").condition(support), usual[..., :-1])
    spread = condition("spread").condition(support)
    assert torch.equal(spread[..., : WIDTH + 1], usual)
    torch.testing.assert_close(spread[..., WIDTH + 1 :], support.std(2, unbiased=False))
    assert condition("support").condition(support).shape == (4, WAYS, 3 * WIDTH + 1)
    check_family(condition("spread"))


def test_residual_targets_are_the_usual_ones_minus_the_prototype_head():
    recipe, options = PrepareConfig(steps=6), HeadOptions(WAYS, 2, 1)
    (usual, _), (family, _) = make_heads(options, 2), make_heads(options, 2, what="residual")
    tasks = family.tasks("train", 0, 4, 0)
    expected = usual.trajectories(tasks.train, recipe, 3, torch.Generator().manual_seed(1))
    found = family.trajectories(tasks.train, recipe, 3, torch.Generator().manual_seed(1))
    base = prototype_head(family.support_features(tasks))
    torch.testing.assert_close(found + base.unsqueeze(1), expected)
    assert torch.equal(family.base(tasks), base)
    assert usual.tasks("train", 0, 4, 0).condition.equal(tasks.condition)
    assert make_heads(options, what="")[0].base(tasks) == 0


def test_differences_start_at_the_prototype_head():
    family, _ = make_heads(HeadOptions(WAYS, 2, 1), 2, what="difference")
    tasks = family.tasks("train", 0, 4, 0)
    one = family.trajectories(tasks.train, PrepareConfig(steps=1, learning_rate=0.01), 1, torch.Generator())
    assert one.abs().max() < 0.0101
    assert one.abs().max() > 0.009
    # from a start of zeros the trajectory is the usual one
    usual, _ = make_heads(HeadOptions(WAYS, 2, 1), 2)
    recipe = PrepareConfig(steps=6, start_std=0.0)
    family.start = lambda count, config, generator: usual.start(count, config, generator)
    found = family.trajectories(tasks.train, recipe, 1, torch.Generator().manual_seed(1))
    expected = usual.trajectories(tasks.train, recipe, 1, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found[:, -1] + family.base(tasks), expected[:, -1])


def test_head_accuracy_is_the_family_s_score():
    family, _ = make_heads(replace(HeadOptions(), ways=WAYS, shots=2, queries=3))
    tasks = family.tasks("test", 0, 5, 0)
    head = prototype_head(family.support_features(tasks))
    query = family.features(tasks.query).unflatten(1, (WAYS, 3))
    torch.testing.assert_close(family.scores(head, tasks.query), head_accuracy(head, query))
