"""The engine through the kernels against the engine through torch: same draws, same numbers to rounding; nothing above kernels/ differs."""

import math

import pytest
import torch
from kernel_helpers import DEVICE, EPS, error
from torch import nn

from mcdi_fast.backend import Backend
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig, PrepareConfig
from mcdi_fast.denoiser import init_parameters, parameter_shapes, token_condition
from mcdi_fast.diffusion import make_inner_batch
from mcdi_fast.errors import McdiError
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels import meta_step
from mcdi_fast.kernels.noise_batch import noise_tables
from mcdi_fast.meta import MetaTrainer, fit
from mcdi_fast.noise import philox_normal
from mcdi_fast.outer import OuterState, outer_scalars, outer_update
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions
from mcdi_fast.weights import WeightLayout

META = MetaConfig(steps=40, meta_batch=3, inner_steps=2, samples=2, inner_lr=0.05, outer_lr=0.02)
DIFFUSION, DENOISER = DiffusionConfig(steps=6), DenoiserConfig(width=17, depth=1)
MODULES = {  # 3 tokens of 5, and with padding: 5 tokens, two of which are 4 wide
    "plain": nn.Linear(4, 3),
    "padded": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
    "network": nn.Linear(9, 4),  # one token of 40, more than twice the denoiser's width
}


def make_bank(folder, module="plain", tasks=20):
    how = {"tokens": "network"} if module == "network" else {"exchangeable": True}
    layout = WeightLayout.from_module(MODULES[module], **how)
    generator = torch.Generator().manual_seed(0)
    bank = TrajectoryBank.create(folder, layout, 3, 7)
    targets = torch.randn(tasks, 3, layout.num_tokens, layout.width, generator=generator) * layout.mask
    bank.append(targets, torch.randn(tasks, layout.num_tokens, 7, generator=generator))
    return bank


def trainer(bank, impl, meta=META, **options):
    device = DEVICE if impl == "triton" else "cpu"
    options = {"precision": "ieee"} | options  # to compare with torch's float32
    return MetaTrainer(bank, meta, DIFFUSION, DENOISER, 3, device=device, impl=impl, **options)


def steps(trainer, count):
    return [float(trainer.outer_step()) for _ in range(count)]


def states(*trainers):
    for name in ("phi", "average", "exp_avg", "exp_avg_sq"):
        yield name, *(getattr(t.state, name).cpu() for t in trainers)


@pytest.mark.parametrize("outer", ["adam", "reptile"])
@pytest.mark.parametrize("module", MODULES)
def test_meta_steps(tmp_path, module, outer):
    bank, meta = make_bank(tmp_path, module), MetaConfig(**vars(META) | {"outer": outer})
    ours, torchs = trainer(bank, "triton", meta), trainer(bank, "torch", meta)
    count = 5 if DEVICE == "cuda" else 2  # on a GPU the last of them are replays of a graph
    # both are float32: what differs is the order of sums, and Adam divides by the size of an entry
    assert steps(ours, count) == pytest.approx(steps(torchs, count), rel=1e-5)
    for name, one, two in states(ours, torchs):
        assert error(one, two) < 2e-4, name
        assert name in ("exp_avg", "exp_avg_sq") or not torch.equal(two, torch.zeros_like(two))


