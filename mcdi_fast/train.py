"""The main job, `python -m mcdi_fast.train`: backbone -> trajectories -> meta-training -> generator -> report.

`torchrun --nproc-per-node 2 -m mcdi_fast.train …` shares trajectories and meta-training between two processes (ranks.py).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch

from mcdi_fast import backbone as bb
from mcdi_fast.config import TrainConfig, default_config
from mcdi_fast.errors import McdiError
from mcdi_fast.evaluate import check_evaluate, draw_tasks, evaluate, generate
from mcdi_fast.heads import head_accuracy
from mcdi_fast.impl import check_device, check_precision, resolve
from mcdi_fast.meta import FREE, MetaTrainer, check_meta, fit
from mcdi_fast.prepare import check_prepare, prepare_bank
from mcdi_fast.ranks import Ranks, join
from mcdi_fast.report import git_sha, machine, write_report
from mcdi_fast.sampler import Sampler
from mcdi_fast.schedule import diffusion_tables
from mcdi_fast.store import atomic_write, make_folder, read_json, remove_temporaries, show_path, write_json
from mcdi_fast.tasks import FAMILIES, FewShotData, check_episodes, load_dataset

Config = TypeVar("Config")


class StoppedError(McdiError):
    """Something went wrong after work had begun: what was made so far is kept."""


# What a run folder may be asked for with other values than before: where things lie, what computes and how the result is evaluated.
_FREE = ("run_dir", "data_dir", "cache_dir", "device", "impl", "precision", "evaluate")
_LOG_EVERY = 10  # outer steps between lines of metrics.jsonl
_TEST_SEED, _VALIDATION_SEED = 1_000_000, 2_000_000  # far from the seeds of training tasks


def check_config(config: TrainConfig) -> None:
    """Raise McdiError, naming the option, for whatever can be seen to be wrong before any work is done."""

    if config.dataset not in FAMILIES:
        raise McdiError(f"--dataset {config.dataset!r}: expected one of {', '.join(FAMILIES)}")
    if not 0 <= config.seed < _TEST_SEED:
        raise McdiError(f"--seed {config.seed}: expected 0 to {_TEST_SEED - 1}")
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


@contextlib.contextmanager
def open_run(folder: Path, config: Any, free: Collection[str] = _FREE) -> Iterator[None]:
    """Take the run folder: make it, lock it, and see that it belongs to this configuration (a dataclass), but for the fields `free`.

    Raises:
        McdiError: the folder cannot be written; another process has it; it holds a run with other settings.
    """

    make_folder(folder)
    try:
        lock: IO[str] = open(folder / ".lock", "a")  # noqa: SIM115 (held until the end)
    except OSError as error:
        raise McdiError(
            f"cannot write {show_path(folder)}: {error.strerror}; make the folder writable or choose another --run-dir"
        ) from error
    with lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel frees it when the process dies, however it dies
        except OSError as error:
            raise McdiError(
                f"{show_path(folder)}: another run is writing there; wait for it or choose another --run-dir"
            ) from error
        for place in (folder, folder / "generator"):  # the bank looks after its own
            remove_temporaries(place)
        path = folder / "config.json"
        ours = json.loads(json.dumps(asdict(config), default=str))
        if path.exists():
            found = read_json(path)
            for key in [key for key in ours if key not in free]:
                theirs, now = (_bound(config.get(key)) for config in (found if isinstance(found, dict) else {}, ours))
                if theirs != now:
                    raise McdiError(
                        f"{show_path(path)}: made with another {_difference(key, theirs, now)}; "
                        "give the same options as before, or another --run-dir"
                    )
        write_json(path, ours)
        yield


def _bound(value: Any) -> Any:
    return {name: entry for name, entry in value.items() if name not in FREE} if isinstance(value, dict) else value


def _difference(key: str, found: Any, ours: Any) -> str:
    if isinstance(found, dict) and isinstance(ours, dict):
        for name in ours:
            if found.get(name) != ours[name]:
                return _difference(f"{key}.{name}", found.get(name), ours[name])
    return f"{key} ({found!r:.60}, now {ours!r:.60})"


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


class _Stages:
    """A progress bar and a stopwatch for each stage."""

    def __init__(self, show: bool = True) -> None:
        self.seconds: dict[str, float] = {}
        self.show = show

    @contextlib.contextmanager
    def __call__(self, name: str, total: int, unit: str) -> Iterator[Any]:
        from tqdm import tqdm

        start = time.perf_counter()
        bar = tqdm(
            total=total, unit=f" {unit}", desc=f"{name:14}", dynamic_ncols=True, smoothing=0.05, disable=not self.show
        )
        with bar:
            yield bar
        self.seconds[name] = time.perf_counter() - start


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
        if not ranks.leads:
            with _stopped():
                _follow(config, folder, ranks)
            return folder
        stages, task = _Stages(), config.task
        with stages("data", 1, "set") as bar:
            data = load_dataset(config.dataset, config.data_dir, config.cache_dir)
            bar.update()
        for part in (data.train, data.val, data.test):
            check_episodes(part.num_classes, part.num_drawers, ways=task.ways, shots=task.shots, queries=task.queries)
        with open_run(folder, config), _stopped():
            _train(config, data, folder, stages, ranks)
    return folder


@contextlib.contextmanager
def _stopped() -> Iterator[None]:
    try:
        yield
    except McdiError as error:
        raise StoppedError(str(error)) from error


def _follow(config: TrainConfig, folder: Path, ranks: Ranks) -> None:
    """What every process but rank 0 does: its share of preparation and meta-training. It writes nothing."""
    compute: dict[str, Any] = {"impl": config.impl, "precision": config.precision, "ranks": ranks}
    features = ranks.features_from_lead(None).to(config.device)
    bank = prepare_bank(
        folder / "bank", features, config.task, config.prepare, config.diffusion.segments, config.seed, **compute
    )
    fit(bank, config.meta, config.diffusion, config.denoiser, seed=config.seed, device=config.device, **compute)


def _train(config: TrainConfig, data: FewShotData, folder: Path, stages: _Stages, ranks: Ranks) -> None:
    task = config.task
    compute = {"impl": config.impl, "precision": config.precision}
    with stages("backbone", config.backbone.steps, "episodes") as bar:
        cache = make_folder(config.cache_dir / "backbones")
        network = bb.train_backbone(
            data, config.backbone, cache, device=config.device, on_start=bar.update, on_step=lambda *_: bar.update()
        )

    images = [data.train] * config.prepare.copies + [data.val, data.test]
    with stages("features", sum(part.num_classes * part.num_drawers for part in images), "images") as bar:
        take = partial(bb.extract_features, network, progress=bar.update, views=config.backbone.views)
        copies = torch.stack([take(data.train, augment_seed=copy or None) for copy in range(config.prepare.copies)])
        validation = draw_tasks(
            take(data.val),
            task,
            config.evaluate.validation_tasks,
            _VALIDATION_SEED + config.seed,
        )
        test = draw_tasks(
            take(data.test),
            task,
            config.evaluate.tasks,
            _TEST_SEED + config.seed,
        )

    ranks.features_from_lead(copies.cpu())

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


def run_command(main: Callable[[], Any]) -> int:
    """Run a command; errors of ours become one line. Exit codes: 0 done, 1 stopped on the way, 2 nothing started, 130 Ctrl-C."""
    try:
        main()
    except McdiError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, StoppedError) else 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(kind: type[Config], default: Callable[[str], Config], name: str, arguments: Sequence[str] | None) -> Config:
    """The command line as a configuration (a dataclass with a `dataset`), whose defaults are those of its --dataset."""
    import tyro

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default=vars(kind)["dataset"])  # that of the class
    dataset = peek.parse_known_args(arguments)[0].dataset
    try:
        return tyro.cli(kind, default=default(dataset), prog=f"python -m {name}", args=arguments)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    config = parse(TrainConfig, default_config, "mcdi_fast.train", arguments)
    return run_command(lambda: train(config))


if __name__ == "__main__":
    sys.exit(main())
