"""The comparison of LoRA matrices, `python -m mcdi_fast.study.text`: heads on a frozen transformer, gradients, closed forms and generated weights.

A part is an objective of a seed, or a data set left out. All methods of a part see the same test tasks; what is chosen is chosen on validation
tasks. The record has every mean by data set and the paired difference to Mc-Di; the table of docs/lora.md is made of it.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch
from torch import Tensor

from mcdi_fast.backend import Backend
from mcdi_fast.config import TrainConfig
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
from mcdi_fast.heads import head_logits
from mcdi_fast.meta import fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.report import git_sha, machine, table
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import make_folder, read_json, write_json
from mcdi_fast.tasks import Setup, TaskBatch, find_family
from mcdi_fast.tasks.lora import LoraFamily, LoraOptions, rows_by_class
from mcdi_fast.tasks.prior import ridge_head

_SEEDS = range(5)
PARTS = (
    *((None, seed, objective) for seed in _SEEDS for objective in ("local-consistency", "vanilla", "naive-local")),
    *((name, seed, "local-consistency") for seed in _SEEDS for name in ("mr", "snli", "mrpc")),
)
"""Data set left out, seed, objective."""
_KNOWN = "known data sets"
_TASKS, _VALIDATION, _GRADIENT_VALIDATION = 120, 80, 40
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_RATES, _STEPS = (0.0001, 0.0003, 0.001, 0.003, 0.01), (30, 90, 270)
_BASE_RATES = (0.0001, 0.0003, 0.001)

Score = Callable[[TaskBatch], Tensor]
"""A method: tasks -> share that is right, [B]."""


def ridge_scores(features: Tensor, penalty: float, tasks: TaskBatch) -> Tensor:
    """Of ridge heads on given features of rows."""
    x = features[rows_by_class(tasks.support)]
    centre = x.mean((1, 2), keepdim=True)
    scale = (x - centre).square().sum(-1, keepdim=True).mean((1, 2), keepdim=True).sqrt()
    head = ridge_head((x - centre) / scale, penalty)
    y = (features[tasks.query["row"]] - centre[:, 0]) / scale[:, 0]
    return (head_logits(head, y).argmax(-1) == tasks.query["label"]).float().mean(1)


def sentence_head(family: LoraFamily, validation: TaskBatch) -> tuple[Score, dict[str, Any]]:
    """Ridge on the frozen encoder's sentence features alone, its penalty chosen."""
    tried = {penalty: float(ridge_scores(family.apart, penalty, validation).mean()) for penalty in _PENALTIES}
    best = max(tried, key=lambda penalty: tried[penalty])
    return partial(ridge_scores, family.apart, best), {"penalty": best}