@pytest.mark.parametrize("rows", [1, 5])
def test_positions_padding_and_a_condition_for_all_tokens(tmp_path, rows):
    """Through `MetaStep` alone, against the inner loop and outer step of torch."""
    layout = WeightLayout.from_module(MODULES["padded"])
    bank, g = TrajectoryBank.create(tmp_path, layout, 3, 7), torch.Generator().manual_seed(0)
    bank.append(torch.randn(20, 3, 5, 5, generator=g) * layout.mask, torch.randn(20, rows, 7, generator=g))
    plain, position = trainer(bank, "torch"), layout.position()
    sizes = (5, 7 + position.shape[1], DIFFUSION.steps, DENOISER.width, DENOISER.depth)
    phi, shapes = init_parameters(*sizes, 0), parameter_shapes(*sizes)
    phi["out.token"].normal_(generator=g)  # 0 otherwise, and with it the gradients of what reads positions
    ours, expected = (OuterState.start(phi, torch.device(device)) for device in (DEVICE, "cpu"))
    draws, scalars = plain.draws(0), outer_scalars(META, 0)
    step = meta_step.MetaStep(
        ours, bank, lambda number: (draws, scalars), noise_tables(plain.objective), plain.normalizer, plain.condition_normalizer, layout.mask, shapes,
        META, seed=3, precision="ieee",
    )  # fmt: skip
    loss = float(step.step(0))
    targets, condition = bank.gather(draws.task)
    target = plain.normalizer.normalize(targets[torch.arange(len(targets)), draws.segment])
    shape = (*draws.step.shape, 5, 5)
    eps = philox_normal([3] * len(target), math.prod(shape[1:]), draws.streams.tolist()).view(shape) * layout.mask
    condition = token_condition(plain.condition_normalizer.normalize(condition), position)
    batch = make_inner_batch(plain.objective, target, condition, draws.segment, draws.step, eps, layout.mask.float())
    delta, losses = inner_loop(phi, batch, META.inner_lr)
    outer_update(expected, torch.cat([value.flatten() for value in delta.values()]), scalars, "adam")
    assert loss == pytest.approx(float(losses[:, 0].mean()), rel=1e-5)
    for name in ("exp_avg", "exp_avg_sq", "phi"):
        assert error(getattr(ours, name).cpu(), getattr(expected, name)) < 2e-4, name


def test_restoring_forgets_failed_and_skipped_steps(tmp_path):
    bank, path = make_bank(tmp_path / "bank"), tmp_path / "checkpoint.safetensors"
    ours = trainer(bank, "triton")
    ours.save(path)
    targets = ours._kernels._resident[0]
    kept = targets.clone()
    targets.fill_(float("nan"))
    ours.outer_step()
    with pytest.raises(McdiError, match="not finite at outer step 0"):
        ours.check()
    targets.copy_(kept)
    ours._kernels._verdict.skipped.add_(2)
    ours.restore(path)
    assert ours.skipped == 0
    before = ours.state.phi.clone()
    ours.outer_step()
    ours.check()
    assert not torch.equal(ours.state.phi, before)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_meta_steps_in_low_precision_stay_near(tmp_path, precision):
    bank, meta = make_bank(tmp_path), MetaConfig(**vars(META) | {"outer": "reptile"})
    ours, torchs = trainer(bank, "triton", meta, precision=precision), trainer(bank, "torch", meta)
    # products in a row: every layer forward and backward, in each inner step; the roundings add in squares (kernel_helpers.py)
    allowed = 4 * math.sqrt(2 * (2 + 3) * META.inner_steps) * EPS[precision]
    assert steps(ours, 1) == pytest.approx(steps(torchs, 1), rel=allowed)
    start = trainer(bank, "torch", meta).state.phi
    assert error(ours.state.phi.cpu() - start, torchs.state.phi - start) < allowed


@pytest.mark.parametrize("resident", [True, False])
def test_draws_go_ahead_of_the_steps(tmp_path, monkeypatch, resident):
    """However many go at a time, and wherever a run goes on, every step has its own draws: the same bits."""
    bank, path = make_bank(tmp_path / "bank"), tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr(meta_step, "RESIDENT_SHARE", 0.5 if resident else -1.0)
    meta = MetaConfig(**vars(META) | {"steps": 5})
    whole, found = trainer(bank, "triton", meta), []
    steps(whole, 2)
    whole.save(path)
    steps(whole, 3)
    for ahead in (1, 2):
        monkeypatch.setattr(meta_step, "AHEAD", ahead)
        one = trainer(bank, "triton", meta)
        steps(one, 1)
        one.restore(path)
        drawn, draws = [], one.draws
        monkeypatch.setattr(one, "draws", lambda step: drawn.append(step) or draws(step))  # noqa: B023
        steps(one, 3)
        found.append(drawn)
        for name, a, b in states(whole, one):
            assert torch.equal(a, b), name
    # one at a time, step 1's draws were made ahead of the checkpoint's; never past the last step
    assert found == [[2, 3, 4], [2, 3, 4]]


