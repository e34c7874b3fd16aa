"""The prior of classes against drawn classes, closed forms in float64 and scikit-free references; ridge heads against normal equations."""

import dataclasses

import pytest
import torch
from helpers import error_of

from mcdi_fast.heads import head_accuracy, prototype_head
from mcdi_fast.tasks.images import LabelledRows
from mcdi_fast.tasks.prior import ClassPrior, choose_penalty, informed_head, ridge_head, unit_head

WIDTH = 6


def world(seed, classes, rows, offset=0.0):
    """Classes of known covariances, with correlated columns: [classes, rows, WIDTH]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    between, within = torch.tensor([3.0, 2, 1, 0.1, 0.1, 0.1]), torch.tensor([0.3, 0.3, 3, 3, 1, 1])
    means = torch.randn(classes, 1, WIDTH, generator=g) * between.sqrt() + offset
    x = means + torch.randn(classes, rows, WIDTH, generator=g) * within.sqrt()
    return x.double() @ mix, (mix.T @ torch.diag(between.double()) @ mix, mix.T @ torch.diag(within.double()) @ mix)


def labelled(x):
    classes, rows, _ = x.shape
    return LabelledRows.of(x.flatten(0, 1), torch.arange(classes).repeat_interleave(rows))


def test_the_prior_finds_the_covariances():
    x, (between, within) = world(0, 4000, 3)
    prior = ClassPrior.fit(labelled(x), smoothing=0.0)
    back = torch.linalg.inv(prior.to_latent.double())
    assert torch.allclose(back.T @ back, within, rtol=0.1, atol=0.1 * within.abs().max())
    found = back.T @ torch.diag(prior.between.double()) @ back
    assert torch.allclose(found, between, rtol=0.1, atol=0.1 * between.abs().max())
    assert torch.allclose(prior.found_between, prior.between, atol=1e-4)
    assert torch.allclose(prior.found_within, torch.ones(WIDTH), atol=1e-4)


def test_ragged_classes():
    x, _ = world(1, 300, 8)
    data = labelled(x)
    keep = torch.rand(len(data), generator=torch.Generator().manual_seed(0)) < 0.6
    keep[::4] = True  # at least two a class
    ragged = LabelledRows.of(data.rows[keep], data.labels[keep])
    assert ragged.counts.unique().numel() > 2
    one, two = ClassPrior.fit(data), ClassPrior.fit(ragged)
    assert torch.allclose(one.between, two.between, rtol=0.3)
    assert one.fingerprint != two.fingerprint


def test_head_against_the_posterior():
    """Rows are the log-densities' linear parts of a new image given each class's support, at unit length: float64, matrix by matrix."""
    x, _ = world(2, 50, 10)
    prior = ClassPrior.fit(labelled(x))
    support = world(3, 5, 3)[0][None].float()
    back = torch.linalg.inv(prior.to_latent.double())
    within, between = back.T @ back, back.T @ torch.diag(prior.between.double()) @ back
    centre = prior.mean + prior.distance(support).double() * (support.double().mean((0, 1, 2)) - prior.mean)
    rows = []
    for images in support[0].double():
        precision = torch.linalg.inv(between) + 3 * torch.linalg.inv(within)
        guess = torch.linalg.solve(precision, torch.linalg.solve(within, (images - centre).sum(0)))
        predictive = within + torch.linalg.inv(precision)
        weight = torch.linalg.solve(predictive, guess)
        weight = weight / (weight @ guess).sqrt()
        rows.append(torch.cat([weight, -(weight @ centre)[None]]))
    assert torch.allclose(prior.head(support)[0].double(), torch.stack(rows), rtol=1e-3, atol=1e-3)


def test_new_classes_are_told_apart_better_than_by_prototypes():
    prior = ClassPrior.fit(labelled(world(4, 300, 10)[0]), smoothing=0.1)
    tasks = world(5, 400, 16)[0].float().view(80, 5, 16, WIDTH)
    support, query = tasks[:, :, :1], tasks[:, :, 1:]
    prototypes = head_accuracy(prototype_head(support), query).mean()
    assert head_accuracy(prior.head(support), query).mean() > prototypes + 0.1
    assert head_accuracy(informed_head(prior, support), query).mean() > prototypes + 0.1


@pytest.mark.parametrize("shots", [1, 5])
def test_distance_grows_with_an_offset(shots):
    prior = ClassPrior.fit(labelled(world(6, 300, 10)[0]))
    near, far = (world(7, 400, shots, offset)[0].float().view(80, 5, shots, WIDTH) for offset in (0.0, 6.0))
    assert prior.distance(near).median() < 0.4
    assert prior.distance(far).min() > 0.5
    assert prior.distance(far).max() <= 1
    # what all classes share tells nothing: the decision does not depend on it
    moved = prior.head(near + 1e4)
    assert torch.isfinite(moved).all()


def test_ridge_head_against_normal_equations():
    support = torch.randn(2, 3, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    penalties = torch.tensor([0.3, 2.0], dtype=torch.float64)
    for task, (x, penalty) in enumerate(zip(support.flatten(1, 2), penalties, strict=True)):
        y = torch.eye(3, dtype=x.dtype).repeat_interleave(4, 0)
        centred = x - x.mean(0)
        weight = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(WIDTH), centred.T @ (y - y.mean(0))).T
        bias = y.mean(0) - weight @ x.mean(0)
        expected = torch.cat([weight, bias[:, None]], 1)
        assert torch.allclose(ridge_head(support, penalties)[task], expected, atol=1e-10)


def test_the_penalty_is_the_best_of_leaving_each_row_out():
    support = torch.randn(6, 3, 4, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    support = support + 0.7 * torch.randn(
        6, 3, 1, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    tried = (0.1, 1.0, 10.0)
    chosen = choose_penalty(support, tried)
    rows, y = support.flatten(1, 2), torch.eye(3, dtype=torch.float64).repeat_interleave(4, 0)
    for task in range(6):
        errors = []
        for penalty in tried:
            total = 0.0
            for left in range(12):
                kept = torch.arange(12) != left
                x, labels = rows[task][kept], y[kept]
                centre = x.mean(0)
                gram = (x - centre).T @ (x - centre) + penalty * torch.eye(WIDTH)
                weight = torch.linalg.solve(gram, (x - centre).T @ (labels - labels.mean(0)))
                total += float((labels.mean(0) + (rows[task][left] - centre) @ weight - y[left]).square().sum())
            errors.append(total)
        assert chosen[task] == tried[errors.index(min(errors))]
    assert (choose_penalty(support[:, :, :1]) == 1).all()


def test_unit_heads_decide_alike():
    g = torch.Generator().manual_seed(0)
    head, query = torch.randn(4, 5, WIDTH + 1, generator=g), torch.randn(4, 5, 9, WIDTH, generator=g)
    assert torch.equal(head_accuracy(unit_head(head), query), head_accuracy(head, query))
    assert torch.allclose(unit_head(head)[..., :-1].flatten(1).norm(dim=1), torch.ones(4))
    assert torch.equal(unit_head(torch.zeros(1, 5, WIDTH + 1)), torch.zeros(1, 5, WIDTH + 1))


def test_a_prior_travels_in_a_file(tmp_path):
    prior = ClassPrior.fit(labelled(world(8, 20, 5)[0]))
    prior.save(tmp_path / "prior.safetensors")
    again = ClassPrior.load(tmp_path / "prior.safetensors")
    assert again.fingerprint == prior.fingerprint
    support = world(9, 5, 1)[0][None].float()
    assert torch.equal(again.head(support), prior.head(support))
    damaged = dataclasses.replace(prior, between=-prior.between)
    damaged.save(tmp_path / "prior.safetensors")
    assert "holds no class-prior" in error_of(ClassPrior.load, tmp_path / "prior.safetensors")


def test_priors_that_cannot_be():
    x = world(10, 4, 3)[0]
    for data, message in (
        (labelled(x[:1]), "1 classes, expected at least 2"),
        (labelled(x[:, :1]), "fewer than 2 rows"),
        (labelled(torch.ones(4, 3, WIDTH)), "features do not differ"),
    ):
        assert message in error_of(ClassPrior.fit, data)


def test_domains_share_an_offset():
    """Classes of a domain differ from its mean; what they share tells nothing, and is not far from the training classes."""
    x, (between, _) = world(11, 400, 6)
    shift = 8 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    domains = torch.arange(400) % 4
    moved = x + shift[domains][:, None]
    rows = torch.arange(2400) // 6
    data = LabelledRows.of(moved.flatten(0, 1), rows // 4, domains=domains[rows])
    prior, plain = ClassPrior.fit(data, smoothing=0.0), ClassPrior.fit(labelled(moved), smoothing=0.0)
    back = torch.linalg.inv(prior.to_latent.double())
    found = back.T @ torch.diag(prior.between.double()) @ back
    assert torch.allclose(found, between, rtol=0.3, atol=0.3 * between.abs().max())
    assert plain.offset.abs().max() == 0 < prior.offset.min()
    tasks = (world(12, 400, 16)[0].view(80, 5, 16, WIDTH) + shift[0]).float()
    support, query = tasks[:, :, :1], tasks[:, :, 1:]
    assert prior.distance(support).max() < 0.3 < plain.distance(support).mean()
    assert head_accuracy(prior.head(support), query).mean() > head_accuracy(plain.head(support), query).mean() + 0.005
    # across domains, images of a class lie as far apart as the domains do
    across = ClassPrior.fit(data, smoothing=0.0, across=True)
    apart = torch.linalg.inv(across.to_latent.double())
    assert float((apart.T @ apart).trace()) > 2 * float((back.T @ back).trace())
