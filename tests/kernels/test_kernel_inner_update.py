import pytest
import torch
from kernel_helpers import assert_close, normal, poisoned, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.inner_update import reptile_delta, reptile_delta_ref, sgd_step_, sgd_step_ref

SHAPES = [(1, 1, 1, 1, 1), (3, 3, 20, 65, 70), (2, 17, 13, 9, 33)]  # steps, tasks, rows, in, out


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_delta(shape, dtype, precision):
    k, b, r, i, o = shape
    inputs, gradients = normal(k, b, r, i, dtype=dtype), normal(k, b, r, o, seed=1, dtype=dtype)
    found = reptile_delta(inputs, gradients, 0.05, out=poisoned(i, o), precision=precision)
    exact, float32 = (reptile_delta_ref(inputs.to(t), gradients.to(t), 0.05) for t in (torch.float64, torch.float32))
    assert_close(found, exact, float32, precision)


def test_delta_is_the_sum_of_weight_gradients():
    inputs, gradients = normal(2, 3, 5, 7), normal(2, 3, 5, 9, seed=1)
    weight = torch.zeros(7, 9, dtype=torch.float64, device=inputs.device, requires_grad=True)
    gradient = torch.autograd.grad(inputs.double() @ weight, weight, gradients.double())[0]
    assert torch.allclose(reptile_delta(inputs, gradients, 0.3).double(), -0.1 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sgd_step(shape, precision):
    _, b, r, i, o = shape
    weights, inputs, gradients = normal(b, i, o), normal(b, r, i, seed=1), normal(b, r, o, seed=2)
    exact, float32 = (
        sgd_step_ref(*(v.to(t) for v in (weights, inputs, gradients)), 0.05) for t in (torch.float64, torch.float32)
    )
    sgd_step_(weights, inputs, gradients, 0.05, precision=precision)
    assert_close(weights, exact, float32, precision)


def test_sgd_per_task():
    weights, inputs, gradients = normal(5, 7, 9), normal(5, 3, 7, seed=1), normal(5, 3, 9, seed=2)
    alone = weights[2:3].clone()
    sgd_step_(alone, inputs[2:3].contiguous(), gradients[2:3].contiguous(), 0.1)
    inputs[1], gradients[3] = float("nan"), float("inf")  # the rows right before and behind
    sgd_step_(weights, inputs, gradients, 0.1)
    same_bits(weights[2:3], alone)


def test_bad_input():
    inputs, gradients = normal(2, 3, 4, 5), normal(2, 3, 4, 6)
    with pytest.raises(McdiError, match="gradients: shape"):
        reptile_delta(inputs, gradients[:, :2], 0.1)
    with pytest.raises(McdiError, match="inputs: shape"):
        reptile_delta(inputs[:, :0], gradients, 0.1)
    with pytest.raises(McdiError, match="inputs: strides"):
        reptile_delta(inputs.transpose(0, 1), gradients.transpose(0, 1), 0.1)
    with pytest.raises(McdiError, match=r"weights: torch\.bfloat16, expected torch\.float32"):
        sgd_step_(normal(3, 5, 6, dtype=torch.bfloat16), inputs[0], gradients[0], 0.1)
    with pytest.raises(McdiError, match="precision"):
        reptile_delta(inputs, gradients, 0.1, precision="fp8")