def test_same_seed_same_bits(tmp_path):
    bank = make_bank(tmp_path)
    one, two = trainer(bank, "triton"), trainer(bank, "triton")
    assert steps(one, 2) == steps(two, 2)
    for name, a, b in states(one, two):
        assert torch.equal(a, b), name


def test_a_bank_too_large_for_the_device_is_read_row_by_row(tmp_path, monkeypatch):
    bank = make_bank(tmp_path)
    resident = trainer(bank, "triton")
    monkeypatch.setattr(meta_step, "RESIDENT_SHARE", -1.0)
    streamed = trainer(bank, "triton")
    assert resident._kernels._resident is not None
    assert streamed._kernels._resident is None
    assert steps(resident, 2) == steps(streamed, 2)
    for name, a, b in states(resident, streamed):
        assert torch.equal(a, b), name


def test_a_checkpoint_moves_between_implementations(tmp_path):
    """A run may start on one and go on on the other; with the same one it is bit for bit as if it had not stopped."""
    bank, path = make_bank(tmp_path / "bank"), tmp_path / "checkpoint.safetensors"
    whole = trainer(bank, "triton")
    steps(whole, 1)
    whole.save(path)
    steps(whole, 1)
    for impl in ("triton", "torch"):
        again = trainer(bank, impl)
        again.restore(path)
        assert again.step == 1
        steps(again, 1)
        for name, a, b in states(whole, again):
            assert error(b, a) < 2e-4, name
            assert impl == "torch" or torch.equal(a, b)


@pytest.mark.parametrize("bad_step", [0, 1])
def test_a_step_that_is_not_finite_stops_with_phi_as_before_it(tmp_path, bad_step):
    bank = make_bank(tmp_path)
    good = trainer(bank, "triton")
    steps(good, bad_step)
    bad = trainer(bank, "triton")
    steps(bad, bad_step)
    draws = bad.draws(bad_step)
    learner = 1
    bad._kernels._resident[0].view(len(bank), 3, -1)[draws.task[learner], draws.segment[learner]] = float("nan")
    for _ in range(2):  # nothing is noticed on the host, and nothing is done on the device
        bad.outer_step()
    for name, a, b in states(good, bad):
        assert torch.equal(a, b), name
    where = f"outer step {bad_step}, task {draws.task[learner]} of the bank"
    with pytest.raises(McdiError, match=f"not finite at {where}"):
        bad.check()
    assert bad.step == bad_step
    with pytest.raises(McdiError, match="not finite"):
        bad.generator()
    with pytest.raises(McdiError, match="not finite"):
        bad.save(tmp_path / "checkpoint.safetensors")
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_torch_stops_at_once(tmp_path):
    bank = make_bank(tmp_path)
    torchs = trainer(bank, "torch", MetaConfig(**vars(META) | {"inner_lr": 1e20, "outer_lr": 1e-9}))
    before = torchs.state.phi.clone()
    with pytest.raises(McdiError, match="not finite at outer step 0"):
        steps(torchs, 1)
    assert torch.equal(torchs.state.phi, before)


