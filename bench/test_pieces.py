"""The pieces of the kernel list, each as the main job runs it here, against the plain way of writing it."""

import providers as P
import pytest
import torch

from mcdi_fast.denoiser import ChainDenoiser, denoise
from mcdi_fast.diffusion import consistency_loss, make_inner_batch, make_objective, make_schedule
from mcdi_fast.heads import head_gradient
from mcdi_fast.optim import adam_scalars, adam_step, sam_perturbation

TASKS = [32, 128]


def pieces(tasks, width=256, samples=4, tokens=5, inner=3):
    """(name, ours, plain, operations, bytes): functions of no argument that give the same tensor."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(P.DEVICE)

    schedule = make_schedule(P.STEPS, 3)
    objective = make_objective(schedule, "local-consistency")
    segment = torch.randint(3, (tasks,), generator=g)
    step = (torch.rand(tasks, inner, samples, generator=g) * objective.ends[segment][:, None, None]).long()
    target, condition = (
        torch.randn(tasks, tokens, P.TOKEN, generator=g),
        torch.randn(tasks, tokens, P.CONDITION, generator=g),
    )
    eps = torch.randn(tasks, inner, samples, tokens, P.TOKEN, generator=g)

    def noising_plain():
        out = torch.empty_like(eps)
        for b in range(tasks):
            signal, noise = objective.signal[segment[b], step[b]].float(), objective.noise[segment[b], step[b]].float()
            out[b] = signal[..., None, None] * target[b] + noise[..., None, None] * eps[b]
        return out

    yield (
        "noising",
        lambda: make_inner_batch(objective, target, condition, segment, step, eps).x,
        noising_plain,
        6 * eps.numel(),
        4 * eps.nbytes,
    )

    f, one = eps * 0.5, eps[:, 0]
    yield (
        "consistency loss",
        lambda: consistency_loss(objective, f[:, 0], segment[:, None].expand(-1, samples), step[:, 0], one),
        lambda: torch.stack(
            [consistency_loss(objective, f[b, 0], segment[b].expand(samples), step[b, 0], one[b]) for b in range(tasks)]
        ),
        5 * one.numel(),
        2 * one.nbytes,
    )

    rows = samples * tokens
    x, w = normal(tasks, rows, width), normal(width, width) / width**0.5
    a, gradient = normal(tasks, rows, width), normal(tasks, rows, width)

    def low_rank():
        shared = (x.view(-1, width) @ w).view(tasks, rows, width)
        return shared.baddbmm_(torch.bmm(x, a.mT), gradient, alpha=-P.RATE)

    weights = torch.baddbmm(w.expand(tasks, -1, -1), a.mT, gradient, alpha=-P.RATE)
    operations = 2 * tasks * rows * width * width
    yield "task linear, one earlier step", low_rank, lambda: torch.bmm(x, weights), operations, 2 * x.nbytes + w.nbytes
    yield (
        "reptile delta",
        lambda: (a.view(-1, width).T @ gradient.view(-1, width)) / tasks,
        lambda: torch.bmm(a.mT, gradient).mean(0),
        operations,
        2 * a.nbytes + w.nbytes,
    )

    heads = normal(tasks, P.WAYS, P.FEATURES + 1)
    images, labels = (
        normal(tasks, 100, P.FEATURES),
        torch.arange(P.WAYS, device=P.DEVICE).repeat_interleave(20).expand(tasks, -1),
    )

    def sam_adam():
        head, first, second = heads.clone(), torch.zeros_like(heads), torch.zeros_like(heads)
        gradient = head_gradient(head, images, labels)
        gradient = head_gradient(sam_perturbation(head, gradient, 0.05), images, labels)
        adam_step(head, gradient, first, second, *adam_scalars(1, 0.05))
        return head

    def sam_adam_plain():
        done = []
        for head, image, label in zip(heads, images, labels, strict=True):
            weight = torch.nn.Parameter(head.clone())
            optimizer = torch.optim.Adam([weight], lr=0.05)
            for point in (0, 1):
                at = weight.detach() + (0.05 * weight.grad / weight.grad.norm() if point else 0)
                at.requires_grad_()
                loss = torch.nn.functional.cross_entropy(image @ at[:, :-1].T + at[:, -1], label)
                weight.grad = torch.autograd.grad(loss, at)[0]
            optimizer.step()
            done.append(weight.detach())
        return torch.stack(done)

    yield (
        "SAM + Adam step",
        sam_adam,
        sam_adam_plain,
        P.prepare_operations(tasks, 100) // P.RECIPE.steps,
        P.prepare_bytes(tasks, 100) // P.RECIPE.steps,
    )

    phi, _ = P.meta_case(1, 1, 1, width)
    noise, raw_normal = normal(tasks, tokens, P.TOKEN), normal(tasks, tokens, P.CONDITION)
    chain = ChainDenoiser(phi, raw_normal, [0.5] * P.STEPS, [2.0] * P.STEPS)
    at = torch.full((tasks, 1), 3, device=P.DEVICE)
    yield (
        "chain step",
        lambda: chain.advance(noise, 3, 1.1, -0.2),
        lambda: 1.1 * noise - 0.2 * (0.5 * noise + 2 * denoise(phi, noise.unsqueeze(1), at, raw_normal).squeeze(1)),
        P.chain_operations(tasks, tokens, phi, 1),
        P.chain_bytes(phi, 1),
    )


NAMES = [
    "noising",
    "consistency loss",
    "task linear, one earlier step",
    "reptile delta",
    "SAM + Adam step",
    "chain step",
]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("provider", ["ours", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_piece(benchmark, measure, name, provider, tasks):
    from checks import close_to

    benchmark.group = f"{name}, {tasks} tasks"
    _, ours, plain, operations, moved = next(piece for piece in pieces(tasks) if piece[0] == name)
    # the plain way of a loop over tasks is the reference; ours and it must agree
    measure(
        ours if provider == "ours" else plain,
        close_to(plain(), 1e-3),
        operations=operations,
        bytes=moved,
        what=name,
        provider=provider,
        size=f"{tasks} tasks",
        work=tasks,
    )
