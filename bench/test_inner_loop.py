"""One meta-step's inner loops: our fused form against a Python loop over tasks, vmap(grad) and the sgemm floor, same inputs.

Rows of a task = noised samples x tokens. Two bounds: `floor` is one large sgemm with as many operations as the fused form's products
have; `products` are the products that no implementation can avoid (forward, input gradient and weight gradient of every matrix over
the rows of all tasks and steps), each at its own shape, without the low-rank terms and without anything elementwise.
"""

import pytest
import torch

from mcdi_fast.denoiser import init_parameters
from mcdi_fast.inner import InnerBatch, inner_loop

WIDTH, DEPTH, TOKEN, CONDITION, STEPS, INNER, RATE = 256, 2, 65, 64, 20, 3, 0.005
SIZES = {  # tasks, samples, tokens
    "32x16": (32, 4, 4),
    "32x20": (32, 4, 5),  # the default size of the main job
    "128x8": (128, 2, 4),
    "8x16": (8, 4, 4),
}


def case(tasks, samples, tokens):
    g = torch.Generator().manual_seed(0)
    phi = init_parameters(TOKEN, CONDITION, STEPS, WIDTH, DEPTH, 0)
    phi = {name: torch.randn(v.shape, generator=g) / v.shape[0] ** 0.5 for name, v in phi.items()}
    shape = (tasks, INNER, samples)
    batch = InnerBatch(
        x=torch.randn(*shape, tokens, TOKEN, generator=g),
        step=torch.randint(STEPS, shape, generator=g),
        condition=torch.randn(tasks, tokens, CONDITION, generator=g),
        gain=torch.rand(shape, generator=g) + 0.5,
        target=torch.randn(*shape, tokens, TOKEN, generator=g),
    )
    return phi, batch


def products(phi, batch):
    """(rows, in, out, how many of forward / input gradient / weight gradient) of every matrix, over all tasks and steps."""
    b, k, s, n, _ = batch.x.shape
    for name, value in phi.items():
        rows = b * k * (n if name == "in.condition" else s if name.endswith(".sample") else s * n)
        yield rows, *value.shape, 2 if name.startswith("in.") else 3


def operations(phi, batch):
    return sum(2 * rows * i * o * count for rows, i, o, count in products(phi, batch))


def low_rank_operations(phi, batch):
    """Scores and values of the low-rank terms: every pair of a step and an earlier one, forward and backward."""
    b, k, s, n, _ = batch.x.shape
    total = 0
    for name, value in phi.items():
        rows = n if name == "in.condition" else s if name.endswith(".sample") else s * n
        total += k * (k - 1) // 2 * (1 if name.startswith("in.") else 2) * 2 * b * rows * rows * sum(value.shape)
    return total


def floor(phi, batch):
    side = 1024
    inner = (operations(phi, batch) + low_rank_operations(phi, batch)) // (2 * side * side)
    a, w = torch.randn(side, inner), torch.randn(inner, side)
    return lambda: a @ w


def unavoidable_products(phi, batch):
    def buffers(rows, i, o, count):
        return torch.randn(rows, i), torch.randn(i, o), torch.randn(rows, o), count

    ready = [buffers(*p) for p in products(phi, batch)]

    def run():
        for a, w, g, count in ready:
            a @ w
            a.T @ g
            if count == 3:
                g @ w.T

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", ["reference", "vmap", "torch", "torch-stacked", "products", "floor"])
def test_inner_loop(benchmark, provider, size):
    benchmark.group = f"inner loop, tasks x rows = {size}"
    phi, batch = case(*SIZES[size])
    if provider in ("floor", "products"):
        run = (floor if provider == "floor" else unavoidable_products)(phi, batch)
    else:
        stacked = provider == "torch-stacked" if provider.startswith("torch") else None
        impl = provider.split("-")[0]

        def run():
            return inner_loop(phi, batch, RATE, impl, stacked)

        expected, losses = inner_loop(phi, batch, RATE, "reference")
        delta, found = run()
        torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
        for name, value in expected.items():
            assert (delta[name] - value).norm() <= 1e-4 * value.norm(), (provider, name)
    benchmark.extra_info["gflop"] = operations(phi, batch) / 1e9
    benchmark.pedantic(run, rounds=15, iterations=1, warmup_rounds=3)
    benchmark.extra_info["gflop_per_s"] = operations(phi, batch) / 1e9 / benchmark.stats.stats.median
