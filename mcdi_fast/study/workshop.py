"""What the cells of the comparison share, made when first asked for: features, tasks, banks, generators. All of it resumable."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcdi_fast import backbone as bb
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import (
    TaskConfig,
)
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import FeatureTasks, draw_tasks
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_accuracy, prototype_head, support_condition
from mcdi_fast.meta import MetaTrainer, fit
from mcdi_fast.prepare import prepare_bank, train_task_heads
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import (
    load_tensors,
    make_folder,
    read_json,
    save_tensors,
    write_json,
)
from mcdi_fast.study.baselines import (
    prepare_difference_bank,
)
from mcdi_fast.study.plan import CHANGES, OBJECTIVES, SETTINGS, Cell, StudyConfig, plan, train_config
from mcdi_fast.tasks import FewShotData, sample_episodes
from mcdi_fast.train import TEST_SEED, VALIDATION_SEED


class PausedError(Exception):
    """The time limit is reached; what was made so far is kept."""


class Workshop:
    """Data, tasks, banks and generators that cells share, made when first asked for."""

    def __init__(self, config: StudyConfig, data: FewShotData, folder: Path, deadline: float, bar: Callable[..., Any]):
        """Deadline: of time.monotonic(). bar: makes a progress bar (tqdm)."""
        self.config, self.data, self.folder, self.deadline, self.bar = config, data, folder, deadline, bar
        self.device = torch.device(config.device)
        self._sampler: tuple[WeightGenerator, Sampler] | None = None
        self.copies = max(train_config(config, cell).prepare.copies for cell in plan(config))
        self.network: Callable[[], nn.Module] = cache(self._network)
        self.backbone_weights: Callable[[], str] = cache(lambda: bb.weights_digest(self.network()))
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
        """Train, val, test: float32 [copies, classes, images_per_class, F], the images and augmented ones (val: the images)."""
        count = self.config.backbone.views
        name = f"{self.backbone_weights()}{f'-views{count}' if count > 1 else ''}-{self.copies}.safetensors"
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
                    features = bb.extract_features(network, images, copy or None, views=self.config.backbone.views)
                    made.append(features.cpu())
                    bar.update()
                result[split] = torch.stack(made)
        save_tensors(path, result, {"data": self.data.name}, "features")
        return result

    def _tasks(self, setting: str, seed: int, purpose: str) -> FeatureTasks:
        """Purpose: "test"; "val", which chooses rates; "selection", validation characters again, other tasks."""
        c, task = self.config, replace(SETTINGS[setting], queries=self.config.queries)
        split, count, first = {
            "test": ("test", c.evaluate.tasks, TEST_SEED),
            "val": ("val", c.evaluate.validation_tasks, VALIDATION_SEED),
            "selection": ("val", c.selection_tasks, VALIDATION_SEED + TEST_SEED),
        }[purpose]
        return draw_tasks(self.features()[split][0], task, count, first + seed)

    def targets(self, cell: Cell, purpose: str = "test") -> Tensor:
        """What the cell's preparation would make for the tasks, from every image of their classes: [B, k, ways, F + 1]."""
        config, tasks = train_config(self.config, cell), self.tasks(cell.setting, cell.seed, purpose)
        every = tasks.every.unsqueeze(0)
        if purpose == "test" and config.prepare.copies > 1:
            others = [
                draw_tasks(copy, config.task, len(tasks), TEST_SEED + cell.seed).every
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
            **bb.features_provenance(self.data, config.backbone, self.network()),
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
        classes, images_per_class = images.shape[:2]
        episodes = sample_episodes(
            classes,
            images_per_class,
            ways=task.ways,
            shots=task.shots,
            queries=images_per_class - task.shots,
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
