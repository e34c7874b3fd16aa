import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import padded, recording
from mcdi_fast.kernels.weight_update import delta_table, reptile_delta_, reptile_delta_ref, sgd_step_


def layers(*shapes, dtype=torch.float32):
    """Layers [steps, tasks, rows, in, out], rows padded by zeros, inputs and gradients of all in one storage each; outputs of NaN."""
    sizes = [[k * b * r * padded(width) for k, b, r, *widths in shapes for width in [widths[side]]] for side in (0, 1)]
    storages = [torch.zeros(sum(size), dtype=dtype, device=DEVICE) for size in sizes]
    outs = torch.full((sum(i * o for *_, i, o in shapes),), float("nan"), device=DEVICE).split(
        [i * o for *_, i, o in shapes]
    )
    found = []
    for number, ((k, b, r, i, o), out) in enumerate(zip(shapes, outs, strict=True)):
        pair = []
        for side, width in enumerate((i, o)):
            rows = storages[side].split(sizes[side])[number].view(k, b, r, padded(width))
            rows[..., :width] = normal(k, b, r, width, seed=side + 2 * number)
            pair.append(rows)
        found.append((*pair, out.view(i, o)))
    return found


def to(dtype, given):
    return [tuple(tensor.to(dtype, copy=True) for tensor in layer) for layer in given]


def test_delta_of_rows_in_bfloat16():
    ours = layers((1, 1, 1, 1, 1), (3, 3, 20, 65, 70), (2, 17, 13, 9, 33), dtype=torch.bfloat16)
    exact, float32 = to(torch.float64, ours), to(torch.float32, ours)
    for given in (exact, float32):
        for number, layer in enumerate(given):  # every layer has the rate of the first one's tasks
            reptile_delta_ref([layer], 0.05 * layer[0].shape[1])
            assert bool(layer[2].isfinite().all()), number
    with recording() as launched:
        reptile_delta_(ours, 0.05)
    assert len(launched) == 1
    reptile_delta_(ours, 0.05)
    for one, two, three in zip(ours, exact, float32, strict=True):
        assert_close(one[2], two[2], three[2])


def test_delta_is_the_sum_of_weight_gradients():
    ((inputs, gradients, out),) = layers((2, 3, 5, 7, 9))
    weight = torch.zeros(7, 9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    exact = torch.autograd.grad(inputs[..., :7].double() @ weight, weight, gradients[..., :9].double())[0]
    reptile_delta_([(inputs, gradients, out)], 0.3)
    assert torch.allclose(out.double(), -0.1 * exact, rtol=1e-5, atol=1e-6)


def test_sgd_per_task():
    weights, inputs, gradients = normal(5, 7, 9), normal(5, 3, 7, seed=1), normal(5, 3, 9, seed=2)
    alone = weights[2:3].clone()
    sgd_step_(alone, inputs[2:3].contiguous(), gradients[2:3].contiguous(), 0.1)
    inputs[1], gradients[3] = float("nan"), float("inf")  # the rows right before and behind
    sgd_step_(weights, inputs, gradients, 0.1)
    same_bits(weights[2:3], alone)


def test_bad_input():
    ((inputs, gradients, out),) = layers((2, 3, 4, 5, 6))
    for layer, message in [
        ((inputs, gradients[:, :2], out), "layer 0 gradients: shape"),
        ((inputs[:, :0], gradients, out), "layer 0 inputs: shape"),
        ((inputs.transpose(0, 1), gradients.transpose(0, 1), out), "layer 0 inputs: strides"),
        ((normal(2, 3, 4, 5), gradients, out), "expected multiples of 32"),
    ]:
        with pytest.raises(McdiError, match=message):
            delta_table([layer])
    one, two = layers((2, 3, 4, 5, 6), (2, 3, 4, 5, 6))
    flat = inputs.view(-1)
    for given, message in [
        ([one, (two[0].clone(), *two[1:])], "inputs of the layers: tensors of several storages"),
        ([one, (*two[:2], two[2].clone())], "out of the layers: tensors of several storages"),
        ([(inputs, gradients, flat[8:38].view(5, 6))], "layer 0 out is written and shares memory with layer 0 inputs"),
        ([one, (*two[:2], one[2])], "layer 0 out is written and shares memory with layer 1 out"),
    ]:
        with pytest.raises(McdiError, match=message):
            reptile_delta_(given, 0.1)
    inputs, gradients = normal(3, 4, 5), normal(3, 4, 6)
    with pytest.raises(McdiError, match=r"weights: torch\.bfloat16, expected torch\.float32"):
        sgd_step_(normal(3, 5, 6, dtype=torch.bfloat16), inputs, gradients, 0.1)
    with pytest.raises(McdiError, match="precision"):
        sgd_step_(normal(3, 5, 6), inputs, gradients, 0.1, precision="fp8")
