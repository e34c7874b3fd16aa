from dataclasses import replace

import pytest
import torch
from kernel_helpers import DEVICE, assert_close, error, normal, poisoned, same_bits

from mcdi_fast.denoiser import FoldedDenoiser, denoise, init_parameters
from mcdi_fast.diffusion import chain_table, make_objective, make_schedule
from mcdi_fast.diffusion import sample_chain as torch_chain
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.chain_weights import pack_weights, run_chain_ref
from mcdi_fast.kernels.launch import HOPPER, Chip, recording
from mcdi_fast.kernels.layered_chain import layered_chain
from mcdi_fast.kernels.operations import DEFAULT, Maker, chain_inputs
from mcdi_fast.kernels.resident_chain import fits, resident_chain
from mcdi_fast.kernels.run_chain import run_chain
from mcdi_fast.kernels.streamed_chain import chain_blocks, streamed_chain


def case(b, n, d, c, hidden, depth, steps):
    generator = torch.Generator().manual_seed(0)
    phi = {  # no zero matrix
        name: (0.5 * torch.randn(v.shape, generator=generator, dtype=torch.float64) / v.shape[0] ** 0.5)
        .float()
        .to(DEVICE)
        for name, v in init_parameters(d, c, steps, hidden, depth, 0).items()
    }
    return phi, make_schedule(steps, min(3, steps)), normal(b, n, d), normal(b, n, c, seed=1)


def packed(phi, dtype=torch.float32):
    return pack_weights(FoldedDenoiser(phi), dtype)


def table(schedule, num_steps=None):
    steps, coefficients = chain_table(schedule, make_objective(schedule, "local-consistency"), num_steps)
    return steps.to(DEVICE), coefficients.float().to(DEVICE)


def by_torch(phi, schedule, x, condition, dtype, num_steps=None):
    """The chain as Sampler and generator.f run it."""
    phi, x, condition = {name: value.to(dtype) for name, value in phi.items()}, x.to(dtype), condition.to(dtype)
    objective = make_objective(schedule, "local-consistency")
    skip, scale = objective.skip.tolist(), objective.scale.tolist()

    def f(x, t):
        net = denoise(phi, x.unsqueeze(-3), torch.tensor([t], device=x.device), condition).squeeze(-3)
        return skip[t] * x + scale[t] * net

    return torch_chain(f, x, schedule, num_steps=num_steps)


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("chain", [run_chain, layered_chain])
@pytest.mark.parametrize(
    ("shape", "num_steps"),
    [
        ((3, 5, 65, 9, 70, 2, 5), 3),
        ((17, 3, 4, 5, 9, 1, 4), None),
        ((2, 67, 13, 5, 33, 2, 3), None),  # more tokens than a program holds
        ((1, 3, 300, 70, 20, 1, 3), None),
    ],
)
def test_same_as_torch_chain(shape, num_steps, chain):
    phi, schedule, x, condition = case(*shape)
    found = chain(packed(phi), x, condition, *table(schedule, num_steps), out=poisoned(*x.shape))
    exact = by_torch(phi, schedule, x, condition, torch.float64, num_steps)
    assert_close(found, exact, by_torch(phi, schedule, x, condition, torch.float32, num_steps))
    weights = packed({name: value.double() for name, value in phi.items()}, torch.float32)
    double = replace(weights, **{name: value.double() for name, value in vars(weights).items()})
    steps, coefficients = table(schedule, num_steps)
    ref = run_chain_ref(double, x.double(), condition.double(), steps, coefficients.double())
    assert error(ref, exact) < 1e-6  # the folded matrices are rounded once, to float32


@pytest.mark.parametrize("chain", [streamed_chain, layered_chain])
def test_very_wide_tokens(chain):
    phi, schedule, x, condition = case(1, 2, 2048, 3, 16, 1, 1)
    found = chain(packed(phi), x, condition, *table(schedule), out=poisoned(*x.shape))
    exact, float32 = (by_torch(phi, schedule, x, condition, dtype) for dtype in (torch.float64, torch.float32))
    assert_close(found, exact, float32)


def test_many_tasks_a_program_and_per_task_bits():
    """chain_blocks puts 2 tasks of 5 tokens in one program here: a broken neighbour in it must not show."""
    assert chain_blocks(4, 5, 132) == (2, 8)
    assert chain_blocks(600, 5, 132) == (4, 8)
    assert chain_blocks(600, 40, 132) == (1, 64)
    phi, schedule, x, condition = case(4, 5, 7, 3, 18, 1, 3)
    weights = packed(phi)
    alone = run_chain(weights, x[3:].contiguous(), condition[3:].contiguous(), *table(schedule))
    x[2], condition[0] = float("nan"), float("inf")
    together = run_chain(weights, x, condition, *table(schedule), out=x)
    assert together is x
    same_bits(together[3:], alone)


def test_many_tokens_per_task_bits():
    phi, schedule, x, condition = case(3, 70, 7, 3, 18, 1, 3)
    weights = packed(phi)
    alone = run_chain(weights, x[2:].contiguous(), condition[2:].contiguous(), *table(schedule))
    x[1], condition[0] = float("nan"), float("inf")
    together = run_chain(weights, x, condition, *table(schedule), out=x)
    assert together is x
    same_bits(together[2:], alone)