def gradients(family: LoraFamily, validation: TaskBatch, known: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Adam on the support: from peft's beginning with a ridge head on frozen features, and from the base.

    known: rows of a part that has chosen steps and rate; otherwise they are chosen, which takes longer than all the rest.
    """
    beginning = family.baselines()["ridge"]

    def plain(steps: int, lr: float, tasks: TaskBatch) -> Tensor:
        first = beginning(tasks)
        data = tasks.support | {"base": tasks.support["base"] + first}
        rest = TaskBatch(tasks.condition, data, data, data)
        return first + finetune(family, rest, steps, lr, 0.0, Backend())

    def based(steps: int, lr: float, tasks: TaskBatch) -> Tensor:
        return finetune(family, tasks, steps, lr, 0.0, Backend())

    made = {}
    for name, adapt, rates in (("LoRA by gradient", plain, _RATES), ("Adam from the base", based, _BASE_RATES)):
        if name in known:
            best = known[name]["steps"], known[name]["lr"]
        else:
            some = validation[:_GRADIENT_VALIDATION]
            every = list(itertools.product(_STEPS, rates))
            best = max(every, key=lambda one, adapt=adapt: float(family.scores(adapt(*one, some), some.query).mean()))  # type: ignore[misc]
        made[name] = partial(adapt, *best), {"steps": best[0], "lr": best[1]}
    return made


def one_part(
    config: TrainConfig[LoraOptions],
    seed: int,
    objective: Any,
    folder: Path,
    setup: Setup,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores of all test tasks by method. folder: of banks. known: of `gradients`."""
    task = config.task
    family = find_family("glue").family(task, setup)
    assert isinstance(family, LoraFamily)
    segments, where = config.diffusion.segments, folder / f"bank-{task.left_out}-{seed}"
    bank = prepare_bank(where, family, config.prepare, segments, seed, meta=family.provenance())
    test = family.tasks("test", 0, config.evaluate.tasks, TEST_SEED + seed)
    validation = family.tasks("val", 0, config.evaluate.validation_tasks, VALIDATION_SEED + seed)
    timing = seed == 0 and task.left_out is None
    began = time.perf_counter()
    diffusion = replace(config.diffusion, objective=objective)
    generator = fit(bank, config.meta, diffusion, config.denoiser, seed=seed, progress=False)
    seconds = round(time.perf_counter() - began, 1)
    sampler, title, rows = Sampler(generator), OBJECTIVE_TITLES[objective], dict[str, Any]()

    def keep(name: str, scores: Tensor, **chosen: Any) -> None:
        rows[name] = {"scores": [round(float(score), 4) for score in scores], **chosen}

    def keep_weights(name: str, adapt: Callable[[TaskBatch], Tensor], **chosen: Any) -> None:
        if timing:
            chosen["ms"] = round(latency_ms(adapt, test), 3)
        keep(name, family.scores(adapt(test), test.query), **chosen)

    count = choose_steps(family, sampler, validation, seed, 0.0)
    keep_weights(title, partial(generate, sampler, first_seed=seed, num_steps=count), steps=count, training_s=seconds)
    for steps in (step_counts(generator)[0], config.diffusion.steps):
        theta = generate(sampler, test, seed, num_steps=steps)
        keep(f"{title}, {steps} steps", family.scores(theta, test.query))
    if title == "Mv-Di":  # as published: from one level of noise, which every step adds again
        keep("OCD", family.scores(generate(sampler, test, seed, eta_noise=1.0), test.query))
    if title == "Mc-Di":
        for name, adapt in (family.baselines() | bank_methods(bank, sampler)).items():
            keep_weights(name, adapt)
        score, found = sentence_head(family, validation)
        keep("ridge, sentence features", score(test), **found)
        for name, (adapt, found) in gradients(family, validation, known or {}).items():
            keep_weights(name, adapt, **found)
        if timing:
            ceiling = trained_targets(family, test, config.prepare, 1, seed, Backend())[:, -1]
            keep("trained-target", family.scores(ceiling, test.query))
            # what a generator is told of a task costs this too
            rows["base"]["ms"] = round(latency_ms(lambda t: family.base(rows_by_class(t.support))[0], test), 3)
    sets = [family.set_of("test", number) for number in range(len(test))]
    settings = {name: asdict(getattr(config, name)) for name in ("task", "prepare", "meta")}
    return {"seed": seed, "rows": rows, "sets": sets, **settings}


def record_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the parts of a setting: mean over all tasks, by data set, and the paired difference to Mc-Di of the same seed with its interval."""
    ours = {part["seed"]: part["rows"]["Mc-Di"]["scores"] for part in parts if "Mc-Di" in part["rows"]}
    made: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part["rows"]):
        found = [part for part in parts if name in part["rows"] and part["seed"] in ours]
        if not found:
            continue
        every = torch.cat([torch.tensor(part["rows"][name]["scores"], dtype=torch.float64) for part in found])
        gap = torch.cat([torch.tensor(ours[part["seed"]], dtype=torch.float64) for part in found]) - every
        sets = [one for part in found for one in part["sets"]]
        first = found[0]["rows"][name]
        made[name] = {
            "seeds": len(found),
            "mean": round(100 * float(every.mean()), 2),
            "ci95": round(100 * interval(every), 2),
            "mc_di_minus_this": round(100 * float(gap.mean()), 2),
            "mc_di_minus_this_ci95": round(100 * interval(gap), 2),
            "sets": {
                one: round(100 * float(every[torch.tensor([other == one for other in sets])].mean()), 1)
                for one in dict.fromkeys(sets)
            },
            **{key: [part["rows"][name].get(key) for part in found] for key in first if key not in ("scores", "ms")},
            **({"ms": first["ms"]} if "ms" in first else {}),
        }
    return made


def tabulated(rows: dict[str, Any]) -> list[str]:
    """A Markdown table."""
    sets = list(next(iter(rows.values()))["sets"])
    lines = [
        [
            name,
            entry["seeds"],
            f"{entry['mean']:.1f} ± {entry['ci95']:.1f}",
            "" if name == "Mc-Di" else f"{entry['mc_di_minus_this']:+.1f} ± {entry['mc_di_minus_this_ci95']:.1f}",
            f"{entry['ms']:.1f}" if "ms" in entry else "",
            *(f"{entry['sets'][one]:.1f}" for one in sets),
        ]
        for name, entry in rows.items()
    ]
    return table(["method", "seeds", "accuracy, %", "Mc-Di minus this", "one task, ms", *sets], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the parts that are missing, and after each the record and its tables: [folder [out [cache]]]."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    folder = make_folder(Path(given[0] if given else "runs/study-text"))
    out = make_folder(Path(given[1]) if len(given) > 1 else folder)
    setup = Setup(cache_dir=Path(given[2] if len(given) > 2 else "runs/cache"))
    config = find_family("glue").config()
    config = replace(config, evaluate=replace(config.evaluate, tasks=_TASKS, validation_tasks=_VALIDATION))
    parts: dict[str, list[dict[str, Any]]] = {}
    for left_out, seed, objective in PARTS:
        path = folder / f"{left_out}-seed{seed}-{objective}.json"
        if not path.exists():
            here = replace(config, task=replace(config.task, left_out=left_out))
            first = parts[_KNOWN][0]["rows"] if parts else {}
            write_json(path, one_part(here, seed, objective, folder, setup, first))
        parts.setdefault(f"left out: {left_out}" if left_out else _KNOWN, []).append(read_json(path))
        settings = {key: parts[_KNOWN][0][key] for key in ("task", "prepare", "meta")}
        rows = {name: record_of(some) for name, some in parts.items()}
        write_json(out / "glue-64.json", {"machine": machine(), "git": git_sha(), "settings": settings, "rows": rows})
    for name, found in rows.items():
        print("\n".join([name, *tabulated(found)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
