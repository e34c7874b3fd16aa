"""The comparison on waves, `python -m mcdi_fast.study.waves`: whole networks generated, against gradients from meta-learned starts.

For each seed: Mc-, Mv- and Tw-Di on one bank, the same network regressed on the weights without diffusion, MAML, Reptile, fine-tuning with tuned
steps and rate. All on the same test tasks, which see 5, 10 or 20 points; a generator learns from tasks of ten. What is chosen is chosen on
validation tasks. The record has every mean; the tables of docs/waves.md are made of it.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch
from torch import Tensor

from mcdi_fast.backend import Backend
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import MetaConfig, TrainConfig
from mcdi_fast.denoiser import denoise, init_parameters
from mcdi_fast.evaluate import (
    OBJECTIVE_TITLES,
    TEST_SEED,
    VALIDATION_SEED,
    bank_methods,
    choose_steps,
    finetune,
    generate,
    interval,
    latency_ms,
    step_counts,
    trained_targets,
)
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.meta import fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.report import git_sha, machine, number, table
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import make_folder, read_json, write_json
from mcdi_fast.tasks import Setup, TaskBatch, find_family
from mcdi_fast.tasks.waves import WaveFamily, WaveOptions, draw

POINTS = (5, 10, 20)
SEEDS = (0, 1, 2, 3, 4)
PARTS = (*OBJECTIVE_TITLES, "gradients")
_GRADIENT_STEPS = (1, 3, 5, 10, 30, 100, 300, 1000)
_RATES = (0.001, 0.003, 0.01, 0.03)
_MAML_STEPS, _MAML_TASKS, _MAML_LR, _MAML_OUTER_LR = 4000, 25, 0.03, 0.001


@cache
def maml(points: int) -> tuple[WaveFamily, Tensor]:
    """Networks 1-40-40-1, as in its paper, and a start [N, D] by second-order MAML (Finn et al., 2017): one inner step on `points` points.

    All tasks of a step at once, Adam outside. Its paper's inner rate is 0.01; on validation tasks 0.03 was twice as good (0.12 to 0.25 in ten steps).
    """
    family = WaveFamily(WaveOptions(points=points, width=40, depth=2))
    theta = family.layout.pack(family.module).detach().clone().requires_grad_()
    outer = torch.optim.Adam([theta], _MAML_OUTER_LR)
    for step in range(_MAML_STEPS):
        support, _, train = draw(family.options, "train", step * _MAML_TASKS, _MAML_TASKS, 2**32)
        start = theta.expand(_MAML_TASKS, -1, -1)
        slope = torch.autograd.grad(family.losses(start, support).sum(), start, create_graph=True)[0]
        outer.zero_grad()
        family.losses(start - _MAML_LR * slope, train).mean().backward()
        outer.step()
    return family, theta.detach()


def descend(family: WaveFamily, start: Tensor, steps: int, tasks: TaskBatch) -> Tensor:
    """Plain gradient descent on the support, as MAML adapts: [B, N, D]."""
    theta = start.expand(len(tasks), -1, -1)
    for _ in range(steps):
        theta = theta - _MAML_LR * family.gradient(theta, tasks.support)
    return theta


def regression(bank: TrajectoryBank, generator: WeightGenerator, meta: MetaConfig, seed: int) -> Any:
    """The denoiser's network trained to say the last target from the condition alone, by mean square error, as long as meta: tasks -> weights."""
    sizes, layout = generator.denoiser, bank.layout
    targets, condition = bank.gather(torch.arange(len(bank)))
    mask = layout.mask.float()
    target = generator.normalizer.normalize(targets[:, -1]) * mask
    told = generator.network_condition(condition)
    phi = init_parameters(layout.width, told.shape[-1], 1, sizes.width, sizes.depth, seed)
    adam = torch.optim.Adam([value.requires_grad_() for value in phi.values()], meta.outer_lr)
    rates = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, meta.steps)
    random = torch.Generator().manual_seed(seed)

    def predict(told: Tensor) -> Tensor:
        nothing = torch.zeros(len(told), 1, layout.num_tokens, layout.width)
        return denoise(phi, nothing, torch.zeros(len(told), 1, dtype=torch.long), told)[:, 0] * mask

    for _ in range(meta.steps):
        rows = torch.randint(len(bank), (meta.meta_batch,), generator=random)
        adam.zero_grad()
        ((predict(told[rows]) - target[rows]).square().sum() / mask.sum() / len(rows)).backward()
        adam.step()
        rates.step()

    @torch.no_grad()
    def adapt(tasks: TaskBatch) -> Tensor:
        return generator.normalizer.denormalize(predict(generator.network_condition(tasks.condition))) * mask

    return adapt


