from dataclasses import replace

import pytest
import torch
from kernel_helpers import DEVICE, assert_close, same_bits

from mcdi_fast.denoiser import init_parameters
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels.inner_loop import inner_loop_triton
from mcdi_fast.kernels.operations import Maker, convert

RATE = 0.1  # large, so that later steps see weights that really differ by task


def random_case(b, k, s, n, d, c, steps, width, depth, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    # no zero matrix: a wrong gradient behind it would not show
    phi = {
        name: normal(*v.shape) / v.shape[0] ** 0.5 for name, v in init_parameters(d, c, steps, width, depth, 0).items()
    }
    step = torch.randint(steps, (b, k, s), generator=generator).to(DEVICE)
    return phi, InnerBatch(
        normal(b, k, s, n, d), step, normal(b, n, c), normal(b, k, s).abs() + 0.5, normal(b, k, s, n, d)
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ((2, 2, 2, 3, 5, 4, 3, 32, 1), False),
        ((3, 3, 2, 3, 5, 4, 3, 9, 1), True),
        ((1, 2, 1, 65, 5, 4, 3, 9, 1), False),  # more tokens than a program holds: their means by torch
    ],
)
def test_same_as_inner_loop(shape, masked, stacked):
    """Other sizes, low precisions: test_kernel_operations.py, in the form that is chosen there."""
    phi, batch = random_case(*shape)
    if masked:
        batch = replace(batch, mask=Maker(DEVICE).mask(*shape[3:5]))
    delta, losses = inner_loop_triton(phi, batch, RATE, stacked=stacked)
    exact, exact_losses = inner_loop(*convert((phi, batch), torch.float64), RATE, "reference")
    torch_delta, torch_losses = inner_loop(phi, batch, RATE, "torch", stacked)
    assert_close(losses, exact_losses, torch_losses)
    assert delta.keys() == exact.keys()
    for name in phi:
        assert_close(delta[name], exact[name], torch_delta[name])


@pytest.mark.parametrize("stacked", [False, True])
def test_losses_per_task(stacked):
    phi, batch = random_case(3, 2, 2, 3, 5, 4, 3, 9, 1)
    one = InnerBatch(**{name: value[1:2].contiguous() for name, value in vars(batch).items() if name != "mask"})
    _, alone = inner_loop_triton(phi, one, RATE, stacked=stacked)
    batch.x[0], batch.target[2] = float("nan"), 1e15
    _, together = inner_loop_triton(phi, batch, RATE, stacked=stacked)
    same_bits(together[1:2].contiguous(), alone.contiguous())


def test_bad_input():
    phi, batch = random_case(3, 2, 2, 3, 5, 4, 3, 9, 1)
    with pytest.raises(McdiError, match="inner batch gain: shape"):
        inner_loop_triton(phi, InnerBatch(batch.x, batch.step, batch.condition, batch.gain[:, :1], batch.target), RATE)
    with pytest.raises(McdiError, match=r"expected torch\.float32"):
        inner_loop_triton(*convert((phi, batch), torch.float64), RATE)
    with pytest.raises(McdiError, match="precision"):
        inner_loop_triton(phi, batch, RATE, precision="fp8")
