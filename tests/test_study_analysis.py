"""Curvature, distances and diagnostics against autograd, eigvalsh and hand-made cases."""

import math

import pytest
import torch
from torch.func import hessian

from mcdi_fast import DiffusionConfig, WeightGenerator
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.evaluate import FeatureTasks, generate
from mcdi_fast.heads import head_layout, prototype_head
from mcdi_fast.sampler import Sampler
from mcdi_fast.study.analysis import (
    diagnose,
    head_hessian_product,
    largest_eigenvalue,
    nearest_row_distance,
    novelty,
    target_distances,
    weight_error,
)
from mcdi_fast.weights import Normalizer

TASKS, WAYS, ROWS, WIDTH = 3, 4, 9, 5


def loss(head, features, labels, decay, weight):
    logits = features @ head[:, :-1].T + head[:, -1]
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (each * weight).sum() + decay / 2 * head.square().sum()


@pytest.fixture(params=[None, "weighted"])
def case(request):
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(TASKS, WAYS, WIDTH + 1, generator=generator, dtype=torch.float64)
    features = torch.randn(TASKS, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(WAYS, (TASKS, ROWS), generator=generator)
    weight = None if request.param is None else torch.rand(ROWS, generator=generator, dtype=torch.float64).softmax(0)
    return head, features, labels, weight


def full_hessian(head, features, labels, decay, weight):
    shares = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64) if weight is None else weight
    size = head[0].numel()
    return torch.stack(
        [hessian(loss)(h, x, y, decay, shares).view(size, size) for h, x, y in zip(head, features, labels, strict=True)]
    )


def test_hessian_product_against_autograd(case):
    head, features, labels, weight = case
    direction = torch.randn(head.shape, dtype=torch.float64)
    expected = full_hessian(head, features, labels, 0.1, weight) @ direction.flatten(1).unsqueeze(-1)
    found = head_hessian_product(head, features, direction, 0.1, weight)
    torch.testing.assert_close(found.flatten(1), expected.squeeze(-1))


def test_largest_eigenvalue_against_eigvalsh(case):
    head, features, labels, weight = case
    expected = torch.linalg.eigvalsh(full_hessian(head, features, labels, 0.1, weight))[:, -1]
    found = largest_eigenvalue(head, features, 0.1, weight, iterations=2000, tolerance=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    alone = torch.cat([largest_eigenvalue(head[i : i + 1], features[i : i + 1], 0.1, weight) for i in range(TASKS)])
    torch.testing.assert_close(alone, expected, rtol=1e-2, atol=0)


def make_generator(segments=2, steps=4):
    normalizer = Normalizer(torch.full((1, 6), 0.5), torch.full((1, 6), 2.0))
    phi = init_parameters(6, 6, steps, 8, 1, seed=0)  # net = 0: f = skip x
    config = DiffusionConfig(steps=steps, segments=segments)
    return WeightGenerator(phi, head_layout(WAYS, WIDTH), normalizer, normalizer, config)


def test_target_distances_and_weight_error():
    generator, support = make_generator(), torch.randn(TASKS, WAYS, 1, WIDTH)
    targets = torch.randn(TASKS, 2, WAYS, WIDTH + 1)
    curve = target_distances(generator, FeatureTasks(support, support, support), targets, 0)
    assert len(curve) == 5
    assert all(len(point) == 2 for point in curve)
    head = generate(Sampler(generator), support, 0)
    last = ((head - targets[:, -1]) / 2).square().mean((1, 2)).sqrt().mean()
    assert math.isclose(curve[-1][-1], float(last), rel_tol=1e-4)
    assert math.isclose(weight_error(generator, head, targets[:, -1]), float(last), rel_tol=1e-4)
    assert weight_error(generator, targets[:, -1], targets[:, -1]) == 0


def test_nearest_row():
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0]])
    rows = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    torch.testing.assert_close(nearest_row_distance(rows, bank), torch.tensor([0.0, 1.0]) / 2**0.5)
    skipped = nearest_row_distance(rows, bank, torch.tensor([0, 1]))
    torch.testing.assert_close(skipped, torch.tensor([5.0, 18**0.5]) / 2**0.5)


def test_novelty_sees_a_copy():
    generator = make_generator()
    training, new = torch.randn(50, WAYS, WIDTH + 1), torch.randn(10, WAYS, WIDTH + 1)
    copied = novelty(generator, training[:10], new, training)
    assert copied["generated"] == {"median": 0.0, "least": 0.0}
    assert copied["trained"]["median"] > 0.1 < copied["training"]["least"] * 10
    assert novelty(generator, new, new, training)["generated"] == copied["trained"]


def test_diagnose_names_what_is_wrong():
    generator, support = make_generator(), torch.randn(20, WAYS, 1, WIDTH) * 2
    good = diagnose(generator, prototype_head(support), support)
    assert good.support_accuracy == 1
    same = diagnose(generator, torch.randn(1, WAYS, WIDTH + 1).expand(20, -1, -1), support)
    assert any("alike" in w for w in same.warnings)
    assert any("support accuracy" in w for w in same.warnings)
    assert any("times as large" in w for w in diagnose(generator, 100 * prototype_head(support), support).warnings)
    assert any("not finite" in w for w in diagnose(generator, prototype_head(support) / 0, support).warnings)
