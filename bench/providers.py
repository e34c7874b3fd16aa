"""Who is timed: the same work done in the ways people would otherwise do it, each a function of the same inputs, and what it is checked by.

Inputs and work are those of the kernels' registry (`mcdi_fast.kernels.operations`). A provider that needs a package which is not installed,
or a GPU where there is none, is absent from the record.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from mcdi_fast.backend import Backend, one_thread
from mcdi_fast.config import PrepareConfig
from mcdi_fast.denoiser import denoise
from mcdi_fast.diffusion import InnerBatch, sample_chain
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_trajectory
from mcdi_fast.inner import inner_loop, task_loss
from mcdi_fast.kernels.operations import DEFAULT, OPERATIONS, Maker, Sizes, inner_batch, layer_rows, relative_error
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.optim import adam_scalars, adam_step, sam_perturbation
from mcdi_fast.outer import OuterScalars, OuterState, flattened, named_views, outer_update
from mcdi_fast.tasks import optimizer_steps
from mcdi_fast.tasks.heads import train_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATE = 0.005
RECIPE = PrepareConfig(steps=DEFAULT.adam_steps, learning_rate=0.05)
WORK = {operation.name: operation for operation in OPERATIONS}
OPTIONAL = {
    name: importlib.util.find_spec(name) is not None
    for name in ("torchopt", "higher", "learn2learn", "pytorch_optimizer", "numba")
}

Inner = Callable[[dict[str, Tensor], InnerBatch], tuple[dict[str, Tensor], Tensor]]


def synchronize() -> None:
    """Wait for the device: a time without it is the time of a launch."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same launches replayed as one CUDA graph; it returns what the capture returned, filled anew."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # lazy initialisation must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# who multiplies by what `own_products` times
BY_OWN = ("meta-step", "ours"), ("sampling", "ours"), ("sampling", "3 steps")


def own_products(side: int = 256, times: int = 100) -> tuple[str, Callable[[], Any] | None, int]:
    """Products by "tiles" (of a packed factor) or by "vectors", of all threads, each of its own in its cache, and their operations; "" where a
    processor has neither."""
    if DEVICE == "cuda" or not OPTIONAL["numba"]:
        return "", None, 0
    from mcdi_fast import cpu_core, cpu_tiles, cpu_vectors

    name = "tiles" if cpu_tiles.available else "vectors" if cpu_vectors.available else ""
    if not name:
        return "", None, 0

    @cpu_core.compiled
    def by_tiles(a, b, right, out, space, times):
        cpu_tiles.prepare(space)
        cpu_tiles.pack(b.T, False, right, space)
        for _ in range(times):
            cpu_tiles.times(a, right, out, False, space)

    @cpu_core.compiled
    def by_vectors(a, b, right, out, space, times):
        for _ in range(times):
            cpu_core.product(a, b, out, 0)

    multiply = {"tiles": by_tiles, "vectors": by_vectors}[name]

    a, b = (torch.randn(side, side).numpy() for _ in range(2))  # zeros would be quicker: they draw less power

    def share(first: int, end: int) -> None:
        right, out = cpu_core.aligned(cpu_tiles.packed(side, side)), cpu_core.aligned(side * side).reshape(side, side)
        multiply(a, b, right, out, cpu_core.aligned(cpu_tiles.workspace(side)), (end - first) * times)

    threads = torch.get_num_threads()
    return name, lambda: cpu_core.by_threads(share, threads), 2 * side**3 * times * threads


# One meta-step


def meta_case(z: Sizes) -> tuple[dict[str, Tensor], InnerBatch]:
    """phi with every matrix away from zero, and a meta-batch; rows of a task = samples x tokens."""
    make = Maker(DEVICE)
    return make.phi(z), inner_batch(z, make)


