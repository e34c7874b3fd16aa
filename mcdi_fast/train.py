"""The main job, `python -m mcdi_fast.train`: backbone -> trajectories -> meta-training -> generator -> report.

`torchrun --nproc-per-node 2 -m mcdi_fast.train …` shares trajectories and meta-training between two processes (ranks.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch

from mcdi_fast.backend import Backend, check_device, check_precision, resolve
from mcdi_fast.bounds import check
from mcdi_fast.cli import Stages, open_run, parse, run_command, say, stopped
from mcdi_fast.config import TrainConfig
from mcdi_fast.diffusion import diffusion_tables, sampling_steps
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import TEST_SEED, VALIDATION_SEED, choose_steps, evaluate, generate
from mcdi_fast.inner import inner_loop
from mcdi_fast.meta import MetaTrainer, check_meta, fit
from mcdi_fast.prepare import check_segments, prepare_bank
from mcdi_fast.ranks import Ranks, join
from mcdi_fast.report import git_sha, machine, milliseconds, number, write_report
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import atomic_write, user_path
from mcdi_fast.tasks import NoOptions, Setup, TaskFamily, find_family
from mcdi_fast.threads import Threads

# What a run folder may be asked for with other values than before: where things lie, what computes and how the result is evaluated.
_FREE = ("run_dir", "data_dir", "cache_dir", "device", "impl", "precision", "evaluate")
_LOG_EVERY = 10  # outer steps between lines of metrics.jsonl
_FEW = 32  # tasks on which the number of threads is measured


def check_config(config: TrainConfig) -> TrainConfig:
    """The configuration with plain numbers; raises McdiError, naming the option, for whatever can be seen to be wrong before any work is done."""
    config = check(config)
    d, noise = config.diffusion, config.evaluate.eta_noise
    schedule, objective = diffusion_tables(d)
    check_segments(config.prepare.steps, d.segments)
    noisy = f"its chain is noise-free, --evaluate.eta-noise = {noise}" if noise else None
    resolve(config.impl, check_device(config.device), noisy)
    check_precision(config.precision)
    if config.evaluate.sampling_steps is not None:
        try:
            sampling_steps(schedule, objective.ends, config.evaluate.sampling_steps)
        except McdiError as error:
            raise McdiError(f"--evaluate.sampling-steps = {config.evaluate.sampling_steps}: {error}") from error
    return config


class Metrics:
    """`metrics.jsonl`: a JSON object a line, in step with the checkpoint."""

    def __init__(self, path: Path, step: int):
        """Keep the lines up to `step`: those behind it belong to work that was lost and is done again."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                # a line cut short by a kill is behind the checkpoint
                with contextlib.suppress(ValueError, TypeError, KeyError):
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


def train(config: TrainConfig, family: TaskFamily | None = None, *, choose_threads: bool = False) -> Path:
    """Run the main job; returns the run folder.

    Args:
        config: `--dataset` names the family, unless one is given. family: of the caller's own; config.dataset is then only its name.
        choose_threads: measure with how many threads the work is quickest (threads.py), as the command does.

    Raises:
        McdiError: bad settings or data, before anything is written; a full disk; a loss that is not finite.
    """
    name = config.dataset.replace(":", "-")
    folder = user_path(config.run_dir or Path("runs") / f"{name}-seed{config.seed}")
    entry = None if family is not None else find_family(config.dataset)
    task = config.task if config.task is not None else entry.options() if entry else NoOptions()
    with join(config.device) as (ranks, device), contextlib.ExitStack() as run:
        config = check_config(replace(config, device=device, task=task))
        check_meta(config.meta, ranks)
        backend = Backend.at_door(config.device, config.impl, config.precision)
        stages, taken = Stages(show=ranks.is_main), list[bool]()
        # processes that share work keep torch's number
        fixed = not choose_threads or backend.device.type != "cpu" or ranks.size > 1
        threads = run.enter_context(Threads(folder / "threads.json", say, fixed))

        def begin() -> None:
            if ranks.is_main and not taken:
                run.enter_context(open_run(folder, config, _FREE))
                run.enter_context(stopped())
                threads.begin("data")
                taken.append(True)

        if not ranks.is_main:
            run.enter_context(stopped())
            ranks.broadcast_number(0)  # rank 0 has made what is kept in the cache
        if entry is not None:
            family = entry.family(task, Setup(config.data_dir, config.cache_dir, backend.device, stages, begin))
        assert family is not None
        begin()
        if ranks.is_main:
            ranks.broadcast_number(0)
            _train(config, family, folder, stages, threads, backend, ranks)
        else:
            _follow(config, family, folder, backend, ranks)
    return folder


def _follow(config: TrainConfig, family: TaskFamily, folder: Path, backend: Backend, ranks: Ranks) -> None:
    """What every process but rank 0 does: its share of preparation and meta-training. It writes nothing."""
    segments = config.diffusion.segments
    bank = prepare_bank(folder / "bank", family, config.prepare, segments, config.seed, backend=backend, ranks=ranks)
    compute: dict[str, Any] = {"device": config.device, "impl": config.impl, "precision": config.precision}
    fit(bank, config.meta, config.diffusion, config.denoiser, seed=config.seed, ranks=ranks, **compute)


