"""Compiled trajectories of heads against the reference in float64, and when a family takes them."""

import pytest
import torch

from mcdi_fast import backend, heads
from mcdi_fast.backend import Backend
from mcdi_fast.config import PrepareConfig
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions, train_heads

pytest.importorskip("numba")

from mcdi_fast import cpu_heads

SHAPES = [  # tasks, ways, rows, features
    (1, 2, 1, 1),
    (4, 3, 12, 6),
    (3, 5, 33, 64),
    (3, 12, 40, 20),
    (2, 5, 1, 300),
    (3, 5, 30, 150),  # from here on rows are few and the products large: SAM by the products of rows
    (2, 7, 17, 247),
    (1, 5, 3, 1400),
]


def recipe(**changes):
    return PrepareConfig(**{"steps": 12, "learning_rate": 0.05, "rho": 0.05, "weight_decay": 0.03} | changes)


def case(tasks, ways, rows, features, seed=0):
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(tasks, ways, features + 1, generator=g) * 0.1
    x = torch.randn(1, tasks, rows, features, generator=g) / features**0.5
    return start, x, torch.randint(ways, (tasks, rows), generator=g)


def exact(start, x, labels, config, segments=1, weight=None, **more):
    weight = None if weight is None else weight.double()
    if "base" in more:
        more["base"] = tuple(value.double() for value in more["base"])
    return heads.head_trajectory(start.double(), x.double(), labels, config, segments, sample_weight=weight, **more)


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_the_reference(shape, rho, weighted):
    start, x, labels = case(*shape)
    config, segments = recipe(rho=rho, weight_decay=0.0 if weighted else 0.03), 3
    weight = torch.linspace(1, 2, shape[2]) / (1.5 * shape[2]) if weighted else None
    copies = [value.clone() for value in (start, x, labels)]
    assert cpu_heads.fits(start, x, labels)
    found = cpu_heads.head_trajectory(start, x, labels, config, segments, sample_weight=weight)
    assert all(torch.equal(one, two) for one, two in zip(copies, (start, x, labels), strict=True))
    assert found.shape == (shape[0], segments, *start.shape[1:])
    expected = exact(start, x, labels, config, segments, weight)
    plain = heads.head_trajectory(start, x, labels, config, segments, None, weight)
    # Adam moves an entry by its gradient's sign: where that is next to nothing, rounding decides
    assert error(found, expected) < 10 * error(plain, expected) + 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("versions", [1, 3])
@pytest.mark.parametrize("from_base", [False, True])
def test_versions_of_rows_and_heads_from_a_base(shape, rho, versions, from_base):
    start, x, labels = case(*shape)
    g = torch.Generator().manual_seed(1)
    config, more = recipe(rho=rho), {}
    if versions > 1:
        x = torch.cat([case(*shape, seed)[1] for seed in range(versions)])
        more["pick"] = torch.randint(versions, (config.steps, *labels.shape), generator=g)
    if from_base:
        more["base"] = torch.randn(start.shape, generator=g), torch.rand(len(start), 1, 1, generator=g)
    assert cpu_heads.fits(start, x, labels, more.get("pick"))
    found, expected = (
        cpu_heads.head_trajectory(start, x, labels, config, 3, **more),
        exact(start, x, labels, config, 3, **more),
    )
    plain = heads.head_trajectory(start, x, labels, config, 3, **more)
    assert error(found, expected) < 10 * error(plain, expected) + 1e-5


def test_a_version_that_is_not_there_is_refused():
    start, x, labels = case(2, 3, 5, 4)
    pick = torch.full((12, 2, 5), 1)
    with pytest.raises(RuntimeError, match="index"):
        train_heads(Backend(), start, x, labels, recipe(), pick=pick)


