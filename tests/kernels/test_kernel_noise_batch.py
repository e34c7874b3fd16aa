import math

import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal, poisoned, same_bits

from mcdi_fast.diffusion import OBJECTIVES, make_inner_batch, make_objective, make_schedule
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import Turn
from mcdi_fast.kernels.load_batch import load_batch_
from mcdi_fast.kernels.noise_batch import noise_batch, noise_batch_ref, noise_tables
from mcdi_fast.kernels.operations import OPERATIONS, TINY, Maker
from mcdi_fast.noise import philox_normal

SEED = 2**40 + 3


def case(b, k, s, n, d, objective="local-consistency"):
    schedule = make_schedule(7, 3)
    objective = make_objective(schedule, objective)
    generator = torch.Generator().manual_seed(0)
    segment = torch.randint(3, (b,), generator=generator)
    step = (torch.rand(b, k, s, generator=generator) * objective.ends[segment][:, None, None]).long()
    streams = torch.tensor([2**63 - 1, 0, *range(5, 3 + b)][:b])
    return schedule, objective, normal(b, n, d), segment, step, streams


def run(schedule, objective, target, segment, step, streams, seed=SEED, **options):
    tables = noise_tables(objective).float().to(DEVICE)
    return noise_batch(target, segment.to(DEVICE), step.to(DEVICE), seed, streams.to(DEVICE), tables, **options)


@pytest.mark.parametrize(
    ("shape", "name"),
    [((1, 1, 1, 1, 1), "vanilla"), ((3, 3, 4, 5, 13), "local-consistency"), ((5, 2, 3, 1, 7), "naive-local")],
)
def test_same_as_make_inner_batch(shape, name):
    assert name in OBJECTIVES
    _, objective, target, segment, step, streams = given = case(*shape, name)
    found = run(*given)
    b, n = shape[0], shape[3]
    eps = philox_normal([SEED] * b, math.prod(shape[1:]), streams.tolist()).view(shape)
    results = []
    for kind in (torch.float64, torch.float32):
        batch = make_inner_batch(objective, target.cpu().to(kind), torch.zeros(b, n, 1), segment, step, eps.to(kind))
        results.append((batch.x, batch.target, batch.gain))
    refs = noise_batch_ref(target.cpu().double(), segment, step, SEED, streams, noise_tables(objective))
    for value, exact, float32, ref in zip(found, *results, refs, strict=True):
        assert_close(value.cpu(), exact, float32)
        assert torch.allclose(ref, exact, rtol=1e-12, atol=1e-13)


def test_mask_keeps_padding_at_zero():
    schedule, objective, target, segment, step, streams = case(3, 2, 3, 4, 5)
    mask = torch.ones(4, 5, device=DEVICE)
    mask[3, 2:] = 0
    x, loss_target, _ = run(schedule, objective, target * mask, segment, step, streams, mask=mask)
    assert (x[..., 3, 2:] == 0).all()
    assert (loss_target[..., 3, 2:] == 0).all()
    assert (x[..., 3, :2] != 0).all()


def test_per_task():
    schedule, objective, target, segment, step, streams = case(4, 2, 3, 5, 7)
    alone = run(schedule, objective, target[2:3].contiguous(), segment[2:3], step[2:3], streams[2:3])
    target[0] = float("nan")
    together = run(schedule, objective, target, segment, step, streams)
    for a, b in zip(alone, together, strict=True):
        same_bits(a, b[2:3])


def test_into_views():
    """Inner steps before tasks, rows with a pitch, as the inner loop keeps them; what stands between the rows stays."""
    given = case(3, 2, 4, 5, 7)
    expected = run(*given)
    rows, target, gain = poisoned(2, 3, 4, 5, 32), poisoned(2, 3, 4, 5, 7), poisoned(2, 3, 4)
    views = rows[..., :7].transpose(0, 1), target.transpose(0, 1), gain.transpose(0, 1)
    found = run(*given, x=views[0], loss_target=views[1], gain=views[2])
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert bool(rows[..., 7:].isnan().all())


def test_bad_input():
    schedule, objective, target, segment, step, streams = case(3, 2, 3, 5, 7)
    for changes, message in [
        ({"target": target[:0]}, "target: shape"),
        ({"segment": segment[:2]}, "segment: shape"),
        ({"step": step.int()}, "step: torch.int32, expected torch.int64"),
        ({"streams": streams[:2]}, "streams: shape"),
        ({"seed": -1}, "seed = -1"),
        ({"mask": torch.ones(5, 6, device=DEVICE)}, "mask: shape"),
        ({"x": torch.empty(3, 2, 3, 7, 5, device=DEVICE).mT}, "x: strides"),
    ]:
        arguments = (
            dict(schedule=schedule, objective=objective, target=target, segment=segment, step=step, streams=streams)
            | changes
        )
        with pytest.raises(McdiError, match=message):
            run(**arguments)


def test_the_row_whose_turn_it_is():
    """Draws of several steps in a table: the same bits as of the row alone, from `noise_batch` and `load_batch_`."""
    (_, objective, target, segment, step, streams), (b, n, d) = case(3, 2, 3, 4, 5), (3, 4, 5)
    table = torch.zeros(4, 2 * b + step.numel(), dtype=torch.int64, device=DEVICE)
    table[2] = torch.cat([segment, streams, step.flatten()]).to(DEVICE)
    parts = table[0].split([b, b, step.numel()])
    turn = Turn(torch.full((1,), 2, device=DEVICE), table.shape[1], 4)
    alone = run(None, objective, target, segment, step, streams)
    found = run(None, objective, target, parts[0], parts[2].view(step.shape), parts[1], turn=turn)
    for one, two in zip(found, alone, strict=True):
        same_bits(one, two)
    filled = []
    for row, steps, at in ((table[2, :b], step.to(DEVICE), None), (parts[0], parts[2].view(step.shape), turn)):
        there, enter, block = (
            poisoned(b, n, d),
            torch.zeros(2, b, 12, 32, device=DEVICE),
            torch.zeros(2, b, 12, 32, device=DEVICE),
        )
        one = torch.ones(n, d, device=DEVICE)
        load_batch_(
            target, target, row, row, steps, 0 * one, one, 0 * one, one, there, enter, [block], 5, 10, 7, turn=at
        )
        filled.append((there, enter, block))
    for one, two in zip(*filled, strict=True):
        same_bits(one, two)
    assert torch.equal(filled[0][0], target[segment])
    assert bool(filled[0][2].any())


def test_what_load_batch_writes_is_its_own():
    """A batch must not be written over what it is made from: an error, instead of other numbers from run to run."""
    inputs = {operation.name: operation for operation in OPERATIONS}["load_batch_"].inputs(TINY, Maker(DEVICE))
    one, two = inputs["blocks"]
    flat, shape = inputs["targets"].view(-1), inputs["target"].shape
    for changes, message in [
        (
            {"target": flat[3 : 3 + inputs["target"].numel()].view(shape)},
            "target is written and shares memory with targets",
        ),
        ({"enter": one}, "enter is written and shares memory with block 0"),
        ({"blocks": [one, one]}, "block 0 is written and shares memory with block 1"),
        ({"blocks": [one, two.clone()]}, "blocks: tensors of several storages, expected views of one"),
    ]:
        with pytest.raises(McdiError, match=message):
            load_batch_(**inputs | changes)
