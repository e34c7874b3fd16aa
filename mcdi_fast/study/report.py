"""Tables and figures of the comparison, from records alone: `records/*.json` in, `results.md` and `figures/` out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mcdi_fast.errors import McdiError
from mcdi_fast.report import new_figure, plot_chains, png
from mcdi_fast.store import atomic_write, dumps, make_folder, read_json, show_path
from mcdi_fast.study.plan import PREPARED, SETTINGS, default_study_config

_FORMAT = 1
# Settings of older records: what they are called now, and what was done before they were settings.
_RENAMED = {
    "start_deviation": "start_std",
    "support_share": "support_loss_weight",
    "inner_rate": "inner_lr",
    "outer_rate": "outer_lr",
    "finetune_rates": "finetune_lrs",
}
_BEFORE: dict[str, dict[str, Any]] = {
    "backbone": {"views": 1},
    "diffusion": {"residual": "scaled"},
    "meta": {"normalizer_floor": 0.1},
}
_PAPER_MC_DI = 97.34  # its own backbone and tasks, 5-way 1-shot on Omniglot
# Half of the 95 % interval of a mean over n seeds is this times deviation / sqrt(n): Student's t with n - 1 degrees of freedom.
_STUDENT = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646, 9: 2.3060, 10: 2.2622}
TITLES = {
    "prototype": "nearest prototype",
    "finetune": "head fine-tuning (Adam, support only)",
    "finetune-decay": "the same with weight decay",
    "reptile-head": "Reptile, head",
    "reptile-net": "Reptile, whole network",
    "ocd": "single-level diffusion (OCD)",
    "mv-di": "Mv-Di",
    "tw-di": "Tw-Di",
    "mc-di-paper": "Mc-Di as the paper trains and samples it",
    "mc-di": "**Mc-Di**",
    "ceiling": "trained targets (ceiling)",
}
_BASELINES = (
    "finetune",
    "finetune-decay",
    "reptile-head",
    "reptile-net",
    "ocd",
    "mv-di",
    "tw-di",
    "mc-di-paper",
    "prototype",
)
_DEFAULT, _K = "sam-augment", 3
_PREPARATIONS = {"sam-augment": "SAM + augmentation", "sam": "SAM", "augment": "augmentation", "plain": "neither"}


@dataclass(frozen=True)
class Difference:
    """A paired difference over the same tasks, in percent.

    Attributes:
        mean, half: over all (seed, task) pairs, with half of the 95 % interval. by_seed: the mean of each seed.
    """

    mean: float
    half: float
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> int:
        """1: the interval lies above zero, -1: below, 0: it holds zero."""
        return 0 if abs(self.mean) <= self.half else (1 if self.mean > 0 else -1)

    def __str__(self) -> str:
        """As in the tables."""
        return f"{self.mean:+.2f} ± {self.half:.2f}"


def paired(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Difference | None:
    """Ours minus theirs, over the seeds that both have. Entries: {"seed", "correct", "queries"}; None where they share no seed."""
    other = {entry["seed"]: entry for entry in theirs}
    parts = [
        100 * (np.array(entry["correct"]) - np.array(other[entry["seed"]]["correct"])) / entry["queries"]
        for entry in ours
        if entry["seed"] in other
    ]
    if not parts:
        return None
    every = np.concatenate(parts)
    half = 1.96 * float(every.std(ddof=1)) / len(every) ** 0.5
    return Difference(float(every.mean()), half, tuple(float(part.mean()) for part in parts))


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, deviation and half of the 95 % interval (Student) over seeds; the latter two 0 for a single seed."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), 0.0, 0.0
    deviation = float(np.std(values, ddof=1))
    return float(np.mean(values)), deviation, _STUDENT.get(n, 1.96) * deviation / n**0.5


def _accuracy(entries: Sequence[dict[str, Any]], interval: bool = True) -> str:
    """Mean ± deviation over seeds (± half of the 95 % interval over tasks); no deviation of a single seed."""
    mean, deviation, _ = over_seeds([e["accuracy_mean"] for e in entries])
    text = f"{mean:.2f} ± {deviation:.2f}" if len(entries) > 1 else f"{mean:.2f}"
    return f"{text} (± {pooled_interval(entries):.2f})" if interval else text


def pooled_interval(entries: Sequence[dict[str, Any]]) -> float:
    """Half of the 95 % interval over the tasks of all seeds, in percent."""
    every = np.concatenate([100 * np.array(entry["correct"]) / entry["queries"] for entry in entries])
    return 1.96 * float(every.std(ddof=1)) / len(every) ** 0.5


# ---------------------------------------------------------------------- records


def publish(folder: Path, out: Path, dataset: str) -> None:
    """Gather the cells of a run folder into dated records, a file a setting, a line a cell: `<out>/records/<date>-ablation-….json`."""
    cells = [read_json(path) for path in sorted((folder / "cells").glob("*.json"))] if folder.is_dir() else []
    if not cells:
        return
    found = read_json(folder / "config.json")
    shared = ("dataset", "queries", "selection_tasks", "backbone", "prepare", "diffusion", "denoiser", "meta")
    config = {key: found[key] for key in (*shared, "evaluate", "reptile")}
    views = config["backbone"]["views"]
    records = make_folder(out / "records")
    for setting in sorted({cell["cell"]["setting"] for cell in cells}):
        mine = {"config": config, "cells": [cell for cell in cells if cell["cell"]["setting"] == setting]}
        date = max(cell["date"] for cell in mine["cells"])
        label = setting if views == 1 else f"{setting}-views{views}"  # other features: a table of their own
        path = records / f"{date}-ablation-{dataset}-{label}.json"
        there = read_record(path) if path.exists() else mine  # of another run folder of the same day
        joint = _joint_config(mine, there)
        if joint is None:
            raise McdiError(
                f"{show_path(path)}: a record with another backbone, another budget or other settings; move it, or choose another --out"
            )
        every = {_key(cell): cell for cell in [*there["cells"], *mine["cells"]]}
        lines = ",\n".join("  " + dumps(every[key], path) for key in sorted(every))
        head = dumps({"format": _FORMAT, "dataset": dataset, "setting": label, "config": joint}, path)
        atomic_write(path, f'{head[:-1]}, "cells": [\n{lines}\n]}}\n'.encode())


def _joint_config(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the cells of two records together; None where they, or the trained backbones, differ.

    Those of Reptile's whole network bind only who ran it.
    """
    if len({cell.get("backbone_weights") for record in (first, second) for cell in record["cells"]}) > 1:
        return None
    if first["config"] == second["config"]:
        return first["config"]
    ran = [r["config"] for r in (first, second) if any(c["cell"]["method"] == "reptile-net" for c in r["cells"])]

    def binding(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "reptile": {k: v for k, v in config["reptile"].items() if not k.startswith("net_")}}

    same = binding(first["config"]) == binding(second["config"])
    return None if len(ran) == 2 or not same else [*ran, first["config"]][0]