@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ((2, 5, 13, 7, 32, 2, 2), False),
        ((3, 3, 4, 5, 17, 1, 3), True),
        ((1, 5, 7, 3, 9, 3, 1), True),
        ((1, 16, 33, 2, 9, 2, 1), False),
    ],
)
def test_resident_phase_by_phase(shape, masked):
    """The code of the one launch, a phase at a time: the interpreter's programs cannot wait for each other."""
    phi, schedule, x, condition = case(*shape)
    mask = None
    if masked:
        mask = torch.ones(*x.shape[1:], device=DEVICE)
        mask[-1, 3:] = 0
        x = x * mask
    weights, (steps, coefficients) = packed(phi), table(schedule)
    found = resident_chain(weights, x, condition, steps, coefficients, mask, out=poisoned(*x.shape), fused=False)
    double = replace(weights, **{name: value.double() for name, value in vars(weights).items()})
    exact = run_chain_ref(double, x.double(), condition.double(), steps, coefficients.double(), mask)
    assert_close(found, exact, run_chain_ref(weights, x, condition, steps, coefficients, mask))
    again = x.clone()
    assert resident_chain(weights, again, condition, steps, coefficients, mask, out=again, fused=False) is again
    assert torch.equal(again, found)


def test_resident_does_not_wait_for_ever():
    """A phase whose packets nobody has written gives NaN after the polls it was given."""
    phi, schedule, x, condition = case(1, 3, 4, 5, 17, 1, 2)
    weights, (steps, coefficients) = packed(phi), table(schedule)
    with recording() as launches:
        resident_chain(
            weights, x, condition, steps, coefficients, out=(out := poisoned(*x.shape)), fused=False, polls=3
        )
    last = launches[-1]
    last.kernel[last.grid](**last.arguments)
    assert bool(out.isnan().all())
    assert last.arguments["polls"] == 3


def test_which_chain():
    """A few small tasks are spread over the chip; more, larger ones, or another make of chip are not."""

    def chosen(chip=HOPPER, **sizes):
        z = replace(DEFAULT, **sizes)
        with recording(chip) as launches:
            run_chain(**chain_inputs(z, Maker()))
        one = launches[-1]
        assert (len(launches) == 1) == (one.kernel.__name__ != "layer_kernel")
        assert one.options.get("launch_cooperative_grid", False) == (one.kernel.__name__ == "resident_chain_kernel")
        return one.kernel.__name__.removesuffix("_kernel"), one.grid[0]

    assert chosen(chains=1) == ("resident_chain", 32)
    assert chosen(chains=2) == chosen(chains=1, tokens=16) == ("resident_chain", 64)
    assert chosen(chains=1, hidden=128, depth=3) == ("resident_chain", 32)
    assert chosen(chains=1, hidden=512) == ("resident_chain", 64)
    for more in (
        {"chains": 3},
        {"tokens": 20},
        {"depth": 3},
        {"condition": 300},
        {"chains": 33, "width": 500},
    ):
        assert chosen(**{"chains": 1} | more)[0] == "streamed_chain", more
    for more in ({"tokens": 65}, {"chains": 100, "tokens": 300}, {"hidden": 2048}, {"width": 500}, {"depth": 4}):
        assert chosen(**{"chains": 1} | more)[0] == "layer", more
    assert chosen(Chip(0, 304, 2**16), chains=1)[0] == "streamed_chain"
    assert chosen(Chip(90, 20, 2**17), chains=1)[0] == "streamed_chain"  # too much for each of its programs
    assert chosen(Chip(90, 20, 2**17), chains=1, hidden=128) == ("resident_chain", 16)
    phi, _, x, condition = case(3, 20, 4, 5, 17, 1, 2)
    assert not fits(packed(phi), x, condition)


@pytest.mark.parametrize("chain", [run_chain, layered_chain])
def test_mask_keeps_padding_at_zero(chain):
    phi, schedule, x, condition = case(3, 5, 7, 3, 18, 1, 3)
    mask = torch.ones(5, 7, device=DEVICE)
    mask[4, 3:] = 0
    found = chain(packed(phi), x * mask, condition, *table(schedule), mask)
    steps, coefficients = table(schedule)
    expected = run_chain_ref(packed(phi), x * mask, condition, steps, coefficients, mask)
    assert (found[:, 4, 3:] == 0).all()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bad_input():
    phi, schedule, x, condition = case(3, 5, 7, 3, 18, 1, 3)
    weights, (steps, coefficients) = packed(phi), table(schedule)
    for changes, message in [
        ({"x": x[:0]}, "x: shape"),
        ({"x": x.double()}, "x: torch.float64"),
        ({"condition": condition[:2]}, "condition: shape"),
        ({"coefficients": coefficients[:2]}, "coefficients: shape"),
        ({"steps": steps.int()}, "steps: torch.int32"),
        ({"weights": replace(weights, token=weights.token[:, :5])}, "weights.token: shape"),
        ({"weights": replace(weights, last=weights.last.bfloat16())}, "weights.last: torch.bfloat16"),
        ({"weights": replace(weights, condition_mean=weights.last)}, "weights.condition_mean: shape"),
        ({"precision": "fp8"}, "precision"),
    ]:
        arguments = dict(weights=weights, x=x, condition=condition, steps=steps, coefficients=coefficients) | changes
        with pytest.raises(McdiError, match=message):
            run_chain(**arguments)
    with pytest.raises(McdiError, match="x: 4097 tokens, expected at most 4096"):
        run_chain(weights, normal(3, 4097, 7), normal(3, 4097, 3), steps, coefficients)
    with pytest.raises(McdiError, match="x: 65 tokens, expected at most 64"):
        streamed_chain(weights, normal(3, 65, 7), normal(3, 65, 3), steps, coefficients)
    with pytest.raises(McdiError, match=r"dtype: torch\.float16"):
        packed(phi, torch.float16)
