"""The main job, `python -m mcdi_fast.train`: backbone -> trajectories -> meta-training -> generator -> report.

`torchrun --nproc-per-node 2 -m mcdi_fast.train …` shares trajectories and meta-training between two processes (ranks.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch

from mcdi_fast import backbone as bb
from mcdi_fast.backend import check_device, check_precision, resolve
from mcdi_fast.cli import Stages, open_run, parse, run_command, stopped
from mcdi_fast.config import TrainConfig, default_config
from mcdi_fast.diffusion import diffusion_tables
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import check_evaluate, draw_tasks, evaluate, generate
from mcdi_fast.heads import head_accuracy
from mcdi_fast.meta import MetaTrainer, check_meta, fit
from mcdi_fast.prepare import check_prepare, prepare_bank
from mcdi_fast.ranks import Ranks, join
from mcdi_fast.report import git_sha, machine, write_report
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import atomic_write, make_folder
from mcdi_fast.tasks import FAMILIES, FewShotData, check_episodes, load_dataset

# What a run folder may be asked for with other values than before: where things lie, what computes and how the result is evaluated.
_FREE = ("run_dir", "data_dir", "cache_dir", "device", "impl", "precision", "evaluate")
_LOG_EVERY = 10  # outer steps between lines of metrics.jsonl
TEST_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # far from the seeds of training tasks


def check_config(config: TrainConfig) -> None:
    """Raise McdiError, naming the option, for whatever can be seen to be wrong before any work is done."""

    if config.dataset not in FAMILIES:
        raise McdiError(f"--dataset {config.dataset!r}: expected one of {', '.join(FAMILIES)}")
    if not 0 <= config.seed < TEST_SEED:
        raise McdiError(f"--seed {config.seed}: expected 0 to {TEST_SEED - 1}")
    d = config.diffusion
    diffusion_tables(d)
    check_prepare(config.prepare, d.segments)
    noisy = (
        f"its chain is noise-free, --evaluate.eta-noise = {config.evaluate.eta_noise}"
        if config.evaluate.eta_noise
        else None
    )
    resolve(config.impl, check_device(config.device), noisy)
    check_precision(config.precision)
    for name in ("width", "depth"):
        if getattr(config.denoiser, name) < 1:
            raise McdiError(f"--denoiser.{name} = {getattr(config.denoiser, name)}: expected at least 1")
    bb.check_backbone(config.backbone)
    check_meta(config.meta)
    check_evaluate(config.evaluate, d.steps, d.segments)


class Metrics:
    """`metrics.jsonl`: a JSON object a line, in step with the checkpoint."""

    def __init__(self, path: Path, step: int):
        """Keep the lines up to `step`: those behind it belong to work that was lost and is done again."""

        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                with contextlib.suppress(
                    ValueError, TypeError, KeyError
                ):  # a line cut short by a kill is behind the checkpoint
                    entry = json.loads(line)
                    if entry["step"] <= step:
                        self.lines.append(entry)
        atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in self.lines).encode())

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(entry)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise McdiError(
                f"cannot write {self.path}: {error.strerror}; mend that and run the same command again: it goes on from the last checkpoint"
            ) from error


def train(config: TrainConfig) -> Path:
    """Run the main job; returns the run folder.

    Raises:
        McdiError: bad settings or data, before anything is written; a full disk; a loss that is not finite.
    """

    folder = config.run_dir or Path("runs") / f"{config.dataset}-seed{config.seed}"
    with join(config.device) as (ranks, device):
        config = replace(config, device=device)
        check_config(config)
        check_meta(config.meta, ranks)
        if not ranks.is_main:
            with stopped():
                _follow(config, folder, ranks)
            return folder
        stages, task = Stages(), config.task
        with stages("data", 1, "set") as bar:
            data = load_dataset(config.dataset, config.data_dir, config.cache_dir)
            bar.update()
        for part in (data.train, data.val, data.test):
            check_episodes(
                part.num_classes, part.images_per_class, ways=task.ways, shots=task.shots, queries=task.queries
            )
        with open_run(folder, config, _FREE), stopped():
            _train(config, data, folder, stages, ranks)
    return folder


def _follow(config: TrainConfig, folder: Path, ranks: Ranks) -> None:
    """What every process but rank 0 does: its share of preparation and meta-training. It writes nothing."""
    compute: dict[str, Any] = {"impl": config.impl, "precision": config.precision, "ranks": ranks}
    features = ranks.broadcast_features(None).to(config.device)
    bank = prepare_bank(
        folder / "bank", features, config.task, config.prepare, config.diffusion.segments, config.seed, **compute
    )
    fit(bank, config.meta, config.diffusion, config.denoiser, seed=config.seed, device=config.device, **compute)


def _train(config: TrainConfig, data: FewShotData, folder: Path, stages: Stages, ranks: Ranks) -> None:
    task = config.task
    compute = {"impl": config.impl, "precision": config.precision}
    with stages("backbone", config.backbone.steps, "episodes") as bar:
        cache = make_folder(config.cache_dir / "backbones")
        network = bb.train_backbone(
            data, config.backbone, cache, device=config.device, on_start=bar.update, on_step=lambda *_: bar.update()
        )

    images = [data.train] * config.prepare.copies + [data.val, data.test]
    with stages("features", sum(part.num_classes * part.images_per_class for part in images), "images") as bar:
        take = partial(bb.extract_features, network, progress=bar.update, views=config.backbone.views)
        copies = torch.stack([take(data.train, augment_seed=copy or None) for copy in range(config.prepare.copies)])
        validation = draw_tasks(
            take(data.val),
            task,
            config.evaluate.validation_tasks,
            VALIDATION_SEED + config.seed,
        )
        test = draw_tasks(
            take(data.test),
            task,
            config.evaluate.tasks,
            TEST_SEED + config.seed,
        )

    ranks.broadcast_features(copies.cpu())

    provenance = {
        "dataset": data.name,
        "data_fingerprint": data.fingerprint,
        **bb.features_provenance(data, config.backbone, network),
    }
    with stages("trajectories", config.prepare.tasks, "tasks") as bar:
        bank = prepare_bank(
            folder / "bank",
            copies,
            task,
            config.prepare,
            config.diffusion.segments,
            config.seed,
            meta=provenance | {"prepare": asdict(config.prepare), "task": asdict(task), "seed": config.seed},
            on_start=bar.update,
            on_tasks=bar.update,
            **compute,
            ranks=ranks,
        )
    del copies

    with stages("meta-training", config.meta.steps, "steps") as bar:
        metrics: list[Metrics] = []

        def on_start(trainer: MetaTrainer) -> None:
            metrics.append(Metrics(folder / "metrics.jsonl", trainer.step))
            bar.update(trainer.step)

        def on_step(trainer: MetaTrainer, loss: torch.Tensor) -> None:
            bar.update()
            if trainer.step % _LOG_EVERY and not trainer.checkpoint_due():
                return  # reading the loss waits for the device
            value = float(loss)
            entry: dict[str, Any] = {"step": trainer.step, "loss": value if math.isfinite(value) else None}
            if config.meta.on_bad_step == "skip":
                entry["skipped"] = trainer.skipped
            if trainer.checkpoint_due():
                sampler = Sampler(trainer.generator(), config.device, **compute)
                heads = generate(sampler, validation.support, config.seed, eta_noise=config.evaluate.eta_noise)
                entry["validation_accuracy"] = 100 * float(head_accuracy(heads, validation.query).mean())
                bar.set_postfix(loss=f"{value:.3f}", validation=f"{entry['validation_accuracy']:.2f} %", refresh=False)
            metrics[0].write(entry)

        generator = fit(
            bank,
            config.meta,
            config.diffusion,
            config.denoiser,
            seed=config.seed,
            checkpoint=folder / "checkpoint.safetensors",
            on_start=on_start,
            on_step=on_step,
            provenance=provenance | {"git": git_sha(), "config": json.loads(json.dumps(asdict(config), default=str))},
            device=config.device,
            **compute,
            ranks=ranks,
        )
    generator.save_pretrained(folder / "generator")

    with stages("evaluation", 4, "parts") as bar:
        sampler = Sampler(generator, config.device, **compute)
        result = evaluate(
            sampler, test, validation, config.evaluate, config.prepare, config.seed, on_stage=lambda _: bar.update()
        )
    result["skipped_steps"] = max((line.get("skipped", 0) for line in metrics[0].lines), default=0)
    result["config"] = json.loads(json.dumps(asdict(config), default=str))
    result["provenance"] = provenance
    result["machine"] = machine()
    result["seconds"] = {stage: round(seconds, 2) for stage, seconds in stages.seconds.items()}
    write_report(folder, result, metrics[0].lines)
    _print_summary(result, folder)


def _print_summary(result: dict[str, Any], folder: Path) -> None:
    for name, m in result["methods"].items():
        print(f"{name:18} {m['accuracy_mean']:6.2f} ± {m['accuracy_ci95']:.2f} %   {m['latency_ms']:8.2f} ms a task")
    print(f"report: {folder / 'report.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    return run_command(lambda: train(parse(TrainConfig, default_config, "mcdi_fast.train", arguments)))


if __name__ == "__main__":
    sys.exit(main())
