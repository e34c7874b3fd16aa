"""The record of a cell of the comparison, by method."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcdi_fast import backbone as bb
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import FeatureTasks, chain_plane, draw_tasks, finetune, generate, interval, latency_ms
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_accuracy, prototype_head
from mcdi_fast.report import machine
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import (
    read_json,
    write_json,
)
from mcdi_fast.study.analysis import diagnose, largest_eigenvalue, novelty, target_distances, weight_error
from mcdi_fast.study.baselines import (
    ReptileNet,
    adapt_head,
    reptile_head,
    row_shares,
)
from mcdi_fast.study.plan import CHANGES, OBJECTIVES, REVISION, SETTINGS, Cell, plan, train_config
from mcdi_fast.study.workshop import Workshop
from mcdi_fast.train import TEST_SEED, VALIDATION_SEED

_CURVATURE_TASKS = 200  # whose Hessian is looked at: half a minute for 20-way heads
FEW_STEPS = 5  # of the short chain that is reported beside the whole one


def scored(correct: Tensor, total: int) -> dict[str, Any]:
    """Record entries of the correct query images of each task, int64 [B], out of `total`."""
    accuracy = correct.double() / total
    return {
        "correct": correct.tolist(),
        "queries": total,
        "accuracy_mean": round(100 * float(accuracy.mean()), 4),
        "accuracy_ci95": round(100 * interval(accuracy), 4),
    }


def scored_heads(heads: Tensor, tasks: FeatureTasks) -> dict[str, Any]:
    """The same of heads [B, ways, F + 1]."""
    total = tasks.query.shape[1] * tasks.query.shape[2]
    return scored((head_accuracy(heads, tasks.query).double() * total).round().long(), total)


def run_cell(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Make the record of one cell."""
    work = {
        "analysis": _analysis,
        "latency": _latency,
        "reptile-net": _reptile_net,
        "reptile-head": _reptile_head,
        "ceiling": _ceiling,
    }
    if cell.method in (*OBJECTIVES, "ocd"):
        made = _diffusion(shop, cell)
    elif cell.method in work:
        made = work[cell.method](shop, cell)
    else:
        made = _support_only(shop, cell)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {
        "cell": asdict(cell),
        "revision": REVISION,
        "date": today,
        **made,
        "backbone_weights": shop.backbone_weights(),
        "machine": machine(),
    }


def _adapter(shop: Workshop, cell: Cell, chosen: dict[str, Any]) -> Callable[..., Tensor]:
    """How a row makes heads of support features, with what validation tasks have chosen for it."""
    if cell.method == "prototype":
        return prototype_head
    if cell.method in ("finetune", "finetune-decay"):
        return partial(
            finetune, steps=shop.config.evaluate.finetune_steps, rate=chosen["rate"], decay=chosen["weight_decay"]
        )
    if cell.method == "reptile-head":
        features, ways = shop.features()["train"][0], SETTINGS[cell.setting].ways
        start = reptile_head(features, ways, shop.config.reptile, chosen["rate"], cell.seed)
        return lambda support: adapt_head(start, support, (chosen["steps"],))[0]
    generator, _ = shop.generator(cell)
    eta = chosen.get("eta_noise", shop.config.evaluate.eta_noise)

    def sample(support: Tensor, **options: Any) -> Tensor:
        return shop.sample(cell, generator, FeatureTasks(support, support, support), eta_noise=eta, **options)

    return sample


