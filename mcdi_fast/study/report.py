"""Tables and figures of the comparison, from records alone: `records/*.json` in, `results.md` and `figures/` out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mcdi_fast.backbone import BackboneConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.report import new_figure, plot_chains, png, table
from mcdi_fast.store import atomic_write, dumps, make_folder, read_json, show_path
from mcdi_fast.study.plan import BUDGET, PREPARED, REVISION, SETTINGS, VARIANTS, default_study_config, flat

_FORMAT = 1
# Settings of older records: what they are called now. One that a record does not name had today's default.
_RENAMED = {
    "queries": "task.queries",
    **{f"backbone.{field.name}": f"task.backbone.{field.name}" for field in fields(BackboneConfig)},
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
_PAPER_MC_DI = 97.34  # its own backbone and tasks, 5-way 1-shot on Omniglot
TITLES = {
    "prototype": "nearest prototype",
    "finetune": "head fine-tuning",
    "finetune-decay": "head fine-tuning with weight decay",
    "reptile-head": "Reptile, head",
    "reptile-net": "Reptile, whole network",
    "ocd": "single-level diffusion (OCD)",
    "mv-di": "Mv-Di",
    "tw-di": "Tw-Di",
    "mc-di-paper": "Mc-Di as the paper trains and samples it",
    "mc-di": "**Mc-Di**",
    "ceiling": "trained targets (ceiling)",
}
_DEFAULT, _K = "sam-augment", 3
_PREPARATIONS: dict[str, str] = dict(
    zip(VARIANTS, ("SAM + augmentation", "SAM", "augmentation", "neither"), strict=True)
)

Entry = dict[str, Any]
"""A cell as the tables see it: setting, seed, method, variant, segments and change beside what was measured."""
Figures = dict[str, bytes]


# ---------------------------------------------------------------------- arithmetic


class Difference(NamedTuple):
    """A paired difference over the same tasks, in percentage points: its mean over all tasks and seeds, half of its 95 % interval."""

    mean: float
    half: float

    @property
    def verdict(self) -> int:
        """1: the interval lies above zero. -1: below. 0: it holds zero."""
        return 0 if abs(self.mean) <= self.half else (1 if self.mean > 0 else -1)

    def __str__(self) -> str:
        """As in the tables."""
        return f"{self.mean:+.2f} ± {self.half:.2f}"


def percent(entry: Entry) -> np.ndarray:
    """Accuracy of each task, in percent."""
    return 100 * np.array(entry["correct"]) / entry["queries"]


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean (normal approximation)."""
    return 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5


def pooled_interval(entries: Sequence[Entry]) -> float:
    """Half of the 95 % interval over the tasks of all seeds, in percent."""
    return half_width(np.concatenate([percent(entry) for entry in entries]))


def paired(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Difference | None:
    """Ours minus theirs over the seeds that both have; None where they share no seed."""
    other = {entry["seed"]: entry for entry in theirs}
    parts = [percent(entry) - percent(other[entry["seed"]]) for entry in ours if entry["seed"] in other]
    if not parts:
        return None
    every = np.concatenate(parts)
    return Difference(float(every.mean()), half_width(every))


def mean_of(entries: Sequence[Entry], get: Callable[[Entry], float] = lambda entry: entry["accuracy_mean"]) -> float:
    """Mean over seeds, of the accuracy by default."""
    return float(np.mean([get(entry) for entry in entries]))


def accuracy(entries: Sequence[Entry], interval: bool = True) -> str:
    """Mean ± deviation over seeds (± half of the interval over tasks). A single seed has no deviation."""
    if not entries:
        return ""
    deviation = f" ± {np.std([e['accuracy_mean'] for e in entries], ddof=1):.2f}" if len(entries) > 1 else ""
    return f"{mean_of(entries):.2f}{deviation}" + (f" (± {pooled_interval(entries):.2f})" if interval else "")


# ---------------------------------------------------------------------- records


def publish(folder: Path, out: Path, dataset: str) -> None:
    """Gather the cells of a run folder into dated records, a file a setting, a line a cell: `<out>/records/<date>-ablation-….json`."""
    cells = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))]
    if not cells:
        return
    found = read_json(folder / "config.json")
    config = flat({key: found[key] for key in BUDGET})
    views = config["task.backbone.views"]
    records = make_folder(out / "records")
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
    config = _defaults(record["dataset"])
    for name, value in flat(record["config"]).items():
        today = _RENAMED.get(name, name)
        if today not in config:
            raise McdiError(f"{show_path(path)}: unknown setting {name}; say in study/report.py what it is called now")
        if name == "prepare.copies":
            value -= 1
        config[today] = [value] if isinstance(config[today], list) and not isinstance(value, list) else value
    record["config"] = config
    for cell in record["cells"]:
        for old, new in _CHANGES.items():
            cell["cell"]["change"] = cell["cell"]["change"].replace(old, new)
    return record


