"""The comparison of LoRA matrices, `python -m mcdi_fast.study.text`: heads on a frozen transformer, gradients, closed forms and generated weights.

A part is an objective of a seed, or a data set left out. All methods of a part see the same test tasks; what is chosen is chosen on validation
tasks. The record has every mean by data set and the paired difference to Mc-Di; the table of docs/lora.md is made of it.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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
from mcdi_fast.heads import head_accuracy, head_by_adam
from mcdi_fast.meta import fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.report import git_sha, machine, table
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import make_folder, read_json, write_json
from mcdi_fast.tasks import Setup, TaskBatch, find_family
from mcdi_fast.tasks.images import LabelledRows
from mcdi_fast.tasks.lora import LoraFamily, LoraOptions, rows_by_class
from mcdi_fast.tasks.prior import ClassPrior, informed_head, ridge_head

_KNOWN, _INTENTS = "known data sets", "new intents, 5-way 1-shot"


def _intents(ways: int) -> dict[str, Any]:
    rows = {"support": ways, "queries": 15 * ways, "train_rows": 99 * ways}
    return {"sets": ("clinc150",), "new_classes": True, "ways": ways, **rows}


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    _KNOWN: ({}, _KNOWN),
    **{f"left out: {name}": ({"left_out": name}, _KNOWN) for name in ("mr", "snli", "mrpc")},
    _INTENTS: (_intents(5), _INTENTS),
    "new intents, 10-way 1-shot": (_intents(10), _INTENTS),
}
"""Options of the family by setting, and the setting whose validation tasks choose for it what takes long to choose."""
_INTENT_TRAJECTORIES = 1000
_SEEDS = range(5)
PARTS = tuple(
    (setting, seed, objective)
    for seed in _SEEDS
    for setting in SETTINGS
    for objective in ("local-consistency", *(() if setting.startswith("left out") else ("vanilla", "naive-local")))
)
"""Setting, seed, objective."""
_TASKS, _VALIDATION, _GRADIENT_VALIDATION = 120, 80, 40
_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_RATES, _STEPS, _RANKS = (0.0001, 0.0003, 0.001, 0.003, 0.01), (30, 90, 270), (1, 4, 16)
_BASE_RATES = (0.0001, 0.0003, 0.001)
_HEAD_RATES, _HEAD_STEPS, _HEAD_DECAYS = (0.003, 0.01, 0.03, 0.1, 0.3), (10, 30, 100), (0.0, 0.001, 0.01, 0.1)

Score = Callable[[TaskBatch], Tensor]
"""A method: tasks -> share that is right, [B]."""


def ridge_scores(features: Tensor, tasks: TaskBatch, penalty: float) -> Tensor:
    """Of ridge heads on given features of rows."""
    x = features[rows_by_class(tasks.support)]
    centre = x.mean((1, 2), keepdim=True)
    scale = (x - centre).square().sum(-1, keepdim=True).mean((1, 2), keepdim=True).sqrt()
    head = ridge_head((x - centre) / scale, penalty)
    y = (features[tasks.query["row"]] - centre[:, 0]) / scale[:, 0]
    return head_accuracy(head, y, tasks.query["label"])


def prior_head(family: LoraFamily) -> Score:
    """The class prior's head on sentence features, in closed form; fitted on the classes of training."""
    classes = [rows for name in family.names("train") for rows in family.classes[name, "train"]]
    label = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(rows) for rows in classes]))
    prior = ClassPrior.fit(LabelledRows.of(torch.cat([family.apart[rows] for rows in classes]), label))

    def score(tasks: TaskBatch) -> Tensor:
        head = informed_head(prior, family.apart[rows_by_class(tasks.support)])
        return head_accuracy(head, family.apart[tasks.query["row"]], tasks.query["label"])

    return score


def sentence_ridge(family: LoraFamily, validation: TaskBatch) -> tuple[Score, dict[str, Any]]:
    """Ridge on the frozen encoder's sentence features alone, its penalty chosen."""
    best = best_of({"penalty": _PENALTIES}, lambda penalty: ridge_scores(family.apart, validation, penalty))
    return partial(ridge_scores, family.apart, **best), best


def best_of(options: Mapping[str, Sequence[Any]], score: Callable[..., Tensor]) -> dict[str, Any]:
    """The options whose mean score is highest. score takes them by name."""
    every = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return max(every, key=lambda one: float(score(**one).mean()))


def frozen_family(config: TrainConfig[LoraOptions], setup: Setup, rank: int) -> LoraFamily:
    """The same texts and tasks from the frozen model: peft's beginning, and a ridge head on frozen features."""
    family = find_family("glue").family(replace(config.task, rank=rank, start_steps=0), setup)
    assert isinstance(family, LoraFamily)
    return family


def seen_by(family: LoraFamily, tasks: TaskBatch) -> TaskBatch:
    """The same rows with the family's own base and condition."""
    base, condition = family.base(rows_by_class(tasks.support))
    return TaskBatch(condition, *(data | {"base": base} for data in (tasks.support, tasks.query, tasks.train)))


class Method(NamedTuple):
    """How tasks, as the family sees them, get weights; and the options that were chosen."""

    family: LoraFamily
    adapt: Callable[[TaskBatch], Tensor]
    chosen: dict[str, Any]


