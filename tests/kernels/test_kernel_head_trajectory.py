from dataclasses import replace

import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal, poisoned, same_bits

from mcdi_fast import heads
from mcdi_fast.backend import Backend
from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.head_trajectory import (
    fits,
    head_trajectory,
    head_trajectory_kernel,
    head_trajectory_ref,
    tiled_trajectory_kernel,
)
from mcdi_fast.kernels.launch import recording
from mcdi_fast.tasks import optimizer_steps

CONFIG = PrepareConfig(steps=6, rho=0.05, weight_decay=0.03)


def case(tasks, rows, width, ways, copies=1, steps=6):
    generator = torch.Generator().manual_seed(0)
    start = normal(tasks, ways, width + 1) * 0.01
    labels = torch.randint(ways, (tasks, rows), generator=generator).to(DEVICE)
    pick = torch.randint(copies, (steps, tasks, rows), generator=generator, dtype=torch.int32).to(DEVICE)
    return start, normal(copies, tasks, rows, width, seed=1), labels, pick if copies > 1 else None


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("shape", "rho", "tiled"),
    [
        ((1, 1, 1, 2), 0.05, False),
        ((17, 7, 13, 3, 2), 0.0, False),
        ((1, 1, 1, 2), 0.05, True),
        ((3, 7, 13, 3, 2), 0.0, True),
        ((2, 67, 131, 5, 2), 0.05, True),  # more than a tile of rows and of features
        ((2, 19, 33, 40), 0.05, True),
    ],
)
def test_equal_rows_and_without_sam(shape, rho, tiled):
    start, features, labels, pick = case(*shape)
    given = (labels, replace(CONFIG, rho=rho), 3, pick)
    found = head_trajectory(start, features, *given, out=poisoned(shape[0], 3, *start.shape[1:]), tiled=tiled)
    exact, float32 = (head_trajectory_ref(start.to(t), features.to(t), *given) for t in (torch.float64, torch.float32))
    assert_close(found, exact, float32, approximate=18)


def test_which_kernel():
    """Heads that a program can keep are kept; larger ones go in tiles, in one launch too."""
    for ways, width, tiled in (
        (5, 64, False),
        (5, 512, False),
        (5, 1280, True),
        (20, 512, True),
        (100, 512, True),
        (128, 2048, True),
    ):
        with recording() as launches:
            head_trajectory(*case(3, 11, width, ways)[:3], CONFIG)
        assert [launch.kernel for launch in launches] == [tiled_trajectory_kernel if tiled else head_trajectory_kernel]


@pytest.mark.parametrize("rho", [0.05, 0.0])
def test_heads_of_too_many_classes_go_step_by_step(rho):
    assert fits(128)
    assert not fits(130)
    start, features, labels, pick = case(3, 11, 70, 130, 2, steps=3)
    config = replace(CONFIG, steps=3, rho=rho)
    steps = optimizer_steps(Backend(DEVICE, True, "ieee"))
    found = heads.head_trajectory(start, features, labels, config, 3, pick, **steps)
    exact, float32 = (
        head_trajectory_ref(start.to(t), features.to(t), labels, config, 3, pick)
        for t in (torch.float64, torch.float32)
    )
    assert_close(found, exact, float32, approximate=18)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_low_precision_stays_near(precision, tiled):
    start, features, labels, _ = case(3, 25, 16, 5)
    found = head_trajectory(start, features, labels, CONFIG, 1, tiled=tiled, precision=precision)
    exact = head_trajectory_ref(start.double(), features.double(), labels, CONFIG, 1)
    # Adam divides each entry by its own size, so only entries whose gradient is below its rounding may move by a whole step
    assert float((found - exact).abs().median()) < 2**-7 * float(exact.abs().median())
    assert float((found - exact).abs().max()) <= 2 * CONFIG.steps * CONFIG.learning_rate


@pytest.mark.parametrize("tiled", [False, True])
def test_per_task(tiled):
    start, features, labels, pick = case(4, 9, 13, 3, 2)
    one = slice(2, 3)
    alone = head_trajectory(
        start[one].contiguous(), features[:, one].contiguous(), labels[one], CONFIG, 2, pick[:, one].contiguous(), tiled=tiled
    )  # fmt: skip
    features[:, 0], start[3] = float("nan"), float("nan")
    together = head_trajectory(start, features, labels, CONFIG, 2, pick, tiled=tiled)
    same_bits(together[one], alone)


def test_bad_input():
    start, features, labels, pick = case(3, 9, 13, 4, 2)
    for changes, message in [
        ({"start": start[:2]}, "features: shape"),
        ({"start": start[..., :5]}, r"start: shape \(3, 4, 5\), expected \(3, 4, 14\)"),
        ({"features": features.double()}, "features: torch.float64"),
        ({"labels": labels.int()}, "labels: torch.int32"),
        ({"pick": pick[:5]}, "pick: shape"),
        ({"sample_weight": torch.ones(8)}, r"sample_weight: shape \(8,\), expected \(9,\)"),
        ({"segments": 4}, "M = 6: expected a positive multiple of the segments k = 4"),
        ({"start": normal(3, 600, 14)}, "start: heads of 600 classes, expected at most 128"),
    ]:
        arguments = dict(start=start, features=features, labels=labels, config=CONFIG, segments=3, pick=pick) | changes
        with pytest.raises(McdiError, match=message):
            head_trajectory(**arguments)
    with pytest.raises(McdiError, match="features: shape"):
        head_trajectory(start[:0], features[:, :0], labels[:0], CONFIG)