def _defaults(dataset: str) -> dict[str, Any]:
    default = default_study_config(dataset)
    return flat({key: asdict(default)[key] for key in BUDGET})


def load_records(out: Path, dataset: str) -> list[dict[str, Any]]:
    """The tables that the records make: `label` of the setting, `name` (label, or label and date), `config`, `cells`, `files`.

    A table is the newest file of a setting with whatever older ones of the same settings and backbone have besides. Older ones
    of another backbone or budget make a table of their own, behind it.

    Raises:
        McdiError: a file that is no such record.
    """
    tables: list[dict[str, Any]] = []
    for path in sorted((out / "records").glob(f"*-ablation-{dataset}-*.json"), reverse=True):
        record = read_record(path)
        same = [found for found in tables if found["label"] == record["setting"]]
        for found in same:
            joint = joint_config(found, record)
            if joint is not None:
                cells = {_key(cell): cell for cell in [*record["cells"], *found["cells"]]}
                found |= {"config": joint, "cells": list(cells.values()), "files": [*found["files"], path.name]}
                break
        else:
            name = f"{record['setting']}-{path.name[:10]}" if same else record["setting"]
            tables.append({**record, "label": record["setting"], "name": name, "files": [path.name]})
    order = list(SETTINGS)
    return sorted(tables, key=lambda found: (order.index(found["label"].split("-")[0]), found["label"]))


