import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.sam_adam import adam_step_, sam_ascent, sam_ascent_ref
from mcdi_fast.optim import adam_scalars


@pytest.mark.parametrize("shape", [(3, 5, 65), (2, 2500)])
def test_ascent_itself(shape):
    """What hides behind theta: its length is rho."""
    zero, gradient = torch.zeros(shape, device=DEVICE), normal(*shape)
    exact, float32 = (sam_ascent_ref(zero.to(t), gradient.to(t), 0.05) for t in (torch.float64, torch.float32))
    assert_close(sam_ascent(zero, gradient, 0.05), exact, float32)
    assert exact.flatten(1).norm(dim=1).tolist() == pytest.approx([0.05] * len(zero))


def test_ascent_of_zero_gradient_stays():
    theta = normal(3, 65)
    assert torch.equal(sam_ascent(theta, torch.zeros_like(theta), 0.05), theta)


def test_ascent_per_task():
    theta, gradient = normal(5, 130), normal(5, 130, seed=1)
    alone = sam_ascent(theta[3:4].contiguous(), gradient[3:4].contiguous(), 0.1)
    gradient[0], gradient[4] = float("nan"), 1e15
    same_bits(sam_ascent(theta, gradient, 0.1)[3:4], alone)


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
