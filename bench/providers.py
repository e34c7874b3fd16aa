"""Who is timed: the same work done in the ways people would otherwise do it, each a function of the same inputs.

A provider that needs a package which is not installed, or a GPU where there is none, is absent from the record.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from mcdi_fast.backend import Backend
from mcdi_fast.config import PrepareConfig
from mcdi_fast.denoiser import FoldedDenoiser, denoise, init_parameters
from mcdi_fast.diffusion import InnerBatch
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_trajectory
from mcdi_fast.inner import inner_loop, task_loss
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.optim import adam_scalars, adam_step, sam_perturbation
from mcdi_fast.tasks import optimizer_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN, CONDITION, STEPS, DEPTH, RATE = 65, 64, 20, 2, 0.005
WAYS, FEATURES = 5, 64
RECIPE = PrepareConfig(steps=90, learning_rate=0.05)
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


# One meta-step


def meta_case(
    tasks: int, samples: int, tokens: int, width: int = 256, inner: int = 3
) -> tuple[dict[str, Tensor], InnerBatch]:
    """phi with every matrix away from zero, and a meta-batch; rows of a task = samples x tokens."""
    g = torch.Generator().manual_seed(0)
    phi = init_parameters(TOKEN, CONDITION, STEPS, width, DEPTH, 0)
    phi = {name: (torch.randn(v.shape, generator=g) / v.shape[0] ** 0.5).to(DEVICE) for name, v in phi.items()}
    shape = (tasks, inner, samples)
    parts = {
        "x": torch.randn(*shape, tokens, TOKEN, generator=g),
        "step": torch.randint(STEPS, shape, generator=g),
        "condition": torch.randn(tasks, tokens, CONDITION, generator=g),
        "gain": torch.rand(shape, generator=g) + 0.5,
        "target": torch.randn(*shape, tokens, TOKEN, generator=g),
    }
    return phi, InnerBatch(**{name: value.to(DEVICE) for name, value in parts.items()})


def meta_products(phi: dict[str, Tensor], batch: InnerBatch) -> list[tuple[int, int, int, int]]:
    """(rows, in, out, how many of forward / input gradient / weight gradient) of every matrix, over all tasks and steps."""
    b, k, s, n, _ = batch.x.shape
    return [
        (
            b * k * (n if name == "in.condition" else s if name.endswith(".sample") else s * n),
            *value.shape,
            2 if name.startswith("in.") else 3,
        )
        for name, value in phi.items()
    ]


def meta_operations(phi: dict[str, Tensor], batch: InnerBatch) -> int:
    """Of the products that no implementation can avoid."""
    return sum(2 * rows * i * o * count for rows, i, o, count in meta_products(phi, batch))


def low_rank_operations(phi: dict[str, Tensor], batch: InnerBatch) -> int:
    """Of the low-rank form on top: scores and values of every pair of a step and an earlier one, forward and backward."""
    b, k, s, n, _ = batch.x.shape
    total = 0
    for name, value in phi.items():
        rows = n if name == "in.condition" else s if name.endswith(".sample") else s * n
        total += k * (k - 1) // 2 * (1 if name.startswith("in.") else 2) * 2 * b * rows * rows * sum(value.shape)
    return total


def meta_bytes(phi: dict[str, Tensor], batch: InnerBatch) -> int:
    """Inputs once, phi and delta once, and each matrix's rows in and gradients out written once and read once for the delta."""
    fixed = 2 * sum(v.nbytes for v in phi.values()) + sum(v.nbytes for v in vars(batch).values())
    return fixed + sum(2 * 4 * rows * (i + o) for rows, i, o, _ in meta_products(phi, batch))


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
        "ours": lambda phi, batch: inner_loop(phi, batch, RATE, "torch", False),
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
    """Inner loops and outer step by Adam on phi of its own, at a rate that leaves the work of every call the same."""
    own = {name: value.clone() for name, value in phi.items()}
    optimizer = torch.optim.Adam(own.values(), lr=1e-8)

    def run() -> Any:
        delta, losses = inner(own, batch)
        for name, value in own.items():
            value.grad = delta[name] / -RATE
        optimizer.step()
        return delta, losses

    return run


# Weight preparation


def prepare_case(tasks: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, R, F], labels [B, R] and the Gaussian starts [B, ways, F + 1]."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(tasks, rows, FEATURES, generator=g) / FEATURES**0.5
    labels = torch.arange(WAYS).repeat_interleave(rows // WAYS).expand(tasks, -1)
    start = torch.randn(tasks, WAYS, FEATURES + 1, generator=torch.Generator().manual_seed(0)) * RECIPE.start_std
    return features.to(DEVICE, dtype), labels.to(DEVICE), start.to(DEVICE, dtype)


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
    steps = optimizer_steps(Backend.at_door(DEVICE))
    return head_trajectory(start, features.unsqueeze(0), labels, RECIPE, **steps)[:, 0]


def prepare_providers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Weight preparation by name."""
    found = {"loop": prepare_loop, "vmap": _prepare_vmap, "stacked": _prepare_stacked, "ours": _prepare_ours}
    if OPTIONAL["pytorch_optimizer"]:
        found["pytorch_optimizer"] = _prepare_package
    return found


def prepare_operations(tasks: int, rows: int) -> int:
    """Two gradients a step, each a product forward and one backward, and Adam's dozen operations an entry."""
    return tasks * RECIPE.steps * (2 * 2 * 2 * rows * WAYS * FEATURES + 16 * WAYS * (FEATURES + 1))


def prepare_bytes(tasks: int, rows: int) -> int:
    """Features read twice a gradient, two gradients a step."""
    return tasks * RECIPE.steps * 4 * rows * FEATURES * 4


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


def chain_by_denoise(generator: Any, condition: Tensor, start: Tensor, network=denoise) -> Tensor:
    """The chain as one writes it down from the paper: `denoise` for the network, tensor arithmetic around it."""
    schedule = generator.schedule
    condition = generator.network_condition(condition)
    alpha, abar, skip, scale = (
        schedule.alpha.float(),
        schedule.abar.float(),
        generator.objective.skip.float(),
        generator.objective.scale.float(),
    )
    x = start
    for t in range(schedule.num_steps):
        step = torch.full((len(x), 1), t, device=x.device)
        net = network(generator.phi, x.unsqueeze(-3), step, condition).squeeze(-3)
        f = skip[t] * x + scale[t] * net
        x = schedule.carry[t + 1].float() * (x - (1 - alpha[t]) / (1 - abar[t]).sqrt() * f) / alpha[t].sqrt()
    return generator.normalizer.denormalize(x)


def _chain_matrices(phi: dict[str, Tensor]) -> tuple[int, int]:
    """Entries of the matrices of a step that every token meets, and of those that a task meets once (denoiser.FoldedDenoiser)."""
    folded = FoldedDenoiser(phi)
    return sum(v.numel() for v in (*folded.token, folded.last)), sum(v.numel() for v in folded.sample)


def chain_operations(tasks: int, tokens: int, phi: dict[str, Tensor], steps: int) -> int:
    """Of the products that are left when what is linear is multiplied out, without the condition's, which are done once."""
    by_token, by_task = _chain_matrices(phi)
    return steps * 2 * tasks * (tokens * by_token + by_task)


def chain_bytes(phi: dict[str, Tensor], steps: int) -> int:
    """Every such matrix read once a step."""
    return steps * 4 * sum(_chain_matrices(phi))
