"""The paper's comparison, `python -m mcdi_fast.study --dataset omniglot`: every method on the same tasks, cell by cell, resumable.

A cell is one method in one setting with one seed and one preparation. It becomes one JSON record in `<run-dir>/cells`, and cells that are
there are never computed again. Stop it at any moment and give the same command again. From the records come the tables (report.py);
`--out docs` puts them where the repository keeps them.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mcdi_fast import environment  # noqa: F401

# isort: split

from mcdi_fast.cli import open_run, parse, run_command, stopped
from mcdi_fast.errors import McdiError
from mcdi_fast.store import make_folder, read_json, remove_temporaries, show_path, write_json
from mcdi_fast.study.cells import run_cell
from mcdi_fast.study.plan import FREE, StudyConfig, check_study, default_study_config, plan, train_config
from mcdi_fast.study.records import publish
from mcdi_fast.study.report import render
from mcdi_fast.study.workshop import PausedError, Workshop
from mcdi_fast.tasks import glyphs, omniglot
from mcdi_fast.tasks.drawings import check_drawings


def study(config: StudyConfig) -> bool:
    """Make the cells asked for and the report; returns whether all are there (False: the time limit came first)."""
    config = check_study(config)
    folder = config.run_dir or Path("runs") / f"study-{config.dataset}"
    deadline, complete = time.monotonic() + (config.time_limit or float("inf")), True
    if not config.report_only:
        data = glyphs.load() if config.dataset == "glyphs" else omniglot.load(config.data_dir, config.cache_dir)
        for task in {train_config(config, cell).task for cell in plan(config)}:
            check_drawings(data, task)
        with open_run(folder, config, FREE), stopped():
            for name in ("cells", "partial", "banks", "generators"):
                remove_temporaries(make_folder(folder / name))
            complete = _make_cells(config, Workshop(config, data, folder, deadline))
    with stopped():
        publish(folder, config.out or folder, config.dataset)
        print(f"report: {render(config.out or folder, config.dataset)}")
    return complete


def _make_cells(config: StudyConfig, shop: Workshop) -> bool:
    from tqdm import tqdm

    cells = plan(config)
    paths = {cell: shop.folder / "cells" / f"{cell.name}.json" for cell in cells}
    pending = [cell for cell in cells if not paths[cell].exists()]
    done = len(cells) - len(pending)
    with tqdm(total=len(cells), initial=done, unit=" cells", desc="cells", dynamic_ncols=True) as bar:
        for i, cell in enumerate(pending):
            try:
                if i:  # a call always makes some progress, however short its time
                    shop.pause_if_late()
                else:
                    _check_backbone(shop)
                record = run_cell(shop, cell)
            except PausedError:
                bar.close()
                print(f"time limit: {done + i} of {len(cells)} cells are there; the same command goes on")
                return False
            write_json(paths[cell], record)
            bar.update()
            if "accuracy_mean" in record:
                score = f"{record['accuracy_mean']:6.2f} ± {record['accuracy_ci95']:.2f} %"
                bar.write(f"{cell.name:58} {score}", file=sys.stderr)
            needed = {shop.bank_name(other) for other in pending[i + 1 :]}
            for path in (shop.folder / "banks").iterdir():
                if path.is_dir() and path.name not in needed:  # up to some 100 MB
                    shutil.rmtree(path)
                    path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    return True


def _check_backbone(shop: Workshop) -> None:
    """Rows of other features are no comparison, and the same recipe trains another backbone on another kind of processor."""
    for path in sorted((shop.folder / "cells").glob("*.json")):
        there, ours = read_json(path).get("backbone_weights"), shop.backbone_weights()
        if there != ours:
            raise McdiError(
                f"{show_path(path)}: made on backbone {there or 'unknown'}, {show_path(shop.config.cache_dir)} has {ours}; "
                "go on with the --cache-dir it was made with, or choose another --run-dir"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Exit codes: 0 done, 1 stopped on the way, 2 nothing started, 3 time limit, 130 Ctrl-C."""
    complete = True

    def run() -> None:
        nonlocal complete
        kind = lambda name: (StudyConfig, default_study_config(name))  # noqa: E731
        complete = study(parse(kind, "mcdi_fast.study", arguments, "omniglot"))

    return run_command(run) or (0 if complete else 3)


if __name__ == "__main__":
    sys.exit(main())