@pytest.mark.parametrize("shape", [(7, 5, 20, 64), (7, 5, 30, 150)])
@pytest.mark.parametrize("from_base", [False, True])
def test_a_task_hears_neither_of_the_others_nor_of_the_threads(shape, from_base):
    start, x, labels = case(*shape)
    base = torch.randn(start.shape, generator=torch.Generator().manual_seed(2)), torch.full((7, 1, 1), 0.5)

    def trained(rows=slice(None)):
        given = tuple(part[rows] for part in base) if from_base else None
        return cpu_heads.head_trajectory(start[rows], x[:, rows], labels[rows], recipe(), base=given)

    before, threads = trained(), torch.get_num_threads()
    assert torch.equal(torch.cat([trained(slice(b, b + 1)) for b in range(7)]), before)
    x[0, 3] = float("nan")
    x[0, 4] = 1e30
    try:
        torch.set_num_threads(3)
        after = trained()
    finally:
        torch.set_num_threads(threads)
    rest = torch.tensor([0, 1, 2, 5, 6])
    assert torch.equal(after[rest], before[rest])
    assert after[3].isnan().all()  # nothing that is not finite is hidden


def test_products_of_rows_are_not_asked_for_a_gradient_that_cancels():
    """Rows alike with labels that pull either way: a norm that is rounding must not become an ascent."""
    start, x, labels = case(3, 2, 8, 600)
    start[:] = 0
    x[:, :, 1::2] = x[:, :, ::2] * (1 + 1e-6)
    labels[:] = torch.arange(8) % 2
    config = recipe(weight_decay=0.0, learning_rate=1e-4, steps=60)
    found, expected = cpu_heads.head_trajectory(start, x, labels, config), exact(start, x, labels, config)
    assert found.isfinite().all()
    assert float((found - expected).abs().max()) < 60 * 1e-4 * 2  # Adam's own reach: the signs are rounding
    assert cpu_heads.head_trajectory(start, 0 * x, labels, config).isfinite().all()  # no gradient at all


def test_another_default_dtype_changes_nothing():
    start, x, labels = case(2, 3, 5, 4)
    weight = torch.full((5,), 0.2)
    expected = cpu_heads.head_trajectory(start, x, labels, recipe(), sample_weight=weight)
    try:
        torch.set_default_dtype(torch.float64)
        plain = cpu_heads.head_trajectory(start, x, labels, recipe())
        weighted = cpu_heads.head_trajectory(start, x, labels, recipe(), sample_weight=weight.double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert plain.dtype == weighted.dtype == torch.float32
    assert torch.equal(plain, weighted)
    assert torch.equal(weighted, expected)


def test_a_converged_task_is_trained_as_by_torch():
    start, x, labels = case(3, 3, 30, 100)
    config = recipe(steps=600, learning_rate=0.02)
    expected = exact(start, x, labels, config)
    plain = heads.head_trajectory(start, x, labels, config)
    assert error(cpu_heads.head_trajectory(start, x, labels, config), expected) < 10 * error(plain, expected)


def test_who_takes_it(monkeypatch):
    taken, inner = [], cpu_heads.head_trajectory
    monkeypatch.setattr(cpu_heads, "head_trajectory", lambda *given, **more: taken.append(1) or inner(*given, **more))
    rows = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(0))
    family = HeadFamily({"train": ClassRows.of_grid(rows)}, HeadOptions(ways=3, queries=2))
    data = family.tasks("train", 0, 4, 0).train

    def trained(where=Backend(), family=family):  # noqa: B008
        return family.trajectories(data, recipe(), 3, torch.Generator().manual_seed(1), where)

    found = trained()
    assert len(taken) == 1
    assert error(trained(Backend.at_door(impl="torch")), found.double()) < 1e-4
    start, x, labels = case(2, 3, 5, 4)
    train_heads(Backend(), start.double(), x.double(), labels, recipe())
    with pytest.raises(RuntimeError, match="index"):
        train_heads(Backend(), start, x, labels + 3, recipe())
    monkeypatch.setenv("MCDI_IMPL", "torch")
    trained(Backend.at_door())
    assert len(taken) == 1


def test_without_numba_torch_trains(monkeypatch):
    backend.numba_module.cache_clear()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    start, x, labels = case(2, 3, 5, 4)
    found = train_heads(Backend(), start, x, labels, recipe())
    backend.numba_module.cache_clear()
    assert torch.equal(found, heads.head_trajectory(start, x, labels, recipe()))