def _train(
    config: TrainConfig,
    family: TaskFamily,
    folder: Path,
    stages: Stages,
    threads: Threads,
    backend: Backend,
    ranks: Ranks,
) -> None:
    plain = json.loads(json.dumps(asdict(config), default=str))
    provenance = {"dataset": config.dataset, **family.provenance()}
    metric, seed, noise = family.metric, config.seed, config.evaluate.eta_noise
    validation = family.tasks("val", 0, config.evaluate.validation_tasks, VALIDATION_SEED + seed)
    test = family.tasks("test", 0, config.evaluate.tasks, TEST_SEED + seed)

    few = family.tasks("train", 0, _FEW, seed).train
    short = replace(config.prepare, steps=config.diffusion.segments)

    def train_few() -> None:
        family.trajectories(few, short, config.diffusion.segments, torch.Generator().manual_seed(0), backend)

    with stages("trajectories", config.prepare.tasks, "tasks") as bar:

        def on_tasks(count: int) -> None:
            bar.update(count)
            threads.step(bar.n)

        def on_prepared(count: int) -> None:
            bar.update(count)
            threads.begin("trajectories", count, train_few)

        bank = prepare_bank(
            folder / "bank",
            family,
            config.prepare,
            config.diffusion.segments,
            seed,
            meta=provenance | {"prepare": asdict(config.prepare), "seed": seed},
            on_start=on_prepared,
            on_tasks=on_tasks,
            backend=backend,
            ranks=ranks,
        )

    compute: dict[str, Any] = {"impl": config.impl, "precision": config.precision}
    with stages("meta-training", config.meta.steps, "steps") as bar:
        metrics: list[Metrics] = []

        def on_start(trainer: MetaTrainer) -> None:
            metrics.append(Metrics(folder / "metrics.jsonl", trainer.step))
            bar.update(trainer.step)

            def work() -> None:
                batch = trainer.batch(trainer.step)
                inner_loop(trainer.phi, batch, config.meta.inner_lr, trainer.impl, precision=trainer.precision)

            threads.begin("meta-training", trainer.step, work)

        def on_step(trainer: MetaTrainer, loss: torch.Tensor) -> None:
            bar.update()
            threads.step(trainer.step)
            if trainer.step % _LOG_EVERY and not trainer.checkpoint_due():
                return  # reading the loss waits for the device
            value = float(loss)
            entry: dict[str, Any] = {"step": trainer.step, "loss": value if math.isfinite(value) else None}
            if config.meta.on_bad_step == "skip":
                entry["skipped"] = trainer.skipped
            if trainer.checkpoint_due():
                theta = generate(
                    Sampler(trainer.generator(), config.device, **compute), validation, seed, eta_noise=noise
                )
                score = metric.factor * float(family.scores(theta, validation.query).mean())
                entry["validation"] = score if math.isfinite(score) else None
                bar.set_postfix(loss=f"{value:.3f}", validation=f"{score:.4g} {metric.unit}", refresh=False)
            metrics[0].write(entry)

        generator = fit(
            bank,
            config.meta,
            config.diffusion,
            config.denoiser,
            seed=seed,
            checkpoint=folder / "checkpoint.safetensors",
            on_start=on_start,
            on_step=on_step,
            progress=False,
            provenance=provenance | {"git": git_sha(), "config": plain},
            device=config.device,
            ranks=ranks,
            **compute,
        )

    with stages("evaluation", 5, "parts") as bar:
        sampler = Sampler(generator, config.device, **compute)
        threads.begin("evaluation", work=lambda: generate(sampler, validation[:_FEW], seed))
        num_steps = config.evaluate.sampling_steps or choose_steps(family, sampler, validation, seed, noise)
        bar.update()
        generator = replace(generator, num_steps=num_steps)
        generator.save_pretrained(folder / "generator")
        family.save(folder / "generator")
        sampler = Sampler(generator, config.device, **compute)
        result = evaluate(
            family, sampler, bank, test, validation, config.evaluate, config.prepare, seed, backend,
            on_stage=lambda _: bar.update(),
        )  # fmt: skip
    result["skipped_steps"] = max((line.get("skipped", 0) for line in metrics[0].lines), default=0)
    result["config"], result["provenance"], result["machine"] = plain, provenance, machine()
    result["seconds"] = {stage: round(seconds, 2) for stage, seconds in stages.seconds.items()}
    write_report(folder, result, metrics[0].lines)
    _print_summary(result, folder)


def _print_summary(result: dict[str, Any], folder: Path) -> None:
    unit = result["metric"]["unit"]
    for name, m in result["methods"].items():
        score = f"{number(m['mean']):>8} ± {number(m['ci95'], m['mean'])} {unit}"
        print(f"{name:18} {score:20} {milliseconds(m):>8} {'' if m['latency_ms'] is None else 'ms a task'}".rstrip())
    print(f"report: {folder / 'report.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    return run_command(lambda: train(parse(kind_of(TrainConfig), "mcdi_fast.train", arguments), choose_threads=True))


def kind_of(form: Any) -> Callable[[str], tuple[Any, Any]]:
    """What a command line is parsed as, and its defaults, by `--dataset`. form: `TrainConfig` or one that adds to it."""

    def kind(dataset: str) -> tuple[Any, Any]:
        entry = find_family(dataset)
        return form[entry.options], form(**vars(entry.config()))

    return kind


def main_job(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Of a configuration that adds to `TrainConfig`: the main job, with changes."""
    return TrainConfig(**{name: getattr(config, name) for name in TrainConfig.__dataclass_fields__} | changes)


if __name__ == "__main__":
    sys.exit(main())