def read_record(path: Path) -> dict[str, Any]:
    """A dated record, its settings under today's names.

    Raises:
        McdiError: a file that is no such record.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != _FORMAT or "cells" not in record:
        raise McdiError(f"{show_path(path)}: no ablation record of format {_FORMAT}; move it elsewhere")
    for name, part in record["config"].items():
        if isinstance(part, dict):
            renamed = {_RENAMED.get(key, key): value for key, value in part.items()}
            record["config"][name] = {**_BEFORE.get(name, {}), **renamed}
    return record


def _key(cell: dict[str, Any]) -> str:
    return json.dumps(cell["cell"], sort_keys=True)


def load_records(out: Path, dataset: str) -> dict[str, dict[str, Any]]:
    """In the order of `SETTINGS`, by setting (and number of views, where an image has several): `config`, `cells`, `files`.

    The newest file of a setting, with what older ones of the same config and backbone have besides.

    Raises:
        McdiError: a file that is no such record.
    """
    result: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "records").glob(f"*-ablation-{dataset}-*.json"), reverse=True):
        record = read_record(path)
        newest = result.setdefault(record["setting"], {"config": record["config"], "cells": [], "files": []})
        joint = _joint_config(newest, record)
        if joint is not None:
            newest["config"] = joint
            newest["cells"] = list({_key(cell): cell for cell in [*record["cells"], *newest["cells"]]}.values())
            newest["files"].append(path.name)
    order = list(SETTINGS)
    return dict(sorted(result.items(), key=lambda item: (order.index(item[0].split("-")[0]), item[0])))


def pick(cells: Sequence[dict[str, Any]], method: str, variant: str = "", **wanted: Any) -> list[dict[str, Any]]:
    """The cells of a row, by seed; each gets its `seed` at the top."""
    wanted = {"method": method, "variant": variant, "change": "", **wanted}
    found = [c for c in cells if all(c["cell"][key] == value for key, value in wanted.items())]
    return sorted(({**c, "seed": c["cell"]["seed"]} for c in found), key=lambda c: c["seed"])


def row(cells: Sequence[dict[str, Any]], method: str, variant: str = _DEFAULT) -> list[dict[str, Any]]:
    """The cells of a row of the comparison."""
    wanted = {"segments": _K} if method in ("mc-di", "mc-di-paper", "tw-di") else {}
    return pick(cells, method, variant if method in PREPARED else "", **wanted)


def steps_of(entries: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The same row sampled with fewer steps, where it was."""
    return [{"seed": e["seed"], **e["by_steps"][str(count)]} for e in entries if str(count) in e.get("by_steps", {})]


