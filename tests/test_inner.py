"""The three inner loops agree: outputs, losses, every gradient (through the Reptile delta of one and of several steps)."""

from dataclasses import replace

import pytest
import torch
from helpers import error_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mcdi_fast.denoiser import denoise, init_parameters
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.inner import inner_loop, stacked_is_cheaper, task_loss

SHAPES = [  # tasks, inner steps, samples, tokens, token width, condition width, steps, width, depth
    (1, 1, 1, 1, 1, 1, 1, 1, 1),
    (3, 3, 4, 5, 65, 64, 20, 63, 2),
    (17, 2, 3, 7, 13, 9, 6, 31, 3),
    (2, 4, 5, 1, 30, 2, 3, 17, 1),
]


def random_mask(n, d, seed):
    """Right padding, one token at least without."""
    widths = torch.randint(1, d + 1, (n,), generator=torch.Generator().manual_seed(seed))
    widths[seed % n] = d
    return (torch.arange(d) < widths[:, None]).double()


def random_case(shape, dtype, seed=0, padded=False):
    b, k, s, n, d, c, steps, width, depth = shape
    phi = init_parameters(d, c, steps, width, depth, seed)
    g = torch.Generator().manual_seed(seed + 1)
    # every matrix away from zero, or a wrong gradient behind a zero matrix would not show
    phi = {name: torch.randn(v.shape, generator=g, dtype=torch.float64) / v.shape[0] ** 0.5 for name, v in phi.items()}
    batch = InnerBatch(
        x=torch.randn(b, k, s, n, d, generator=g, dtype=torch.float64),
        step=torch.randint(steps, (b, k, s), generator=g),
        condition=torch.randn(b, n, c, generator=g, dtype=torch.float64),
        gain=torch.rand(b, k, s, generator=g, dtype=torch.float64) + 0.5,
        target=torch.randn(b, k, s, n, d, generator=g, dtype=torch.float64),
    )
    if padded:  # noise in x and target stays: nothing at padding may reach loss or gradient but through x
        batch = replace(batch, mask=random_mask(n, d, seed))
    return cast(phi, batch, dtype)


def cast(phi, batch, dtype):
    phi = {name: value.to(dtype) for name, value in phi.items()}
    fields = {name: value if name == "step" else value.to(dtype) for name, value in tensors(batch).items()}
    return phi, InnerBatch(**fields)


def tensors(batch):
    return {name: value for name, value in vars(batch).items() if value is not None}


def relative(value, expected):
    return float((value.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "stacked"), [("vmap", None), ("torch", False), ("torch", True)])
@pytest.mark.parametrize("padded", [False, True])
def test_agree_in_float64(shape, impl, stacked, padded):
    # a large rate, so that later steps see weights that really differ by task
    phi, batch = random_case(shape, torch.float64, 0, padded)
    expected, expected_losses = inner_loop(phi, batch, 0.1, "reference")
    delta, losses = inner_loop(phi, batch, 0.1, impl, stacked)
    assert relative(losses, expected_losses) < 1e-12
    assert delta.keys() == expected.keys()
    for name in phi:
        assert relative(delta[name], expected[name]) < 1e-11, name