def pick(cells: Iterable[dict[str, Any]], method: str, variant: str = "", **wanted: Any) -> list[Entry]:
    """The cells of a row, by seed."""
    wanted = {"method": method, "variant": variant, "change": "", **wanted}
    entries = [{**cell, **cell["cell"]} for cell in cells]
    found = [e for e in entries if all(e[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda e: e["seed"])


def row(cells: Iterable[dict[str, Any]], method: str, variant: str = _DEFAULT) -> list[Entry]:
    """The cells of a row of the comparison."""
    wanted = {"segments": _K} if method in ("mc-di", "mc-di-paper", "tw-di") else {}
    return pick(cells, method, variant if method in PREPARED else "", **wanted)


def steps_of(entries: Sequence[Entry], count: int) -> list[Entry]:
    """The same row sampled with fewer steps, where it was."""
    return [{"seed": e["seed"], **e["by_steps"][str(count)]} for e in entries if str(count) in e.get("by_steps", {})]


# ---------------------------------------------------------------------- rendering


def render(out: Path, dataset: str) -> Path:
    """Write results.md and its figures from `<out>/records`; returns its path."""
    tables = load_records(out, dataset)
    figures: Figures = {}
    text = (
        ["# Results", "", *_introduction(dataset, tables)] if tables else ["# Results", "", "No record is there yet."]
    )
    for found in tables:
        cells, name = found["cells"], found["name"]
        text += [f"## {dataset}, {_title(name)}", ""]
        text += _comparison(cells) + _claims(found["label"], cells) + _few_steps(cells) + _variants(cells)
        text += (
            _segments(cells, figures, name) + _theorem_one(cells, figures, name) + _novelty(cells) + _selection(cells)
        )
        if any(row(cells, method) for method in TITLES):
            figures[f"{name}-accuracy.png"] = _plot_rows(cells)
            text += [f"![accuracy of every row](figures/{name}-accuracy.png)", ""]
    folder = make_folder(out / "figures")
    for file, data in figures.items():
        atomic_write(folder / file, data)
    path = out / "results.md"
    atomic_write(path, ("\n".join(text).rstrip() + "\n").encode())
    return path


def _title(name: str) -> str:
    """5way1shot-views9 -> 5-way 1-shot, 9 views."""
    name = re.sub(r"(\d+)way(\d+)shot", r"\1-way \2-shot", re.sub(r"-views(\d+)", r", \1 views", name))
    return re.sub(r"-(\d{4}-\d\d-\d\d)$", r", older records of \1", name)


def _introduction(dataset: str, tables: list[dict[str, Any]]) -> list[str]:
    lines = [
        "This page is generated from the records in its first table. "
        f"`python -m mcdi_fast.study --dataset {dataset} --out docs --report-only` writes it again. Do not edit it by hand.",
        "",
        "**Protocol.** All rows of a seed share the frozen backbone and the test tasks. Learning rates, weight decays, numbers of gradient "
        "steps and the noise of OCD's chain are chosen on validation tasks. [baselines.md](baselines.md) says what each baseline took from "
        "its publication and what it left out.",
        "",
        "**Numbers.** An accuracy reads: mean over seeds ± standard deviation over seeds (± half of the 95 % interval over the tasks of all "
        "seeds). A difference is paired over the same tasks. It is in percentage points, ± half of its 95 % interval.",
        "",
        *_corrections(tables),
    ]
    rows = []
    for found in tables:
        config, machines = found["config"], [c["machine"] for c in found["cells"]]
        seeds = sorted({c["cell"]["seed"] for c in found["cells"]})
        budget = (
            f"{config['evaluate.tasks']} test tasks a seed, {config['prepare.tasks']} tasks in the bank, "
            f"{config['meta.steps']} outer steps"
        )
        processor = " ".join(filter(None, (machines[0]["processor"], machines[0].get("instructions"))))
        rows.append(
            [
                _title(found["name"]),
                ", ".join(f"[{file[:10]}](records/{file})" for file in found["files"]),
                " ".join(map(str, seeds)),
                budget,
                _options(config) or "defaults",
                found["cells"][0].get("backbone_weights") or "not kept",
                f"{processor}, {machines[0]['threads']} thread(s), torch {machines[0]['torch']}",
                " ".join(sorted({m["git"] for m in machines})),
            ]
        )
    return [*lines, *table(["setting", "records", "seeds", "budget", "options", "backbone", "machine", "git"], rows)]


def _corrections(tables: list[dict[str, Any]]) -> list[str]:
    """Which rows are older than the corrections that `plan.REVISION` counts, and what that means."""
    whole, some = [], []
    for found in tables:
        cells = [c for c in found["cells"] if c["cell"]["method"] in PREPARED]
        older = [c for c in cells if c.get("revision", 1) < REVISION]
        methods = {c["cell"]["method"] for c in older}
        titles = [title.strip("*") for method, title in TITLES.items() if method in methods]
        if older and len(older) == len(cells):
            whole.append(_title(found["name"]))
        elif older:
            some.append(f"of {_title(found['name'])} {len(older)} cells of {', '.join(titles)}")
    if not whole and not some:
        return []
    where = "; ".join([f"all diffusion rows and trained targets of {', '.join(whole)}"] * bool(whole) + some)
    return [
        f"**Rows made before two corrections: {where}.** Two defects were found after them and are corrected in the code. First, the "
        "network's output had Mc-Di's scale for every objective. Tw-Di needs sqrt(abar_t) and got 8 to 11 times as much in the first of its three "
        "segments. Its older rows are too low for that reason, by about 0.07 at 20 ways, so they cannot carry the claim that Mc-Di is above "
        "Tw-Di. Mv-Di and OCD have k = 1 here, where the two scales are the same. Second, all seeds shared the random choices of preparation "
        "(start, augmentation) and of meta-training (task, target and step of each sample). Their tasks, the network's start and the noise "
        "did differ. The older deviations over seeds therefore miss part of the spread. Means and paired differences are not biased by it.",
        "",
    ]


def _options(config: dict[str, Any]) -> str:
    """The options of the command that differ from its defaults."""
    default, found = _defaults(config["dataset"]), []
    for name, value in config.items():
        if value != default[name]:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"--{name.replace('_', '-')} {text}")
    return f"`{' '.join(found)}`" if found else ""


def _comparison(cells: list[dict[str, Any]]) -> list[str]:
    ours, rows = row(cells, "mc-di"), []
    for method, title in TITLES.items():
        entries = row(cells, method)
        if not entries:
            continue
        rows.append(
            [
                title,
                len(entries),
                accuracy(entries),
                paired(ours, entries) or "" if method != "mc-di" else "",
                f"{_milliseconds(cells, method, entries):.2f}",
                " / ".join(map(str, sorted({e["gradient_steps"] for e in entries}))),
                _seconds(entries, "training_seconds"),
                _seconds(entries, "preparation_seconds"),
            ]
        )
    if not rows:
        return []
    timed = (
        "All rows but the whole network and the ceiling were timed in one process, one after the other."
        if pick(cells, "latency")
        else "Each row was timed in its own cell, beside whatever else the machine did."
    )
    header = "row|seeds|accuracy, %|Mc-Di minus it|one task, ms|gradient steps|training, s|preparation, s".split("|")
    return [
        "One task: milliseconds for the weights of a new task whose support features are given (whole network: its images). "
        + timed,
        "",
        *table(header, rows),
        *_whole_network(cells),
    ]


def _whole_network(cells: list[dict[str, Any]]) -> list[str]:
    """What Reptile on the whole network came to: without an outer step it is not Reptile's any more."""
    chosen = [e["chosen"] for e in row(cells, "reptile-net")]
    if not chosen:
        return []
    tried = sorted({outer for c in chosen for _, _, outer, _ in c["tried"]})
    text = " or ".join(str(outer) for outer in sorted({c["outer_steps"] for c in chosen}))
    best = [max(accuracy for accuracy, _, outer, _ in c["tried"] if outer == tried[-1]) for c in chosen]
    return [
        f"Reptile, whole network: {' and '.join(map(str, tried))} outer steps from the trained backbone were tried. Validation tasks chose "
        f"{text}. With 0 the row is the trained backbone and a head of zeros, fine-tuned as a whole. With {tried[-1]} it had "
        f"{np.mean(best):.1f} % on validation tasks. [baselines.md](baselines.md) says why.",
        "",
    ]


def _milliseconds(cells: list[dict[str, Any]], method: str, entries: list[Entry], steps: str = "all") -> float:
    """Of the part latency where it was made, else the median of the row's own cells."""
    for timed in pick(cells, "latency"):
        if steps in timed["adapt_ms"].get(method, {}):
            return float(timed["adapt_ms"][method][steps])
    return float(np.median([e["adapt_ms"] for e in entries]))


def _seconds(entries: list[Entry], key: str) -> str:
    values = [e[key] for e in entries if e.get(key)]
    return f"{np.mean(values):.0f}" if values else "0"


def _claims(label: str, cells: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, object, str]] = []

    def claim(text: str, difference: Difference | None) -> None:
        words = {1: "**holds**", -1: "**does not hold**, the opposite does", 0: "**undecided**"}
        if difference is not None:
            rows.append((text, difference, words[difference.verdict]))

    ours = row(cells, "mc-di")
    if ours and label.startswith("5way1shot"):
        mean = mean_of(ours)
        word = "**holds**" if mean >= _PAPER_MC_DI else "**does not hold**"
        rows.append((f"Mc-Di has at least {_PAPER_MC_DI} %, the paper's number (its backbone)", f"{mean:.2f} %", word))
    for method, title in TITLES.items():
        if method not in ("mc-di", "ceiling"):
            claim(f"Mc-Di above {title}", paired(ours, row(cells, method)))
    few = paired(steps_of(ours, 5), row(cells, "mv-di"))
    if few:
        word = "does not hold" if few.verdict < 0 else "holds" if few.mean >= 0 or few.half < 0.1 else "undecided"
        rows.append(("Mc-Di with 5 sampling steps not below Mv-Di with all", few, f"**{word}**"))
    for with_sam, without in (("sam-augment", "augment"), ("sam", "plain")):
        a, b = row(cells, "ceiling", with_sam), row(cells, "ceiling", without)
        name = f"({_PREPARATIONS[with_sam]} against {_PREPARATIONS[without]})"
        if a and b:
            x, y = (mean_of(part, _eigenvalue) for part in (a, b))
            word = "**holds**" if x < y else "**does not hold**"
            rows.append((f"SAM lowers the largest eigenvalue {name}", f"{x:.4f} against {y:.4f}", word))
        claim(
            f"SAM raises Mc-Di's accuracy {name}", paired(row(cells, "mc-di", with_sam), row(cells, "mc-di", without))
        )
    for with_it, without in (("sam-augment", "sam"), ("augment", "plain")):
        name = f"({_PREPARATIONS[with_it]} against {_PREPARATIONS[without]})"
        difference = paired(row(cells, "mc-di", with_it), row(cells, "mc-di", without))
        claim(f"augmentation raises Mc-Di's accuracy {name}", difference)
    if not rows:
        return []
    return [
        "### Which claims hold here",
        "",
        "A claim about a difference is undecided where the 95 % interval holds zero.",
        "",
        *table(["claim", "measured", "verdict"], rows),
    ]


