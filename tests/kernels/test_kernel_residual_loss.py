"""The loss behind the last product: rows times the identity are a network's given outputs."""

import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal, poisoned, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.task_linear import Residual, loss_parts, residual_loss_ref, task_linear


def inputs(b, s, n, d):
    return normal(b, s * n, d), normal(b, s, seed=1), normal(b, s, n, d, seed=2)


def loss_of(net, gain, target, mask=None, wide=0, **options):
    """The loss [B] and its gradient [B, R, D or wide]."""
    one = torch.eye(net.shape[-1], max(wide, net.shape[-1]), device=DEVICE)
    real = None if mask is None else int(mask.sum())
    gradient, parts = task_linear(net, one, residual=Residual(gain, target, mask, real, **options))
    return parts.sum(-1), gradient


@pytest.mark.parametrize("shape", [(3, 4, 5, 13), (2, 7, 11, 70)])
def test_padding_is_not_counted(shape):
    """What stands at padding, in the target or behind the network's columns, changes nothing. Also more than one block of rows and columns."""
    net, gain, target = inputs(*shape)
    b, _, n, d = shape
    r = net.shape[1]
    mask = torch.ones(n, d, device=DEVICE)
    mask[3, 4:] = 0
    loss, gradient = loss_of(net, gain, target, mask, parts=poisoned(b, loss_parts(r, d)))
    leaf = net.double().requires_grad_()
    error = (gain[..., None, None].double() * leaf.view(shape) - target.double())[..., mask.bool()]
    exact = error.square().mean((1, 2))
    reference = residual_loss_ref(net, Residual(gain, target, mask, int(mask.sum())))
    assert_close(loss, exact.detach(), reference[0])
    assert_close(gradient, torch.autograd.grad(exact.sum(), leaf)[0], reference[1])
    target[..., 3, 4:] = 1e6
    again, wide = loss_of(net, gain, target, mask, wide=96)
    assert wide.shape == (b, r, 96)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)  # the order of the sum
    assert torch.equal(wide[..., :d], gradient)  # but for the sign of zeros at padding
    assert not wide[..., d:].any()


def test_per_task():
    net, gain, target = inputs(5, 3, 5, 13)
    alone = loss_of(net[2:3].contiguous(), gain[2:3].contiguous(), target[2:3].contiguous())
    net[0], target[4] = float("nan"), float("inf")
    together = loss_of(net, gain, target)
    for a, b in zip(alone, together, strict=True):
        same_bits(a, b[2:3])


def test_bad_input():
    net, gain, target = inputs(3, 4, 5, 6)
    for arguments, message in [
        ((net, gain, target[0]), r"target: shape .* expected \[B, S, N, D\]"),
        ((net, gain, target[:, :3].contiguous()), "target: 3 x 5 rows a task, expected 20"),
        ((net, gain, normal(3, 4, 5, 7)), r"target: shape \(3, 4, 5, 7\), expected \(3, 4, 5, 6\)"),
        ((net, gain, target, normal(6, 5)), "mask: shape"),
        ((net, gain[:, :2], target), r"gain: shape \(3, 2\), expected \(3, 4\)"),
        ((net, gain, target.half()), r"target: torch.float16, expected torch.float32"),
        ((net, gain, target.transpose(2, 3).contiguous().transpose(2, 3)), "target: strides"),
        ((net, gain.to("meta"), target), "gain: on device meta"),
    ]:
        with pytest.raises(McdiError, match=message):
            loss_of(*arguments)
    with pytest.raises(McdiError, match="parts: shape"):
        loss_of(net, gain, target, parts=poisoned(3, 4))