def judged(make: Callable[..., Method], judges: TaskBatch, **options: Any) -> Tensor:
    """Scores of a method with these options."""
    family, adapt, _ = make(**options)
    tasks = seen_by(family, judges)
    return family.scores(adapt(tasks), tasks.query)


def tuned_methods(
    config: TrainConfig[LoraOptions], setup: Setup, family: LoraFamily, validation: TaskBatch, known: dict[str, Any]
) -> dict[str, Method]:
    """Adam from the base; heads on the frozen encoder, and LoRA and head by gradient from there (peft's beginning, a ridge head).

    known: rows of a part that has chosen options; otherwise they are chosen, which takes longer than all the rest.
    """
    frozen, few = cache(partial(frozen_family, config, setup)), validation[:_GRADIENT_VALIDATION]

    def adam(family: LoraFamily, **chosen: Any) -> Method:
        return Method(family, partial(finetune, family, **chosen, decay=0.0, backend=Backend()), chosen)

    def lora(rank: int, **chosen: Any) -> Method:
        return adam(frozen(rank), **chosen)

    def head(of_features: Callable[..., Tensor], rank: int, **chosen: Any) -> Method:
        return Method(frozen(rank), partial(frozen(rank).on_frozen, partial(of_features, **chosen)), chosen)

    rank = (config.task.rank,)
    heads = {"rank": rank, "steps": _HEAD_STEPS, "lr": _HEAD_RATES, "decay": _HEAD_DECAYS}
    made = {}
    for name, make, options, judges in (
        ("Adam from the base", partial(adam, family), {"steps": _STEPS, "lr": _BASE_RATES}, few),
        ("ridge", partial(head, ridge_head), {"rank": rank, "penalty": _PENALTIES}, validation),
        ("head-finetune", partial(head, head_by_adam), heads, validation),
        ("LoRA by gradient", lora, {"rank": _RANKS, "steps": _STEPS, "lr": _RATES}, few),
    ):
        if name in known:
            best = {key: known[name][key] for key in options}
        else:
            best = best_of(options, partial(judged, make, judges))
        made[name] = make(**best)._replace(chosen=best)
    return made


def one_part(
    config: TrainConfig[LoraOptions],
    seed: int,
    objective: Any,
    folder: Path,
    setup: Setup,
    known: dict[str, Any],
) -> dict[str, Any]:
    """Scores of all test tasks by method. folder: of the bank. known: of `tuned_methods`."""
    task = config.task
    family = find_family("glue").family(task, setup)
    assert isinstance(family, LoraFamily)
    bank = prepare_bank(folder, family, config.prepare, config.diffusion.segments, seed, meta=family.provenance())
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
        keep_method(name, Method(family, adapt, chosen), test)

    def keep_method(name: str, method: Method, tasks: TaskBatch) -> None:
        ms = {"ms": round(latency_ms(method.adapt, tasks), 3)} if timing else {}
        keep(name, method.family.scores(method.adapt(tasks), tasks.query), **ms, **method.chosen)

    count = choose_steps(family, sampler, validation, seed, 0.0)
    keep_weights(title, partial(generate, sampler, first_seed=seed, num_steps=count), steps=count, training_s=seconds)
    for steps in (step_counts(generator)[0], config.diffusion.steps):
        theta = generate(sampler, test, seed, num_steps=steps)
        keep(f"{title}, {steps} steps", family.scores(theta, test.query))
    if title == "Mv-Di":  # as published: from one level of noise, which every step adds again
        keep("OCD", family.scores(generate(sampler, test, seed, eta_noise=1.0), test.query))
    if title == "Mc-Di":
        fixed = family.baselines() | bank_methods(bank, sampler)
        for name in ("base", "nearest-prototype", "bank-mean", "nearest-task"):  # the others' options are chosen below
            keep_weights(name, fixed[name])
        score, found = sentence_ridge(family, validation)
        keep("ridge, sentence features", score(test), **found)
        if task.new_classes:
            keep("class prior, sentence features", prior_head(family)(test))
        for name, method in tuned_methods(config, setup, family, validation, known).items():
            keep_method(name, method, seen_by(method.family, test))
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
    for setting, seed, objective in PARTS:
        short = setting.replace(": ", "-").replace(", ", "-").replace(" ", "-")
        path = folder / f"{short}-seed{seed}-{objective}.json"
        if not path.exists():
            options, chooser = SETTINGS[setting]
            here = replace(config, task=replace(config.task, **options))
            if here.task.new_classes:
                here = replace(here, prepare=replace(here.prepare, tasks=_INTENT_TRAJECTORIES))
            first = parts[chooser][0]["rows"] if chooser in parts else {}
            write_json(path, one_part(here, seed, objective, folder / f"bank-{short}-{seed}", setup, first))
        parts.setdefault(setting, []).append(read_json(path))
        settings = {key: parts[_KNOWN][0][key] for key in ("task", "prepare", "meta")}
        rows = {name: record_of(some) for name, some in parts.items()}
        write_json(out / "glue-64.json", {"machine": machine(), "git": git_sha(), "settings": settings, "rows": rows})
    for name, found in rows.items():
        print("\n".join([name, *tabulated(found)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