def sines(tasks: TaskBatch) -> Tensor:
    """Error [B] of a ridge regression on sin x and cos x: what knowing the family brings."""
    (x, y), (at, truth) = ((data["x"].double(), data["y"].double()) for data in (tasks.support, tasks.query))
    basis, new = (torch.cat([where.sin(), where.cos()], -1) for where in (x, at))
    weights = torch.linalg.solve(basis.mT @ basis + 1e-6 * torch.eye(2, dtype=torch.float64), basis.mT @ y)
    return (new @ weights - truth).square().mean((1, 2))


def configuration() -> TrainConfig[Any]:
    """The family's defaults."""
    return find_family("waves").config()


def one_part(seed: int, part: str, folder: Path, family: WaveFamily) -> dict[str, Any]:
    """Scores of all test tasks, by method and points. part: of `PARTS`. folder: of the seed's bank."""
    config = configuration()
    bank = prepare_bank(folder / "bank", family, config.prepare, config.diffusion.segments, seed)
    seen = {points: WaveFamily(replace(config.task, points=points)) for points in POINTS}
    tasks, validation = (
        {points: one.tasks(split, 0, count, first + seed) for points, one in seen.items()}
        for split, count, first in (
            ("test", config.evaluate.tasks, TEST_SEED),
            ("val", config.evaluate.validation_tasks, VALIDATION_SEED),
        )
    )
    rows: dict[str, Any] = {}

    def keep(name: str, points: int, adapt: Any, family: WaveFamily = family, **chosen: Any) -> None:
        """Of a method, tasks -> weights of the family's network."""
        scores = family.scores(adapt(tasks[points]), tasks[points].query)
        entry = rows.setdefault(name, {}).setdefault(str(points), {})
        entry |= {"scores": [round(float(score), 5) for score in scores], **chosen}
        if points == 10 and seed == SEEDS[0]:
            entry["ms"] = round(latency_ms(adapt, tasks[points]), 3)

    if part != "gradients":
        objective: Any = part
        title, began = OBJECTIVE_TITLES[objective], time.perf_counter()
        diffusion = replace(config.diffusion, objective=objective)
        generator = fit(bank, config.meta, diffusion, config.denoiser, seed=seed, progress=False)
        seconds = round(time.perf_counter() - began, 1)
        sampler = Sampler(generator)
        count = choose_steps(family, sampler, validation[10], seed, 0.0)
        for points in POINTS:
            for steps in step_counts(generator):
                keep(f"{title}, {steps} steps", points, partial(generate, sampler, first_seed=seed, num_steps=steps))
            chosen = partial(generate, sampler, first_seed=seed, num_steps=count)
            keep(title, points, chosen, steps=count, training_s=seconds)
        if title == "Mc-Di":
            known = {
                "regressed weights": regression(bank, generator, config.meta, seed),
                **bank_methods(bank, sampler),
                "trained-target": lambda t: trained_targets(family, t, config.prepare, 1, seed, Backend())[:, -1],
            }
            for points, (name, adapt) in itertools.product(POINTS, known.items()):
                keep(name, points, adapt)
        return rows
    for points in POINTS:
        theirs, start = maml(min(points, 10))
        for steps in _GRADIENT_STEPS[:6]:
            keep(f"MAML, {steps} steps", points, partial(descend, theirs, start, steps), theirs)
        tried = {}
        for steps, lr in itertools.product(_GRADIENT_STEPS, _RATES):
            theta = finetune(family, validation[points], steps, lr, 0.0, Backend())
            tried[steps, lr] = float(family.scores(theta, validation[points].query).mean())
        best = min(tried, key=lambda key: tried[key])
        for steps in _GRADIENT_STEPS:
            lr = min(_RATES, key=lambda lr, steps=steps: tried[steps, lr])  # type: ignore[misc]
            adapt = partial(finetune, family, steps=steps, lr=lr, decay=0.0, backend=Backend())
            keep(f"Reptile, Adam, {steps} steps", points, adapt, lr=lr)
            if steps == best[0]:
                keep("Reptile, Adam", points, adapt, steps=steps, lr=lr)

        def on_posterior(t: TaskBatch, points: int = points) -> Tensor:
            """What a target is trained on, but of the posterior's wave: gradients with all that the generator is told."""
            expected = seen[points].prior.posterior(t.support["x"][..., 0], t.support["y"][..., 0]).float()
            data = {"x": t.train["x"], "y": expected.unsqueeze(-1)}
            return family.trajectories(data, config.prepare, 1, torch.Generator())[:, -1]

        keep("Reptile, Adam on the posterior's wave", points, on_posterior)
        rows.setdefault("ridge on sines", {})[str(points)] = {"scores": sines(tasks[points]).tolist()}
    return rows


