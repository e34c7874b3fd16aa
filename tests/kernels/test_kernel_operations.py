"""Every entry of the registry against its reference in float64, at ragged sizes, in every precision."""

import pytest
import torch
from kernel_helpers import DEVICE, assert_close

from mcdi_fast.kernels.operations import TINY, Maker, each

CASES = list(each(TINY))


def test_the_list_names_everything_once():
    names = [name for name, *_ in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "operation", "sizes", "precision"), CASES, ids=[case[0] for case in CASES])
def test_same_as_the_reference(name, operation, sizes, precision):
    if precision not in (None, "ieee") and operation.name == "head_trajectory":
        pytest.skip("Adam moves an entry by its sign: test_kernel_head_trajectory.py has a bound")
    inputs = operation.inputs(sizes, Maker(DEVICE))
    exact, float32 = operation.exact(inputs), operation.exact(inputs, torch.float32)
    found = operation(inputs, precision)
    assert len(found) == len(exact)
    for one, two, three in zip(found, exact, float32, strict=True):
        if operation.name == "normal_noise":  # two libraries' sine, cosine and logarithm
            torch.testing.assert_close(one.cpu(), two.float().cpu(), rtol=1e-5, atol=4e-6)
        else:
            assert_close(one, two, three, precision or "ieee", operation.depth(sizes))