IMPLEMENTATION_FORMS = [("reference", None), ("vmap", None)] + [
    (impl, stacked) for impl in ("torch", "auto") for stacked in (False, True, None)
]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*(st.integers(1, high) for high in (5, 4, 4, 5, 9, 5, 6, 12, 3))),
    st.integers(0, 2**31),
    st.floats(1e-4, 0.2),
    st.booleans(),
)
def test_any_shape_agrees_in_float64(shape, seed, rate, padded):
    phi, batch = random_case(shape, torch.float64, seed, padded)
    expected, expected_losses = inner_loop(phi, batch, rate, "reference")
    # a diverging task multiplies rounding by its growth, which says nothing about the implementations
    assume(float(expected_losses.max()) < 1e3 * float(expected_losses[:, 0].max()))
    for impl, stacked in IMPLEMENTATION_FORMS[1:]:
        delta, losses = inner_loop(phi, batch, rate, impl, stacked)
        assert losses.shape == shape[:2]
        assert relative(losses, expected_losses) < 1e-10
        for name in phi:
            assert delta[name].shape == phi[name].shape
            # against the whole difference too: a single matrix's may be next to nothing
            size = sum(float(value.norm()) for value in expected.values())
            assert float((delta[name] - expected[name]).norm()) < 1e-10 * (float(expected[name].norm()) + 1e-3 * size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_float32_rounds_no_worse_than_the_reference(shape, stacked, padded, impl):
    phi, batch = random_case(shape, torch.float64, 0, padded)
    phi32, batch32 = cast(phi, batch, torch.float32)
    phi, batch = cast(phi32, batch32, torch.float64)  # of the rounded inputs: what is compared is the arithmetic
    exact, exact_losses = inner_loop(phi, batch, 0.05, "reference")
    plain, plain_losses = inner_loop(phi32, batch32, 0.05, "reference")
    fused, fused_losses = inner_loop(phi32, batch32, 0.05, impl, stacked, "ieee")
    for name in phi:
        assert fused[name].dtype == torch.float32
        assert relative(fused[name], exact[name]) < 3 * relative(plain[name], exact[name]) + 2e-7, name
    assert relative(fused_losses, exact_losses) < 3 * relative(plain_losses, exact_losses) + 2e-7


def test_one_step_is_minus_eta_times_the_mean_gradient():
    phi, batch = random_case((5, 1, 3, 4, 6, 3, 4, 8, 2), torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in phi.items()}
    losses = torch.stack(
        [
            task_loss(leaves, batch.x[b, 0], batch.step[b, 0], batch.condition[b], batch.gain[b, 0], batch.target[b, 0])
            for b in range(5)
        ]
    )
    gradients = torch.autograd.grad(losses.mean(), list(leaves.values()))
    for impl, stacked in IMPLEMENTATION_FORMS:
        delta, found = inner_loop(phi, batch, 0.3, impl, stacked)
        torch.testing.assert_close(found[:, 0], losses.detach(), rtol=1e-12, atol=0)
        for name, gradient in zip(phi, gradients, strict=True):
            torch.testing.assert_close(delta[name], -0.3 * gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("impl", "stacked"), IMPLEMENTATION_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_task_does_not_hear_of_the_others(impl, stacked, dtype):
    """Its losses, over all inner steps, bit by bit, whatever the other tasks hold: other numbers, infinity, NaN."""
    shape = (6, 3, 4, 5, 13, 9, 7, 16, 2)
    phi, batch = random_case(shape, dtype)
    _, other = random_case(shape, dtype, seed=7)
    _, before = inner_loop(phi, batch, 0.1, impl, stacked)
    for mine in (0, 3, 5):
        rest = torch.arange(6) != mine
        for fill in (None, 1e30, float("inf"), float("nan")):
            fields = {name: value.clone() for name, value in tensors(batch).items()}
            for name, value in fields.items():
                value[rest] = getattr(other, name)[rest]
                if fill is not None and name != "step":
                    value[rest] = fill
            _, after = inner_loop(phi, InnerBatch(**fields), 0.1, impl, stacked)
            assert torch.equal(after[mine], before[mine])
            if fill is not None:
                assert not after[rest][:, 1:].isfinite().any()


@pytest.mark.parametrize("field", ["x", "condition", "gain", "target"])
@pytest.mark.parametrize(("impl", "stacked"), IMPLEMENTATION_FORMS)
def test_nan_in_one_task_is_found_and_leaves_the_others_alone(impl, stacked, field):
    phi, batch = random_case((4, 3, 2, 3, 5, 4, 6, 8, 2), torch.float32)
    _, before = inner_loop(phi, batch, 0.1, impl, stacked)
    value = getattr(batch, field).clone()
    value[1].view(-1)[0] = float("nan")
    delta, after = inner_loop(phi, replace(batch, **{field: value}), 0.1, impl, stacked)
    rest = torch.tensor([0, 2, 3])
    assert torch.equal(after[rest], before[rest])
    assert after[1].isnan().all()
    assert any(part.isnan().any() for part in delta.values())  # the mean over tasks must not hide it


@pytest.mark.parametrize(("impl", "stacked"), IMPLEMENTATION_FORMS)
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_given_is_written_to_and_strides_do_not_matter(impl, stacked, padded):
    phi, batch = random_case((3, 2, 4, 3, 5, 4, 6, 8, 2), torch.float64, 0, padded)
    turned = {name: value.clone().transpose(0, -1).contiguous() for name, value in tensors(batch).items()}
    fields = {name: value.transpose(0, -1) for name, value in turned.items()}
    fields["gain"] = batch.gain[:, :1, :1].expand(-1, 2, 4)
    strided, plain = InnerBatch(**fields), replace(batch, gain=fields["gain"].contiguous())
    strided_phi = {name: value.T.contiguous().T for name, value in phi.items()}
    copies = [{n: v.clone() for n, v in d.items()} for d in (tensors(strided), strided_phi)]
    delta, losses = inner_loop(strided_phi, strided, 0.1, impl, stacked)
    for found, copy in zip((tensors(strided), strided_phi), copies, strict=True):
        for name, value in found.items():
            assert torch.equal(value, copy[name]), name
    expected, expected_losses = inner_loop(phi, plain, 0.1, "reference")
    assert relative(losses, expected_losses) < 1e-12
    for name in phi:
        assert relative(delta[name], expected[name]) < 1e-11, name
        assert not delta[name].requires_grad
        assert delta[name].data_ptr() != strided_phi[name].data_ptr()


def test_the_same_twice():
    phi, batch = random_case(SHAPES[1], torch.float32)
    for impl, stacked in IMPLEMENTATION_FORMS[2:]:
        (one, losses), (two, again) = (inner_loop(phi, batch, 0.1, impl, stacked) for _ in range(2))
        assert torch.equal(losses, again)
        assert all(torch.equal(one[name], two[name]) for name in phi)


def test_the_crossover_only_chooses_between_the_two_forms():
    for shape in (
        (2, 3, 4, 5, 6, 4, 5, 8, 1),
        (2, 1, 1, 2, 6, 4, 5, 64, 1),
    ):  # all maps stacked but those of samples; none
        phi, batch = random_case(shape, torch.float64)
        chosen, named = (inner_loop(phi, batch, 0.1, impl)[0] for impl in ("torch", "reference"))
        assert all(torch.allclose(chosen[name], named[name], rtol=1e-10, atol=1e-12) for name in phi)
    square, wide = torch.empty(64, 64), torch.empty(16, 64)
    assert [stacked_is_cheaper(square, 3, rows, 1.0) for rows in (5, 21, 22, 60)] == [False, False, True, True]
    assert stacked_is_cheaper(wide, 3, 12, 1.0)  # a smaller map has its weights sooner
    assert not stacked_is_cheaper(square, 1, 1000, 1.0)  # no earlier rows


@pytest.mark.parametrize("impl", ["auto", "torch", "vmap", "reference"])
def test_what_does_not_fit_is_named(impl):
    b, k, s, n, d, c = shape = (2, 3, 4, 5, 6, 7)
    phi, batch = random_case((*shape, 3, 8, 1), torch.float32, 0, True)
    good = {
        "x": (b, k, s, n, d),
        "step": (b, k, s),
        "condition": (b, n, c),
        "gain": (b, k, s),
        "target": (b, k, s, n, d),
        "mask": (n, d),
    }
    for name, full in good.items():
        for axis in range(len(full)):
            if name == "x" and axis < 4:  # x says what the other shapes should be
                continue
            wrong = getattr(batch, name).narrow(axis, 0, full[axis] - 1)
            message = error_of(inner_loop, phi, replace(batch, **{name: wrong}), 0.1, impl)
            assert message.startswith(f"inner batch {name}: shape {tuple(wrong.shape)}")
            assert f"expected {full}" in message
        wrong = getattr(batch, name)[0]
        assert f"inner batch {name}: shape {tuple(wrong.shape)}" in error_of(
            inner_loop, phi, replace(batch, **{name: wrong}), 0.1, impl
        )
        wrong = getattr(batch, name).to(torch.int32 if name == "step" else torch.float64)
        message = error_of(inner_loop, phi, replace(batch, **{name: wrong}), 0.1, impl)
        assert message.startswith(f"inner batch {name}: {wrong.dtype} on cpu, expected")
        wrong = getattr(batch, name).to("meta")
        message = error_of(inner_loop, phi, replace(batch, **{name: wrong}), 0.1, impl)
        assert message.startswith(f"inner batch {name}: {wrong.dtype} on meta, expected {wrong.dtype} on cpu")
    for axis in range(3):  # fewer tasks, inner steps or samples in x alone: the next tensor disagrees
        message = error_of(inner_loop, phi, replace(batch, x=batch.x.narrow(axis, 0, 1)), 0.1, impl)
        assert message.startswith("inner batch step: shape")
    for axis in range(5):
        empty = batch.x.narrow(axis, 0, 0)
        message = error_of(inner_loop, phi, replace(batch, x=empty), 0.1, impl)
        assert message.startswith(f"inner batch x: shape {tuple(empty.shape)}")
        assert "[B, K, S, N, D]" in message
    for wrong, said in ((-1, "-1 to"), (99, "to 99")):
        step = batch.step.clone()
        step[-1, -1, -1] = wrong
        message = error_of(inner_loop, phi, replace(batch, step=step), 0.1, impl)
        assert message.startswith("inner batch step: ")
        assert said in message
        assert "expected 0 to" in message


def test_unknown_implementation():
    phi, batch = random_case(SHAPES[0], torch.float32)
    message = error_of(inner_loop, phi, batch, 0.1, "quick")
    assert "'quick'" in message
    for name in ("torch", "vmap", "reference"):
        assert name in message


@pytest.mark.parametrize(("impl", "stacked"), IMPLEMENTATION_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_padding_the_mask_changes_no_bit(impl, stacked, dtype):
    """A full mask of ones, and none: the same numbers."""
    phi, batch = random_case(SHAPES[1], dtype)
    delta, losses = inner_loop(phi, batch, 0.1, impl, stacked)
    full = replace(batch, mask=torch.ones(batch.x.shape[-2:], dtype=dtype))
    again, same = inner_loop(phi, full, 0.1, impl, stacked)
    assert torch.equal(losses, same)
    assert all(torch.equal(delta[name], again[name]) for name in phi)


@pytest.mark.parametrize(("impl", "stacked"), IMPLEMENTATION_FORMS)
def test_padding_counts_neither_in_the_loss_nor_in_the_gradient(impl, stacked):
    """Whatever the targets say there; and every token alone, cut to its real entries, has the same loss."""
    phi, batch = random_case((3, 3, 2, 4, 9, 3, 4, 8, 2), torch.float64, 3, True)
    assert 0 < int(batch.mask.sum()) < batch.mask.numel()
    delta, losses = inner_loop(phi, batch, 0.1, impl, stacked)
    other = replace(batch, target=torch.where(batch.mask.bool(), batch.target, 1e6))
    again, same = inner_loop(phi, other, 0.1, impl, stacked)
    torch.testing.assert_close(same, losses, rtol=1e-12, atol=0)
    for name in phi:
        torch.testing.assert_close(again[name], delta[name], rtol=1e-9, atol=1e-14)
    net = denoise(phi, batch.x[:, 0], batch.step[:, 0], batch.condition)
    error = batch.gain[:, 0, :, None, None] * net - batch.target[:, 0]
    real = error[..., batch.mask.bool()]  # [B, S, real entries]
    torch.testing.assert_close(losses[:, 0], real.square().mean((1, 2)), rtol=1e-12, atol=0)
    # a token of padding alone for some columns: their rows and columns of phi hear of the tokens that have them
    narrow = int(batch.mask.sum(0).argmin())
    only = replace(batch, mask=batch.mask * (torch.arange(9) != narrow))
    delta, _ = inner_loop(phi, only, 0.1, impl, stacked)
    assert not delta["out.token"][:, narrow].any()
