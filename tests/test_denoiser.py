import math

import pytest
import torch
import torch.nn.functional as F
from helpers import error_of

from mcdi_fast.denoiser import ChainDenoiser, FoldedDenoiser, denoise, init_parameters

D, C, T, H, L = 6, 3, 5, 8, 2


def case(dtype=torch.float64, depth=L, lead=(2,), samples=4, tokens=3, seed=0):
    """Parameters away from zero (or what hides behind a zero matrix would not show), x, step and condition."""
    g = torch.Generator().manual_seed(seed)
    phi = {
        name: torch.randn(value.shape, generator=g, dtype=torch.float64).div_(len(value) ** 0.5).to(dtype)
        for name, value in init_parameters(D, C, T, H, depth, 0).items()
    }
    x = torch.randn(*lead, samples, tokens, D, generator=g, dtype=torch.float64).to(dtype)
    step = torch.randint(T, (*lead, samples), generator=g)
    condition = torch.randn(*lead, tokens, C, generator=g, dtype=torch.float64).to(dtype)
    return phi, x, step, condition


def by_hand(phi, x, t, condition):
    """One sample [N, D], token by token, as the module's docstring writes it."""
    depth = sum(name.endswith(".out") for name in phi)
    h = [x[n] @ phi["in.token"] + condition[n] @ phi["in.condition"] for n in range(len(x))]
    for layer in range(depth):
        token, sample, out = (phi[f"block{layer}.{name}"] for name in ("token", "sample", "out"))
        mean = sum(h) / len(h)
        onehot = torch.zeros(T, dtype=x.dtype)
        onehot[t] = 1
        shared = torch.cat([mean, onehot]) @ sample
        h = [row + F.silu(row @ token + shared) @ out for row in h]
    return torch.stack([row @ phi["out.token"] for row in h])


@pytest.mark.parametrize("depth", [1, 3])
def test_equals_the_formula_token_by_token(depth):
    phi, x, step, condition = case(depth=depth)
    net = denoise(phi, x, step, condition)
    assert net.shape == x.shape
    for b in range(2):
        for s in range(4):
            expected = by_hand(phi, x[b, s], int(step[b, s]), condition[b])
            torch.testing.assert_close(net[b, s], expected, rtol=1e-12, atol=1e-13)


def test_leading_dimensions_are_a_batch():
    phi, x, step, condition = case(lead=(2, 3))
    whole = denoise(phi, x, step, condition)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(
                whole[i, j], denoise(phi, x[i, j], step[i, j], condition[i, j]), rtol=1e-13, atol=1e-14
            )
    one = denoise(phi, x[0, 0], step[0, 0], condition[0, 0])
    assert one.shape == (4, 3, D)


def test_permuting_the_tokens_permutes_the_output():
    phi, x, step, condition = case(tokens=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = denoise(phi, x[..., order, :], step, condition[..., order, :])
    torch.testing.assert_close(moved, denoise(phi, x, step, condition)[..., order, :], rtol=1e-12, atol=1e-13)


def test_samples_are_independent_and_tokens_are_not():
    phi, x, step, condition = case()
    before = denoise(phi, x, step, condition)
    changed = x.clone()
    changed[0, 1, 2] += 1
    after = denoise(phi, changed, step, condition)
    same = torch.ones(2, 4, dtype=torch.bool)
    same[0, 1] = False
    torch.testing.assert_close(after[same], before[same], rtol=1e-13, atol=1e-14)
    assert ((after - before)[0, 1].abs().amax(-1) > 1e-6).all()  # through the mean, every token hears of it


def test_the_step_conditions_every_block_by_its_own_row():
    phi, x, _, condition = case(lead=())
    outputs = [denoise(phi, x, torch.full((4,), t), condition) for t in range(T)]
    for t in range(T):
        for other in range(t):
            assert (outputs[t] - outputs[other]).abs().max() > 1e-3
    for layer in range(L):
        altered = dict(phi)
        altered[f"block{layer}.sample"] = phi[f"block{layer}.sample"].clone()
        altered[f"block{layer}.sample"][H + 2] += 1
        for t in range(T):
            found = denoise(altered, x, torch.full((4,), t), condition)
            assert torch.equal(found, outputs[t]) == (t != 2)


def test_the_initial_network_says_zero():
    phi = init_parameters(D, C, T, H, L, 3)
    _, x, step, condition = case(torch.float32)
    assert not denoise(phi, x, step, condition).any()
    for layer in range(L):
        assert not phi[f"block{layer}.out"].any()
        assert not phi[f"block{layer}.sample"][H:].any()
        assert phi[f"block{layer}.sample"][:H].any()
    assert not phi["out.token"].any()


def test_initial_parameters():
    phi = init_parameters(D, C, T, 200, 3, 5)
    assert {name: tuple(value.shape) for name, value in phi.items()} == {
        "in.token": (D, 200),
        "in.condition": (C, 200),
        "out.token": (200, D),
        **{f"block{i}.token": (200, 200) for i in range(3)},
        **{f"block{i}.sample": (200 + T, 200) for i in range(3)},
        **{f"block{i}.out": (200, 200) for i in range(3)},
    }
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in phi.values())
    # 40000 draws: the deviation of their deviation is 0.35 %
    assert float(phi["block1.token"].std()) == pytest.approx(1 / math.sqrt(200), rel=0.02)
    assert float(phi["in.token"].std()) == pytest.approx(1 / math.sqrt(D), rel=0.1)
    again, other = init_parameters(D, C, T, 200, 3, 5), init_parameters(D, C, T, 200, 3, 6)
    for name, value in phi.items():
        assert torch.equal(again[name], value)
    assert not torch.equal(other["in.token"], phi["in.token"])
    double = init_parameters(D, C, T, 200, 3, 5, torch.float64)
    for name, value in phi.items():  # the same draw
        assert double[name].dtype == torch.float64
        assert torch.equal(double[name].float(), value)


