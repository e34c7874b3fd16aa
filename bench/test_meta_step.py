"""One meta-step: the inner loops of all tasks and the outer step, against what people would otherwise run.

Rows of a task = noised samples x tokens. `floor` is one large sgemm with as many operations as our form's products have, `products` are
the products no implementation can avoid, each at its own shape, without low-rank terms and without anything elementwise.
"""

import providers as P
import pytest
import torch
from checks import meta_check

SIZES = {  # tasks, samples, tokens, width, inner steps
    "8x16": (8, 4, 4, 256, 3),
    "32x16": (32, 4, 4, 256, 3),
    "32x20": (32, 4, 5, 256, 3),  # the default size of the main job
    "128x16": (128, 4, 4, 256, 3),
    "128x8": (128, 2, 4, 256, 3),
    "32x60": (32, 12, 5, 256, 3),
    "32x20 width 128": (32, 4, 5, 128, 3),
    "32x20 width 512": (32, 4, 5, 512, 3),
    "32x20 K 1": (32, 4, 5, 256, 1),
    "32x20 K 5": (32, 4, 5, 256, 5),
}
FEW = {
    "8x16",
    "32x16",
    "32x20",
    "128x8",
}  # sizes of everything but ours, vmap and stacked: ten minutes are to be enough
COMPILED = {"32x20"}  # a size takes torch.compile most of a minute
INNER = P.inner_providers()


def floor(phi, batch):
    side = 1024
    inner = (P.meta_operations(phi, batch) + P.low_rank_operations(phi, batch)) // (2 * side * side)
    a, w = torch.randn(side, inner, device=P.DEVICE), torch.randn(inner, side, device=P.DEVICE)
    return lambda: a @ w


def unavoidable_products(phi, batch):
    ready = [
        (*(torch.randn(*shape, device=P.DEVICE) for shape in ((rows, i), (i, o), (rows, o))), count)
        for rows, i, o, count in P.meta_products(phi, batch)
    ]

    def run():
        for a, w, g, count in ready:
            a @ w
            a.T @ g
            if count == 3:
                g @ w.T

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", [*INNER, "cuda-graph", "products", "floor"])
def test_meta_step(benchmark, measure, provider, size):
    benchmark.group = f"meta-step, tasks x rows = {size}"
    if provider not in ("ours", "vmap", "stacked", "compiled") and size not in FEW:
        pytest.skip("timed at fewer sizes")
    if provider == "compiled" and size not in COMPILED:
        pytest.skip("compiled at the default size only")
    if provider == "cuda-graph" and P.DEVICE != "cuda":
        pytest.skip("no GPU")
    phi, batch = P.meta_case(*SIZES[size])
    check = meta_check(phi, batch)
    if provider in ("floor", "products"):
        run, check = (floor if provider == "floor" else unavoidable_products)(phi, batch), lambda _: None
    elif provider == "cuda-graph":
        run = P.graphed(lambda: P.eager_inner(phi, batch))
    else:
        run = P.meta_step(INNER[provider], phi, batch)
    tasks, samples, tokens, _, inner = SIZES[size]
    measure(
        run,
        check,
        operations=P.meta_operations(phi, batch),
        bytes=P.meta_bytes(phi, batch),
        what="meta-step",
        provider=provider,
        size=size,
        work=tasks * samples * tokens * inner,
        with_low_rank=P.low_rank_operations(phi, batch) / 1e9,
    )