def low_rank_operations(z: Sizes) -> int:
    """Of the low-rank form on top: scores and values of every pair of a step and an earlier one, forward and backward."""
    pairs = z.inner * (z.inner - 1) // 2 * z.tasks
    return pairs * sum(
        (1 if n.startswith("in.") else 2) * 2 * r * r * (i + o) for n, (r, i, o) in layer_rows(z).items()
    )


class _Network(nn.Module):
    """The denoiser as a module, for packages that want one."""

    def __init__(self, phi: dict[str, Tensor]):
        super().__init__()
        self.names = list(phi)
        self.matrices = nn.ParameterList([value.clone() for value in phi.values()])

    def forward(self, x: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        return denoise(dict(zip(self.names, self.matrices, strict=True)), x, step, condition)


def _losses_and_delta(phi, per_task):
    deltas, losses = zip(*per_task, strict=True)
    delta = {name: torch.stack([d[name] for d in deltas]).mean(0) for name in phi}
    return delta, torch.stack(losses)


def _higher(phi: dict[str, Tensor], batch: InnerBatch):
    import higher

    def one(b: int):
        network = _Network(phi)
        losses = []
        with higher.innerloop_ctx(
            network, torch.optim.SGD(network.parameters(), lr=RATE), track_higher_grads=False
        ) as (f, inner):
            for r in range(batch.x.shape[1]):
                net = f(batch.x[b, r], batch.step[b, r], batch.condition[b])
                loss = (batch.gain[b, r][:, None, None] * net - batch.target[b, r]).square().mean()
                inner.step(loss)
                losses.append(loss.detach())
            after = [p.detach() for p in f.parameters()]
        return {name: new - value for (name, value), new in zip(phi.items(), after, strict=True)}, torch.stack(losses)

    return _losses_and_delta(phi, [one(b) for b in range(len(batch.x))])


def _torchopt(phi: dict[str, Tensor], batch: InnerBatch):
    import torchopt

    optimizer = torchopt.sgd(lr=RATE)

    def one(b: int):
        phi_b = {name: value.clone().requires_grad_() for name, value in phi.items()}
        state, losses = optimizer.init(phi_b), []
        for r in range(batch.x.shape[1]):
            loss = task_loss(
                phi_b, batch.x[b, r], batch.step[b, r], batch.condition[b], batch.gain[b, r], batch.target[b, r]
            )
            gradients = dict(zip(phi_b, torch.autograd.grad(loss, list(phi_b.values())), strict=True))
            updates, state = optimizer.update(gradients, state, inplace=False)
            phi_b = {
                n: v.detach().requires_grad_() for n, v in torchopt.apply_updates(phi_b, updates, inplace=False).items()
            }
            losses.append(loss.detach())
        return {name: phi_b[name].detach() - value for name, value in phi.items()}, torch.stack(losses)

    return _losses_and_delta(phi, [one(b) for b in range(len(batch.x))])


def inner_providers() -> dict[str, Inner]:
    """Inner loops by name. `compiled` is torch.compile of vmap(grad), the best of the two baselines at every size but the smallest."""
    found: dict[str, Inner] = {
        "loop": lambda phi, batch: inner_loop(phi, batch, RATE, "reference"),
        "vmap": lambda phi, batch: inner_loop(phi, batch, RATE, "vmap"),
        "compiled": torch.compile(lambda phi, batch: inner_loop(phi, batch, RATE, "vmap"), dynamic=False),
        "stacked": lambda phi, batch: inner_loop(phi, batch, RATE, "torch", True),
        "torch": lambda phi, batch: inner_loop(phi, batch, RATE, "torch"),
        "ours": lambda phi, batch: inner_loop(phi, batch, RATE),
        "ieee": lambda phi, batch: inner_loop(phi, batch, RATE, precision="ieee"),
    }
    if OPTIONAL["higher"]:
        found["higher"] = _higher
    if OPTIONAL["torchopt"]:
        found["torchopt"] = _torchopt
    return found


def eager_inner(phi: dict[str, Tensor], batch: InnerBatch) -> tuple[dict[str, Tensor], Tensor]:
    """What is captured as a CUDA graph: the low-rank form in torch."""
    return inner_loop(phi, batch, RATE, "torch", False)


def meta_step(inner: Inner, phi: dict[str, Tensor], batch: InnerBatch) -> Callable[[], Any]:
    """Inner loops and outer step by torch's fused Adam on phi of its own, at a rate that leaves the work of every call the same."""
    own = {name: value.clone() for name, value in phi.items()}
    optimizer = torch.optim.Adam(own.values(), lr=1e-8, fused=True)

    def run() -> Any:
        delta, losses = inner(own, batch)
        for name, value in own.items():
            value.grad = delta[name] / -RATE
        optimizer.step()
        return delta, losses

    return run


def our_meta_step(inner: Inner, phi: dict[str, Tensor], batch: InnerBatch) -> Callable[[], Any]:
    """The same with the engine's own outer step, which keeps the average of phi too."""
    state = OuterState.start(phi, batch.x.device)
    own = named_views(state.phi, {name: tuple(value.shape) for name, value in phi.items()})
    scalars = OuterScalars(1e-8, 1.0, -1 / RATE, 0.01)

    compiled = DEVICE == "cpu" and OPTIONAL["numba"]
    update = importlib.import_module("mcdi_fast.cpu_outer").outer_update if compiled else outer_update

    def run() -> Any:
        delta, losses = inner(own, batch)
        with one_thread(compiled):
            flat = flattened(delta)
        update(state, flat if compiled else flat.clone(), scalars, "adam")  # torch's way uses it up
        return delta, losses

    return run


# Weight preparation


def prepare_case(tasks: int, rows: int, features: int = DEFAULT.features) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, R, F], labels [B, R] and the starts [B, ways, F + 1]."""
    found = WORK["head_trajectory"].inputs(replace(DEFAULT, heads=tasks, rows=rows, features=features), Maker(DEVICE))
    return found["features"][0] / features**0.5, found["labels"], found["start"]


def _head_loss(head: Tensor, x: Tensor, y: Tensor) -> Tensor:
    logits = x @ head[:, :-1].T + head[:, -1]
    return F.cross_entropy(logits, y) + RECIPE.weight_decay / 2 * head.square().sum()


def prepare_loop(features: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """What published code does: one task after the other, autograd, torch.optim.Adam and the two phases of the SAM paper."""
    heads = []
    for x, y, theta in zip(features, labels, start, strict=True):
        head = nn.Parameter(theta.clone())
        optimizer = torch.optim.Adam([head], lr=RECIPE.learning_rate)
        for _ in range(RECIPE.steps):
            g = torch.autograd.grad(_head_loss(head, x, y), head)[0]
            perturbed = (head.detach() + RECIPE.rho * g / g.norm()).requires_grad_()
            head.grad = torch.autograd.grad(_head_loss(perturbed, x, y), perturbed)[0]
            optimizer.step()
        heads.append(head.detach())
    return torch.stack(heads)


def _prepare_package(features: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """The loop with the SAM of the package pytorch_optimizer around torch.optim.Adam."""
    from pytorch_optimizer import SAM

    heads = []
    for x, y, theta in zip(features, labels, start, strict=True):
        head = nn.Parameter(theta.clone())
        optimizer = SAM([head], torch.optim.Adam, rho=RECIPE.rho, lr=RECIPE.learning_rate)
        for _ in range(RECIPE.steps):
            _head_loss(head, x, y).backward()
            optimizer.first_step(zero_grad=True)
            _head_loss(head, x, y).backward()
            optimizer.second_step(zero_grad=True)
        heads.append(head.detach())
    return torch.stack(heads)


def _prepare_vmap(features: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    gradient = vmap(grad(_head_loss))
    head, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, RECIPE.steps + 1):
        g = gradient(head, features, labels)
        g = gradient(sam_perturbation(head, g, RECIPE.rho), features, labels)
        adam_step(head, g, first, second, *adam_scalars(step, RECIPE.learning_rate))
    return head


def _prepare_stacked(features: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """All heads in one tensor, autograd of the summed losses, torch.optim.Adam, one SAM norm a task: batched eager torch."""
    head = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([head], lr=RECIPE.learning_rate)

    def gradient(weights: Tensor) -> Tensor:
        logits = torch.baddbmm(weights[:, None, :, -1], features, weights[..., :-1].mT)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.reshape(-1), reduction="sum") / features.shape[1]
        return torch.autograd.grad(loss + RECIPE.weight_decay / 2 * weights.square().sum(), weights)[0]

    for _ in range(RECIPE.steps):
        perturbed = sam_perturbation(head.detach(), gradient(head), RECIPE.rho).requires_grad_()
        head.grad = gradient(perturbed)
        optimizer.step()
    return head.detach()


def _prepare_ours(features: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    return train_heads(Backend.at_door(DEVICE), start, features.unsqueeze(0), labels, RECIPE)[:, 0]


def _prepare_torch(features: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    steps = optimizer_steps(Backend.at_door(DEVICE))
    return head_trajectory(start, features.unsqueeze(0), labels, RECIPE, **steps)[:, 0]


def prepare_providers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Weight preparation by name. torch: ours without numba or the fused kernel."""
    found = {
        "loop": prepare_loop,
        "vmap": _prepare_vmap,
        "stacked": _prepare_stacked,
        "torch": _prepare_torch,
        "ours": _prepare_ours,
    }
    if OPTIONAL["pytorch_optimizer"]:
        found["pytorch_optimizer"] = _prepare_package
    return found