def _eigenvalue(entry: Entry) -> float:
    return entry["eigenvalue"]["mean"]


def _few_steps(cells: list[dict[str, Any]]) -> list[str]:
    rows = []
    names = [(method, _DEFAULT, TITLES[method]) for method in ("ocd", "mv-di", "tw-di", "mc-di-paper", "mc-di")]
    names += [("mc-di", variant, f"Mc-Di, {_PREPARATIONS[variant]} in the preparation") for variant in ("sam", "plain")]
    for method, variant, title in names:
        entries = row(cells, method, variant)
        for count in sorted({int(c) for e in entries for c in e.get("by_steps", {})}):
            few = steps_of(entries, count)
            against = [entries, row(cells, "prototype"), row(cells, "mv-di", variant)]
            time = f"{_milliseconds(cells, method, few, str(count)):.2f}"
            rows.append([title, count, accuracy(few), *(paired(few, other) or "" for other in against), time])
    if not rows:
        return []
    header = "row|steps|accuracy, %|minus the row with all steps|minus nearest prototype|minus Mv-Di|one task, ms"
    return [
        "### Fewer sampling steps",
        "",
        "Mv-Di, in the column that subtracts it, takes all its steps and has the same preparation.",
        "",
        *table(header.split("|"), rows),
    ]


