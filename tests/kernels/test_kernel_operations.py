"""Every entry of the registry against its reference in float64: in every precision at ragged sizes, at sizes of 1, in several blocks, in bfloat16."""

import pytest
import torch
from kernel_helpers import DEVICE, assert_close, in_bfloat16

from mcdi_fast.kernels.operations import ONE, TINY, WIDE, Maker, each

CASES = [
    (f"{name}{label}", operation, sizes, precision, label)
    for label, which in {"": TINY, ", ones": ONE, ", wide": WIDE, ", from bf16": TINY}.items()
    for name, operation, sizes, precision in each(which)
    # a resident chain is of few tokens; inner loops take float32 alone; of 40,000 numbers Adam moves some by the sign of a rounding
    if not label
    or (
        precision in (None, "ieee")
        and (operation.name, label)
        not in (
            ("resident_chain", ", wide"),
            ("head_trajectory of many", ", wide"),
            ("inner_loop", ", from bf16"),
        )
    )
]


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_list_names_everything_once():
    names = [name for name, *_ in CASES]
    assert len(set(names)) == len(names)
    assert bool(torch.empty(3, device=DEVICE).isnan().all())


@pytest.mark.parametrize(("name", "operation", "sizes", "precision", "label"), CASES, ids=[case[0] for case in CASES])
def test_same_as_the_reference(name, operation, sizes, precision, label):
    if precision not in (None, "ieee") and operation.name.startswith("head_trajectory"):
        pytest.skip("Adam moves an entry by its sign: test_kernel_head_trajectory.py has a bound")
    inputs = operation.inputs(sizes, Maker(DEVICE))
    if label == ", from bf16":
        inputs = in_bfloat16(operation, inputs)
    exact, float32 = operation.exact(inputs), operation.exact(inputs, torch.float32)
    found = operation(inputs, precision)
    assert len(found) == len(exact)
    for one, two, three in zip(found, exact, float32, strict=True):
        if operation.name == "normal_noise":  # two libraries' sine, cosine and logarithm
            torch.testing.assert_close(one.cpu(), two.float().cpu(), rtol=1e-5, atol=4e-6)
        else:
            # as kernel_helpers.py has it; an inner loop of one number has a silu's division and exponential, and no sum to even them out
            approximate = 18 if operation.name.startswith("head_trajectory") else 8 * (operation.name == "inner_loop")
            assert_close(one, two, three, precision or "ieee", operation.depth(sizes), approximate)