# ---------------------------------------------------------------------- rendering


def render(out: Path, dataset: str) -> Path:
    """Write results.md and its figures from `<out>/records`; returns its path."""
    records = load_records(out, dataset)
    figures: dict[str, bytes] = {}
    text = ["# Results", "", *_introduction(dataset, records)]
    for setting, record in records.items():
        text += _setting(setting, record, figures, dataset)
    if not records:
        text += ["No record is there yet."]
    folder = make_folder(out / "figures")
    for name, data in figures.items():
        atomic_write(folder / name, data)
    path = out / "results.md"
    atomic_write(path, ("\n".join(text).rstrip() + "\n").encode())
    return path


def _introduction(dataset: str, records: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        f"Made by `python -m mcdi_fast.study --dataset {dataset} --out docs` from the records named below; do not edit it by hand, "
        "`--report-only` writes it again. Protocol: the same backbone and the same test tasks for every row of a seed; rates, decays, "
        "numbers of gradient steps and the noise of OCD's chain are chosen on validation tasks only. What the baselines took from their "
        "publications and what they left: [baselines.md](baselines.md).",
        "",
    ]
    for setting, record in records.items():
        config, machines = record["config"], [c["machine"] for c in record["cells"]]
        backbone = record["cells"][0].get("backbone_weights")
        seeds = sorted({c["cell"]["seed"] for c in record["cells"]})
        lines.append(
            f"- {setting}: records {', '.join(record['files'])}; {_options(config)}; "
            f"seeds {', '.join(map(str, seeds))}; {config['evaluate']['tasks']} test tasks "
            f"a seed; {config['meta']['steps']} outer steps, {config['prepare']['tasks']} tasks in the bank; "
            f"{f'backbone {backbone}; ' if backbone else ''}"
            f"{' '.join(filter(None, (machines[0]['processor'], machines[0].get('instructions'))))}, "
            f"{machines[0]['threads']} thread(s), torch {machines[0]['torch']}; "
            f"git {', '.join(sorted({m['git'] for m in machines}))}"
        )
    return [*lines, ""]


