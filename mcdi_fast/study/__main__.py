"""The paper's comparison, `python -m mcdi_fast.study --dataset omniglot`: every method on the same tasks, cell by cell, resumable.

A cell is one method in one setting with one seed and one preparation; it becomes one JSON record in `<run-dir>/cells`, and cells that are
there are never computed again. Stop it at any moment and give the same command again. From the records come the tables
(report.py); `--out docs` puts them where the repository keeps them.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch

from mcdi_fast.cli import StoppedError, open_run, parse, run_command
from mcdi_fast.errors import McdiError
from mcdi_fast.store import (
    make_folder,
    read_json,
    remove_temporaries,
    show_path,
    write_json,
)
from mcdi_fast.study.cells import run_cell
from mcdi_fast.study.plan import FREE, SETTINGS, Cell, StudyConfig, check_study, default_study_config, plan
from mcdi_fast.study.report import publish, render
from mcdi_fast.study.workshop import PausedError, Workshop
from mcdi_fast.tasks import FewShotData, check_episodes, load_dataset


def study(config: StudyConfig) -> bool:
    """Make the cells asked for and the report; returns whether all are there (False: the time limit came first)."""
    check_study(config)
    folder = config.run_dir or Path("runs") / f"study-{config.dataset}"
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
            check_episodes(
                part.num_classes, part.images_per_class, ways=task.ways, shots=task.shots, queries=config.queries
            )
    with open_run(folder, config, FREE):
        for name in ("cells", "partial", "banks", "generators"):
            remove_temporaries(make_folder(folder / name))
        try:
            complete = _make_cells(config, data, folder, deadline)
            _report(folder, out, config.dataset)
        except McdiError as error:
            raise StoppedError(str(error)) from error
    return complete


def _make_cells(config: StudyConfig, data: FewShotData, folder: Path, deadline: float) -> bool:
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
                else:
                    _check_backbone(folder, shop)
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


def _check_backbone(folder: Path, shop: Workshop) -> None:
    """Rows of other features are no comparison, and the same recipe trains another backbone on another kind of processor."""
    for path in sorted((folder / "cells").glob("*.json")):
        there = read_json(path).get("backbone_weights")
        if there != shop.backbone_weights():
            raise McdiError(
                f"{show_path(path)}: made on backbone {there or 'unknown'}, {show_path(shop.config.cache_dir)} has {shop.backbone_weights()}; "
                "go on with the --cache-dir it was made with, or choose another --run-dir"
            )


def _report(folder: Path, out: Path, dataset: str) -> None:
    publish(folder, out, dataset)
    print(f"report: {render(out, dataset)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Exit codes: 0 done, 1 stopped on the way, 2 nothing started, 3 time limit, 130 Ctrl-C."""
    complete = True

    def run() -> None:
        nonlocal complete
        complete = study(
            parse(
                lambda dataset: (StudyConfig, default_study_config(dataset)), "mcdi_fast.study", arguments, "omniglot"
            )
        )

    return run_command(run) or (0 if complete else 3)


if __name__ == "__main__":
    sys.exit(main())
