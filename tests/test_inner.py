"""The three inner loops agree: outputs, losses, every gradient (through the Reptile delta of one and of several steps)."""

import pytest
import torch

from mcdi_fast.denoiser import init_parameters
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import InnerBatch, inner_loop

SHAPES = [  # tasks, inner steps, samples, tokens, token width, condition width, steps, width, depth
    (1, 1, 1, 1, 1, 1, 1, 1, 1),
    (3, 3, 4, 5, 65, 64, 20, 63, 2),
    (17, 2, 3, 7, 13, 9, 6, 31, 3),
    (2, 4, 5, 1, 30, 2, 3, 17, 1),
]


def random_case(shape, dtype, seed=0):
    b, k, s, n, d, c, steps, width, depth = shape
    phi = init_parameters(d, c, steps, width, depth, seed)
    g = torch.Generator().manual_seed(seed + 1)
    # every matrix away from zero, or a wrong gradient behind a zero matrix would not show
    phi = {name: torch.randn(v.shape, generator=g, dtype=torch.float64) / v.shape[0] ** 0.5 for name, v in phi.items()}
    batch = InnerBatch(
        x=torch.randn(b, k, s, n, d, generator=g, dtype=torch.float64),
        step=torch.randint(steps, (b, k, s), generator=g),
        condition=torch.randn(b, n, c, generator=g, dtype=torch.float64),
        gain=torch.rand(b, k, s, generator=g, dtype=torch.float64) + 0.5,
        target=torch.randn(b, k, s, n, d, generator=g, dtype=torch.float64),
    )
    return cast(phi, batch, dtype)


def cast(phi, batch, dtype):
    phi = {name: value.to(dtype) for name, value in phi.items()}
    fields = {name: value if name == "step" else value.to(dtype) for name, value in vars(batch).items()}
    return phi, InnerBatch(**fields)


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("implementation", "stacked"), [("vmap", None), ("fused", False), ("fused", True)])
def test_agree_in_float64(shape, implementation, stacked):
    # a large rate, so that later steps see weights that really differ by task
    phi, batch = random_case(shape, torch.float64)
    expected, expected_losses = inner_loop(phi, batch, 0.1, "reference")
    delta, losses = inner_loop(phi, batch, 0.1, implementation, stacked)
    assert relative(losses, expected_losses) < 1e-12
    assert delta.keys() == expected.keys()
    for name in phi:
        assert relative(delta[name], expected[name]) < 1e-11, name
