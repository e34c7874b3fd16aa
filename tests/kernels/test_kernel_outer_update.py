import pytest
import torch
from kernel_helpers import DEVICE, assert_close, normal

from mcdi_fast.config import MetaConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import Turn
from mcdi_fast.kernels.outer_update import Verdict, judge_, judge_ref, outer_update_
from mcdi_fast.outer import OuterState, outer_scalars, outer_update

NAMES = ("phi", "average", "exp_avg", "exp_avg_sq")


def run(update, count, outer, dtype, steps=3):
    meta = MetaConfig(outer=outer, steps=200, outer_lr=0.05)
    phi = normal(count, dtype=dtype)
    state = OuterState(phi, phi.clone(), torch.zeros_like(phi), torch.zeros_like(phi))
    for step in range(steps):
        update(state, normal(count, seed=step + 1, dtype=dtype), outer_scalars(meta, step), outer)
    return state


def on_the_device(state, delta, scalars, outer, good=1):
    flag = torch.tensor([good], dtype=torch.int32, device=DEVICE)
    outer_update_(state, delta, torch.tensor(scalars, dtype=torch.float64, device=DEVICE), flag, outer)


@pytest.mark.parametrize("outer", ["adam", "reptile"])
@pytest.mark.parametrize("count", [1, 130, 2500])
def test_same_as_torch(count, outer):
    found = run(on_the_device, count, outer, torch.float32)
    exact, float32 = (run(outer_update, count, outer, dtype) for dtype in (torch.float64, torch.float32))
    for name in NAMES:
        assert_close(getattr(found, name), getattr(exact, name), getattr(float32, name))
    assert not torch.equal(found.phi, found.average)


@pytest.mark.parametrize("outer", ["adam", "reptile"])
def test_is_torch_optim_s(outer):
    """Reptile's difference as a gradient for Adam, or as a step; and the average of phi as torch.optim.swa_utils has it."""
    meta = MetaConfig(outer=outer, steps=50, outer_lr=0.05, inner_lr=0.1, ema=0.99)
    parameter = normal(70).requires_grad_()
    state = OuterState(*(t.clone() for t in (parameter.detach(), parameter.detach())), *torch.zeros(2, 70).to(DEVICE))
    optimizer = (torch.optim.Adam if outer == "adam" else torch.optim.SGD)([parameter], lr=1.0)
    average = parameter.detach().clone()
    for step in range(20):
        delta = normal(70, seed=step + 1)
        outer_update(state, delta.clone(), outer_scalars(meta, step), outer)
        # warm-up over the first 1 % (here none), then linearly to 0
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 50)
        parameter.grad = -delta / 0.1 if outer == "adam" else -delta
        optimizer.step()
        decay = min(0.99, (step + 1) / (11 + step))
        average = decay * average + (1 - decay) * parameter.detach()
        torch.testing.assert_close(state.phi, parameter.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.average, average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outer", ["adam", "reptile"])
def test_nothing_happens_once_a_step_has_failed(outer):
    state = run(on_the_device, 130, outer, torch.float32)
    before = [getattr(state, name).clone() for name in NAMES]
    scalars = outer_scalars(MetaConfig(outer=outer), 3)
    on_the_device(state, torch.full((130,), float("nan"), device=DEVICE), scalars, outer, good=0)
    for name, value in zip(NAMES, before, strict=True):
        assert torch.equal(getattr(state, name), value)


def test_bad_input():
    state = OuterState(*(normal(6, seed=i) for i in range(4)))
    scalars, good = torch.ones(4, dtype=torch.float64, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)
    for arguments, message in [
        ((state, normal(5), scalars, good), "delta: shape"),
        ((state, normal(6), scalars.float(), good), "scalars: torch.float32"),
        ((state, normal(6), scalars, good.long()), "good: torch.int64"),
        ((OuterState(*(normal(5 + i) for i in range(4))), normal(5), scalars, good), "average: shape"),
    ]:
        with pytest.raises(McdiError, match=message):
            outer_update_(*arguments, "adam")


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_step_that_is_not_finite_is_remembered_or_passed_over(skip):
    losses, number = torch.full((2, 3, 2), 0.5, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    scalars = normal(4, dtype=torch.float64)
    ours, theirs = Verdict.start(losses[..., 0]), Verdict.start(losses[..., 0])
    for step, (total, loss, good) in enumerate(
        [(1.0, 1.0, 1), (float("inf"), 2.0, 0), (0.0, float("nan"), 0), (1.0, 3.0, int(skip))]
    ):
        losses[1, 2, 1] = loss
        for judge, verdict in ((judge_, ours), (judge_ref, theirs)):
            judge(verdict, torch.full((1,), total, device=DEVICE), losses, number.fill_(step), scalars, skip)
        assert int(ours.good) == good
        for name, value in vars(theirs).items():
            assert torch.equal(getattr(ours, name), value), (step, name)
    assert (int(ours.failed), int(ours.skipped)) == ((-1, 2) if skip else (1, 0))


def test_turns_follow_each_other():
    """Number and scalars of the row whose turn it is; then it is the next one's, and behind the last the first one's."""
    table = torch.arange(21, device=DEVICE).view(
        3, 7
    )  # of three steps: 2 numbers of something else, the number, 4 scalars
    bits = table[:, 3:].double().view(torch.int64)
    table[:, 3:] = bits
    turn = Turn(torch.full((1,), 1, device=DEVICE), 7, 3)
    losses = torch.ones(1, 2, 1, device=DEVICE)
    for row in (1, 2, 0, 1):
        verdict, total = Verdict.start(losses[..., 0]), torch.full((1,), float("nan"), device=DEVICE)
        judge_(verdict, total, losses, table[0, 2:3], table[0, 3:].view(torch.float64), False, turn)
        assert int(verdict.failed) == 7 * row + 2
        assert torch.equal(verdict.scalars, table[row, 3:].view(torch.float64))
        assert int(turn.at) == (row + 1) % 3
    with pytest.raises(McdiError, match=r"turn: torch\.int32"):
        judge_(verdict, total, losses, table[0, 2:3], verdict.scalars, False, turn._replace(at=turn.at.int()))