@pytest.mark.parametrize("module", MODULES)
def test_a_generator_fitted_and_sampled_through_the_kernels(tmp_path, module):
    bank, meta = make_bank(tmp_path, module), MetaConfig(**vars(META) | {"steps": 2, "outer_lr": 0.2})
    ours, torchs = (
        fit(bank, meta, DIFFUSION, DENOISER, seed=1, device=device, impl=impl, precision="ieee")
        for impl, device in (("triton", DEVICE), ("torch", "cpu"))
    )
    for name, value in torchs.phi.items():
        assert error(ours.phi[name], value) < 2e-4, name
    condition = torch.randn(3, bank.layout.num_tokens, 7, generator=torch.Generator().manual_seed(1))
    seeds = [2**64 - 1, 0, 7]
    for num_steps in (None, 4):
        kernel, plain = Sampler(ours, DEVICE, impl="triton", precision="ieee"), Sampler(ours, "cpu", impl="torch")
        found = kernel.sample(condition.to(DEVICE), seeds, num_steps=num_steps).tokens.cpu()
        expected = plain.sample(condition, seeds, num_steps=num_steps).tokens
        mask = bank.layout.mask
        torch.testing.assert_close(found * mask, expected * mask, rtol=1e-4, atol=1e-4)
    bits = torch.tensor([-1, 0, 7], device=DEVICE)  # the same seeds, where the sampler is
    assert torch.equal(kernel.sample(condition.to(DEVICE), bits, num_steps=4).tokens.cpu(), found)
    alone = kernel.sample(condition[1:2].to(DEVICE), seeds[1:2], num_steps=4).tokens.cpu()
    torch.testing.assert_close(alone, found[1:2], rtol=1e-5, atol=1e-5)


def test_what_the_chain_kernel_lacks(tmp_path, monkeypatch):
    generator = fit(make_bank(tmp_path), MetaConfig(**vars(META) | {"steps": 1}), DIFFUSION, DENOISER)
    condition = torch.zeros(1, 3, 7)
    plain, kernel = Sampler(generator), Sampler(generator, DEVICE, impl="triton")
    for options, message in [
        ({"eta_noise": 1.0}, "its chain is noise-free, eta_noise = 1.0; use impl='torch'"),
        ({"callback": lambda t, x: None}, "its chain has no callback; use impl='torch'"),
    ]:
        with pytest.raises(McdiError, match=message):
            kernel.sample(condition.to(DEVICE), [0], **options)
        plain.sample(condition, [0], **options)
    with pytest.raises(McdiError, match="sampling steps = 2"):
        kernel.sample(condition.to(DEVICE), [0], num_steps=2)
    for eta_noise in (-0.5, math.nan):
        with pytest.raises(McdiError, match="eta_noise"):
            plain.sample(condition, [0], eta_noise=eta_noise)
        with pytest.raises(McdiError, match="eta_noise"):
            kernel.sample(condition.to(DEVICE), [0], eta_noise=eta_noise)


def test_tokens_too_wide_for_the_chain_kernel(tmp_path, monkeypatch):
    generator = fit(make_bank(tmp_path, "network"), MetaConfig(**vars(META) | {"steps": 1}), DIFFUSION, DENOISER)
    monkeypatch.setattr("mcdi_fast.sampler.MAX_WIDTH", 39)
    with pytest.raises(McdiError, match="width 39 at most, here 40"):
        Sampler(generator, DEVICE, impl="triton")


def test_prepared_banks_agree(tmp_path):
    features = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    config, banks = PrepareConfig(tasks=4, steps=6), []
    for impl, device in (("triton", DEVICE), ("torch", "cpu")):
        family = HeadFamily({"train": ClassRows.of_grid(features)}, HeadOptions(3, 1, 2), device=device)
        banks.append(prepare_bank(tmp_path / impl, family, config, 3, 5, backend=Backend.at_door(device, impl, "ieee")))
    (targets, condition), (expected, expected_condition) = (bank.gather(torch.arange(4)) for bank in banks)
    assert torch.equal(condition, expected_condition)
    # Adam moves an entry by its sign at first: one that is 0 to rounding may go the other way
    assert error(targets, expected) < 1e-3


def test_a_device_that_is_not_there(tmp_path):
    bank = make_bank(tmp_path)
    with pytest.raises(McdiError, match=r"device 'tpu': expected cpu, cuda or cuda:<number>"):
        MetaTrainer(bank, META, DIFFUSION, DENOISER, device="tpu")
    with pytest.raises(McdiError, match="precision = 'fp8'"):
        MetaTrainer(bank, META, DIFFUSION, DENOISER, precision="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(McdiError, match="device cuda: torch finds no CUDA device"):
            MetaTrainer(bank, META, DIFFUSION, DENOISER, device="cuda")
