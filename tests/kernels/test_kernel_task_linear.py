import pytest
import torch
from kernel_helpers import assert_close, normal, poisoned, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.task_linear import task_linear, task_linear_ref

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


def test_silu_and_its_backward_by_autograd():
    rows, weight, earlier = case(3, 20, 13, 33, 2)
    add_to, gradient = normal(3, 20, 33, seed=5), normal(3, 20, 13, seed=7)
    found, pre_activation = task_linear(
        rows, weight, earlier, RATE, add_to=add_to, activation="silu", pre_activation=poisoned(3, 20, 33)
    )
    exact, float32 = (
        task_linear_ref(*to(t, rows, weight, earlier), RATE, add_to=add_to.to(t))
        for t in (torch.float64, torch.float32)
    )
    assert_close(pre_activation, exact[0], float32[0])
    assert_close(found, *(torch.nn.functional.silu(out) for out, _ in (exact, float32)))
    # the backward of silu behind another product
    found, _ = task_linear(gradient, weight, activation="silu_backward", pre_activation=pre_activation)
    results = []
    for kind in (torch.float64, torch.float32):
        leaf = pre_activation.to(kind).requires_grad_()
        upstream = gradient.to(kind) @ weight.to(kind)
        results.append(torch.autograd.grad(torch.nn.functional.silu(leaf), leaf, upstream)[0])
    assert_close(found, *results)


@pytest.mark.parametrize("tokens", [1, 5, 33, 64])
def test_means_and_their_backward(tokens):
    """Behind the product's columns the means over a sample's tokens; the backward of a map of [h, mean of h] folds them back. More than one block."""
    rows, weight, _ = case(2, 2 * tokens, 13, 70, 0)
    found, _ = task_linear(rows, weight, tokens=tokens, mean_at=71, out=poisoned(2, 2 * tokens, 150))
    assert bool(found[..., 141:].isnan().all())
    assert bool(found[..., 70].isnan().all())
    exact, float32 = (rows.to(t) @ weight.to(t) for t in (torch.float64, torch.float32))

    def mean(h):
        return h.unflatten(1, (2, tokens)).mean(2, keepdim=True).expand(-1, -1, tokens, -1).flatten(1, 2)

    assert_close(found[..., :70], exact, float32)
    assert_close(found[..., 71:141], mean(exact), mean(float32))
    both, (keys, values), gradient = (
        normal(140, 9, seed=8),
        (normal(1, 2, 2 * tokens, 140), normal(1, 2, 2 * tokens, 9)),
        normal(2, 2 * tokens, 9),
    )
    folded, _ = task_linear(
        gradient, both.T, (values, keys), RATE, tokens=tokens, fold=True, out=poisoned(2, 2 * tokens, 70)
    )
    results = []
    for t in (torch.float64, torch.float32):
        h = exact.to(t).requires_grad_()
        out, _ = task_linear_ref(torch.cat([h, mean(h)], -1), both.to(t), (keys.to(t), values.to(t)), RATE)
        results.append(torch.autograd.grad(out, h, gradient.to(t))[0])
    assert_close(folded, *results)


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
        ((rows, weight), {"fold": True, "tokens": 3}, "tokens = 3, mean_at = 0: expected a divisor of 4 rows"),
        ((rows, weight), {"mean_at": 5, "tokens": 2}, "mean_at = 5: expected .* at least 6"),
        ((rows, weight), {"activation": "relu"}, "activation = 'relu'"),
        ((rows, weight), {"activation": "silu_backward"}, "pre_activation: None"),
        ((rows, weight), {"precision": "fp8"}, "precision = 'fp8'"),
    ]:
        with pytest.raises(McdiError, match=message):
            task_linear(*arguments, **options)
