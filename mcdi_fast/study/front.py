"""What accuracy costs, `python -m mcdi_fast.study.front --dataset omniglot`: sizes of the generator, of its chain and of its training.

Every combination of the given sizes is trained on the same banks and judged on the same *validation* tasks, seed by seed. The record says of each
how far it is behind the best, paired over tasks, and the time of one sample; the picture shows the front. Defaults come from here (docs/choices.md).
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch
from torch import Tensor

from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.cli import Stages, open_run, parse, run_command, stopped
from mcdi_fast.config import AtLeastOne, Options, Seed, TrainConfig
from mcdi_fast.evaluate import VALIDATION_SEED, generate, interval, latency_ms, step_counts
from mcdi_fast.figures import new_figure, png
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.meta import MetaTrainer, fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.report import axis_label, git_sha, machine, number, table
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import atomic_write, make_folder, read_json, write_json
from mcdi_fast.tasks import Metric, Setup, TaskBatch, TaskFamily, find_family
from mcdi_fast.train import check_config, kind_of, main_job

_SIZES = ("widths", "depths", "chains", "segments", "trajectories", "trajectory_steps")
_FREE = ("run_dir", "out", "data_dir", "cache_dir", "seeds", *_SIZES)
_LATENCY_TASKS, _ROUNDS = 8, 7
_SLACK, _SLACK_ACCURACY = 0.01, 0.0005
"""A size is level with the best where it is behind, its interval included, by at most this share of the best's error (the loss, or 1 minus
the accuracy); or by this accuracy, which is more where the error is below 5 %."""


@dataclass(frozen=True)
class FrontConfig(TrainConfig[Options]):
    """Try sizes of the generator, of its chain and of its preparation on validation tasks, and say what each costs.

    All combinations of the lists are tried. Stopped at any moment, the same command goes on; seeds and sizes may be added later: the record is of
    every size in the run folder that has all of the seeds. So several calls try a list of sizes that is no product.
    """

    out: Path | None = None
    """Where the record front-<dataset>.json, the table and the picture go. The run folder by default."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Of tasks, banks and training; --seed is not used."""
    widths: tuple[AtLeastOne, ...] = (32, 64, 128, 256)
    """H."""
    depths: tuple[AtLeastOne, ...] = (1, 2)
    """L."""
    chains: tuple[AtLeastOne, ...] = (6, 20)
    """T."""
    segments: tuple[AtLeastOne, ...] = (3,)
    """k."""
    trajectories: tuple[AtLeastOne, ...] = ()
    """Tasks in the bank; those of --prepare.tasks by default."""
    trajectory_steps: tuple[AtLeastOne, ...] = ()
    """M; --prepare.steps by default."""


def sizes_of(config: FrontConfig[Any]) -> list[dict[str, int]]:
    """All combinations, those on one bank one after the other."""
    axes = {
        "trajectories": config.trajectories or (config.prepare.tasks,),
        "M": config.trajectory_steps or (config.prepare.steps,),
        "k": config.segments,
        "T": config.chains,
        "width": config.widths,
        "depth": config.depths,
    }
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def one_config(config: FrontConfig[Any], size: dict[str, int], seed: int) -> TrainConfig[Any]:
    """The main job of one size. Raises McdiError for sizes that contradict each other."""
    return check_config(
        main_job(
            config,
            seed=seed,
            prepare=replace(config.prepare, tasks=size["trajectories"], steps=size["M"]),
            diffusion=replace(config.diffusion, steps=size["T"], segments=size["k"]),
            denoiser=replace(config.denoiser, width=size["width"], depth=size["depth"]),
        )
    )


def _stem(config: FrontConfig[Any]) -> str:
    return f"front-{config.dataset.replace(':', '-')}"


def front(config: FrontConfig[Any]) -> Path:
    """Make the cells that are missing, then the record, the table and the picture; returns the folder they are in."""
    sizes = sizes_of(config)
    for size in sizes:
        one_config(config, size, 0)
    stem = _stem(config)
    folder = config.run_dir or Path("runs") / stem
    stages = Stages()
    with open_run(folder, config, _FREE):
        setup = Setup(config.data_dir, config.cache_dir, torch.device("cpu"), stages)
        family = find_family(config.dataset).family(config.task, setup)
        with stopped(), stages("cells", len(sizes) * len(config.seeds), "cells") as bar:
            for seed in config.seeds:
                validation = family.tasks("val", 0, config.evaluate.validation_tasks, VALIDATION_SEED + seed)
                for size in sizes:
                    name = "-".join(f"{key}{value}" for key, value in size.items())
                    path = make_folder(folder / "cells") / f"{name}-seed{seed}.json"
                    if not path.exists():
                        one = one_config(config, size, seed)
                        write_json(path, {"size": size, "seed": seed} | _cell(folder, family, one, validation))
                    bar.update()
        cells = complete_cells(folder / "cells", config.seeds)
        with stages("latencies", _ROUNDS, "rounds") as bar:
            measure(folder, family, config, cells, bar.update)
    record = {
        "dataset": config.dataset,
        "task": json.loads(json.dumps(vars(config.task), default=str)),
        "validation_tasks": config.evaluate.validation_tasks,
        "seeds": list(config.seeds),
        "outer_steps": config.meta.steps,
        "machine": machine(),
        "git": git_sha(),
        "metric": family.metric._asdict(),
        "rows": rows_of(cells, family.metric),
    }
    out = make_folder(config.out or folder)
    write_json(out / f"{stem}.json", record)
    atomic_write(out / f"{stem}.md", "\n".join(tabulated(record)).encode())
    atomic_write(out / f"{stem}.png", plot(record))
    return out


