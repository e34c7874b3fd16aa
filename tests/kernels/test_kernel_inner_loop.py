import pytest
import torch
from kernel_helpers import DEVICE, assert_close, same_bits

from mcdi_fast.denoiser import init_parameters
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels.inner_loop import inner_loop_triton

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


def double(phi, batch):
    fields = {name: value if name in ("step", "mask") else value.double() for name, value in vars(batch).items()}
    return {name: value.double() for name, value in phi.items()}, InnerBatch(**fields)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1, 1, 1, 1), (3, 3, 4, 5, 13, 7, 6, 33, 2), (17, 2, 2, 3, 5, 4, 3, 9, 1)]
)
def test_same_as_inner_loop(shape, stacked, precision):
    phi, batch = random_case(*shape)
    delta, losses = inner_loop_triton(phi, batch, RATE, stacked=stacked, precision=precision)
    exact, exact_losses = inner_loop(*double(phi, batch), RATE, "reference")
    torch_delta, torch_losses = inner_loop(phi, batch, RATE, "torch", stacked)
    depth = 2 * (2 + 3 * shape[8]) * shape[1]  # products in a row: every layer forward and backward, K times
    assert_close(losses, exact_losses, torch_losses, precision, depth)
    assert delta.keys() == exact.keys()
    for name in phi:
        assert_close(delta[name], exact[name], torch_delta[name], precision, depth)


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
        inner_loop_triton(*double(phi, batch), RATE)
    with pytest.raises(McdiError, match="precision"):
        inner_loop_triton(phi, batch, RATE, precision="fp8")