@pytest.mark.parametrize(
    ("position", "name"), list(enumerate(["token_width", "condition_width", "num_steps", "width", "depth"]))
)
@pytest.mark.parametrize("value", [0, -1])
def test_errors(position, name, value):
    sizes = [D, C, T, H, L]
    sizes[position] = value
    assert f"{name} = {value}" in error_of(init_parameters, *sizes, 0)


def test_gradients():
    phi, x, step, condition = case(lead=(2,), samples=2, tokens=2)
    names = list(phi)
    values = [phi[name].requires_grad_() for name in names]

    def net(x, condition, *values):
        return denoise(dict(zip(names, values, strict=True)), x, step, condition)

    assert torch.autograd.gradcheck(net, (x.requires_grad_(), condition.requires_grad_(), *values), fast_mode=True)
    g = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    small = {name: leaf(*value.shape) for name, value in init_parameters(2, 1, 2, 3, 1, 0).items()}
    names, step = list(small), torch.tensor([[0, 1]])
    assert torch.autograd.gradcheck(net, (leaf(1, 2, 2, 2), leaf(1, 2, 1), *small.values()))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (3, 5, 65, 64, 20, 31, 2), (2, 7, 4, 3, 5, 16, 3)])
def test_chain_denoiser_is_denoise(shape):
    tasks, tokens, width, condition_width, steps, hidden, depth = shape
    g = torch.Generator().manual_seed(0)
    phi = init_parameters(width, condition_width, steps, hidden, depth, 0, torch.float64)
    phi = {name: torch.randn(v.shape, generator=g, dtype=torch.float64) / v.shape[0] ** 0.5 for name, v in phi.items()}
    x = torch.randn(tasks, tokens, width, generator=g, dtype=torch.float64)
    condition = torch.randn(tasks, tokens, condition_width, generator=g, dtype=torch.float64)
    skip, scale = torch.rand(2, steps, generator=g, dtype=torch.float64).tolist()
    f = ChainDenoiser(FoldedDenoiser(phi), condition, skip, scale)
    before = x.clone()
    for t in range(steps):
        net = denoise(phi, x.unsqueeze(-3), torch.full((tasks, 1), t), condition).squeeze(-3)
        torch.testing.assert_close(f(x, t), skip[t] * x + scale[t] * net, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_a_chain_of_wide_tokens_keeps_its_last_matrix_in_factors():
    """One token that is a whole network: no matrix [D, D]."""
    g = torch.Generator().manual_seed(0)
    phi = init_parameters(41, 3, 4, 5, 2, 0, torch.float64)
    phi = {name: torch.randn(value.shape, generator=g, dtype=torch.float64) / 3 for name, value in phi.items()}
    x, c = (torch.randn(2, 1, width, generator=g, dtype=torch.float64) for width in (41, 3))
    chain = ChainDenoiser(FoldedDenoiser(phi), c, [0.5] * 4, [0.7] * 4)
    expected = 0.5 * x + 0.7 * denoise(phi, x.unsqueeze(1), torch.full((2, 1), 2), c).squeeze(1)
    torch.testing.assert_close(chain(x, 2), expected)
    assert [tuple(matrix.shape) for matrix in chain._folded.last] == [(51, 5), (5, 41)]


def test_folded_matrices_know_when_phi_has_changed():
    phi = init_parameters(3, 2, 4, 5, 2, 0)
    folded = FoldedDenoiser(phi)
    assert folded.is_of(phi)
    assert folded.is_of(dict(phi))
    phi["in.token"].mul_(2)
    assert not folded.is_of(phi)
    folded = FoldedDenoiser(phi)
    assert not folded.is_of(phi | {"out.token": phi["out.token"].clone()})