def _latency(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Every row's time for one new task, one row after the other, which rows timed hours apart in their own cells do not give."""
    test = shop.tasks(cell.setting, cell.seed, "test")
    rows = plan(replace(shop.config, settings=(cell.setting,), seeds=(cell.seed,), parts=("comparison",)))  # type: ignore[arg-type]
    times: dict[str, dict[str, float]] = {}
    for one in rows:
        path = shop.folder / "cells" / f"{one.name}.json"
        if one.method in ("reptile-net", "ceiling") or not path.exists():
            continue  # the network's own cell times whole images; the ceiling is no way to adapt
        record = read_json(path)
        adapt = _adapter(shop, one, record.get("chosen", {}))
        times[one.method] = {"all": round(latency_ms(adapt, test.support), 4)}
        for count in record.get("by_steps", {}):
            times[one.method][count] = round(latency_ms(partial(adapt, num_steps=int(count)), test.support), 4)
    if not times:
        raise McdiError(
            f"--parts latency: no row of {cell.setting}, seed {cell.seed}, is there; ask for comparison too"
        )
    return {"adapt_ms": times}


def _support_only(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Nearest prototype and fine-tuning, which need no training."""
    test, validation = (shop.tasks(cell.setting, cell.seed, name) for name in ("test", "val"))
    c, chosen = shop.config.evaluate, {}
    if cell.method != "prototype":
        tried = []
        for rate in c.finetune_lrs:
            for decay in (0.0,) if cell.method == "finetune" else c.finetune_decays:
                heads = finetune(validation.support, c.finetune_steps, rate, decay)
                tried.append((float(head_accuracy(heads, validation.query).mean()), rate, decay))
        accuracy, rate, decay = max(tried)
        chosen = {"rate": rate, "weight_decay": decay, "validation_accuracy": round(100 * accuracy, 3)}
    adapt = _adapter(shop, cell, chosen)
    return {
        **scored_heads(adapt(test.support), test),
        "adapt_ms": round(latency_ms(adapt, test.support), 4),
        "training_seconds": 0.0,
        "gradient_steps": c.finetune_steps if chosen else 0,
        **({"chosen": chosen} if chosen else {}),
    }


def _reptile_head(shop: Workshop, cell: Cell) -> dict[str, Any]:
    test, validation = (shop.tasks(cell.setting, cell.seed, name) for name in ("test", "val"))
    c, ways = shop.config.reptile, SETTINGS[cell.setting].ways
    features, tried = shop.features()["train"][0], []
    start_time = time.perf_counter()
    with shop.bar(cell.name, c.head_steps * len(c.head_rates), "steps") as bar:
        for rate in c.head_rates:
            begun = time.perf_counter()
            start = reptile_head(features, ways, c, rate, cell.seed, on_step=bar.update)
            seconds = time.perf_counter() - begun
            steps = sorted(c.test_steps)
            for count, heads in zip(steps, adapt_head(start, validation.support, steps), strict=True):
                tried.append((float(head_accuracy(heads, validation.query).mean()), -count, seconds, start))
    accuracy, count, seconds, start = max(tried, key=lambda entry: entry[:2])

    def adapt(support: Tensor) -> Tensor:
        return adapt_head(start, support, (-count,))[0]

    chosen = {"rate": start.rate, "steps": -count, "validation_accuracy": round(100 * accuracy, 3)}
    return {
        **scored_heads(adapt(test.support), test),
        "adapt_ms": round(latency_ms(adapt, test.support), 4),
        "training_seconds": round(seconds, 2),
        "search_seconds": round(time.perf_counter() - start_time, 2),
        "gradient_steps": -count,
        "chosen": chosen,
    }


def _reptile_net(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Resumable by outer steps and by evaluated tasks. Where Reptile starts from, the trained backbone, is tried too: validation chooses."""
    c, task = shop.config.reptile, replace(SETTINGS[cell.setting], queries=shop.config.queries)
    progress = shop.folder / "partial" / f"{cell.name}.json"
    done: dict[str, Any] = read_json(progress) if progress.exists() else {}
    network, steps = shop.network(), sorted(c.net_test_steps)
    seconds: dict[str, float] = done.setdefault("seconds", {})
    models = {(rate, 0): ReptileNet(network, task.ways, c, rate, cell.seed) for rate in c.net_rates}
    with shop.bar(cell.name, c.net_steps * len(c.net_rates), "steps") as bar:
        for rate in c.net_rates:
            path = shop.folder / "partial" / f"{cell.name}_rate{rate}.safetensors"
            model = models[rate, c.net_steps] = ReptileNet(network, task.ways, c, rate, cell.seed)
            before = model.restore(path)["seconds"] if path.exists() else 0.0
            begun = time.perf_counter()
            bar.update(model.step)
            while model.step < c.net_steps:
                model.outer_step(shop.data.train)
                bar.update()
                if model.step % c.checkpoint_every == 0 or model.step == c.net_steps:
                    seconds[str(rate)] = before + time.perf_counter() - begun
                    model.save(path, {"seconds": seconds[str(rate)]})
                    shop.pause_if_late()
            seconds.setdefault(str(rate), before)

    def count_correct(
        model: ReptileNet, split: str, purpose: str, total: int, counts: list[list[int]], at: list[int]
    ) -> None:
        """Append to counts, a list a task, the correct query images after each of `at` steps."""
        images = getattr(shop.data, split)
        position = torch.arange(images.num_classes * images.images_per_class).view(
            images.num_classes, images.images_per_class, 1
        )
        seed = {"val": VALIDATION_SEED, "test": TEST_SEED}[purpose] + cell.seed
        tasks = draw_tasks(position, task, total, seed)
        flat = torch.from_numpy(images.images).flatten(0, 1)
        label = torch.arange(task.ways).repeat_interleave(task.shots)
        truth = torch.arange(task.ways).repeat_interleave(task.queries)
        with shop.bar(f"{cell.name} {purpose}", total, "tasks") as bar:
            bar.update(len(counts))
            while len(counts) < total:
                one = tasks[slice(len(counts), len(counts) + 1)]
                x, query = (bb.to_float(flat[part.flatten()]) for part in (one.support, one.query))
                logits = model.adapt(x, label, query, at)
                counts.append([int((found.argmax(-1) == truth).sum()) for found in logits])
                bar.update()
                if len(counts) % 20 == 0 or len(counts) == total:
                    write_json(progress, done)
                    shop.pause_if_late()

    tried = []
    validation_total = min(c.net_validation_tasks, shop.config.evaluate.validation_tasks)
    for (rate, outer), model in models.items():
        counts = done.setdefault("validation", {}).setdefault(f"{rate}, {outer}", [])
        count_correct(model, "val", "val", validation_total, counts, steps)
        mean = torch.tensor(counts, dtype=torch.float64).mean(0) / (task.ways * task.queries)
        tried += [(float(mean[i]), -steps[i], -outer, rate) for i in range(len(steps))]
    accuracy, count, outer, rate = max(tried)
    model = models[rate, -outer]
    counts = done.setdefault("test", [])
    count_correct(model, "test", "test", shop.config.evaluate.tasks, counts, [-count])
    some = torch.from_numpy(shop.data.test.images[: task.ways])
    x, query = bb.to_float(some[:, : task.shots]), bb.to_float(some[:, task.shots : task.shots + 1])
    label, times = torch.arange(task.ways).repeat_interleave(task.shots), []
    for _ in range(5):
        begun = time.perf_counter()
        model.adapt(x, label, query, [-count])
        times.append(1000 * (time.perf_counter() - begun))
    for rest in progress.parent.glob(f"{cell.name}*"):
        rest.unlink()
    return {
        **scored(torch.tensor(counts)[:, 0], task.ways * task.queries),
        "adapt_ms": round(sorted(times)[2], 3),
        "training_seconds": round(seconds[str(rate)] if outer else 0.0, 2),
        "gradient_steps": -count,
        "chosen": {
            "rate": rate,
            "outer_steps": -outer,
            "steps": -count,
            "validation_accuracy": round(100 * accuracy, 3),
            "tried": [[round(100 * a, 3), -n, -o, r] for a, n, o, r in sorted(tried, reverse=True)],
        },
    }


def _ceiling(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Heads trained on every image of the test classes, and the curvature of their loss (theorem 2)."""
    config, test = train_config(shop.config, cell), shop.tasks(cell.setting, cell.seed, "test")
    begun = time.perf_counter()
    heads = shop.targets(cell)[:, -1]
    seconds = time.perf_counter() - begun
    ways, images_per_class = test.every.shape[1:3]
    weight = row_shares(ways, images_per_class, config.task.shots, config.prepare.support_loss_weight)
    value = torch.cat(
        [
            largest_eigenvalue(heads[i : i + 50], test.every[i : i + 50].flatten(1, 2), sample_weight=weight)
            for i in range(0, min(len(heads), _CURVATURE_TASKS), 50)
        ]
    )
    return {
        **scored_heads(heads, test),
        "adapt_ms": round(1000 * seconds / len(heads), 4),
        "training_seconds": 0.0,
        "gradient_steps": config.prepare.steps * (2 if config.prepare.rho else 1),
        "eigenvalue": {"mean": float(value.mean()), "median": float(value.median()), "std": float(value.std())},
        "eigenvalues": [round(v, 5) for v in value.tolist()],
    }


def _diffusion(shop: Workshop, cell: Cell) -> dict[str, Any]:
    purpose = "selection" if cell.change else "test"
    generator, training = shop.generator(cell)
    tasks, validation = shop.tasks(cell.setting, cell.seed, purpose), shop.tasks(cell.setting, cell.seed, "val")
    noise, chosen = shop.config.evaluate.eta_noise, {}
    if cell.method == "ocd":  # its publication samples with noise; validation tasks say whether that is its best here
        found = {
            eta: float(head_accuracy(shop.sample(cell, generator, validation, eta_noise=eta), validation.query).mean())
            for eta in (0.0, 1.0)
        }
        noise = max(found, key=lambda eta: (found[eta], -eta))
        chosen = {"eta_noise": noise, "validation_accuracy": {str(e): round(100 * a, 3) for e, a in found.items()}}

    adapt = _adapter(shop, cell, {"eta_noise": noise})
    heads = adapt(tasks.support)
    record: dict[str, Any] = {
        **scored_heads(heads, tasks),
        "adapt_ms": round(latency_ms(adapt, tasks.support), 4),
        "gradient_steps": 0,
        **training,
        "chosen": chosen,
    }
    if cell.change:
        record["changed"] = CHANGES[cell.change]
        return record
    fewest = len(set(generator.objective.ends.tolist()))
    record["by_steps"] = {}
    for count in sorted({fewest, FEW_STEPS}):
        if fewest <= count < generator.diffusion.steps:
            few = scored_heads(adapt(tasks.support, num_steps=count), tasks)
            few["adapt_ms"] = round(latency_ms(partial(adapt, num_steps=count), tasks.support), 4)
            record["by_steps"][str(count)] = few
    if cell.method != "ocd":
        record["weight_error"] = weight_error(generator, heads, shop.targets(cell)[:, -1])
        health = asdict(diagnose(generator, heads, tasks.support))
        record["health"] = {key: value if key == "warnings" else round(value, 4) for key, value in health.items()}
    return record


def _analysis(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Theorem 1, the chains of figure 1 and novelty, from the generators of the comparison."""
    test, targets = shop.tasks(cell.setting, cell.seed, "test"), shop.targets(cell)
    eta = shop.config.evaluate.eta_noise
    curves: dict[str, Any] = {}
    reference: WeightGenerator | None = None
    for method in ("mc-di", "mc-di-paper", "tw-di", "mv-di"):
        row = replace(cell, method=method, segments=1 if method == "mv-di" else cell.segments)
        generator, _ = shop.generator(row)
        reference = reference or generator
        curves[method] = target_distances(generator, test, targets, cell.seed, eta, reference.normalizer)
    assert reference is not None
    bank, _ = shop.bank(cell)
    training, _ = bank.gather(torch.arange(min(len(bank), 5000)))
    heads = generate(Sampler(reference), test.support, cell.seed, eta_noise=eta)
    plane = chain_plane(Sampler(reference), test[:1], targets[0], cell.seed, eta)
    return {
        "distances": curves,
        "ends": list(reference.schedule.ends),
        "novelty": novelty(reference, heads, targets[:, -1], training[:, -1]),
        "plane": _rounded(plane),
    }


def _rounded(value: Any) -> Any:
    """JSON-able with four digits, enough for a plot."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
