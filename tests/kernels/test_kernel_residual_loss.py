import pytest
import torch
from kernel_helpers import assert_close, normal, poisoned, same_bits

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.residual_loss import residual_loss, residual_loss_ref


def inputs(shape, dtype=torch.float32):
    return normal(*shape, dtype=dtype), normal(*shape[:2], seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)


def test_padding_is_not_counted():
    """What stands at padding, in the target or behind the rows of the network's output, changes nothing."""
    net, gain, target = inputs((3, 4, 5, 13))
    mask = torch.ones(5, 13, device=net.device)
    mask[3, 4:] = 0
    loss, gradient = residual_loss(net, gain, target, mask, int(mask.sum()))
    leaf = net.double().requires_grad_()
    error = (gain[..., None, None].double() * leaf - target.double())[..., mask.bool()]
    exact = error.square().mean((1, 2))
    assert_close(loss, exact.detach(), residual_loss_ref(net, gain, target, mask, int(mask.sum()))[0])
    assert torch.allclose(gradient.double(), torch.autograd.grad(exact.sum(), leaf)[0], rtol=1e-5, atol=1e-8)
    wide = torch.full((3, 4, 5, 32), 7.0, device=net.device)
    wide[..., :13] = net
    target[..., 3, 4:] = 1e6
    again, wide_gradient = residual_loss(wide, gain, target, mask, int(mask.sum()), gradient=poisoned(*wide.shape))
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)  # the order of the sum
    assert torch.equal(wide_gradient[..., :13], gradient)  # but for the sign of zeros at padding
    assert not wide_gradient[..., 13:].any()


def test_per_task():
    net, gain, target = inputs((5, 3, 5, 13))
    alone = residual_loss(net[2:3].contiguous(), gain[2:3].contiguous(), target[2:3].contiguous())
    net[0], target[4] = float("nan"), float("inf")
    together = residual_loss(net, gain, target)
    for a, b in zip(alone, together, strict=True):
        same_bits(a, b[2:3])


def test_bad_input():
    net, gain, target = inputs((3, 4, 5, 6))
    for arguments, message in [
        ((net[:0], gain, target), r"net: shape \(0, 4, 5, 6\)"),
        ((net[..., :5], gain, target), r"net: shape \(3, 4, 5, 5\), expected \(3, 4, 5, 6\)"),
        ((net, gain, target[0]), r"target: shape .* expected \[B, S, N, D\]"),
        ((net, gain, target, normal(6, 5), 7), "mask: shape"),
        ((net, gain[:, :2], target), r"gain: shape \(3, 2\), expected \(3, 4\)"),
        ((net, gain, target.half()), "target: torch.float16, expected torch.float32 or"),
        ((net, gain, target.transpose(2, 3).contiguous().transpose(2, 3)), "target: strides"),
        ((net, gain.to("meta"), target), "gain: on device meta"),
    ]:
        with pytest.raises(McdiError, match=message):
            residual_loss(*arguments)
    with pytest.raises(McdiError, match="loss: shape"):
        residual_loss(net, gain, target, loss=poisoned(4))