def record_of(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds that have a method, deviation over them, and the paired difference to Mc-Di over all tasks with its 95 % interval."""
    rows: dict[str, Any] = {}
    cells = dict.fromkeys((one, points) for seed in seeds for one in seed for points in seed[one])
    for name, points in cells:
        found = [(seed[name][points], seed["Mc-Di"][points]) for seed in seeds if name in seed]
        every, ours = (
            [torch.tensor(entry["scores"], dtype=torch.float64) for entry in entries]
            for entries in zip(*found, strict=True)
        )
        means, gap = torch.stack([one.mean() for one in every]), torch.cat(every) - torch.cat(ours)
        first = found[0][0]
        rows.setdefault(name, {})[points] = {
            "seeds": len(found),
            "mean": round(float(means.mean()), 5),
            "std_over_seeds": round(float(means.std(correction=min(1, len(means) - 1))), 5),
            "minus_mc_di": round(float(gap.mean()), 5),
            "minus_mc_di_ci95": round(interval(gap), 5),
            **{key: [entry.get(key) for entry, _ in found] for key in first if key not in ("scores", "ms")},
            **{key: first[key] for key in ("ms",) if key in first},
        }
    return rows


def tabulated(rows: dict[str, Any]) -> list[str]:
    """Two Markdown tables: methods by the number of points, and errors at ten points by the number of steps."""

    def cell(entry: dict[str, Any]) -> str:
        return f"{number(entry['mean'])} ± {number(entry['std_over_seeds'], entry['mean'])}"

    lines, curves = [], dict[str, dict[int, str]]()
    for name, entry in rows.items():
        ten = entry["10"]
        curve = re.fullmatch(r"(.+), (\d+) steps", name)
        if curve:
            curves.setdefault(curve[1], {})[int(curve[2])] = number(ten["mean"])
        if not curve or name == "MAML, 10 steps":  # the number of its paper
            gap, half = ten["minus_mc_di"], ten["minus_mc_di_ci95"]
            paired = f"{'-' if gap < 0 else '+'}{number(abs(gap))} ± {number(half)}" if name != "Mc-Di" else ""
            ms = f"{ten['ms']:.2f}" if "ms" in ten else ""
            lines.append([name, ten["seeds"], *(cell(entry[str(points)]) for points in POINTS), paired, ms])
    steps = sorted({count for curve in curves.values() for count in curve})
    by_steps = [[name, *(curve.get(count, "") for count in steps)] for name, curve in curves.items()]
    header = ["method", "seeds", *(f"{points} points" for points in POINTS), "minus Mc-Di, 10 points", "one task, ms"]
    return [*table(header, lines), *table(["steps", *map(str, steps)], by_steps)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what is missing, all seeds of Mc-Di first, and after each part the record and its tables: [folder [out]]."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    folder = make_folder(Path(given[0] if given else "runs/study-waves"))
    config = configuration()
    family = find_family("waves").family(config.task, Setup())
    assert isinstance(family, WaveFamily)
    seeds: list[dict[str, Any]] = [{} for _ in SEEDS]
    for part in PARTS:
        for seed, rows in zip(SEEDS, seeds, strict=True):
            path = folder / f"seed{seed}-{part}.json"
            if not path.exists():
                write_json(path, one_part(seed, part, make_folder(folder / f"seed{seed}"), family))
            rows |= read_json(path)
        settings = json.loads(json.dumps({"prepare": vars(config.prepare), "meta": vars(config.meta)}))
        record = {"machine": machine(), "git": git_sha(), "settings": settings, "rows": record_of(seeds)}
        out = make_folder(Path(given[1] if len(given) > 1 else folder))
        write_json(out / "waves.json", record)
        print("\n".join(tabulated(record["rows"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
