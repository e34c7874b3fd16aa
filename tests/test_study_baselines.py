"""Reptile against plain loops with torch.optim.Adam; the OCD bank against its definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcdi_fast import McdiError
from mcdi_fast.backbone import conv4, to_float
from mcdi_fast.config import PrepareConfig, TaskConfig
from mcdi_fast.heads import head_accuracy, prototype_head
from mcdi_fast.noise import REPTILE, draw_generator
from mcdi_fast.prepare import train_task_heads
from mcdi_fast.study import baselines
from mcdi_fast.study.baselines import (
    HeadStart,
    ReptileConfig,
    ReptileNet,
    adapt_head,
    check_reptile,
    minibatches,
    overfit_heads,
    prepare_difference_bank,
    reptile_head,
    row_shares,
)
from mcdi_fast.tasks import ClassImages, sample_episodes

WAYS, WIDTH = 3, 6
SMALL = ReptileConfig(
    head_steps=4, head_batch=2, net_steps=3, net_batch=2, inner_steps=3, inner_batch=4, train_shots=3, test_steps=(1, 3)
)


def plain_adam(head, rate, second, steps):
    """torch.optim.Adam on a head, with a second moment and a step count that came from elsewhere."""
    parameter = head.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=rate, betas=(0.0, 0.999))
    if steps:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.zeros_like(head),
            "exp_avg_sq": second.clone(),
        }
    return parameter, optimizer


def step(parameter, optimizer, x, label):
    loss = F.cross_entropy(x @ parameter[:, :-1].T + parameter[:, -1], label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_minibatches_see_every_row_once_a_pass():
    picks = minibatches(6, 2, 6, 5, torch.Generator().manual_seed(0))
    assert picks.shape == (6, 5, 2)
    for task in range(5):
        for half in (picks[:3, task], picks[3:, task]):
            assert sorted(half.flatten().tolist()) == list(range(6))
    assert minibatches(3, 10, 2, 1, torch.Generator()).shape == (2, 1, 3)


def test_reptile_head_against_a_plain_loop():
    features = torch.randn(8, 5, WIDTH, generator=torch.Generator().manual_seed(3))
    found = reptile_head(features, WAYS, SMALL, 0.05, seed=7)
    phi, second, steps = torch.zeros(WAYS, WIDTH + 1), torch.zeros(WAYS, WIDTH + 1), 0
    generator = torch.Generator().manual_seed(7)
    label = torch.arange(WAYS).repeat_interleave(3)
    for outer in range(SMALL.head_steps):
        episodes = sample_episodes(8, 5, ways=WAYS, shots=3, queries=0, seed=7, start=2 * outer, count=2)
        picks = minibatches(9, 4, 3, 2, generator)
        heads, seconds = [], []
        for task in range(2):
            rows = features[episodes.classes[task].unsqueeze(-1), episodes.support[task]].flatten(0, 1)
            parameter, optimizer = plain_adam(phi, 0.05, second, steps)
            for pick in picks[:, task]:
                step(parameter, optimizer, rows[pick], label[pick])
            heads.append(parameter.detach())
            seconds.append(optimizer.state[parameter]["exp_avg_sq"])
        phi = phi + (1 - outer / SMALL.head_steps) * (torch.stack(heads).mean(0) - phi)
        second, steps = torch.stack(seconds).mean(0), steps + 3
    torch.testing.assert_close(found.head, phi, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.second, second, rtol=1e-4, atol=1e-7)
    assert found.steps == steps == 12


def test_adapt_head_against_a_plain_loop():
    generator = torch.Generator().manual_seed(4)
    start = HeadStart(torch.randn(WAYS, WIDTH + 1, generator=generator), torch.full((WAYS, WIDTH + 1), 1e-4), 12, 0.05)
    support = torch.randn(2, WAYS, 2, WIDTH, generator=generator)
    found = adapt_head(start, support, (1, 5))
    for task in range(2):
        parameter, optimizer = plain_adam(start.head, 0.05, start.second, 12)
        for i in range(1, 6):
            step(parameter, optimizer, support[task].flatten(0, 1), torch.arange(WAYS).repeat_interleave(2))
            if i in (1, 5):
                torch.testing.assert_close(found[i == 5][task], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_reptile_head_learns():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, 1, WIDTH, generator=generator)
    features = centres + 0.1 * torch.randn(30, 8, WIDTH, generator=generator)
    start = reptile_head(features[:20], WAYS, SMALL, 0.05, seed=0)
    heads = adapt_head(start, features[20:23, :1].unsqueeze(0), (20,))[0]
    assert head_accuracy(heads, features[20:23, 1:].unsqueeze(0)).item() > 0.9


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return ClassImages(rng.integers(0, 255, (6, 4, 28, 28), np.uint8))


@pytest.fixture(scope="module")
def backbone(images):
    torch.manual_seed(0)
    net = conv4()
    net.train()
    with torch.no_grad():
        net(to_float(torch.from_numpy(images.images)))  # some running statistics
    return net.eval()


def test_reptile_net_against_a_plain_loop(images, backbone):
    model = ReptileNet(backbone, WAYS, SMALL, 0.001, seed=5)
    before = [p.detach().clone() for p in model.parameters]
    statistics = {n: b.clone() for n, b in model.net.named_buffers()}
    model.outer_step(images)

    net = torch.nn.Sequential(conv4(), torch.nn.Linear(64, WAYS))
    net[0].load_state_dict(backbone.state_dict())
    net.eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001, betas=(0.0, 0.999))
    episodes = sample_episodes(6, 4, ways=WAYS, shots=3, queries=0, seed=5, start=0, count=2)
    picks = minibatches(9, 4, 3, 2, draw_generator(5, REPTILE, 0))
    label, ends = torch.arange(WAYS).repeat_interleave(3), []
    for task in range(2):
        with torch.no_grad():
            for p, value in zip(net.parameters(), before, strict=True):
                p.copy_(value)
        x = torch.cat(
            [
                to_float(torch.from_numpy(images.images)[c, d])
                for c, d in zip(episodes.classes[task], episodes.support[task], strict=True)
            ]
        )
        for pick in picks[:, task]:
            loss = F.cross_entropy(net(x[pick]), label[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    for found, a, b in zip(model.parameters, *ends, strict=True):
        torch.testing.assert_close(found.detach(), (a + b) / 2, rtol=1e-3, atol=1e-5)
    for name, value in model.net.named_buffers():
        assert torch.equal(value, statistics[name]), f"{name} moved: a query could see another"


def test_reptile_net_adapts_resumes_and_puts_the_start_back(images, backbone, tmp_path):
    model = ReptileNet(backbone, WAYS, SMALL, 0.001, seed=5)
    model.outer_step(images)
    model.save(tmp_path / "net.safetensors", {"seconds": 2.0})
    support, query = to_float(torch.from_numpy(images.images[:3, 0])), to_float(torch.from_numpy(images.images[:3, 1]))
    before = [p.detach().clone() for p in model.parameters]
    first, last = model.adapt(support, torch.arange(3), query, (1, 3))
    assert not torch.equal(first, last)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters, strict=True))
    assert torch.equal(model.adapt(support, torch.arange(3), query, (1, 3))[1], last)

    other = ReptileNet(backbone, WAYS, SMALL, 0.001, seed=5)
    assert other.restore(tmp_path / "net.safetensors") == {"seconds": 2.0}
    assert other.step == 1
    for m in (model, other):
        m.outer_step(images)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters, other.parameters, strict=True))


def test_overfitting_starts_at_the_base():
    images = torch.randn(2, 4, WAYS, 5, WIDTH)
    base = prototype_head(images[0, :, :, :2])
    one = overfit_heads(images, base, 2, PrepareConfig(steps=1, learning_rate=0.01), torch.Generator())
    assert ((one - base).abs() < 0.0101).all()
    assert (one - base).abs().max() > 0.009


def test_overfitting_is_the_preparation_from_another_start():
    images = torch.randn(2, 4, WAYS, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    recipe = PrepareConfig(steps=6, start_std=0.0)
    zero = torch.zeros(4, WAYS, WIDTH + 1)
    generator = torch.Generator().manual_seed(1)
    torch.randn(zero.shape, generator=generator)  # the preparation draws its start, times 0 here
    ours = overfit_heads(images, zero, 2, recipe, generator)
    theirs = train_task_heads(images, 2, recipe, torch.Generator().manual_seed(1), 1)[:, -1]
    torch.testing.assert_close(ours, theirs)


def test_row_shares():
    weight = row_shares(2, 5, 1, 0.8)
    assert weight.view(2, 5)[:, 0].tolist() == pytest.approx([0.4, 0.4])
    assert float(weight.sum()) == pytest.approx(1)
    assert row_shares(2, 5, 1, None) is None
    assert row_shares(2, 5, 5, 0.8) is None


def test_difference_bank(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "SHARD_TASKS", 4)
    features = torch.randn(2, 8, 6, WIDTH, generator=torch.Generator().manual_seed(2))
    recipe = PrepareConfig(tasks=10, steps=3)
    bank = prepare_difference_bank(tmp_path / "a", features, TaskConfig(WAYS, 2), recipe, 3)
    targets, condition = bank.gather(torch.arange(10))
    assert targets.shape == (10, 1, WAYS, WIDTH + 1)
    episodes = sample_episodes(8, 6, ways=WAYS, shots=2, queries=4, seed=3, start=4, count=1)
    torch.testing.assert_close(condition[4:5], prototype_head(episodes.take(features[0])[0]))
    part = PrepareConfig(tasks=4, steps=3)
    prepare_difference_bank(tmp_path / "b", features, TaskConfig(WAYS, 2), part, 3)
    again = prepare_difference_bank(tmp_path / "b", features, TaskConfig(WAYS, 2), recipe, 3)
    assert torch.equal(again.gather(torch.arange(10))[0], targets)


@pytest.mark.parametrize("change", [{"head_steps": 0}, {"net_rates": ()}, {"test_steps": (0, 3)}, {"outer_lr": 1.5}])
def test_bad_settings(change):
    name = next(iter(change)).replace("_", "-")
    with pytest.raises(McdiError, match=f"--reptile.{name}"):
        check_reptile(ReptileConfig(**change))