def _variants(cells: list[dict[str, Any]]) -> list[str]:
    if not any(row(cells, method, v) for method in ("mc-di", "ceiling") for v in VARIANTS[1:]):
        return []
    header = ["row", *_PREPARATIONS.values()]
    rows = [
        [title, *(accuracy(row(cells, method, v), interval=False) for v in VARIANTS)]
        for method, title in TITLES.items()
        if method in PREPARED
    ]
    ceilings = [row(cells, "ceiling", v) for v in VARIANTS]
    rows.append(["largest eigenvalue", *(f"{mean_of(c, _eigenvalue):.4f}" if c else "" for c in ceilings)])
    differences = [
        [title, *(paired(row(cells, "mc-di", v), row(cells, method, v)) or "" for v in VARIANTS)]
        for method, title in TITLES.items()
        if method not in ("mc-di", "ceiling")
    ]
    return [
        "### Preparation: SAM and augmentation",
        "",
        "Accuracy in %, with the deviation over seeds. Last row: the largest eigenvalue of the Hessian of the trained heads' loss, mean over "
        "test tasks.",
        "",
        *table(header, rows),
        "Mc-Di minus the row, both with the same preparation.",
        "",
        *table(header, [line for line in differences if any(line[1:])]),
    ]


def _segments(cells: list[dict[str, Any]], figures: Figures, name: str) -> list[str]:
    found = {k: pick(cells, "mc-di", _DEFAULT, segments=k) for k in sorted({c["cell"]["segments"] for c in cells})}
    points = [(k, entries, mean_of(entries, lambda e: e["weight_error"])) for k, entries in found.items() if entries]
    if len(points) < 2:
        return []
    figure, (left, right) = new_figure(2)
    numbers = [k for k, _, _ in points]
    half = [pooled_interval(entries) for _, entries, _ in points]
    left.errorbar(numbers, [mean_of(entries) for _, entries, _ in points], half, fmt="o-", ms=3, capsize=3)
    left.set(xlabel="segments k", ylabel="accuracy, %")
    right.plot(numbers, [error for _, _, error in points], "o-", ms=3)
    right.set(xlabel="segments k", ylabel="weight error (normalised RMS)", ylim=(0, None))
    figures[f"{name}-segments.png"] = png(figure)
    return [
        "### Number of segments k (the paper's figure 4)",
        "",
        "Weight error: root mean square distance to the trained weights of the same task, in normalised weights.",
        "",
        *table(
            ["k", "seeds", "accuracy, %", "weight error"],
            [[k, len(entries), accuracy(entries), f"{error:.3f}"] for k, entries, error in points],
        ),
        f"![accuracy and weight error against k](figures/{name}-segments.png)",
        "",
    ]