def _options(config: dict[str, Any]) -> str:
    """The options of the command that differ from its defaults."""
    default = json.loads(json.dumps(asdict(default_study_config(config["dataset"])), default=str))
    found = []
    for key, value in config.items():
        parts = (
            {f"{key}.{name}": (v, default[key].get(name)) for name, v in value.items()}
            if isinstance(value, dict)
            else {}
        )
        for name, (ours, theirs) in (parts or {key: (value, default[key])}).items():
            if ours != theirs:
                text = " ".join(map(str, ours)) if isinstance(ours, list) else str(ours)
                found.append(f"--{name.replace('_', '-')} {text}")
    return f"options `{' '.join(found)}`" if found else "default options"


def _setting(setting: str, record: dict[str, Any], figures: dict[str, bytes], dataset: str) -> list[str]:
    cells = record["cells"]
    ours = row(cells, "mc-di")
    text = [f"## {dataset}, {setting}", ""]
    text += _comparison(cells, ours)
    text += _claims(setting, cells, ours)
    text += _few_steps(cells)
    text += _variants(cells)
    text += _segments(cells, figures, setting)
    text += _theorem_one(cells, figures, setting)
    text += _novelty(cells)
    text += _selection(cells)
    if any(row(cells, method) for method in TITLES):
        figures[f"{setting}-accuracy.png"] = _plot_rows(cells)
        text += [f"![accuracy of every row](figures/{setting}-accuracy.png)", ""]
    return text