def complete_cells(folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The cells of these seeds, of every size that has all of them; seeds in order, so that scores are paired."""
    found: dict[str, dict[int, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        cell = read_json(path)
        found.setdefault(json.dumps(cell["size"]), {})[cell["seed"]] = cell
    return [cells[seed] for cells in found.values() if cells.keys() >= set(seeds) for seed in seeds]


def measure(
    folder: Path, family: TaskFamily, config: FrontConfig[Any], cells: list[dict[str, Any]], on_round: Callable[[], Any]
) -> None:
    """Give cells their "latency_ms", milliseconds of one sample by number of steps: of all sizes in turn, several rounds, the least.

    So sizes can be compared beside other work; measured anew whenever the record is made. Untrained generators: numbers do not change the time.
    """
    tasks = family.tasks("val", 0, _LATENCY_TASKS, VALIDATION_SEED)
    chains: dict[str, tuple[Sampler, dict[str, float]]] = {}
    for cell in cells:
        one = one_config(config, cell["size"], cell["seed"])
        key = json.dumps([asdict(one.diffusion), asdict(one.denoiser)])
        if key not in chains:
            trainer = MetaTrainer(_bank(folder, family, one), one.meta, one.diffusion, one.denoiser)
            chains[key] = Sampler(trainer.generator()), {}
        cell["latency_ms"] = chains[key][1]
    for _ in range(_ROUNDS):
        for sampler, times in chains.values():
            for count in step_counts(sampler.generator):
                found = latency_ms(partial(generate, sampler, first_seed=0, num_steps=count), tasks)
                times[str(count)] = round(min(found, times.get(str(count), found)), 4)
        on_round()


def _bank(folder: Path, family: TaskFamily, config: TrainConfig[Any]) -> TrajectoryBank:
    p, k, seed = config.prepare, config.diffusion.segments, config.seed
    return prepare_bank(folder / "banks" / f"{p.tasks}-{p.steps}-{k}-seed{seed}", family, p, k, seed)


def _cell(folder: Path, family: TaskFamily, config: TrainConfig[Any], validation: TaskBatch) -> dict[str, Any]:
    """Train one size: scores of all validation tasks by outer steps and sampling steps, and the seconds of training."""
    seed, total = config.seed, config.meta.steps
    bank = _bank(folder, family, config)
    points = list[dict[str, Any]]()
    start, waited = time.perf_counter(), 0.0

    def look(generator: WeightGenerator, step: int) -> None:
        nonlocal waited
        now = time.perf_counter()
        sampler, seconds = Sampler(generator), round(now - start - waited, 2)
        for count in step_counts(generator):
            theta = generate(sampler, validation, seed, num_steps=count)
            scores = [round(score, 6) for score in family.scores(theta, validation.query).tolist()]
            points.append({"outer": step, "steps": count, "seconds": seconds, "scores": scores})
        waited += time.perf_counter() - now

    def on_step(trainer: MetaTrainer, loss: Tensor) -> None:
        if trainer.step in (total // 4, total // 2):
            look(trainer.generator(), trainer.step)

    options: dict[str, Any] = {"seed": seed, "on_step": on_step, "progress": False}
    generator = fit(bank, config.meta, config.diffusion, config.denoiser, **options)
    look(generator, total)
    return {"points": points, "parameters": sum(value.numel() for value in generator.phi.values())}


def rows_of(cells: list[dict[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    """A row for each size, number of outer and of sampling steps: mean over all seeds and tasks, minus the best row (paired), costs.

    The best row is the one with the best mean.  Sorted by the time of a sample.
    """
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for point in cell["points"]:
            key = cell["size"] | {"outer": point["outer"], "sampling": point["steps"]}
            row = found.setdefault(json.dumps(key), {"key": key, "scores": [], "seconds": []})
            row["scores"].append(torch.tensor(point["scores"], dtype=torch.float64))
            row["seconds"].append(point["seconds"])
            row["ms"] = cell["latency_ms"][str(point["steps"])]
            row["kilobytes"] = round(4 * cell["parameters"] / 1000)
    sign = 1 if metric.higher_is_better else -1
    every = {name: torch.cat(row["scores"]) for name, row in found.items()}
    best = max(every.values(), key=lambda one: sign * float(one.mean()))
    error = 1 - float(best.mean()) if metric.higher_is_better else float(best.mean())
    slack = max(_SLACK * error, _SLACK_ACCURACY if metric.name == "accuracy" else 0.0)
    rows = []
    for name, row in found.items():
        behind = sign * (best - every[name])
        mean, half = float(behind.mean()), interval(behind)
        rows.append(
            row["key"]
            | {
                "mean": metric.factor * float(every[name].mean()),
                "behind": metric.factor * mean,
                "behind_ci95": metric.factor * half,
                "level": mean + half <= slack,
                "ms": row["ms"],
                "training_seconds": round(sorted(row["seconds"])[len(row["seconds"]) // 2], 1),
                "kilobytes": row["kilobytes"],
            }
        )
    return sorted(rows, key=lambda row: (row["ms"], row["training_seconds"]))


def front_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no quicker row is as good as, quickest first."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if not kept or row["behind"] < kept[-1]["behind"] - 1e-6:
            kept.append(row)
    return kept


def tabulated(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: the front, and the quickest row that is level with the best."""
    rows, metric = record["rows"], record["metric"]
    knee = next(row for row in rows if row["level"])
    shown = front_of(rows) + [knee] * (knee not in front_of(rows))
    lines, digits = [], 3 if metric["factor"] > 1 else 5
    for row in sorted(shown, key=lambda row: row["ms"]):
        sizes = [row[key] for key in ("width", "depth", "T", "k", "sampling", "outer")]
        behind = f"{row['behind']:.{digits}f} ± {row['behind_ci95']:.{digits}f}"
        costs = [f"{row['ms']:.3f}", f"{row['training_seconds']:.0f}", row["kilobytes"]]
        line = [*sizes, number(row["mean"]), behind, *costs]
        lines.append([f"**{cell}**" for cell in line] if row is knee else line)
    header = f"H|L|T|k|sampling steps|outer steps|{axis_label(metric)}|behind the best|one sample, ms|training, s|kB"
    text = f"{record['dataset']}: {len(rows)} rows, {len(record['seeds'])} seeds of {record['validation_tasks']} validation tasks."
    return [f"{text} Bold: the quickest that is level with the best.", "", *table(header.split("|"), lines)]


def plot(record: dict[str, Any]) -> bytes:
    """Every fully trained row by the time of its sample; the front as a line, with the sizes of its networks; the knee of several seeds as a ring."""
    figure, ax = new_figure()
    metric, last = record["metric"], record["outer_steps"]
    rows = [row for row in record["rows"] if row["outer"] == last]
    ax.margins(x=0.1)
    ax.plot([row["ms"] for row in rows], [row["mean"] for row in rows], ".", ms=3, color="0.7")
    line = front_of(rows)
    ax.plot([row["ms"] for row in line], [row["mean"] for row in line], "o-", ms=4)
    first = []
    if len(record["seeds"]) > 1:  # one seed's interval is wider than what counts as level
        first = [row for row in rows if row["level"]][:1]  # none where fewer outer steps are better
        ax.plot([row["ms"] for row in first], [row["mean"] for row in first], "o", ms=9, mfc="none", color="C1")
    ylabel = f"{metric['name']} (validation), {metric['unit']}".rstrip(", ")
    ax.set(xscale="log", xlabel="one sample on one thread, ms", ylabel=ylabel)
    ticks = [digit * 10.0**power for power in range(-3, 4) for digit in (1, 2, 5)]
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in ticks if low < tick < high], minor=False)
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter("{x:g}")
    _label(ax, first + line, below=metric["higher_is_better"])
    return png(figure)


def _label(ax: Any, rows: list[dict[str, Any]], below: bool) -> None:
    """The network of each row beside its point, on the side of the front where no line is; once each, the first rows first, never on one another."""
    side = -11 if below else 4
    places = ((7, side, "left"), (-7, -7 - side, "right"), (7, -7 - side, "left"), (-7, side, "right"))
    shown, taken = set[str](), list[Any]()
    ax.figure.draw_without_rendering()
    for row in rows:
        label = f"{row['width']} x {row['depth']}"
        for x, y, align in places:
            if label in shown:
                break
            note = ax.annotate(
                label, (row["ms"], row["mean"]), xytext=(x, y), textcoords="offset points", ha=align, fontsize=8
            )
            box = note.get_window_extent()
            if any(box.overlaps(other) for other in taken):
                note.remove()
            else:
                shown.add(label)
                taken.append(box)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""

    def run() -> None:
        config = parse(kind_of(FrontConfig), "mcdi_fast.study.front", arguments)
        print((front(config) / f"{_stem(config)}.md").read_text())

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
