import pytest
import torch
from kernel_helpers import assert_close, normal, poisoned, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.task_linear import Broadcast, task_linear, task_linear_ref

SHAPES = [  # tasks, rows, in, out, earlier steps
    (1, 1, 1, 1, 0),
    (3, 20, 65, 70, 2),
    (1, 67, 40, 130, 1),
]
RATE = 0.05


def case(b, r, i, o, earlier):
    rows, weight = normal(b, r, i), normal(i, o, seed=1)
    keys, values = normal(earlier, b, r, i, seed=2), normal(earlier, b, r, o, seed=3)
    return rows, weight, (keys, values)


def to(dtype, *tensors):
    return [tuple(t.to(dtype) for t in tensor) if isinstance(tensor, tuple) else tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_same_product_swapped(shape):
    rows, weight, (keys, values) = case(*shape)
    b, r, _, o, _ = shape
    gradient = normal(b, r, o, seed=4)
    found, _ = task_linear(gradient, weight.T, (values, keys), RATE)
    results = []
    for kind in (torch.float64, torch.float32):
        leaf = rows.to(kind).requires_grad_()
        out, _ = task_linear_ref(leaf, *to(kind, weight, (keys, values)), RATE)
        results.append(torch.autograd.grad(out, leaf, gradient.to(kind))[0])
    assert_close(found, *results)


@pytest.mark.parametrize("divide", [1, 5])
def test_fused(divide):
    b, s, n, i, o = 3, 4, 5, 13, 33
    rows, weight, earlier = case(b, s * n, i, o, 2)
    add_to, more = normal(b, s * n, o, seed=5), normal(b, n if divide == 1 else s, o, seed=6)
    pre_activation, gradient = poisoned(b, s * n, o), normal(b, s * n, i, seed=7)
    options = dict(add_to=add_to, broadcast=Broadcast(more, divide, 0.3), activation="silu")
    found, found_pre_activation = task_linear(
        rows, weight, earlier, RATE, **options, pre_activation=pre_activation, out=poisoned(b, s * n, o)
    )
    assert found_pre_activation is pre_activation

    def exact(kind):
        leaf = rows.to(kind).requires_grad_()
        options = dict(add_to=add_to.to(kind), broadcast=Broadcast(more.to(kind), divide, 0.3), activation="silu")
        out, pre_activation = task_linear_ref(leaf, *to(kind, weight, earlier), RATE, **options)
        return out.detach(), pre_activation.detach()

    assert_close(found, exact(torch.float64)[0], exact(torch.float32)[0])
    assert_close(pre_activation, exact(torch.float64)[1], exact(torch.float32)[1])

    # the backward of silu behind another product, against autograd
    found, _ = task_linear(gradient, weight, activation="silu_backward", pre_activation=pre_activation)
    results = []
    for kind in (torch.float64, torch.float32):
        leaf = pre_activation.to(kind).requires_grad_()
        upstream = gradient.to(kind) @ weight.to(kind)
        results.append(torch.autograd.grad(torch.nn.functional.silu(leaf), leaf, upstream)[0])
    assert_close(found, *results)


def test_in_place_residual():
    rows, weight, _ = case(3, 7, 13, 33, 0)
    h = normal(3, 7, 33, seed=5)
    expected = h + rows @ weight
    task_linear(rows, weight, add_to=h, out=h)
    assert torch.allclose(h, expected, rtol=1e-5, atol=1e-5)


def test_per_task():
    rows, weight, (keys, values) = case(5, 7, 13, 9, 2)
    one = slice(2, 3)
    alone, _ = task_linear(
        rows[one].contiguous(), weight, (keys[:, one].contiguous(), values[:, one].contiguous()), RATE
    )
    rows[0], keys[0, 1], values[1, 3] = float("nan"), float("nan"), float("inf")
    together, _ = task_linear(rows, weight, (keys, values), RATE)
    same_bits(alone, together[one])


def test_bad_input():
    rows, weight, (keys, values) = case(3, 4, 5, 6, 2)
    for arguments, options, message in [
        ((rows[:0], weight), {}, "rows: shape"),
        ((rows.transpose(0, 1), weight), {}, "rows: strides"),
        ((rows[..., :4].contiguous(), weight), {}, r"rows: shape \(3, 4, 4\), expected \(3, 4, 5\)"),
        ((rows, normal(2, 5, 6)), {}, r"weight: shape \(2, 5, 6\), expected \(3, 5, 6\)"),
        ((rows, weight.double()), {}, "weight: torch.float64"),
        ((rows, weight, (keys[..., :4], values)), {}, "keys: shape"),
        ((rows, weight, (keys, values[:1])), {}, "values: shape"),
        ((rows, weight), {"add_to": rows}, "add_to: shape"),
        ((rows, weight), {"broadcast": Broadcast(normal(3, 4, 5))}, "broadcast: shape"),
        ((rows, weight), {"activation": "relu"}, "activation = 'relu'"),
        ((rows, weight), {"activation": "silu_backward"}, "pre_activation: None"),
        ((rows, weight), {"precision": "fp8"}, "precision = 'fp8'"),
    ]:
        with pytest.raises(McdiError, match=message):
            task_linear(*arguments, **options)
