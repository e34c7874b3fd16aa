"""Curvature and distances against autograd, eigvalsh and hand-made cases."""

import math
from functools import partial

import pytest
import torch
from torch.func import hessian

from mcdi_fast import DiffusionConfig, WeightGenerator
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.evaluate import generate
from mcdi_fast.heads import head_gradient, head_layout, support_condition
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.sampler import Sampler
from mcdi_fast.study.analysis import (
    largest_eigenvalue,
    nearest_row_distance,
    novelty,
    target_distances,
    weight_error,
)
from mcdi_fast.tasks import TaskBatch

TASKS, WAYS, ROWS, WIDTH = 3, 4, 9, 5


def loss(head, features, labels, weight):
    logits = features @ head[:, :-1].T + head[:, -1]
    return (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weight).sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_largest_eigenvalue_against_eigvalsh(weighted):
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(TASKS, WAYS, WIDTH + 1, generator=generator, dtype=torch.float64)
    features = torch.randn(TASKS, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(WAYS, (TASKS, ROWS), generator=generator)
    weight = torch.rand(ROWS, generator=generator, dtype=torch.float64).softmax(0) if weighted else None
    shares = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64) if weight is None else weight
    size = head[0].numel()
    full = [hessian(loss)(h, x, y, shares).view(size, size) for h, x, y in zip(head, features, labels, strict=True)]
    expected = torch.linalg.eigvalsh(torch.stack(full))[:, -1]

    def gradient(rows):
        return partial(head_gradient, features=features[rows], labels=labels[rows], sample_weight=weight)

    found = largest_eigenvalue(gradient(slice(None)), head, iterations=2000, tolerance=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    alone = [largest_eigenvalue(gradient(slice(i, i + 1)), head[i : i + 1]) for i in range(TASKS)]
    torch.testing.assert_close(torch.cat(alone), expected, rtol=1e-2, atol=0)


def make_generator(segments=2, steps=4):
    normalizer = Normalizer(torch.full((1, 6), 0.5), torch.full((1, 6), 2.0))
    phi = init_parameters(6, 6, steps, 8, 1, seed=0)  # net = 0: f = skip x
    config = DiffusionConfig(steps=steps, segments=segments)
    return WeightGenerator(phi, head_layout(WAYS, WIDTH), normalizer, normalizer, config)


def test_target_distances_and_weight_error():
    generator, support = make_generator(), torch.randn(TASKS, WAYS, 1, WIDTH)
    targets = torch.randn(TASKS, 2, WAYS, WIDTH + 1)
    tasks = TaskBatch(support_condition(support), {}, {}, {})
    curve = target_distances(generator, tasks, targets, 0, 0.0, generator.normalizer)
    assert len(curve) == 5
    assert all(len(point) == 2 for point in curve)
    head = generate(Sampler(generator), tasks, 0)
    last = ((head - targets[:, -1]) / 2).square().mean((1, 2)).sqrt().mean()
    assert math.isclose(curve[-1][-1], float(last), rel_tol=1e-4)
    assert math.isclose(weight_error(generator, head, targets[:, -1]), float(last), rel_tol=1e-4)
    assert weight_error(generator, targets[:, -1], targets[:, -1]) == 0


def test_nearest_row():
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0]])
    rows = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    torch.testing.assert_close(nearest_row_distance(rows, bank), torch.tensor([0.0, 1.0]) / 2**0.5)
    torch.testing.assert_close(nearest_row_distance(bank[:2], bank, skip=1), torch.tensor([5.0, 5.0]) / 2**0.5)


def test_novelty_sees_a_copy():
    generator = make_generator()
    training, new = torch.randn(50, WAYS, WIDTH + 1), torch.randn(10, WAYS, WIDTH + 1)
    copied = novelty(generator, training[:10], new, training)
    assert copied["generated"] == {"median": 0.0, "least": 0.0}
    assert copied["training_rows"] == 200
    assert copied["trained"]["median"] > 0.1 < copied["training"]["least"] * 10
    assert novelty(generator, new, new, training)["generated"] == copied["trained"]
