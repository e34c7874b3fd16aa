import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal, poisoned, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.sam_adam import adam_step_, adam_step_ref, sam_ascent, sam_ascent_ref
from mcdi_fast.optim import adam_scalars

SHAPES = [(1, 1), (3, 5, 65), (17, 37), (2, 2500)]


@pytest.mark.parametrize("shape", SHAPES)
def test_ascent(shape):
    theta, gradient = normal(*shape), normal(*shape, seed=1)
    out = sam_ascent(theta, gradient, 0.05, out=poisoned(*shape))
    exact = sam_ascent_ref(theta.double(), gradient.double(), 0.05)
    assert_close(out, exact, sam_ascent_ref(theta, gradient, 0.05))
    # the ascent itself, which hides behind theta: length rho
    assert_close(
        sam_ascent(theta * 0, gradient, 0.05), exact - theta.double(), sam_ascent_ref(theta * 0, gradient, 0.05)
    )


def test_ascent_of_zero_gradient_stays():
    theta = normal(3, 65)
    assert torch.equal(sam_ascent(theta, torch.zeros_like(theta), 0.05), theta)


def test_ascent_per_task():
    theta, gradient = normal(5, 130), normal(5, 130, seed=1)
    alone = sam_ascent(theta[3:4].contiguous(), gradient[3:4].contiguous(), 0.1)
    gradient[0], gradient[4] = float("nan"), 1e15
    same_bits(sam_ascent(theta, gradient, 0.1)[3:4], alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_adam(shape):
    def run(step_of, dtype):
        theta, exp_avg, exp_avg_sq = (
            normal(*shape).to(dtype),
            torch.zeros(shape, dtype=dtype, device=DEVICE),
            torch.zeros(shape, dtype=dtype, device=DEVICE),
        )
        for step in range(1, 4):
            step_of(theta, normal(*shape, seed=step).to(dtype), exp_avg, exp_avg_sq, *adam_scalars(step, 0.05))
        return theta, exp_avg, exp_avg_sq

    found = run(adam_step_, torch.float32)
    for value, exact, baseline in zip(
        found, run(adam_step_ref, torch.float64), run(adam_step_ref, torch.float32), strict=True
    ):
        assert_close(value, exact, baseline)


def test_adam_agrees_with_torch_optim():
    value = normal(4, 33)
    theta, parameter = value.clone(), value.clone().requires_grad_()
    exp_avg, exp_avg_sq = torch.zeros_like(theta), torch.zeros_like(theta)
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    for step in range(1, 4):
        parameter.grad = normal(4, 33, seed=step)
        adam_step_(theta, parameter.grad, exp_avg, exp_avg_sq, *adam_scalars(step, 0.01))
        optimizer.step()
    assert torch.allclose(theta, parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:0], "theta: shape"),
        (lambda a: a.double(), "theta: torch.float64"),
        (lambda a: a[0], "theta: shape"),
        (lambda a: a.T, "theta: strides"),
    ],
)
def test_bad_theta(change, message):
    theta = change(normal(4, 6))
    with pytest.raises(McdiError, match=message):
        sam_ascent(theta, normal(*theta.shape), 0.1)


def test_bad_gradient_and_moment():
    a = normal(4, 6)
    with pytest.raises(McdiError, match="gradient: shape"):
        sam_ascent(a, normal(4, 5), 0.1)
    with pytest.raises(McdiError, match="exp_avg_sq: shape"):
        adam_step_(a, a, a, normal(4, 5), 0.1, 0.1)
