"""What the kernel tests share: the device, NaN-poisoned outputs, inputs in bfloat16, and a tolerance derived from torch's own rounding error."""

import torch

from mcdi_fast.backend import interpreted
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import recording
from mcdi_fast.kernels.operations import convert
from mcdi_fast.kernels.operations import relative_error as error

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
EPS = {"ieee": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-9}


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def poisoned(*shape):
    return torch.full(shape, float("nan"), device=DEVICE)


def in_bfloat16(operation, inputs):
    """The inputs with all of them in bfloat16 that the launcher takes so, but for those that it changes."""
    for name in inputs.keys() - (operation.changes or ()):
        changed = inputs | {name: convert(inputs[name], torch.bfloat16)}
        try:
            with recording():
                operation.run(**changed)
        except McdiError:
            continue
        inputs = changed
    return inputs


def assert_close(found, exact, float32, precision="ieee", depth=1, approximate=0):
    """No further from the float64 result than a few times what torch's float32 is, plus the rounding of the operands of `depth` products.

    4: another order of the same sums has an error of the same size, not the same value. Rounding both operands of a product by a relative
    u moves it by up to 2 u sum |a b|, which for rows of random sign is about 2 u of its own norm; twice that is allowed. The roundings of
    products in a row are independent, so they add in squares.

    approximate: what the compiled code's division (4 u), exponential (4 u) and square root (2 u, u = 2^-24) may be off, in u, all to one side. A
    step of Adam + SAM has two divisions and a root behind its gradient's exponential and division: 18.
    """
    assert bool(found.isfinite().all())
    allowed = 4 * error(float32, exact) + (8 + approximate) * EPS["ieee"]
    if precision != "ieee":
        allowed += 4 * depth**0.5 * EPS[precision]
    assert error(found, exact) <= allowed, (error(found, exact), allowed)


def same_bits(a, b):
    assert torch.equal(a.view(torch.int32), b.view(torch.int32))