# Sampling


def on_device(generator: WeightGenerator) -> WeightGenerator:
    """The generator with its tensors where the benchmark runs."""

    def moved(normalizer: Normalizer) -> Normalizer:
        return Normalizer(normalizer.mean.to(DEVICE), normalizer.std.to(DEVICE))

    return replace(
        generator,
        phi={name: value.to(DEVICE) for name, value in generator.phi.items()},
        normalizer=moved(generator.normalizer),
        condition_normalizer=moved(generator.condition_normalizer),
    )


def chain(
    generator: WeightGenerator, condition: Tensor, start: Tensor, steps: int | None = None, network=denoise
) -> Tensor:
    """The chain as one writes it down from the paper: `denoise` for the network, in the dtype of `start`."""
    condition = generator.network_condition(condition).to(start)
    phi = {name: value.to(start) for name, value in generator.phi.items()}
    skip, scale = generator.objective.skip.tolist(), generator.objective.scale.tolist()

    def f(x: Tensor, t: int) -> Tensor:
        step = torch.full((len(x), 1), t, device=x.device)
        return skip[t] * x + scale[t] * network(phi, x.unsqueeze(-3), step, condition).squeeze(-3)

    found = sample_chain(f, start, generator.schedule, ends=generator.objective.ends, num_steps=steps)
    return generator.normalizer.denormalize(found)


def close_to(expected: Any, tolerance: float = 1e-3) -> Callable[[Any], None]:
    """A check of all tensors of a result, each relative to the norm of the expected one. A wrong provider is not timed."""

    def check(found: Any) -> None:
        error = relative_error(found, expected)
        assert error <= tolerance, f"relative error {error:.1e}, expected at most {tolerance}"

    return check


def meta_check(phi: dict[str, Tensor], batch: InnerBatch) -> Callable[[Any], None]:
    """Of (delta, losses) against the Python loop."""
    return close_to(inner_loop(phi, batch, RATE, "reference"))


def prepare_check(features: Tensor, labels: Tensor, start: Tensor, count: int = 4) -> Callable[[Tensor], None]:
    """Of the first heads against the loop in float64."""
    check = close_to(prepare_loop(features[:count].double(), labels[:count], start[:count].double()), 2e-3)
    return lambda found: check(found[:count])
