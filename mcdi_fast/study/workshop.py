"""What the cells of the comparison share, made when first asked for: features, tasks, banks, generators. All of it resumable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcdi_fast import backbone as bb
from mcdi_fast.backend import Backend
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.evaluate import TEST_SEED, VALIDATION_SEED, trained_targets
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.meta import MetaTrainer, fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import load_tensors, make_folder, read_json, save_tensors, write_json
from mcdi_fast.study.baselines import ChangedHeads, whole_network
from mcdi_fast.study.plan import OBJECTIVES, Cell, StudyConfig, plan, train_config
from mcdi_fast.tasks import TaskBatch, TaskFamily
from mcdi_fast.tasks.drawings import DrawingOptions, FewShotData
from mcdi_fast.tasks.heads import ClassRows


class PausedError(Exception):
    """The time limit is reached; what was made so far is kept."""


class Stage:
    """A piece of work over all its interruptions: a progress bar, and seconds and notes that are kept in a file."""

    def __init__(self, path: Path, bar: Any, pause_if_late: Callable[[], None]):
        """path: JSON beside the work's own checkpoint."""
        found: dict[str, Any] = read_json(path) if path.exists() else {"seconds": 0.0, "notes": {}}
        self.path, self.notes, self.update, self._pause_if_late = path, found["notes"], bar.update, pause_if_late
        self._before, self._clock, self._begun = float(found["seconds"]), time.perf_counter(), 0

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.perf_counter() - self._clock

    def start(self, done: int) -> None:
        """So many units are there already."""
        self._begun = done
        self.update(done)

    def step(self, step: int, every: int) -> None:
        """Step number `step` is done. The one behind a checkpoint of this call, written every so many steps, is where to pause."""
        if step > self._begun + 1 and (step - 1) % every == 0:
            self._pause_if_late()
        self.update()

    def keep(self, pause: bool = True) -> None:
        """Write seconds and notes, to go on from them; pause: the work itself is kept too."""
        write_json(self.path, {"seconds": self.seconds, "notes": self.notes})
        if pause:
            self._pause_if_late()