def _theorem_one(cells: list[dict[str, Any]], figures: Figures, name: str) -> list[str]:
    entries = pick(cells, "analysis", _DEFAULT)
    if not entries:
        return []
    ends = entries[0]["ends"]
    curves = {m: np.mean([e["distances"][m] for e in entries], 0) for m in ("mc-di", "mc-di-paper", "tw-di", "mv-di")}
    figure, axes = new_figure(len(curves))
    for ax, (method, curve) in zip(axes, curves.items(), strict=True):
        for i in range(curve.shape[1]):
            ax.plot(curve[:, i], label=f"target {i + 1}")
            ax.axvline(ends[i], color=f"C{i}", lw=0.7, ls=":")
        ylabel = "distance of x_t (normalised RMS)"
        ax.set(xlabel="step t", ylabel=ylabel, title=TITLES[method].strip("*"), yscale="log")
        ax.legend(frameon=False)
    figures[f"{name}-theorem1.png"] = png(figure)
    figures[f"{name}-chains.png"] = plot_chains(entries[0])
    rows = [
        [TITLES[m], *(f"{curve[end, i]:.3f} (nearest: {int(curve[end].argmin()) + 1})" for i, end in enumerate(ends))]
        for m, curve in curves.items()
    ]
    return [
        "### Does the chain hit the local targets? (Theorem 1, figure 1)",
        "",
        "Distance of x_t to target i at t = e_i, and the target that is nearest there. Root mean square in weights normalised by Mc-Di's "
        "normaliser, mean over test tasks.",
        "",
        *table(["chain", *(f"target {i} at t = {end}" for i, end in enumerate(ends, 1))], rows),
        f"![distance to each local target along the chain](figures/{name}-theorem1.png)",
        "",
        f"![chains of one task in a plane of weight space, over its loss](figures/{name}-chains.png)",
        "",
    ]


def _novelty(cells: list[dict[str, Any]]) -> list[str]:
    entries = pick(cells, "analysis", _DEFAULT)
    if not entries:
        return []
    titles = {
        "generated": "generated for new tasks",
        "trained": "trained for the same new tasks",
        "training": "training rows, nearest other one",
    }
    mean = {
        key: np.mean([[e["novelty"][key][what] for what in ("median", "least")] for e in entries], 0) for key in titles
    }
    rows = [[title, *(f"{value:.3f}" for value in mean[key])] for key, title in titles.items()]
    warnings = [w for e in row(cells, "mc-di") for w in e.get("health", {}).get("warnings", [])]
    return [
        "### Are generated heads new?",
        "",
        f"Distance of a class's row of weights to the nearest of {entries[0]['novelty']['training_rows']} training rows: root mean square in "
        "normalised weights, mean over seeds. A copy has distance 0.",
        "",
        *table(["rows", "median", "least"], rows),
        f"Diagnostics of the generated heads: {'; '.join(warnings) if warnings else 'nothing to report'}.",
        "",
    ]


def _selection(cells: list[dict[str, Any]]) -> list[str]:
    changes: dict[str, list[Entry]] = {}
    for cell in sorted(cells, key=lambda c: int(c["cell"]["seed"])):
        if cell["cell"]["change"]:
            changes.setdefault(cell["cell"]["change"], []).append({**cell, **cell["cell"]})
    default = changes.get("default", [])
    if not default:
        return []
    against = {name: paired(entries, default) for name, entries in changes.items() if name != "default"}
    order = sorted(against, key=lambda name: -(against[name] or Difference(0, 0)).mean)
    rows = []
    for name in ("default", *order):
        entries = changes[name]
        time = f"{np.median([e['adapt_ms'] for e in entries]):.2f}"
        mean = f"{mean_of(entries):.2f} ± {pooled_interval(entries):.2f}"
        seeds = ", ".join(str(e["seed"]) for e in entries)
        rows.append([name, seeds, mean, against.get(name) or "", time, _seconds(entries, "training_seconds")])
    return [
        "### One change at a time (validation characters)",
        "",
        f"Mc-Di on {len(default[0]['correct'])} validation tasks a seed; ± behind an accuracy is half of the 95 % interval over tasks. Seeds have "
        "tasks of their own, so compare differences, not accuracies of rows with other seeds.",
        "",
        *table(["change", "seeds", "accuracy, %", "minus the default", "one task, ms", "training, s"], rows),
    ]


def _plot_rows(cells: list[dict[str, Any]]) -> bytes:
    figure, ax = new_figure()
    methods = [m for m in TITLES if row(cells, m)]
    for y, method in enumerate(methods):
        entries = row(cells, method)
        color = "C1" if method == "mc-di" else "C0"
        ax.errorbar(mean_of(entries), y, xerr=pooled_interval(entries), fmt="o", color=color, capsize=4)
        ax.plot([e["accuracy_mean"] for e in entries], [y] * len(entries), "|", color="0.5")
    ax.set(yticks=range(len(methods)), yticklabels=[TITLES[m].strip("*") for m in methods], xlabel="accuracy, %")
    ax.invert_yaxis()
    return png(figure)
