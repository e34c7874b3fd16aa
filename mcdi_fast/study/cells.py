"""The record of a cell of the comparison, by method."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.config import PrepareConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import TEST_SEED, VALIDATION_SEED, chain_plane, finetune, generate, interval, latency_ms
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_gradient, prototype_head
from mcdi_fast.report import machine
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import read_json
from mcdi_fast.study.analysis import largest_eigenvalue, novelty, target_distances, weight_error
from mcdi_fast.study.baselines import Start, adapt, reptile_step
from mcdi_fast.study.plan import OBJECTIVES, REVISION, Cell, plan, train_config
from mcdi_fast.study.workshop import Workshop
from mcdi_fast.tasks import TaskBatch

_CURVATURE_TASKS = 200  # whose Hessian is looked at: half a minute for 20-way heads
FEW_STEPS = 5  # of the short chain that is reported beside the whole one

Adapt = Callable[..., Tensor]
"""A row's way to heads: tasks -> [B, ways, F + 1]."""


def scored(correct: list[int], total: int) -> dict[str, Any]:
    """Record entries of the correct query images of each task, out of `total`."""
    accuracy = torch.tensor(correct, dtype=torch.float64) / total
    return {
        "correct": correct,
        "queries": total,
        "accuracy_mean": round(100 * float(accuracy.mean()), 4),
        "accuracy_ci95": round(100 * interval(accuracy), 4),
    }


