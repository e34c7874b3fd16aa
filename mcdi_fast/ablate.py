"""The paper's comparison, `python -m mcdi_fast.ablate --dataset omniglot`: every method on the same tasks, cell by cell, resumable.

A cell is one method in one setting with one seed and one preparation; it becomes one JSON record in `<run-dir>/cells`, and cells that are
there are never computed again. Stop it at any moment and give the same command again. From the records come the tables
(ablate_report.py); `--out docs` puts them where the repository keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # as in train.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: page faults were half of the backbone's training time

import torch
from torch import Tensor, nn

from mcdi_fast import backbone as bb
from mcdi_fast.ablate_report import publish, render
from mcdi_fast.analysis import diagnose, largest_eigenvalue, novelty, target_distances, weight_error
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.baselines import (
    ReptileConfig,
    ReptileNet,
    adapt_head,
    check_reptile,
    prepare_difference_bank,
    reptile_head,
    row_shares,
)
from mcdi_fast.config import (
    BackboneConfig,
    DenoiserConfig,
    DiffusionConfig,
    EvaluateConfig,
    MetaConfig,
    PrepareConfig,
    TaskConfig,
    TrainConfig,
    default_config,
)
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import FeatureTasks, chain_plane, draw_tasks, finetune, generate, interval, latency_ms
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_accuracy, prototype_head, support_condition
from mcdi_fast.impl import check_device
from mcdi_fast.meta import MetaTrainer, fit
from mcdi_fast.prepare import prepare_bank, train_task_heads
from mcdi_fast.report import machine
from mcdi_fast.sampler import Sampler
from mcdi_fast.schedule import Schedule
from mcdi_fast.store import (
    load_tensors,
    make_folder,
    read_json,
    remove_temporaries,
    save_tensors,
    write_json,
)
from mcdi_fast.tasks import FewShotData, check_episodes, load_dataset, sample_episodes
from mcdi_fast.train import _TEST_SEED, _VALIDATION_SEED, StoppedError, check_config, open_run, run_command

SettingName = Literal["5way1shot", "5way5shot", "20way1shot"]
MethodName = Literal[
    "prototype",
    "finetune",
    "finetune-decay",
    "reptile-head",
    "reptile-net",
    "ocd",
    "mv-di",
    "tw-di",
    "mc-di-paper",
    "mc-di",
    "ceiling",
]
VariantName = Literal["sam-augment", "sam", "augment", "plain"]
PartName = Literal["comparison", "analysis", "variants", "segments", "selection", "latency"]

SETTINGS: dict[str, TaskConfig] = {
    "5way1shot": TaskConfig(5, 1),
    "5way5shot": TaskConfig(5, 5),
    "20way1shot": TaskConfig(20, 1),
}
METHODS: tuple[MethodName, ...] = MethodName.__args__  # type: ignore[attr-defined]
PREPARED = (
    "ocd",
    "mv-di",
    "tw-di",
    "mc-di-paper",
    "mc-di",
    "ceiling",
)  # their training data is what the preparation makes
OBJECTIVES = {
    "mv-di": "vanilla",
    "tw-di": "naive-local",
    "mc-di-paper": "local-consistency",
    "mc-di": "local-consistency",
}
VARIANTS: tuple[VariantName, ...] = VariantName.__args__  # type: ignore[attr-defined]
PARTS: tuple[PartName, ...] = PartName.__args__  # type: ignore[attr-defined]
_CURVATURE_TASKS = 200  # whose Hessian is looked at: half a minute for 20-way heads
FEW_STEPS = 5  # of the short chain that is reported beside the whole one

# One change of Mc-Di at a time, judged on validation characters: dotted options, and three that are no options (`bank`, `sampler`, `form`).
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "window-whole": {"diffusion.window": "whole"},
    "carry-full": {"sampler": {"carry": "full"}},
    "schedule-start-0.5": {"diffusion.beta_start": 0.5},
    "schedule-start-0.95": {"diffusion.beta_start": 0.95},
    "schedule-end-0.001": {"diffusion.beta_end": 0.001},
    "schedule-end-0.1": {"diffusion.beta_end": 0.1},
    "schedule-end-0.3": {"diffusion.beta_end": 0.3},
    "schedule-end-0.5": {"diffusion.beta_end": 0.5},
    "T-6": {"diffusion.steps": 6},
    "T-10": {"diffusion.steps": 10},
    "T-40": {"diffusion.steps": 40},
    "full-noise": {"sampler": {"eta_noise": 1.0}},
    "half-noise": {"sampler": {"eta_noise": 0.5}},
    "3-sampling-steps": {"sampler": {"num_steps": 3}},
    "5-sampling-steps": {"sampler": {"num_steps": 5}},
    "B-8": {"meta.meta_batch": 8},
    "B-128": {"meta.meta_batch": 128},
    "S-1": {"meta.samples": 1},
    "S-16": {"meta.samples": 16},
    "K-1": {"meta.inner_steps": 1},
    "inner-rate-0.02": {"meta.inner_rate": 0.02},
    "plain-reptile-outer": {"meta.outer": "reptile", "meta.outer_rate": 1.0},
    "outer-rate-0.001": {"meta.outer_rate": 0.001},
    "outer-rate-0.01": {"meta.outer_rate": 0.01},
    "no-ema": {"meta.ema": 0.0},
    "M-30": {"prepare.steps": 30},
    "M-120": {"prepare.steps": 120},
    "rho-0": {"prepare.rho": 0.0},
    "rho-0.2": {"prepare.rho": 0.2},
    "rho-0.5": {"prepare.rho": 0.5},
    "decay-0.001": {"prepare.weight_decay": 0.001},
    "decay-0.01": {"prepare.weight_decay": 0.01},
    "support-share-0.5": {"prepare.support_share": 0.5},
    "support-share-1": {"prepare.support_share": 1.0},
    "no-augmentation": {"prepare.copies": 1},
    "4-copies": {"prepare.copies": 4},
    "twice-the-tasks": {"prepare.tasks": 2.0},  # a factor: the budget's own number is the base
    "residual-to-prototype-head": {"bank": "residual"},
    "condition-prototypes": {"bank": "prototypes"},
    "condition-spread": {"bank": "spread"},
    "condition-all-support": {"bank": "support"},
    "width-128": {"denoiser.width": 128},
    "width-512": {"denoiser.width": 512},
    "depth-1": {"denoiser.depth": 1},
    "depth-4": {"denoiser.depth": 4},
    "no-skip": {"form": "no-skip"},
    "unscaled-residual": {"form": "unscaled-residual"},
    "normalizer-floor-0.03": {"form": "floor-0.03"},
    "normalizer-floor-1": {"form": "floor-1"},
    "half-the-steps": {"meta.steps": 0.5},
    "twice-the-steps": {"meta.steps": 2.0},
}


@dataclass(frozen=True)
class AblateConfig:
    """Compare the methods on the same tasks: every row of the paper's tables, with intervals, times and gradient steps.

    The work is a list of cells (setting x seed x method x preparation); each that is finished is a record under the run folder and is never
    computed again. Stopped at any moment, the same command goes on. Which cells to compute (settings, seeds, methods, parts) may change
    from call to call; the budget and every other setting belong to the run folder.
    """

    dataset: Literal["glyphs", "omniglot"] = "omniglot"
    """glyphs: built in, drawn by rule, needs no data. omniglot: real; downloaded unless found."""
    run_dir: Path | None = None
    """Where cells, banks, generators and the report go; runs/ablate-<dataset> by default."""
    out: Path | None = None
    """Where results.md, figures/ and records/ go; the run folder by default, `docs` for the repository's own."""
    data_dir: Path | None = None
    """Folder that holds omniglot/…; without it MCDI_DATA_DIR, then a download."""
    cache_dir: Path = Path("runs/cache")
    """Downloads, trained backbones and features, shared by runs."""
    settings: tuple[SettingName, ...] = ("5way1shot", "5way5shot", "20way1shot")
    """Which few-shot settings. The first is also the one of the parts analysis, segments and selection."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of tasks, starts, noise and training; the backbone has its own. The part selection uses the first."""
    methods: tuple[MethodName, ...] = METHODS
    """Which rows of the comparison."""
    variants: tuple[VariantName, ...] = VARIANTS
    """Preparations: with and without SAM and augmentation. The part comparison uses sam-augment, the part variants the others."""
    parts: tuple[PartName, ...] = PARTS
    """comparison: the rows. analysis: theorem 1, chains, novelty. variants: the rows without SAM or augmentation. segments: k against
    accuracy. selection: one change at a time, on validation characters. latency: every row's time for one task, one row after the other in
    one process; ask for it again, on an idle machine, after removing `cells/*latency.json`."""
    segment_numbers: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """k of the part segments; M is rounded up to a multiple of each."""
    changes: tuple[str, ...] = tuple(CHANGES)
    """Which changes the part selection tries."""
    time_limit: float | None = None
    """Stop after about so many seconds at a point from which the same command goes on (exit code 3); no limit by default."""
    threads: int | None = None
    """Of torch; its own choice by default."""
    device: str = "cpu"
    """cpu, cuda or cuda:<number>: backbone, preparation, meta-training, sampling and Reptile's whole network go there; small sums stay on
    the CPU. No GPU has run it yet."""
    report_only: bool = False
    """Compute nothing: write tables and figures from the records there are."""
    keep_banks: bool = False
    """Keep the trajectory banks (up to some 100 MB each); else each goes when no asked-for cell needs it any more."""
    queries: int = 15
    """Query images a class (protocol)."""
    selection_tasks: int = 1000
    """Validation tasks that judge a change; other ones than those that choose rates."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prepare: PrepareConfig = field(default_factory=lambda: PrepareConfig(tasks=5000))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    meta: MetaConfig = field(default_factory=lambda: MetaConfig(steps=300, checkpoint_every=50))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    reptile: ReptileConfig = field(default_factory=ReptileConfig)


# What a run folder may be asked for with other values than before.
FREE = (
    "run_dir out data_dir cache_dir settings seeds methods variants parts segment_numbers changes time_limit threads device "
    "report_only keep_banks"
).split()


class PausedError(Exception):
    """The time limit is reached; what was made so far is kept."""


@dataclass(frozen=True)
class Cell:
    """One record to make.

    Attributes:
        method: a `MethodName`, "analysis" or "latency". variant: "" where the preparation does not matter. segments: k, 0 where it does not matter.
        change: a name of `CHANGES` for the part selection (then on validation tasks), else "".
    """

    setting: str
    seed: int
    method: str
    variant: str = ""
    segments: int = 0
    change: str = ""

    @property
    def name(self) -> str:
        """Of its record."""
        parts = [
            self.setting,
            f"seed{self.seed}",
            self.method,
            self.variant,
            f"k{self.segments}" if self.segments else "",
        ]
        return "_".join(part for part in [*parts, self.change] if part)


def plan(config: AblateConfig) -> list[Cell]:
    """The cells that a configuration asks for, in the order in which they are made, none twice."""
    k = config.diffusion.segments
    cells: list[Cell] = []

    def rows(setting: str, seed: int, variant: str) -> Iterable[Cell]:
        for method in config.methods:
            if method in PREPARED:
                segments = {"mc-di": k, "mc-di-paper": k, "tw-di": k}.get(method, 1 if method != "ceiling" else 0)
                yield Cell(setting, seed, method, variant, segments)
            elif variant == "sam-augment":
                yield Cell(setting, seed, method)

    first = config.settings[0]
    for setting in config.settings:
        for seed in config.seeds:
            if "comparison" in config.parts and "sam-augment" in config.variants:
                cells += rows(setting, seed, "sam-augment")
            if "analysis" in config.parts and setting == first:
                cells.append(Cell(setting, seed, "analysis", "sam-augment", k))
    if "segments" in config.parts:
        cells += [Cell(first, s, "mc-di", "sam-augment", n) for s in config.seeds for n in config.segment_numbers]
    if "variants" in config.parts:
        for setting in config.settings:
            for seed in config.seeds:
                for variant in config.variants:
                    if variant != "sam-augment":
                        cells += [cell for cell in rows(setting, seed, variant) if cell.method in PREPARED]
    if "selection" in config.parts:
        cells += [Cell(first, config.seeds[0], "mc-di", "sam-augment", k, change) for change in config.changes]
    if "latency" in config.parts:
        cells += [Cell(setting, config.seeds[0], "latency") for setting in config.settings]
    return list(dict.fromkeys(cells))


def check_ablate(config: AblateConfig) -> None:
    """Raise McdiError, naming the option, for whatever can be seen to be wrong before any work is done."""
    for name in ("settings", "seeds", "parts", "methods", "variants", "segment_numbers", "changes"):
        values = getattr(config, name)
        if not values:
            raise McdiError(f"--{name.replace('_', '-')}: found none, expected at least one")
        if len(set(values)) < len(values):
            raise McdiError(f"--{name.replace('_', '-')} {' '.join(map(str, values))}: one stands twice")
    for seed in config.seeds:
        if not 0 <= seed < _TEST_SEED:
            raise McdiError(f"--seeds {seed}: expected 0 to {_TEST_SEED - 1}")
    unknown = [change for change in config.changes if change not in CHANGES]
    if unknown:
        raise McdiError(f"--changes {unknown[0]!r}: expected some of {', '.join(CHANGES)}")
    if config.time_limit is not None and not config.time_limit > 0:
        raise McdiError(f"--time-limit = {config.time_limit}: expected a positive number of seconds")
    if config.threads is not None and config.threads < 1:
        raise McdiError(f"--threads = {config.threads}: expected at least 1")
    if config.selection_tasks < 2:
        raise McdiError(f"--selection-tasks = {config.selection_tasks}: expected at least 2, for an interval")
    check_device(config.device)
    check_reptile(config.reptile)
    if not plan(config):
        raise McdiError("no cell to make: --parts, --methods and --variants exclude each other; ask for more of them")
    for cell in plan(config):
        check_config(train_config(config, cell))


def train_config(config: AblateConfig, cell: Cell) -> TrainConfig:
    """A cell's settings as those of a main job: preparation variant, segments and change applied."""
    prepare = config.prepare
    if cell.variant in ("plain", "augment"):
        prepare = replace(prepare, rho=0.0)
    if cell.variant in ("plain", "sam"):
        prepare = replace(prepare, copies=1)
    k = cell.segments or config.diffusion.segments
    diffusion = replace(config.diffusion, segments=k)
    if cell.method in OBJECTIVES:
        diffusion = replace(diffusion, objective=OBJECTIVES[cell.method])  # type: ignore[arg-type]
    if cell.method == "mc-di-paper":
        diffusion = replace(diffusion, window="whole", carry="full")
    meta = config.meta
    if cell.method == "ocd":
        # plain stochastic gradients: one "inner step", which sees what the others see in all of theirs
        diffusion = replace(diffusion, objective="vanilla")
        meta = replace(meta, inner_steps=1, samples=meta.samples * meta.inner_steps, outer="adam")
    result = TrainConfig(
        dataset=config.dataset,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        seed=cell.seed,
        task=replace(SETTINGS[cell.setting], queries=config.queries),
        backbone=config.backbone,
        prepare=prepare,
        diffusion=diffusion,
        denoiser=config.denoiser,
        meta=meta,
        evaluate=config.evaluate,
    )
    for key, value in CHANGES[cell.change].items() if cell.change else ():
        if "." in key:
            part, name = key.split(".")
            old = getattr(getattr(result, part), name)
            new = round(old * value) if isinstance(old, int) and isinstance(value, float) else value
            result = replace(result, **{part: replace(getattr(result, part), **{name: new})})
    steps = -(-result.prepare.steps // k) * k  # every k divides its own M
    return replace(result, prepare=replace(result.prepare, steps=steps))


class Workshop:
    """Data, tasks, banks and generators that cells share, made when first asked for."""

    def __init__(self, config: AblateConfig, data: FewShotData, folder: Path, deadline: float, bar: Callable[..., Any]):
        """Deadline: of time.monotonic(). bar: makes a progress bar (tqdm)."""
        self.config, self.data, self.folder, self.deadline, self.bar = config, data, folder, deadline, bar
        self.device = torch.device(config.device)
        self._sampler: tuple[WeightGenerator, Sampler] | None = None
        self.copies = max(train_config(config, cell).prepare.copies for cell in plan(config))
        self.network: Callable[[], nn.Module] = cache(self._network)
        self.features: Callable[[], dict[str, Tensor]] = cache(self._features)
        self.tasks: Callable[[str, int, str], FeatureTasks] = lru_cache(4)(self._tasks)

    def pause_if_late(self) -> None:
        """Raise PausedError behind the deadline; called where nothing is lost."""
        if time.monotonic() > self.deadline:
            raise PausedError

    # ------------------------------------------------------------------ shared parts

    def _network(self) -> nn.Module:
        cache_dir, every = make_folder(self.config.cache_dir / "backbones"), self.config.backbone.checkpoint_every
        with self.bar("backbone", self.config.backbone.steps, "episodes") as bar:

            def on_step(step: int, loss: float) -> None:
                if step % every == 1 % every and bar.n > first + 1:  # one step behind a checkpoint of this call
                    self.pause_if_late()
                bar.update()

            first = 0

            def on_start(step: int) -> None:
                nonlocal first
                first = step
                bar.update(step)

            return bb.train_backbone(
                self.data, self.config.backbone, cache_dir, device=self.device, on_start=on_start, on_step=on_step
            )

    def _features(self) -> dict[str, Tensor]:
        """Train, val, test: float32 [copies, classes, drawers, F], the images and augmented ones (val: the images)."""
        name = f"{bb.fingerprint(self.data, self.config.backbone, self.device)}-{self.copies}.safetensors"
        path = make_folder(self.config.cache_dir / "features") / name
        if path.exists():
            return load_tensors(path, "features")[0]
        network, result = self.network(), {}
        parts = {"train": self.data.train, "val": self.data.val, "test": self.data.test}
        with self.bar("features", 2 * self.copies + 1, "sets") as bar:
            for split, images in parts.items():
                copies = 1 if split == "val" else self.copies
                made = []
                for copy in range(copies):
                    made.append(bb.extract_features(network, images, augment_seed=copy or None).cpu())
                    bar.update()
                result[split] = torch.stack(made)
        save_tensors(path, result, {"data": self.data.name}, "features")
        return result

    def _tasks(self, setting: str, seed: int, purpose: str) -> FeatureTasks:
        """Purpose: "test"; "val", which chooses rates; "selection", validation characters again, other tasks."""
        c, task = self.config, replace(SETTINGS[setting], queries=self.config.queries)
        split, count, first = {
            "test": ("test", c.evaluate.tasks, _TEST_SEED),
            "val": ("val", c.evaluate.validation_tasks, _VALIDATION_SEED),
            "selection": ("val", c.selection_tasks, _VALIDATION_SEED + _TEST_SEED),
        }[purpose]
        return draw_tasks(self.features()[split][0], task, count, first + seed)

    def targets(self, cell: Cell, purpose: str = "test") -> Tensor:
        """What the cell's preparation would make for the tasks, from every image of their classes: [B, k, ways, F + 1]."""
        config, tasks = train_config(self.config, cell), self.tasks(cell.setting, cell.seed, purpose)
        every = tasks.every.unsqueeze(0)
        if purpose == "test" and config.prepare.copies > 1:
            others = [
                draw_tasks(copy, config.task, len(tasks), _TEST_SEED + cell.seed).every
                for copy in self.features()["test"][1 : config.prepare.copies]
            ]
            every = torch.stack([tasks.every, *others])
        generator = torch.Generator().manual_seed(cell.seed)
        k = config.diffusion.segments
        return train_task_heads(every, config.task.shots, config.prepare, generator, k)

    # ------------------------------------------------------------------ banks

    def bank_name(self, cell: Cell) -> str:
        """The folder of the bank that a cell trains on; "" where it needs none."""
        if cell.method not in (*OBJECTIVES, "ocd", "analysis"):
            return ""
        config = train_config(self.config, cell)
        parts = [cell.setting, f"seed{cell.seed}", cell.variant]
        if cell.method == "ocd":
            return "_".join([*parts, "difference"])
        # one bank of k targets serves all three objectives: Mv-Di takes the last
        k = self.config.diffusion.segments if cell.method == "mv-di" else config.diffusion.segments
        changed = [f"{key}={value}" for key, value in self._bank_changes(cell).items()]
        return "_".join([*parts, f"k{k}", *changed])

    @staticmethod
    def _bank_changes(cell: Cell) -> dict[str, Any]:
        items = CHANGES[cell.change].items() if cell.change else ()
        return {key: value for key, value in items if key.startswith("prepare.")}

    def bank(self, cell: Cell) -> tuple[TrajectoryBank, float]:
        """The bank a cell trains on and the seconds that making it took."""
        name, config = self.bank_name(cell), train_config(self.config, cell)
        folder = self.folder / "banks" / name
        if cell.method == "mv-di":  # shared with the other objectives
            config = train_config(self.config, replace(cell, method="mc-di", segments=self.config.diffusion.segments))
        copies = self.features()["train"][: config.prepare.copies].to(self.device)
        meta = {
            "backbone": bb.fingerprint(self.data, config.backbone, self.device),
            "prepare": asdict(config.prepare),
            "task": asdict(config.task),
            "seed": config.seed,
        }
        clock = _Stopwatch(self.folder / "partial" / f"bank_{name}.json")
        with self.bar(f"bank {name}", config.prepare.tasks, "tasks") as bar:

            def on_tasks(count: int) -> None:
                bar.update(count)
                clock.save()
                self.pause_if_late()

            options: dict[str, Any] = {"meta": meta, "on_start": bar.update, "on_tasks": on_tasks}
            if cell.method == "ocd":
                bank = prepare_difference_bank(folder, copies, config.task, config.prepare, config.seed, **options)
            else:
                k = config.diffusion.segments
                bank = prepare_bank(folder, copies, config.task, config.prepare, k, config.seed, **options)
        return bank, clock.before

    def view(self, cell: Cell, bank: TrajectoryBank) -> TrajectoryBank:
        """The bank as the cell sees it: Mv-Di only the last target; other conditions or residual targets for some changes."""
        what = "last" if cell.method == "mv-di" else CHANGES[cell.change].get("bank", "") if cell.change else ""
        if not what:
            return bank
        folder = self.folder / "banks" / f"{self.bank_name(cell)}_{what}"
        shutil.rmtree(folder, ignore_errors=True)  # cheap to make: never resumed
        task = train_config(self.config, cell).task
        made: TrajectoryBank | None = None
        for start in range(0, len(bank), 500):
            index = torch.arange(start, min(start + 500, len(bank)))
            targets, condition = bank.gather(index)
            if what == "last":
                targets = targets[:, -1:]
            elif what == "residual":
                targets = targets - condition.unsqueeze(1)  # the condition is the prototype head
            else:
                condition = other_condition(what, self._support(task, cell.seed, index))
            if made is None:
                made = TrajectoryBank.create(
                    folder, bank.layout, targets.shape[1], condition.shape[-1], {**bank.meta, "view": what}
                )
            made.append(targets, condition)
        assert made is not None
        return made

    def _support(self, task: TaskConfig, seed: int, index: Tensor) -> Tensor:
        """Support features of tasks of a bank: [B, ways, shots, F]."""
        images = self.features()["train"][0]
        classes, drawers = images.shape[:2]
        episodes = sample_episodes(
            classes,
            drawers,
            ways=task.ways,
            shots=task.shots,
            queries=drawers - task.shots,
            seed=seed,
            start=int(index[0]),
            count=len(index),
        )
        return episodes.take(images)[0]

    # ------------------------------------------------------------------ generators

    def generator(self, cell: Cell) -> tuple[WeightGenerator, dict[str, Any]]:
        """The trained generator of a cell, from disk where it is there, and `training_seconds`, `preparation_seconds`, `curve`."""
        if set(CHANGES[cell.change] if cell.change else ()) <= {"sampler"}:
            cell = replace(cell, change="")  # trained as in the comparison
        folder = self.folder / "generators" / cell.name
        if (folder / "config.json").exists():
            generator = WeightGenerator.from_pretrained(folder)
            return generator, generator.provenance["training"]
        config = train_config(self.config, cell)
        bank, seconds = self.bank(cell)
        bank = self.view(cell, bank)
        validation = self.tasks(cell.setting, cell.seed, "val")
        checkpoint = self.folder / "partial" / f"{cell.name}.safetensors"
        clock = _Stopwatch(checkpoint.with_suffix(".json"))
        begun: list[int] = []
        every = config.meta.checkpoint_every
        with self.bar(cell.name, config.meta.steps, "steps") as bar:

            def on_start(trainer: MetaTrainer) -> None:
                bar.update(trainer.step)
                begun.append(trainer.step)
                clock.extra["curve"] = [p for p in clock.extra.get("curve", []) if p[0] <= trainer.step]

            def on_step(trainer: MetaTrainer, loss: Tensor) -> None:
                bar.update()
                if trainer.checkpoint_due():
                    with clock.stopped():
                        heads = self.sample(cell, trainer.generator(), validation)
                        accuracy = 100 * float(head_accuracy(heads, validation.query).mean())
                    clock.extra["curve"].append([trainer.step, round(float(loss), 5), round(accuracy, 3)])
                    clock.save()
                elif (
                    trainer.step % every == 1 % every and trainer.step > begun[0] + 1
                ):  # one step behind a checkpoint of this call
                    self.pause_if_late()

            generator = fit(
                bank,
                config.meta,
                config.diffusion,
                config.denoiser,
                seed=config.seed,
                checkpoint=checkpoint,
                device=self.device,
                on_start=on_start,
                on_step=on_step,
            )
        training = {
            "training_seconds": round(clock.seconds(), 2),
            "preparation_seconds": round(seconds, 2),
            "curve": clock.extra["curve"],
        }
        generator = replace(generator, provenance={"cell": asdict(cell), "training": training})
        generator.save_pretrained(folder)
        for path in (checkpoint, clock.path):
            path.unlink(missing_ok=True)
        return generator, training

    def sample(self, cell: Cell, generator: WeightGenerator, tasks: FeatureTasks, **options: Any) -> Tensor:
        """Heads of tasks, [B, ways, F + 1], the way the cell samples."""
        options = {"eta_noise": self.config.evaluate.eta_noise, **options}
        change = CHANGES[cell.change] if cell.change else {}
        options |= change.get("sampler", {})
        if "carry" in options:
            generator = replace(generator, diffusion=replace(generator.diffusion, carry=options.pop("carry")))
        what = change.get("bank", "")
        if self._sampler is None or self._sampler[0] is not generator:
            self._sampler = generator, Sampler(generator, self.device)
        plain = what in ("", "residual")
        condition = support_condition(tasks.support) if plain else other_condition(what, tasks.support)
        seeds = range(cell.seed, cell.seed + len(tasks))
        heads = self._sampler[1].sample(condition.to(self.device), seeds, **options).tokens.cpu()
        if cell.method == "ocd" or what == "residual":
            heads = heads + prototype_head(tasks.support)
        return heads


def other_condition(what: str, support: Tensor) -> Tensor:
    """Conditions other than the default: [B, ways, shots, F] -> [B, ways, C].

    prototypes: without the squared norm. spread: the default and the deviation within each class. support: all features, in order.
    """
    if what == "prototypes":
        return support.mean(-2)
    if what == "spread":
        return torch.cat([prototype_head(support), support.std(-2, unbiased=False)], -1)
    if what == "support":
        return torch.cat([prototype_head(support), support.flatten(-2)], -1)
    raise McdiError(f"condition {what!r}: expected prototypes, spread or support")


def other_form(name: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which f or the normaliser has another form, to learn what the default brings: too little for an option of its own.

    no-skip: f = scale net, with the deviation of f as scale. unscaled-residual: f = skip x + net. floor-<number>: of `Normalizer.fit`.
    """
    if name.startswith("floor-"):
        return mock.patch("mcdi_fast.meta._FLOOR", float(name.removeprefix("floor-")))
    if name == "unscaled-residual":
        return mock.patch.object(Schedule, "scale", lambda self: torch.ones_like(self.alpha))
    if name == "no-skip":
        stack = contextlib.ExitStack()

        def deviation(self: Schedule) -> Tensor:
            a = self.abar_segment[self.next_segment(), torch.arange(self.num_steps)]
            return ((1 - self.abar[:-1]) / (1 - a)).sqrt()

        stack.enter_context(mock.patch.object(Schedule, "skip", lambda self: torch.zeros_like(self.alpha)))
        stack.enter_context(mock.patch.object(Schedule, "scale", deviation))
        return stack
    return contextlib.nullcontext()


class _Stopwatch:
    """Seconds of a piece of work over all its interruptions, kept beside its checkpoint, with some JSON of its own."""

    def __init__(self, path: Path):
        found: dict[str, Any] = read_json(path) if path.exists() else {"seconds": 0.0, "extra": {}}
        self.path, self.before, self.extra = path, float(found["seconds"]), found["extra"]
        self._start = time.perf_counter()

    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self._start

    def save(self) -> None:
        """Keep the seconds so far."""
        self.before, self._start = self.seconds(), time.perf_counter()
        write_json(self.path, {"seconds": self.before, "extra": self.extra})

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        """Context in which time does not count."""

        @contextlib.contextmanager
        def pause() -> Iterator[None]:
            start = time.perf_counter()
            yield
            self._start += time.perf_counter() - start

        return pause()


# ---------------------------------------------------------------------- cells


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
        with other_form(CHANGES[cell.change].get("form", "") if cell.change else ""):
            made = _diffusion(shop, cell)
    elif cell.method in work:
        made = work[cell.method](shop, cell)
    else:
        made = _support_only(shop, cell)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"cell": asdict(cell), "date": today, **made, "machine": machine()}


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
        for rate in c.finetune_rates:
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
    """Resumable by outer steps and by evaluated tasks."""
    c, task = shop.config.reptile, replace(SETTINGS[cell.setting], queries=shop.config.queries)
    progress = shop.folder / "partial" / f"{cell.name}.json"
    done: dict[str, Any] = read_json(progress) if progress.exists() else {}
    network, steps = shop.network(), sorted(c.net_test_steps)
    seconds: dict[str, float] = done.setdefault("seconds", {})
    models: dict[float, ReptileNet] = {}
    with shop.bar(cell.name, c.net_steps * len(c.net_rates), "steps") as bar:
        for rate in c.net_rates:
            path = shop.folder / "partial" / f"{cell.name}_rate{rate}.safetensors"
            model = models[rate] = ReptileNet(network, task.ways, c, rate, cell.seed)
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
        position = torch.arange(images.num_classes * images.num_drawers).view(images.num_classes, images.num_drawers, 1)
        seed = {"val": _VALIDATION_SEED, "test": _TEST_SEED}[purpose] + cell.seed
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
    for rate, model in models.items():
        counts = done.setdefault("validation", {}).setdefault(str(rate), [])
        count_correct(model, "val", "val", validation_total, counts, steps)
        mean = torch.tensor(counts, dtype=torch.float64).mean(0) / (task.ways * task.queries)
        tried += [(float(mean[i]), -steps[i], rate) for i in range(len(steps))]
    accuracy, count, rate = max(tried)
    counts = done.setdefault("test", [])
    count_correct(models[rate], "test", "test", shop.config.evaluate.tasks, counts, [-count])
    some = torch.from_numpy(shop.data.test.images[: task.ways])
    x, query = bb.to_float(some[:, : task.shots]), bb.to_float(some[:, task.shots : task.shots + 1])
    label, times = torch.arange(task.ways).repeat_interleave(task.shots), []
    for _ in range(5):
        begun = time.perf_counter()
        models[rate].adapt(x, label, query, [-count])
        times.append(1000 * (time.perf_counter() - begun))
    for rest in progress.parent.glob(f"{cell.name}*"):
        rest.unlink()
    return {
        **scored(torch.tensor(counts)[:, 0], task.ways * task.queries),
        "adapt_ms": round(sorted(times)[2], 3),
        "training_seconds": round(seconds[str(rate)], 2),
        "gradient_steps": -count,
        "chosen": {"rate": rate, "steps": -count, "validation_accuracy": round(100 * accuracy, 3)},
    }


def _ceiling(shop: Workshop, cell: Cell) -> dict[str, Any]:
    """Heads trained on every image of the test classes, and the curvature of their loss (theorem 2)."""
    config, test = train_config(shop.config, cell), shop.tasks(cell.setting, cell.seed, "test")
    begun = time.perf_counter()
    heads = shop.targets(cell)[:, -1]
    seconds = time.perf_counter() - begun
    ways, drawers = test.every.shape[1:3]
    weight = row_shares(ways, drawers, config.task.shots, config.prepare.support_share)
    value = torch.cat(
        [
            largest_eigenvalue(heads[i : i + 50], test.every[i : i + 50].flatten(1, 2), row_weight=weight)
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


# ---------------------------------------------------------------------- the command


def ablate(config: AblateConfig) -> bool:
    """Make the cells asked for and the report; returns whether all are there (False: the time limit came first)."""
    check_ablate(config)
    folder = config.run_dir or Path("runs") / f"ablate-{config.dataset}"
    out = config.out or folder
    if config.report_only:
        _report(folder, out, config.dataset)
        return True
    deadline = time.monotonic() + (config.time_limit or float("inf"))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_dataset(config.dataset, config.data_dir, config.cache_dir)
    for setting in config.settings:
        task = SETTINGS[setting]
        for part in (data.train, data.val, data.test):
            check_episodes(part.num_classes, part.num_drawers, ways=task.ways, shots=task.shots, queries=config.queries)
    with open_run(folder, config, FREE):
        for name in ("cells", "partial", "banks", "generators"):
            remove_temporaries(make_folder(folder / name))
        try:
            complete = _make_cells(config, data, folder, deadline)
        except McdiError as error:
            raise StoppedError(str(error)) from error
        _report(folder, out, config.dataset)
    return complete


def _make_cells(config: AblateConfig, data: FewShotData, folder: Path, deadline: float) -> bool:
    from tqdm import tqdm

    def path(cell: Cell) -> Path:
        return folder / "cells" / f"{cell.name}.json"

    def bar(name: str, total: int, unit: str) -> Any:
        return tqdm(total=total, unit=f" {unit}", desc=f"  {name}", leave=False, dynamic_ncols=True, smoothing=0.05)

    cells = plan(config)
    pending = [cell for cell in cells if not path(cell).exists()]
    shop = Workshop(config, data, folder, deadline, bar)
    with tqdm(
        total=len(cells), initial=len(cells) - len(pending), unit=" cells", desc="cells", dynamic_ncols=True
    ) as all_:
        for i, cell in enumerate(pending):
            try:
                if i:  # a call always makes some progress, however short its time
                    shop.pause_if_late()
                record = run_cell(shop, cell)
            except PausedError:
                all_.close()
                print(
                    f"time limit: {len(cells) - len(pending) + i} of {len(cells)} cells are there; the same command goes on"
                )
                return False
            write_json(path(cell), record)
            all_.update()
            if "accuracy_mean" in record:
                all_.write(
                    f"{cell.name:58} {record['accuracy_mean']:6.2f} ± {record['accuracy_ci95']:.2f} %", file=sys.stderr
                )
            if not config.keep_banks:
                needed = {shop.bank_name(other) for other in pending[i + 1 :]}
                needed |= {f"{name}_last" for name in needed}
                for bank in (folder / "banks").iterdir():
                    if bank.name not in needed:
                        shutil.rmtree(bank)
                        (folder / "partial" / f"bank_{bank.name}.json").unlink(missing_ok=True)
    return True


def _report(folder: Path, out: Path, dataset: str) -> None:
    publish(folder, out, dataset)
    print(f"report: {render(out, dataset)}")


def default_ablate_config(dataset: str) -> AblateConfig:
    """The defaults for a task family: the backbone of glyphs takes seconds."""
    default = AblateConfig(dataset=dataset)  # type: ignore[arg-type]
    return replace(default, backbone=default_config(dataset).backbone) if dataset == "glyphs" else default


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Exit codes: 0 done, 1 stopped on the way, 2 nothing started, 3 time limit, 130 Ctrl-C."""
    import tyro

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default="omniglot")
    dataset = peek.parse_known_args(arguments)[0].dataset
    config = tyro.cli(
        AblateConfig, default=default_ablate_config(dataset), prog="python -m mcdi_fast.ablate", args=arguments
    )
    complete = True

    def run() -> None:
        nonlocal complete
        complete = ablate(config)

    return run_command(run) or (0 if complete else 3)


if __name__ == "__main__":
    sys.exit(main())