def _comparison(cells: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[str]:
    lines = [
        "± behind an accuracy: deviation over seeds, then half of the 95 % interval over the tasks of all seeds. Mc-Di minus the row: paired "
        "over the same tasks, with its 95 % interval. One task: milliseconds to adapt to a new task, its support features given (whole "
        f"network: its images){_timed(cells)}.",
        "",
        "| row | seeds | accuracy, % | Mc-Di minus it | one task, ms | gradient steps at test time | training, s | preparation, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, title in TITLES.items():
        entries = row(cells, method)
        if not entries:
            continue
        difference = paired(ours, entries) if method != "mc-di" else None
        steps = sorted({e["gradient_steps"] for e in entries})
        lines.append(
            f"| {title} | {len(entries)} | {_accuracy(entries)} | {difference or ''} | "
            f"{_milliseconds(cells, method, entries):.2f} | {' / '.join(map(str, steps))} | "
            f"{_seconds(entries, 'training_seconds')} | {_seconds(entries, 'preparation_seconds')} |"
        )
    return [*lines, "", *_whole_network(cells)] if len(lines) > 4 else []


def _whole_network(cells: list[dict[str, Any]]) -> list[str]:
    """What Reptile on the whole network came to: without an outer step it is not Reptile's any more."""
    chosen = [e["chosen"] for e in row(cells, "reptile-net")]
    if not chosen:
        return []
    tried = sorted({outer for c in chosen for _, _, outer, _ in c["tried"]})
    text = " / ".join(str(outer) for outer in sorted({c["outer_steps"] for c in chosen}))
    best = [max(accuracy for accuracy, _, outer, _ in c["tried"] if outer == tried[-1]) for c in chosen]
    return [
        f"Reptile, whole network: of {' and '.join(map(str, tried))} outer steps from the trained backbone, validation tasks chose {text} "
        f"(0: the trained backbone and a head of zeros, fine-tuned as a whole); with {tried[-1]} it had {np.mean(best):.1f} % there. Why: "
        "[baselines.md](baselines.md).",
        "",
    ]


def _milliseconds(cells: list[dict[str, Any]], method: str, entries: list[dict[str, Any]], steps: str = "all") -> float:
    """Of the part latency where it was made, else the median of the row's own cells."""
    for timed in pick(cells, "latency"):
        if steps in timed["adapt_ms"].get(method, {}):
            return float(timed["adapt_ms"][method][steps])
    return float(np.median([e["adapt_ms"] for e in entries]))


def _timed(cells: list[dict[str, Any]]) -> str:
    if not pick(cells, "latency"):
        return ", each row in its own cell, beside whatever else the machine did"
    return ", all timed in one process, one after the other, but the whole network and the ceiling"


def _seconds(entries: list[dict[str, Any]], key: str) -> str:
    values = [e[key] for e in entries if e.get(key)]
    return f"{np.mean(values):.0f}" if values else "0"


def _claims(setting: str, cells: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[str]:
    lines = []
    words = {
        1: "**holds**",
        -1: "**does not hold**: significantly the other way",
        0: "**undecided**: the interval holds zero",
    }
    if ours and setting.startswith("5way1shot"):
        mean = over_seeds([e["accuracy_mean"] for e in ours])[0]
        what = "holds" if mean >= _PAPER_MC_DI else "does not hold"
        lines.append(f"- Mc-Di at least {_PAPER_MC_DI} % (the paper's number, its backbone): {mean:.2f} %, **{what}**")
    for method in _BASELINES:
        difference = paired(ours, row(cells, method))
        if difference:
            name = TITLES[method].strip("*").replace("the same", "head fine-tuning")
            lines.append(f"- Mc-Di above {name}: {difference}, {words[difference.verdict]}")
    few = paired(steps_of(ours, 5), row(cells, "mv-di"))
    if few:
        word = "does not hold" if few.verdict < 0 else "holds" if few.mean >= 0 or few.half < 0.1 else "undecided"
        lines.append(f"- Mc-Di with 5 sampling steps at least as good as Mv-Di with all: {few}, **{word}**")
    for with_sam, without in (("sam-augment", "augment"), ("sam", "plain")):
        a, b = row(cells, "ceiling", with_sam), row(cells, "ceiling", without)
        if a and b:
            x, y = (np.mean([e["eigenvalue"]["mean"] for e in part]) for part in (a, b))
            word = "holds" if x < y else "does not hold"
            lines.append(
                f"- SAM lowers the largest Hessian eigenvalue of the trained heads ({with_sam} against {without}): {x:.4f} against "
                f"{y:.4f}, **{word}**"
            )
        difference = paired(row(cells, "mc-di", with_sam), row(cells, "mc-di", without))
        if difference:
            lines.append(
                f"- SAM raises Mc-Di's accuracy ({with_sam} against {without}): {difference}, {words[difference.verdict]}"
            )
    for with_it, without in (("sam-augment", "sam"), ("augment", "plain")):
        difference = paired(row(cells, "mc-di", with_it), row(cells, "mc-di", without))
        if difference:
            lines.append(
                f"- augmentation raises Mc-Di's accuracy ({with_it} against {without}): {difference}, {words[difference.verdict]}"
            )
    return ["### Which claims hold here", "", *lines, ""] if lines else []


def _few_steps(cells: list[dict[str, Any]]) -> list[str]:
    lines = []
    rows = [(method, _DEFAULT, TITLES[method]) for method in ("ocd", "mv-di", "tw-di", "mc-di-paper", "mc-di")]
    rows += [("mc-di", variant, f"Mc-Di, {_PREPARATIONS[variant]} in the preparation") for variant in ("sam", "plain")]
    for method, variant, title in rows:
        entries = row(cells, method, variant)
        for count in sorted({int(c) for e in entries for c in e.get("by_steps", {})}):
            few = steps_of(entries, count)
            against = [
                paired(few, entries),
                paired(few, row(cells, "prototype")),
                paired(few, row(cells, "mv-di", variant)),
            ]
            lines.append(
                f"| {title} | {count} | {_accuracy(few)} | {' | '.join(str(d or '') for d in against)} | "
                f"{_milliseconds(cells, method, few, str(count)):.2f} |"
            )
    if not lines:
        return []
    return [
        "### Fewer sampling steps",
        "",
        "Minus: paired over the same tasks, with its 95 % interval; Mv-Di with all its steps, of the same preparation.",
        "",
        "| row | steps | accuracy, % | minus the row with all steps | minus nearest prototype | minus Mv-Di | one task, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *lines,
        "",
    ]


def _variants(cells: list[dict[str, Any]]) -> list[str]:
    variants = tuple(_PREPARATIONS)
    heading = [f"| row | {' | '.join(_PREPARATIONS.values())} |", "| --- | --- | --- | --- | --- |"]
    if not any(row(cells, "mc-di", v) or row(cells, "ceiling", v) for v in variants[1:]):
        return []
    lines = [
        "### Preparation: SAM and augmentation",
        "",
        "Accuracy, % (deviation over seeds); below, the largest Hessian eigenvalue of the trained heads' loss, mean over test tasks.",
        "",
        *heading,
    ]
    for method in ("ocd", "mv-di", "tw-di", "mc-di-paper", "mc-di", "ceiling"):
        values = []
        for variant in variants:
            entries = row(cells, method, variant)
            values.append(_accuracy(entries, interval=False) if entries else "")
        lines.append(f"| {TITLES[method]} | {' | '.join(values)} |")
    values = []
    for variant in variants:
        entries = row(cells, "ceiling", variant)
        values.append(f"{np.mean([e['eigenvalue']['mean'] for e in entries]):.4f}" if entries else "")
    lines += [f"| largest eigenvalue | {' | '.join(values)} |", ""]
    lines += [
        "Mc-Di minus the row, the preparation of both being the same, paired over the same tasks, with its 95 % interval.",
        "",
        *heading,
    ]
    for method in _BASELINES:
        differences = [paired(row(cells, "mc-di", v), row(cells, method, v)) for v in variants]
        if any(differences):
            lines.append(f"| {TITLES[method]} | {' | '.join(str(d or '') for d in differences)} |")
    return [*lines, ""]


def _segments(cells: list[dict[str, Any]], figures: dict[str, bytes], setting: str) -> list[str]:
    points = []
    for k in range(1, 65):
        entries = pick(cells, "mc-di", _DEFAULT, segments=k)
        if entries:
            error = float(np.mean([e["weight_error"] for e in entries]))
            points.append((k, entries, over_seeds([e["accuracy_mean"] for e in entries])[0], error))
    if len(points) < 2:
        return []
    figure, (left, right) = new_figure(2)
    half = [pooled_interval(p[1]) for p in points]
    left.errorbar([p[0] for p in points], [p[2] for p in points], half, fmt="o-", ms=3, capsize=3)
    left.set(xlabel="segments k", ylabel="accuracy, %")
    right.plot([p[0] for p in points], [p[3] for p in points], "o-", ms=3)
    right.set(xlabel="segments k", ylabel="weight error (normalised RMS)", ylim=(0, None))
    figures[f"{setting}-segments.png"] = png(figure)
    lines = [
        "### Segment number k (the paper's figure 4)",
        "",
        "| k | seeds | accuracy, % | weight error |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {k} | {len(entries)} | {_accuracy(entries)} | {error:.3f} |" for k, entries, _, error in points]
    return [*lines, "", f"![accuracy and weight error against k](figures/{setting}-segments.png)", ""]


def _theorem_one(cells: list[dict[str, Any]], figures: dict[str, bytes], setting: str) -> list[str]:
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
        ax.set(
            xlabel="step t", ylabel="distance of x_t (normalised RMS)", title=TITLES[method].strip("*"), yscale="log"
        )
        ax.legend(frameon=False)
    figures[f"{setting}-theorem1.png"] = png(figure)
    plane_figure = plot_chains(entries[0])
    figures[f"{setting}-chains.png"] = plane_figure
    lines = [
        "### Does the chain hit the local targets? (Theorem 1, figure 1)",
        "",
        "Distance (root mean square, in weights normalised by Mc-Di's normaliser) of x_t to target i at t = e_i, mean over test tasks, and "
        "which target is nearest there.",
        "",
        "| chain | " + " | ".join(f"target {i + 1} at t = {end}" for i, end in enumerate(ends)) + " |",
        "| --- | " + " | ".join("---" for _ in ends) + " |",
    ]
    for method, curve in curves.items():
        values = [f"{curve[end, i]:.3f} (nearest: {int(curve[end].argmin()) + 1})" for i, end in enumerate(ends)]
        lines.append(f"| {TITLES[method]} | {' | '.join(values)} |")
    return [
        *lines,
        "",
        f"![distance to each local target along the chain](figures/{setting}-theorem1.png)",
        "",
        f"![chains of one task in a plane of weight space, over its loss](figures/{setting}-chains.png)",
        "",
    ]


def _novelty(cells: list[dict[str, Any]]) -> list[str]:
    entries = pick(cells, "analysis", _DEFAULT)
    if not entries:
        return []
    lines = [
        "### Are generated heads new?",
        "",
        f"Distance (normalised RMS) of a class's row of weights to the nearest of {entries[0]['novelty']['training_rows']} training rows; a "
        "copy has distance 0. Mean over seeds.",
        "",
        "| rows | median | least |",
        "| --- | --- | --- |",
    ]
    names = {
        "generated": "generated for new tasks",
        "trained": "trained for the same new tasks",
        "training": "training rows, nearest other one",
    }
    for key, title in names.items():
        median, least = (float(np.mean([e["novelty"][key][what] for e in entries])) for what in ("median", "least"))
        lines.append(f"| {title} | {median:.3f} | {least:.3f} |")
    warnings = [w for e in row(cells, "mc-di") for w in e.get("health", {}).get("warnings", [])]
    return [
        *lines,
        "",
        f"Diagnostics of the generated heads: {'; '.join(warnings) if warnings else 'nothing to report'}.",
        "",
    ]


def _selection(cells: list[dict[str, Any]]) -> list[str]:
    changes: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda c: int(c["cell"]["seed"])):
        if cell["cell"]["change"]:
            changes.setdefault(cell["cell"]["change"], []).append({**cell, "seed": cell["cell"]["seed"]})
    default = changes.pop("default", [])
    if not default:
        return []
    lines = [
        "### One change at a time (validation characters)",
        "",
        f"Mc-Di, {len(default[0]['correct'])} validation tasks a seed; the difference is paired over the same tasks of the same seeds. "
        "Seeds have tasks of their own: compare differences, not accuracies of rows with other seeds.",
        "",
        "| change | seeds | accuracy, % | minus the default | one task, ms | training, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    against = {name: paired(entries, default) for name, entries in changes.items()}
    order = sorted(changes, key=lambda name: -(against[name] or Difference(0, 0, ())).mean)
    for name, entries in [("default", default), *((name, changes[name]) for name in order)]:
        seeds = ", ".join(str(e["seed"]) for e in entries)
        mean, half = over_seeds([e["accuracy_mean"] for e in entries])[0], pooled_interval(entries)
        lines.append(
            f"| {name} | {seeds} | {mean:.2f} ± {half:.2f} | {against.get(name) or ''} | "
            f"{np.median([e['adapt_ms'] for e in entries]):.2f} | {_seconds(entries, 'training_seconds')} |"
        )
    return [*lines, ""]


def _plot_rows(cells: list[dict[str, Any]]) -> bytes:
    figure, ax = new_figure()
    methods = [m for m in TITLES if row(cells, m)]
    for y, method in enumerate(methods):
        entries = row(cells, method)
        mean = over_seeds([e["accuracy_mean"] for e in entries])[0]
        ax.errorbar(
            mean, y, xerr=pooled_interval(entries), fmt="o", color="C1" if method == "mc-di" else "C0", capsize=4
        )
        ax.plot([e["accuracy_mean"] for e in entries], [y] * len(entries), "|", color="0.5")
    ax.set(yticks=range(len(methods)), yticklabels=[TITLES[m].strip("*") for m in methods], xlabel="accuracy, %")
    ax.invert_yaxis()
    return png(figure)
