"""The dated records of the comparison: written from a run folder's cells, read under today's names, joined into tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mcdi_fast.backbone import BackboneConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.store import atomic_write, dumps, make_folder, read_json, show_path
from mcdi_fast.study.plan import BUDGET, PREPARED, SETTINGS, default_study_config, flat

_FORMAT = 1
# Settings of older records: what they are called now. One that a record does not name had today's default.
_RENAMED = {
    "queries": "task.queries",
    **{f"backbone.{one.name}": f"task.backbone.{one.name}" for one in fields(BackboneConfig)},
    "prepare.copies": "task.augmentation",  # counted the image itself
    "prepare.support_share": "task.support_loss_weight",
    "prepare.start_deviation": "prepare.start_std",
    "meta.inner_rate": "meta.inner_lr",
    "meta.outer_rate": "meta.outer_lr",
    "evaluate.finetune_rates": "evaluate.finetune_lrs",
    "reptile.outer_rate": "reptile.outer_lr",
    "reptile.head_rates": "reptile.head_lrs",
    "reptile.net_rates": "reptile.net_lrs",
}
# The same of names of changes, by how they begin.
_CHANGES = {"support-share-": "support-loss-weight-", "inner-rate-": "inner-lr-", "outer-rate-": "outer-lr-"}

Entry = dict[str, Any]
"""A cell as the tables see it: setting, seed, method, variant, segments and change beside what was measured."""


@dataclass
class Table:
    """What results.md shows of one setting.

    Attributes:
        label: the setting, with the number of views where an image has several. name: the label; with a date where newer records of the
            setting have another backbone or budget. config: settings by dotted name. files: of the records. figures: made on the way.
    """

    label: str
    name: str
    config: dict[str, Any]
    entries: list[Entry]
    files: list[str]
    figures: dict[str, bytes] = field(default_factory=dict)

    def pick(self, method: str, variant: str = "", change: str = "", **wanted: Any) -> list[Entry]:
        """The cells of a row, by seed."""
        wanted |= {"method": method, "variant": variant, "change": change}
        found = [e for e in self.entries if all(e[key] == value for key, value in wanted.items())]
        return sorted(found, key=lambda e: e["seed"])

    def row(self, method: str, variant: str = "sam-augment") -> list[Entry]:
        """The cells of a row of the comparison."""
        wanted: dict[str, Any] = {"segments": 3} if method in ("mc-di", "mc-di-paper", "tw-di") else {}
        return self.pick(method, variant if method in PREPARED else "", **wanted)


def steps_of(entries: Sequence[Entry], count: int) -> list[Entry]:
    """The same row sampled with fewer steps, where it was."""
    return [{"seed": e["seed"], **e["by_steps"][str(count)]} for e in entries if str(count) in e.get("by_steps", {})]


def publish(folder: Path, out: Path, dataset: str) -> None:
    """Gather the cells of a run folder into dated records, a file a setting, a line a cell: `<out>/records/<date>-ablation-….json`."""
    cells = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    if not cells:
        return
    found = read_json(folder / "config.json")
    config = flat({key: found[key] for key in BUDGET})
    views, records = config["task.backbone.views"], make_folder(out / "records")
    for setting in sorted({cell["cell"]["setting"] for cell in cells}):
        mine = {"config": config, "cells": [cell for cell in cells if cell["cell"]["setting"] == setting]}
        date = max(cell["date"] for cell in mine["cells"])
        label = setting if views == 1 else f"{setting}-views{views}"  # other features: a table of their own
        path = records / f"{date}-ablation-{dataset}-{label}.json"
        there = read_record(path) if path.exists() else mine  # of another run folder of the same day
        joint = joint_config(mine, there)
        if joint is None:
            raise McdiError(
                f"{show_path(path)}: a record with another backbone, another budget or other settings; move it, or choose another --out"
            )
        every = {_key(cell): cell for cell in [*there["cells"], *mine["cells"]]}
        lines = ",\n".join("  " + dumps(every[key], path) for key in sorted(every))
        head = dumps({"format": _FORMAT, "dataset": dataset, "setting": label, "config": joint}, path)
        atomic_write(path, f'{head[:-1]}, "cells": [\n{lines}\n]}}\n'.encode())


def _key(cell: dict[str, Any]) -> str:
    return json.dumps(cell["cell"], sort_keys=True)


def joint_config(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the cells of two records together; None where they, or the trained backbones, differ.

    Those of Reptile's whole network bind only who ran it.
    """
    if len({cell.get("backbone_weights") for record in (first, second) for cell in record["cells"]}) > 1:
        return None
    ran = [r["config"] for r in (first, second) if any(c["cell"]["method"] == "reptile-net" for c in r["cells"])]
    differ = {name for name, value in first["config"].items() if second["config"][name] != value}
    if differ and (len(ran) == 2 or not all(name.startswith("reptile.net_") for name in differ)):
        return None
    return [*ran, first["config"]][0]


def read_record(path: Path) -> dict[str, Any]:
    """A dated record, under today's names, its settings by dotted name.

    Raises:
        McdiError: a file that is no such record; a setting that today's code does not know.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != _FORMAT or "cells" not in record:
        raise McdiError(f"{show_path(path)}: no ablation record of format {_FORMAT}; move it elsewhere")
    config = default_settings(record["dataset"])
    for name, value in flat(record["config"]).items():
        today = _RENAMED.get(name, name)
        if today not in config:
            raise McdiError(f"{show_path(path)}: unknown setting {name}; say in study/records.py what it is called now")
        if name == "prepare.copies":
            value -= 1
        config[today] = [value] if isinstance(config[today], list) and not isinstance(value, list) else value
    record["config"] = config
    for cell in record["cells"]:
        for old, new in _CHANGES.items():
            cell["cell"]["change"] = cell["cell"]["change"].replace(old, new)
    return record


def default_settings(dataset: str) -> dict[str, Any]:
    """Of a run folder and a record, by dotted name."""
    default = asdict(default_study_config(dataset))
    return flat({key: default[key] for key in BUDGET})


def load_records(out: Path, dataset: str) -> list[Table]:
    """The tables that the records make.

    A table is the newest file of a setting with whatever older ones of the same settings and backbone have besides. Older ones
    of another backbone or budget make a table of their own, behind it.

    Raises:
        McdiError: a file that is no such record.
    """
    merged: list[dict[str, Any]] = []
    for path in sorted((out / "records").glob(f"*-ablation-{dataset}-*.json"), reverse=True):
        record = read_record(path)
        same = [one for one in merged if one["setting"] == record["setting"]]
        for one in same:
            joint = joint_config(one, record)
            if joint is not None:
                cells = {_key(cell): cell for cell in [*record["cells"], *one["cells"]]}
                one |= {"config": joint, "cells": list(cells.values()), "files": [*one["files"], path.name]}
                break
        else:
            merged.append({**record, "date": f"-{path.name[:10]}" if same else "", "files": [path.name]})
    order = list(SETTINGS)
    merged.sort(key=lambda one: (order.index(one["setting"].split("-")[0]), one["setting"]))
    tables = []
    for one in merged:
        entries = [{**cell, **cell["cell"]} for cell in one["cells"]]
        tables.append(Table(one["setting"], one["setting"] + one["date"], one["config"], entries, one["files"]))
    return tables
