"""One meta-step: the inner loops of all tasks and the outer step, against what people would otherwise run.

Rows of a task = noised samples x tokens. `floor` is one large sgemm with as many operations as our form's products have, `products` are
the products no implementation can avoid, each at its own shape, without low-rank terms and without anything elementwise.
"""

from dataclasses import replace

import providers as P
import pytest
import torch

SIZES = {  # two blocks of width 256, and what differs from that
    "8x16": {"tasks": 8, "tokens": 4},
    "32x16": {"tokens": 4},
    "32x20": {},
    "128x16": {"tasks": 128, "tokens": 4},
    "128x8": {"tasks": 128, "tokens": 4, "samples": 2},
    "32x60": {"samples": 12},
    "32x20 width 128": {"hidden": 128},
    "32x20 width 512": {"hidden": 512},
    "32x20 K 1": {"inner": 1},
    "32x20 K 5": {"inner": 5},
    "32x20 depth 1": {"depth": 1},  # the main job on drawings
    "33 tokens": {"tokens": 33, "samples": 1, "hidden": 128, "tasks": 64},  # a whole network, a token a unit
    "81 tokens": {"tokens": 81},
    "192 tokens": {  # LoRA of rank 8 on query and value of 12 layers, 768 wide
        "tokens": 192,
        "tasks": 8,
        "width": 1536,
        "condition": 768,
    },
}
EVERYWHERE = ("ours", "ieee", "vmap", "stacked")  # the others at few sizes: ten minutes are to be enough
FEW = ("8x16", "32x16", "32x20", "32x20 depth 1", "128x8")
COMPILED = ("32x20", "32x20 depth 1", "33 tokens", "81 tokens", "192 tokens")
INNER = P.inner_providers()


def floor(z, side=1024):
    inner = (P.WORK["inner_loop"].work(z).flop + P.low_rank_operations(z)) // (2 * side * side)
    a, w = torch.randn(side, inner, device=P.DEVICE), torch.randn(inner, side, device=P.DEVICE)
    return lambda: a @ w


def products(z):
    ready = []
    for name, (r, i, o) in P.layer_rows(z).items():
        shapes = ((z.inner * z.tasks * r, i), (i, o), (z.inner * z.tasks * r, o))
        ready.append((*(torch.randn(*shape, device=P.DEVICE) for shape in shapes), name.startswith("in.")))

    def run():
        for a, w, g, first in ready:
            a @ w
            a.T @ g
            if not first:
                g @ w.T

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", [*INNER, "cuda-graph", "products", "floor"])
def test_meta_step(benchmark, measure, provider, size):
    benchmark.group = f"meta-step, tasks x rows = {size}"
    # a size takes torch.compile most of a minute
    if provider not in EVERYWHERE and size not in (COMPILED if provider == "compiled" else FEW):
        pytest.skip("timed at fewer sizes")
    if provider == "cuda-graph" and P.DEVICE != "cuda":
        pytest.skip("no GPU")
    z = replace(P.DEFAULT, **SIZES[size])
    phi, batch = P.meta_case(z)
    check = P.meta_check(phi, batch)
    if provider in ("floor", "products"):
        run, check = {"floor": floor, "products": products}[provider](z), lambda _: None
    elif provider == "cuda-graph":
        run = P.graphed(lambda: INNER["ours"](phi, batch))
    else:
        step = P.our_meta_step if provider in ("ours", "ieee", "torch") else P.meta_step
        run = step(INNER[provider], phi, batch)
    ours = P.our_meta_step(INNER["ours"], phi, batch) if provider != "ours" else None
    measure(
        run, check, P.WORK["inner_loop"].work(z), ours, what="meta-step", provider=provider, size=size,
        work=z.tasks * z.samples * z.tokens * z.inner, with_low_rank=P.low_rank_operations(z) / 1e9,
    )  # fmt: skip