def run_cell(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Make the record of one cell."""
    work = {
        "analysis": _analysis,
        "latency": _latency,
        "prototype": _support_only,
        "finetune": _support_only,
        "finetune-decay": _support_only,
        "reptile-head": _reptile,
        "reptile-net": _reptile,
        "ceiling": _ceiling,
    }
    made = work.get(cell.method, _diffusion)(shop, cell)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    where = {"backbone_weights": shop.backbone_weights(), "machine": machine()}
    return {"cell": asdict(cell), "revision": REVISION, "date": today, **made, **where}


def _scored(shop: Workshop, cell: Cell, heads: Tensor, tasks: TaskBatch) -> dict[str, Any]:
    total = tasks.query["label"].shape[1]
    scores = shop.family(cell).scores(heads, tasks.query)
    return scored((scores.double() * total).round().long().tolist(), total)


def _row(shop: Workshop, cell: Cell, adapt: Adapt, gradient_steps: int, **more: Any) -> dict[str, Any]:
    """The record of a row that makes heads: its score and its time."""
    tasks = shop.tasks(cell, "selection" if cell.change else "test")
    made = {"adapt_ms": round(latency_ms(adapt, tasks), 4), "gradient_steps": gradient_steps}
    return {**_scored(shop, cell, adapt(tasks), tasks), **made, "training_seconds": 0.0, **more}


def _validation_accuracy(shop: Workshop, cell: Cell, heads: Tensor, tasks: TaskBatch) -> float:
    return round(100 * float(shop.family(cell).scores(heads, tasks.query).double().mean()), 3)


def _adapter(shop: Workshop, cell: Cell, chosen: dict[str, Any]) -> Adapt:
    """How a row makes heads of tasks, with what validation tasks have chosen for it."""
    family = shop.family(cell)
    if cell.method == "prototype":
        return lambda tasks: prototype_head(family.support_features(tasks))
    if cell.method in ("finetune", "finetune-decay"):
        recipe = chosen["steps"], chosen["lr"], chosen["weight_decay"]
        return lambda tasks: finetune(family, tasks, *recipe, shop.backend)
    if cell.method == "reptile-head":  # what it learned does not matter for its time
        theta = torch.zeros(family.layout.num_tokens, family.layout.width, device=shop.backend.device)
        start = Start(theta, theta, 0, chosen["lr"])
        return lambda tasks: adapt(family, start, tasks.support, (chosen["steps"],))[0]
    generator, _ = shop.generator(cell)
    eta = chosen.get("eta_noise", shop.config.evaluate.eta_noise)
    return partial(shop.sample, cell, generator, eta_noise=eta)


def _latency(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Every row's time for one new task, one row after the other, which rows timed hours apart in their own cells do not give."""
    tasks = shop.tasks(cell, "test")
    rows = plan(replace(shop.config, settings=(cell.setting,), seeds=(cell.seed,), parts=("comparison",)))  # type: ignore[arg-type]
    times: dict[str, dict[str, float]] = {}
    for one in rows:
        path = shop.folder / "cells" / f"{one.name}.json"
        if one.method in ("reptile-net", "ceiling") or not path.exists():
            continue  # the network's own cell times whole images; the ceiling is no way to adapt
        record = read_json(path)
        adapt = _adapter(shop, one, record.get("chosen", {}))
        times[one.method] = {"all": round(latency_ms(adapt, tasks), 4)}
        for count in record.get("by_steps", {}):
            times[one.method][count] = round(latency_ms(partial(adapt, num_steps=int(count)), tasks), 4)
    if not times:
        raise McdiError(
            f"--parts latency: no row of {cell.setting}, seed {cell.seed}, is there; ask for comparison too"
        )
    return {"adapt_ms": times}


def _support_only(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Nearest prototype and fine-tuning, which need no training."""
    if cell.method == "prototype":
        return _row(shop, cell, _adapter(shop, cell, {}), 0)
    c, validation, family = shop.config.evaluate, shop.tasks(cell, "val"), shop.family(cell)
    tried = []
    decays = (0.0,) if cell.method == "finetune" else c.finetune_decays
    for steps, lr, decay in itertools.product(c.finetune_steps, c.finetune_lrs, decays):
        heads = finetune(family, validation, steps, lr, decay, shop.backend)
        tried.append((_validation_accuracy(shop, cell, heads, validation), -steps, lr, decay))
    accuracy, steps, lr, decay = max(tried)
    chosen = {"steps": -steps, "lr": lr, "weight_decay": decay, "validation_accuracy": accuracy}
    return _row(shop, cell, _adapter(shop, cell, chosen), -steps, chosen=chosen)


def _reptile(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Reptile on the head or the whole network, resumable by outer steps and by evaluated tasks.

    What Reptile starts from, adapted without an outer step, is tried too: validation tasks choose.
    """
    c, whole = shop.config.reptile, cell.method == "reptile-net"
    training, family = shop.reptile_families(cell)
    total, batch = (c.net_steps, c.net_batch) if whole else (c.head_steps, c.head_batch)
    lrs, steps = (c.net_lrs, sorted(c.net_test_steps)) if whole else (c.head_lrs, sorted(c.test_steps))
    starts: dict[tuple[float, int], Start] = {}
    with shop.stage(cell.name, total * len(lrs), "steps") as stage:
        for lr in lrs:
            path = shop.folder / "partial" / f"{cell.name}_lr{lr}.safetensors"
            theta = training.start(1, PrepareConfig(start_std=0.0), torch.Generator())[0].to(shop.backend.device)
            starts[lr, 0] = Start(theta, torch.zeros_like(theta), 0, lr)
            start = starts[lr, total] = Start.load(path) if path.exists() else replace(starts[lr, 0])
            begun = start.steps // c.inner_steps
            stage.update(begun)
            before, clock = stage.notes.get(f"seconds {lr}", 0.0), time.perf_counter()
            for outer in range(begun, total):
                reptile_step(training, start, c, outer, batch, total, cell.seed)
                stage.update()
                if (outer + 1) % c.checkpoint_every == 0 or outer + 1 == total:
                    stage.notes[f"seconds {lr}"] = before + time.perf_counter() - clock
                    start.save(path)
                    stage.keep()

    def count_correct(start: Start, split: str, number: int, at: list[int]) -> list[list[int]]:
        """The correct query images of each task after each of `at` steps. A network's tasks come one by one: their weights are large."""
        counts = stage.notes.setdefault(f"{split} {start.lr} {start.steps}", [])
        seed, chunk = {"val": VALIDATION_SEED, "test": TEST_SEED}[split] + cell.seed, 1 if whole else 100
        with shop.stage(f"{cell.name}_{split}", number, "tasks") as bar:
            bar.update(len(counts))
            while len(counts) < number:
                tasks = family.tasks(split, len(counts), min(chunk, number - len(counts)), seed)
                scores = [family.scores(theta, tasks.query) for theta in adapt(family, start, tasks.support, at)]
                right = (torch.stack(scores, 1).double() * tasks.query["label"].shape[1]).round().long()
                counts += right.tolist()
                bar.update(len(right))
                if len(counts) % 20 == 0:
                    stage.keep()
        return counts

    evaluate, tried = shop.config.evaluate, []
    number = min(c.net_validation_tasks, evaluate.validation_tasks) if whole else evaluate.validation_tasks
    test = family.tasks("test", 0, min(32, evaluate.tasks), TEST_SEED + cell.seed)
    queries = test.query["label"].shape[1]
    for (lr, outer), start in starts.items():
        right = torch.tensor(count_correct(start, "val", number, steps), dtype=torch.float64)
        accuracies = (100 * right.mean(0) / queries).tolist()
        tried += [(round(a, 3), -n, -outer, lr) for a, n in zip(accuracies, steps, strict=True)]
    accuracy, count, outer, lr = max(tried)
    start = starts[lr, -outer]
    counts = count_correct(start, "test", evaluate.tasks, [-count])
    for rest in stage.path.parent.glob(f"{cell.name}*"):
        rest.unlink()
    return {
        **scored([correct for (correct,) in counts], queries),
        "adapt_ms": round(latency_ms(lambda tasks: adapt(family, start, tasks.support, [-count])[0], test), 4),
        "training_seconds": round(stage.notes.get(f"seconds {lr}", 0.0) if outer else 0.0, 2),
        "gradient_steps": -count,
        "chosen": {
            "lr": lr,
            "outer_steps": -outer,
            "steps": -count,
            "validation_accuracy": accuracy,
            "tried": [[a, -n, -o, r] for a, n, o, r in sorted(tried, reverse=True)],
        },
    }


def _ceiling(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Heads trained on every image of the test classes, and the curvature of their loss (theorem 2)."""
    config, tasks, family = train_config(shop.config, cell), shop.tasks(cell, "test"), shop.family(cell)
    begun = time.perf_counter()
    heads = shop.targets(cell)[:, -1]
    seconds = time.perf_counter() - begun
    values: list[float] = []
    for i in range(0, min(len(heads), _CURVATURE_TASKS), 50):
        part = tasks[slice(i, i + 50)].train
        weight = part["weight"][0].double() if "weight" in part else None
        x, label = family.features(part).double(), part["label"]
        gradient = partial(head_gradient, features=x, labels=label, sample_weight=weight)
        values += largest_eigenvalue(gradient, heads[i : i + 50].double()).tolist()
    return {
        **_scored(shop, cell, heads, tasks),
        "adapt_ms": round(1000 * seconds / len(heads), 4),
        "training_seconds": 0.0,
        "gradient_steps": config.prepare.steps * (2 if config.prepare.rho else 1),
        "eigenvalue": {"mean": sum(values) / len(values)},
        "eigenvalues": [round(v, 5) for v in values],
    }


def _diffusion(shop: Workshop, cell: Cell) -> dict[str, Any]:
    generator, training = shop.generator(cell)
    chosen: dict[str, Any] = {}
    if cell.method == "ocd":  # its publication samples with noise; validation tasks say whether that is its best here
        validation = shop.tasks(cell, "val")
        found = {
            eta: _validation_accuracy(shop, cell, shop.sample(cell, generator, validation, eta_noise=eta), validation)
            for eta in (0.0, 1.0)
        }
        accuracies = {str(eta): accuracy for eta, accuracy in found.items()}
        chosen = {"eta_noise": max(found, key=lambda eta: (found[eta], -eta)), "validation_accuracy": accuracies}
    adapt = _adapter(shop, cell, chosen)
    record = _row(shop, cell, adapt, 0, **training, chosen=chosen)
    if cell.change:
        return record | {"changed": cell.changed}
    tasks, fewest = shop.tasks(cell, "test"), len(set(generator.objective.ends.tolist()))
    record["by_steps"] = {}
    for count in sorted({fewest, FEW_STEPS}):
        if fewest <= count < generator.diffusion.steps:
            short = partial(adapt, num_steps=count)
            time_ms = {"adapt_ms": round(latency_ms(short, tasks), 4)}
            record["by_steps"][str(count)] = {**_scored(shop, cell, short(tasks), tasks), **time_ms}
    if cell.method != "ocd":
        record["weight_error"] = weight_error(generator, adapt(tasks), shop.targets(cell)[:, -1])
    return record


def _analysis(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Theorem 1, the chains of figure 1 and novelty, from the generators of the comparison."""
    tasks, targets, eta = shop.tasks(cell, "test"), shop.targets(cell), shop.config.evaluate.eta_noise
    rows = {m: replace(cell, method=m, segments=1 if m == "mv-di" else cell.segments) for m in OBJECTIVES if m != "ocd"}
    generators: dict[str, WeightGenerator] = {method: shop.generator(row)[0] for method, row in rows.items()}
    ours = generators["mc-di"]
    bank, _ = shop.bank(cell)
    training, _ = bank.gather(torch.arange(min(len(bank), 5000)))
    sampler = Sampler(ours, shop.backend.device)
    heads = generate(sampler, tasks, cell.seed, eta_noise=eta)
    plane = json.dumps(chain_plane(shop.family(cell), sampler, tasks[:1], targets[0], cell.seed, eta))
    return {
        "distances": {
            method: target_distances(generator, tasks, targets, cell.seed, eta, ours.normalizer)
            for method, generator in generators.items()
        },
        "ends": list(ours.schedule.ends),
        "novelty": novelty(ours, heads, targets[:, -1], training[:, -1]),
        "plane": json.loads(plane, parse_float=lambda text: round(float(text), 4)),  # enough for a plot
    }
