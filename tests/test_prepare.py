import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import error_of

from mcdi_fast.config import PrepareConfig
from mcdi_fast.heads import head_gradient, head_trajectory
from mcdi_fast.optim import adam_scalars, adam_step, sam_perturbation
from mcdi_fast.prepare import check_segments

B, WAYS, ROWS, WIDTH = 4, 3, 12, 6


def config(**changes):
    return PrepareConfig(
        **{"steps": 30, "learning_rate": 0.05, "rho": 0.05, "weight_decay": 0.03, "start_std": 0.1} | changes
    )


def case(copies=1, dtype=torch.float64, tasks=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(copies, tasks, ROWS, WIDTH, generator=g, dtype=torch.float64).to(dtype)
    return features, torch.randint(WAYS, (tasks, ROWS), generator=g)


def run(features, labels, settings, seed=1, segments=3):
    """The draws of preparation, then all tasks at once."""
    g = torch.Generator().manual_seed(seed)
    copies, tasks, rows, width = features.shape
    start = torch.randn(tasks, WAYS, width + 1, generator=g, dtype=features.dtype) * settings.start_std
    pick = torch.randint(copies, (settings.steps, tasks, rows), generator=g) if copies > 1 else None
    return head_trajectory(start, features, labels, settings, segments, pick)


def loss_of(head, x, y, weight_decay):
    """One task: head [ways, F + 1], x [R, F], y [R]."""
    return F.cross_entropy(x @ head[:, :-1].T + head[:, -1], y) + weight_decay / 2 * head.square().sum()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_head_gradient_is_autograd_s(weight_decay):
    features, labels = case()
    head = torch.randn(B, WAYS, WIDTH + 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    head *= torch.tensor([0.0, 0.1, 1.0, 50.0]).view(-1, 1, 1)  # no weight at all, and a sure head
    inputs = [value.clone() for value in (head, features, labels)]
    found = head_gradient(head, features[0], labels, weight_decay)
    for b in range(B):
        leaf = head[b].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_of(leaf, features[0, b], labels[b], weight_decay), leaf)
        torch.testing.assert_close(found[b], expected, rtol=1e-11, atol=1e-14)
    for before, after in zip(inputs, (head, features, labels), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adam_step_is_torch_s(dtype):
    g = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 4, 5, generator=g, dtype=dtype)
    parameter = theta.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(1, 21):
        gradient = torch.randn(3, 4, 5, generator=g, dtype=dtype) * 10.0 ** (step % 5 - 3)
        gradient[0, 0] = 0
        parameter.grad = gradient.clone()
        optimizer.step()
        adam_step(theta, gradient, first, second, *adam_scalars(step, 0.03))
        # "the same arithmetic": to the last bits of twenty steps
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(theta, parameter.detach(), rtol=tolerance, atol=tolerance)
    assert first[0, 0].any() == second[0, 0].any() == False  # noqa: E712 (tensors)
    state = optimizer.state[parameter]
    torch.testing.assert_close(first, state["exp_avg"], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(second, state["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def plain_loop(features, labels, settings, seed, segments):
    """The same draws; then every task for itself, by autograd and torch.optim.Adam, SAM as its paper writes it."""
    g = torch.Generator().manual_seed(seed)
    copies, tasks, rows, width = features.shape
    starts = torch.randn(tasks, WAYS, width + 1, generator=g, dtype=features.dtype) * settings.start_std
    picks = [
        torch.randint(copies, (tasks, rows, 1), generator=g)[..., 0] if copies > 1 else torch.zeros(tasks, rows).long()
        for _ in range(settings.steps)
    ]
    result = []
    for b in range(tasks):
        head = starts[b].clone().requires_grad_()
        optimizer = torch.optim.Adam([head], lr=settings.learning_rate)
        kept = []
        for step, pick in enumerate(picks, 1):
            x = torch.stack([features[int(pick[b, r]), b, r] for r in range(rows)])
            (gradient,) = torch.autograd.grad(loss_of(head, x, labels[b], settings.weight_decay), head)
            if settings.rho:
                up = (head.detach() + settings.rho * gradient / gradient.norm()).requires_grad_()
                (gradient,) = torch.autograd.grad(loss_of(up, x, labels[b], settings.weight_decay), up)
            head.grad = gradient
            optimizer.step()
            if step % (settings.steps // segments) == 0:
                kept.append(head.detach().clone())
        result.append(torch.stack(kept))
    return torch.stack(result)


@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("segments", [1, 3, 30])
def test_head_trajectory_is_the_plain_loop(rho, copies, segments):
    features, labels = case(copies)
    settings = config(rho=rho)
    found = run(features, labels, settings, segments=segments)
    assert found.shape == (B, segments, WAYS, WIDTH + 1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain_loop(features, labels, settings, 1, segments), rtol=1e-9, atol=1e-11)


def test_heads_from_a_base_are_trained_as_autograd_says():
    features, labels = case()
    g, settings = torch.Generator().manual_seed(3), config(rho=0.0)
    base = torch.randn(B, WAYS, WIDTH + 1, generator=g, dtype=torch.float64)
    trust = torch.rand(B, 1, 1, generator=g, dtype=torch.float64)
    start = torch.zeros_like(base)
    found = head_trajectory(start, features, labels, settings, base=(base, trust))[:, 0]
    for b in range(B):
        theta = start[b].clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], settings.learning_rate)
        for _ in range(settings.steps):
            loss = loss_of(base[b] + trust[b] * theta, features[0, b], labels[b], 0.0)
            (theta.grad,) = torch.autograd.grad(loss + settings.weight_decay / 2 * theta.square().sum(), theta)
            optimizer.step()
        torch.testing.assert_close(found[b], theta.detach(), rtol=1e-9, atol=1e-11)


def test_the_local_targets_lie_on_one_trajectory():
    features, labels = case(2)
    every = run(features, labels, config(), segments=30)
    assert torch.equal(run(features, labels, config(), segments=3), every[:, 9::10])
    assert torch.equal(run(features, labels, config(), segments=1)[:, 0], every[:, -1])
    start = run(features, labels, config(steps=1, learning_rate=1e-30), segments=1)
    expected = torch.randn(B, WAYS, WIDTH + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.1
    torch.testing.assert_close(start[:, 0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rho", [0.05, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_does_not_hear_of_the_others(rho, dtype):
    """Bit by bit: one norm over the stack of tasks would couple them."""
    features, labels = case(2, dtype)
    before = run(features, labels, config(rho=rho))
    for scale in (1e-3, 1e3):
        changed, others = features.clone(), labels.clone()
        changed[:, 0] = case(2, dtype, seed=9)[0][:, 0] * scale
        others[0] = (labels[0] + 1) % WAYS
        after = run(changed, others, config(rho=rho))
        assert torch.equal(after[1:], before[1:])
        assert not torch.equal(after[0], before[0])


def test_sam_perturbation_has_one_norm_a_task():
    g = torch.Generator().manual_seed(0)
    theta, gradient = torch.randn(2, 5, 3, 7, generator=g, dtype=torch.float64)
    gradient *= torch.tensor([1e-6, 1.0, 0.0, 1e6, 3.0]).view(-1, 1, 1)
    found = sam_perturbation(theta, gradient, 0.3)
    for b in range(5):
        if b == 2:
            assert torch.equal(found[b], theta[b])  # no gradient, no ascent, no NaN
            continue
        expected = theta[b] + 0.3 * gradient[b] / gradient[b].norm()
        torch.testing.assert_close(found[b], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(sam_perturbation(theta, gradient, 0.0), theta)
    alone = torch.cat([sam_perturbation(theta[b : b + 1], gradient[b : b + 1], 0.3) for b in range(5)])
    assert torch.equal(alone, found)


@pytest.mark.parametrize("exponent", [-44, -38, -30, -25, -21, -15, -10, 0, 10, 17, 19, 25])
@pytest.mark.parametrize("rho", [0.05, 10.0])
def test_the_ascent_never_exceeds_rho(exponent, rho):
    """Also where the squares of the gradient underflow or overflow in float32: a task near its optimum must not be thrown away."""
    gradient = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 10.0**exponent
    moved = sam_perturbation(torch.zeros_like(gradient), gradient, rho)
    assert moved.isfinite().all()
    assert (moved.flatten(1).norm(dim=1) <= rho * (1 + 1e-5)).all()
    if -10 <= exponent <= 17:
        assert (moved.flatten(1).norm(dim=1) >= rho * (1 - 1e-3)).all()


def test_the_same_seed_gives_the_same_heads_and_the_inputs_stay():
    features, labels = case(3, torch.float32)
    copies = features.clone(), labels.clone()
    one, two, other = (run(features, labels, config(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.dtype == torch.float32
    assert torch.equal(features, copies[0])
    assert torch.equal(labels, copies[1])
    torch.manual_seed(77)  # the global generator has no say
    assert torch.equal(run(features, labels, config(), seed=1), one)


@pytest.mark.parametrize(("steps", "segments"), [(30, 4), (30, 60), (2, 3)])
def test_steps_that_do_not_divide(steps, segments):
    message = error_of(check_segments, steps, segments)
    assert f"M = {steps}" in message
    assert f"k = {segments}" in message
    assert f"raise M to {max(segments, 32 if steps == 30 and segments == 4 else segments)}" in message


@pytest.mark.slow
def test_a_network_of_50000_weights_in_8_gb():
    """Prepared, meta-trained and sampled; peak resident memory of a process of its own."""
    code = """
import resource, tempfile, torch
from mcdi_fast.config import DenoiserConfig, MetaConfig, PrepareConfig
from mcdi_fast.meta import fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks.waves import WaveFamily, WaveOptions
family = WaveFamily(WaveOptions(width=224, depth=2))
assert int(family.layout.mask.sum()) > 50_000
recipe = PrepareConfig(tasks=40, steps=6, learning_rate=0.003, rho=0.0, start_std=0.0)
bank = prepare_bank(tempfile.mkdtemp(), family, recipe, 3, 0)
generator = fit(bank, MetaConfig(steps=2), None, DenoiserConfig(256, 2), progress=False)
tasks = family.tasks("val", 0, 8, 0)
assert Sampler(generator).sample(tasks.condition, range(8)).tokens.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 8