class Workshop:
    """Data, tasks, banks and generators that cells share, made when first asked for."""

    def __init__(self, config: StudyConfig, data: FewShotData, folder: Path, deadline: float):
        """deadline: of time.monotonic()."""
        self.config, self.data, self.folder, self.deadline = config, data, folder, deadline
        self.backend = Backend.at_door(config.device)
        self.versions = 1 + max(train_config(config, cell).task.augmentation for cell in plan(config))
        self._sampler: tuple[WeightGenerator, Sampler] | None = None
        self.network: Callable[[], nn.Sequential] = cache(self._network)
        self.backbone_weights: Callable[[], str] = cache(lambda: bb.weights_digest(self.network()))
        self.features: Callable[[], dict[str, Tensor]] = cache(self._features)
        self.heads: Callable[..., ChangedHeads] = lru_cache(4)(self._heads)

    def pause_if_late(self) -> None:
        """Raise PausedError behind the deadline; called where nothing is lost."""
        if time.monotonic() > self.deadline:
            raise PausedError

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, folder: str = "partial") -> Iterator[Stage]:
        """Show the progress of `total` units."""
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", desc=f"  {name}", leave=False, dynamic_ncols=True) as bar:
            yield Stage(self.folder / folder / f"{name}.json", bar, self.pause_if_late)

    # ------------------------------------------------------------------ backbone, features, tasks

    def _network(self) -> nn.Sequential:
        config, folder = self.config.task.backbone, make_folder(self.config.cache_dir / "backbones")
        with self.stage("backbone", config.steps, "episodes") as stage:

            def on_step(step: int, loss: float) -> None:
                stage.step(step, config.checkpoint_every)

            done: dict[str, Any] = {"on_start": stage.start, "on_step": on_step}
            return bb.train_backbone(self.data, config, folder, device=self.backend.device, **done)

    def _features(self) -> dict[str, Tensor]:
        """float32 [versions, classes, images_per_class, F] of each split: the images and, but for val, augmented ones."""
        views = self.config.task.backbone.views
        name = f"{self.backbone_weights()}{f'-views{views}' if views > 1 else ''}-{self.versions}.safetensors"
        path = make_folder(self.config.cache_dir / "features") / name
        if path.exists():
            return load_tensors(path, "features")[0]
        result = {}
        with self.stage("features", 2 * self.versions + 1, "sets") as stage:
            for split in ("train", "val", "test"):
                made = []
                for version in range(1 if split == "val" else self.versions):
                    images = getattr(self.data, split)
                    made.append(bb.extract_features(self.network(), images, version or None, views=views).cpu())
                    stage.update()
                result[split] = torch.stack(made)
        save_tensors(path, result, {"data": self.data.name}, "features")
        return result

    def _heads(self, options: DrawingOptions, what: str, train: str) -> ChangedHeads:
        """train: the split whose images the trajectories see, "test" for the ceiling."""
        features = self.features()
        seen = features[train][: 1 + options.augmentation]
        splits = {"train": seen, "val": features["val"], "test": features["test"][:1]}
        provenance = bb.features_provenance(self.data, options.backbone, self.network())
        provenance |= {"task": asdict(options), "what": what}
        rows = {name: ClassRows.of_grid(grid) for name, grid in splits.items()}
        family = ChangedHeads(rows, options, provenance, self.backend.device)
        family.what = what
        return family

    def family(self, cell: Cell, train: str = "train") -> ChangedHeads:
        """The tasks of a cell, as it sees them."""
        what = "difference" if cell.method == "ocd" else cell.changed.get("family", "")
        return self.heads(train_config(self.config, cell).task, what if train == "train" else "", train)

    def reptile_families(self, cell: Cell) -> tuple[TaskFamily, TaskFamily]:
        """Of the tasks that Reptile trains on, which have more shots, and of those it is tested on."""
        task = train_config(self.config, cell).task
        shots = min(self.config.reptile.train_shots, self.data.train.images_per_class - 1)
        if cell.method == "reptile-net":
            family = whole_network(self.network(), self.data, task, shots)
            return family, family
        return self.heads(replace(task, shots=shots, queries=1), "", "train"), self.family(cell)

    def tasks(self, cell: Cell, purpose: str) -> TaskBatch:
        """purpose: "test"; "val", which chooses settings; "selection", validation characters again, other tasks."""
        c = self.config
        split, count, first = {
            "test": ("test", c.evaluate.tasks, TEST_SEED),
            "val": ("val", c.evaluate.validation_tasks, VALIDATION_SEED),
            "selection": ("val", c.selection_tasks, VALIDATION_SEED + TEST_SEED),
        }[purpose]
        return self.family(cell).tasks(split, 0, count, first + cell.seed)

    def targets(self, cell: Cell) -> Tensor:
        """What the cell's preparation would make for the test tasks, from every image of their classes: [B, k, ways, F + 1]."""
        config, family = train_config(self.config, cell), self.family(cell, "test")
        tasks = family.tasks("train", 0, config.evaluate.tasks, TEST_SEED + cell.seed)
        return trained_targets(family, tasks, config.prepare, config.diffusion.segments, cell.seed, self.backend)

    # ------------------------------------------------------------------ banks and generators

    def bank_name(self, cell: Cell) -> str:
        """The folder of the bank that a cell trains on; "" where it needs none."""
        if cell.method not in (*OBJECTIVES, "analysis"):
            return ""
        k = train_config(self.config, cell).diffusion.segments
        makes = ("prepare.", "task.", "family")
        mine = [f"{key}={value}" for key, value in cell.changed.items() if key.startswith(makes)]
        parts = [cell.setting, f"seed{cell.seed}", cell.variant, f"k{k}", *mine]
        return "_".join([*parts, "ocd"] if cell.method == "ocd" else parts)

    def bank(self, cell: Cell) -> tuple[TrajectoryBank, float]:
        """The bank a cell trains on, and the seconds that making it took."""
        name, config, family = self.bank_name(cell), train_config(self.config, cell), self.family(cell)
        meta = {**family.provenance(), "prepare": asdict(config.prepare), "seed": cell.seed}
        with self.stage(name, config.prepare.tasks, "tasks", "banks") as stage:

            def on_tasks(count: int) -> None:
                stage.update(count)
                stage.keep()

            options: dict[str, Any] = {"meta": meta, "on_start": stage.update, "on_tasks": on_tasks}
            seconds = stage.seconds
            bank = prepare_bank(
                self.folder / "banks" / name, family, config.prepare, config.diffusion.segments, cell.seed,
                backend=self.backend, **options,
            )  # fmt: skip
            return bank, read_json(stage.path)["seconds"] if stage.path.exists() else seconds

    def generator(self, cell: Cell) -> tuple[WeightGenerator, dict[str, float]]:
        """The trained generator of a cell, from disk where it is there; `training_seconds` and `preparation_seconds`."""
        if set(cell.changed) <= {"sampler"}:
            cell = replace(cell, change="")  # trained as in the comparison
        folder = self.folder / "generators" / cell.name
        if (folder / "config.json").exists():
            generator = WeightGenerator.from_pretrained(folder)
            return generator, generator.provenance["training"]
        config = train_config(self.config, cell)
        bank, seconds = self.bank(cell)
        checkpoint = self.folder / "partial" / f"{cell.name}.safetensors"
        with self.stage(cell.name, config.meta.steps, "steps") as stage:

            def on_step(trainer: MetaTrainer, loss: Tensor) -> None:
                stage.step(trainer.step, config.meta.checkpoint_every)
                if trainer.checkpoint_due():  # it is written behind this call
                    stage.keep(pause=False)

            generator = fit(
                bank,
                config.meta,
                config.diffusion,
                config.denoiser,
                seed=cell.seed,
                checkpoint=checkpoint,
                device=self.backend.device,
                on_start=lambda trainer: stage.start(trainer.step),
                on_step=on_step,
                progress=False,
            )
            training = {"training_seconds": round(stage.seconds, 2), "preparation_seconds": round(seconds, 2)}
        generator = replace(generator, provenance={"cell": asdict(cell), "training": training})
        generator.save_pretrained(folder)
        for path in (checkpoint, stage.path):
            path.unlink(missing_ok=True)
        return generator, training

    def sample(self, cell: Cell, generator: WeightGenerator, tasks: TaskBatch, **options: Any) -> Tensor:
        """Heads of tasks, [B, ways, F + 1], the way the cell samples."""
        options = {"eta_noise": self.config.evaluate.eta_noise, **options} | cell.changed.get("sampler", {})
        if "carry" in options:
            generator = replace(generator, diffusion=replace(generator.diffusion, carry=options.pop("carry")))
        if self._sampler is None or self._sampler[0] is not generator:
            self._sampler = generator, Sampler(generator, self.backend.device)
        seeds = range(cell.seed, cell.seed + len(tasks))
        return self._sampler[1].sample(tasks.condition, seeds, **options).tokens + self.family(cell).base(tasks)
