"""Tables and figures of the comparison, from its records alone: `records/*.json` in, `results.md` and `figures/` out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mcdi_fast.evaluate import interval
from mcdi_fast.figures import new_figure, png
from mcdi_fast.report import plot_chains, table
from mcdi_fast.store import atomic_write, make_folder
from mcdi_fast.study.plan import PREPARED, REVISION, VARIANTS
from mcdi_fast.study.records import Entry, Table, default_settings, load_records, steps_of

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
_OTHERS = [method for method in TITLES if method not in ("mc-di", "ceiling")]
_WAYS = ("SAM + augmentation", "SAM", "augmentation", "neither")
_PREPARATIONS: dict[str, str] = dict(zip(VARIANTS, _WAYS, strict=True))


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


def pooled_interval(entries: Sequence[Entry]) -> float:
    """Half of the 95 % interval over the tasks of all seeds, in percent."""
    return interval(torch.from_numpy(np.concatenate([percent(entry) for entry in entries])))


def paired(ours: Sequence[Entry], theirs: Sequence[Entry]) -> Difference | None:
    """Ours minus theirs over the seeds that both have; None where they share no seed."""
    other = {entry["seed"]: entry for entry in theirs}
    parts = [percent(entry) - percent(other[entry["seed"]]) for entry in ours if entry["seed"] in other]
    if not parts:
        return None
    every = np.concatenate(parts)
    return Difference(float(every.mean()), interval(torch.from_numpy(every)))


def mean_of(entries: Sequence[Entry], get: Callable[[Entry], Any] = lambda entry: entry["accuracy_mean"]) -> float:
    """Mean over seeds, of the accuracy by default."""
    return float(np.mean([get(entry) for entry in entries]))


def accuracy(entries: Sequence[Entry], interval: bool = True) -> str:
    """Mean ± deviation over seeds (± half of the interval over tasks). A single seed has no deviation."""
    if not entries:
        return ""
    deviation = f" ± {np.std([e['accuracy_mean'] for e in entries], ddof=1):.2f}" if len(entries) > 1 else ""
    return f"{mean_of(entries):.2f}{deviation}" + (f" (± {pooled_interval(entries):.2f})" if interval else "")


def _eigenvalue(entries: Sequence[Entry]) -> str:
    return f"{mean_of(entries, lambda e: e['eigenvalue']['mean']):.4f}" if entries else ""


def _seconds(entries: Sequence[Entry], key: str) -> str:
    values = [e[key] for e in entries if e.get(key)]
    return f"{np.mean(values):.0f}" if values else "0"


def _milliseconds(t: Table, method: str, entries: Sequence[Entry], steps: str = "all") -> str:
    """Of the part latency where it was made, else the median of the row's own cells."""
    timed = [e["adapt_ms"][method][steps] for e in t.pick("latency") if steps in e["adapt_ms"].get(method, {})]
    return f"{timed[0] if timed else np.median([e['adapt_ms'] for e in entries]):.2f}"


# ---------------------------------------------------------------------- rendering


def render(out: Path, dataset: str) -> Path:
    """Write results.md and its figures from `<out>/records`; returns its path."""
    tables = load_records(out, dataset)
    text = ["# Results", "", *(_introduction(dataset, tables) if tables else ["No record is there yet."])]
    sections = (_comparison, _claims, _few_steps, _variants, _segments, _theorem_one, _novelty, _selection, _plot_rows)
    for t in tables:
        text += [f"## {dataset}, {_title(t.name)}", "", *(line for section in sections for line in section(t))]
        for file, data in t.figures.items():
            atomic_write(make_folder(out / "figures") / f"{t.name}-{file}.png", data)
    path = out / "results.md"
    atomic_write(path, ("\n".join(text).rstrip() + "\n").encode())
    return path


def _section(title: str, text: str, header: str, rows: Sequence[Sequence[object]]) -> list[str]:
    """A heading, a text and a table, whose header has its columns between bars; None is an empty cell. Nothing where there is no row."""
    shown = [["" if cell is None else cell for cell in line] for line in rows]
    return [f"### {title}", "", text, "", *table(header.split("|"), shown)] if rows else []


def _figure(t: Table, file: str, data: bytes, title: str) -> list[str]:
    t.figures[file] = data
    return [f"![{title}](figures/{t.name}-{file}.png)", ""]


def _title(name: str) -> str:
    """5way1shot-views9 -> 5-way 1-shot, 9 views."""
    name = re.sub(r"(\d+)way(\d+)shot", r"\1-way \2-shot", re.sub(r"-views(\d+)", r", \1 views", name))
    return re.sub(r"-(\d{4}-\d\d-\d\d)$", r", older records of \1", name)


def _introduction(dataset: str, tables: list[Table]) -> list[str]:
    rows = []
    for t in tables:
        c, machines, default = t.config, [e["machine"] for e in t.entries], default_settings(dataset)
        changed = {
            name: value if isinstance(value, list) else [value] for name, value in c.items() if value != default[name]
        }
        options = [f"`--{name.replace('_', '-')} {' '.join(map(str, values))}`" for name, values in changed.items()]
        processor = " ".join(filter(None, (machines[0]["processor"], machines[0].get("instructions"))))
        rows.append(
            [
                _title(t.name),
                ", ".join(f"[{file[:10]}](records/{file})" for file in t.files),
                " ".join(map(str, sorted({e["seed"] for e in t.entries}))),
                f"{c['evaluate.tasks']} test tasks a seed, {c['prepare.tasks']} tasks in the bank, {c['meta.steps']} outer steps",
                " ".join(options) or "defaults",
                t.entries[0].get("backbone_weights") or "not kept",
                f"{processor}, {machines[0]['threads']} thread(s), torch {machines[0]['torch']}",
                " ".join(sorted({m["git"] for m in machines})),
            ]
        )
    return [
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
        *table("setting|records|seeds|budget|options|backbone|machine|git".split("|"), rows),
    ]


def _corrections(tables: list[Table]) -> list[str]:
    """Which rows are older than the corrections that `plan.REVISION` counts, and what that means."""
    whole, some = [], []
    for t in tables:
        cells = [e for e in t.entries if e["method"] in PREPARED]
        older = [e for e in cells if e.get("revision", 1) < REVISION]
        titles = [TITLES[method].strip("*") for method in TITLES if any(e["method"] == method for e in older)]
        if older and len(older) == len(cells):
            whole.append(_title(t.name))
        elif older:
            some.append(f"of {_title(t.name)} {len(older)} cells of {', '.join(titles)}")
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


def _comparison(t: Table) -> list[str]:
    ours, rows = t.row("mc-di"), []
    for method, title in TITLES.items():
        entries = t.row(method)
        if entries:
            outer = sorted({e["chosen"]["outer_steps"] for e in entries if "outer_steps" in e.get("chosen", {})})
            rows.append(
                [
                    f"{title} ({' or '.join(map(str, outer))} outer steps)" if outer else title,
                    len(entries),
                    accuracy(entries),
                    paired(ours, entries) if method != "mc-di" else None,
                    _milliseconds(t, method, entries),
                    " / ".join(map(str, sorted({e["gradient_steps"] for e in entries}))),
                    _seconds(entries, "training_seconds"),
                    _seconds(entries, "preparation_seconds"),
                ]
            )
    timed = "All rows but the whole network and the ceiling were timed in one process, one after the other."
    if not t.pick("latency"):
        timed = "Each row was timed in its own cell, beside whatever else the machine did."
    header = "row|seeds|accuracy, %|Mc-Di minus it|one task, ms|gradient steps|training, s|preparation, s"
    text = (
        "One task: milliseconds for the weights of a new task whose support features are given (whole network: its images). "
        f"{timed} Reptile's outer steps were chosen on validation tasks: 0 is its start, only fine-tuned."
    )
    return _section("Accuracy and cost", text, header, rows)


def _claims(t: Table) -> list[str]:
    rows: list[tuple[str, object, str]] = []

    def claim(text: str, measured: object, verdict: int) -> None:
        words = {1: "**holds**", -1: "**does not hold**", 0: "**undecided**"}
        rows.append((text, measured, words[verdict]))

    def above(text: str, difference: Difference | None) -> None:
        if difference:
            claim(text, difference, difference.verdict)

    ours = t.row("mc-di")
    if ours and t.label.startswith("5way1shot"):
        text = f"Mc-Di has at least {_PAPER_MC_DI} %, the paper's number (its backbone)"
        claim(text, f"{mean_of(ours):.2f} %", 1 if mean_of(ours) >= _PAPER_MC_DI else -1)
    for method in _OTHERS:
        above(f"Mc-Di above {TITLES[method]}", paired(ours, t.row(method)))
    few = paired(steps_of(ours, 5), t.row("mv-di"))
    if few:
        holds = few.mean >= 0 or few.half < 0.1
        claim("Mc-Di with 5 sampling steps not below Mv-Di with all", few, -1 if few.verdict < 0 else int(holds))
    pairs = {
        "SAM": (("sam-augment", "augment"), ("sam", "plain")),
        "augmentation": (("sam-augment", "sam"), ("augment", "plain")),
    }
    for what, (one, other) in [(what, pair) for what, both in pairs.items() for pair in both]:
        name = f"({_PREPARATIONS[one]} against {_PREPARATIONS[other]})"
        x, y = (_eigenvalue(t.row("ceiling", variant)) for variant in (one, other))
        if what == "SAM" and x and y:
            lower = (float(x) < float(y)) - (float(x) > float(y))
            claim(f"SAM lowers the largest eigenvalue {name}", f"{x} against {y}", lower)
        above(f"{what} raises Mc-Di's accuracy {name}", paired(t.row("mc-di", one), t.row("mc-di", other)))
    text = (
        "A claim about a difference holds where the 95 % interval lies above zero, is undecided where it holds zero, and does not hold where it "
        "lies below: then the opposite does."
    )
    return _section("Which claims hold here", text, "claim|measured|verdict", rows)


def _few_steps(t: Table) -> list[str]:
    rows = []
    names = [(method, VARIANTS[0], TITLES[method]) for method in ("ocd", "mv-di", "tw-di", "mc-di-paper", "mc-di")]
    names += [("mc-di", v, f"Mc-Di, {_PREPARATIONS[v]} in the preparation") for v in ("sam", "plain")]
    for method, variant, title in names:
        entries = t.row(method, variant)
        against = [entries, t.row("prototype"), t.row("mv-di", variant)]
        for count in sorted({int(c) for e in entries for c in e.get("by_steps", {})}):
            few = steps_of(entries, count)
            time = _milliseconds(t, method, few, str(count))
            rows.append([title, count, accuracy(few), *(paired(few, other) for other in against), time])
    header = "row|steps|accuracy, %|minus the row with all steps|minus nearest prototype|minus Mv-Di|one task, ms"
    text = "Mv-Di, in the column that subtracts it, takes all its steps and has the same preparation."
    return _section("Fewer sampling steps", text, header, rows)


def _variants(t: Table) -> list[str]:
    if not any(t.row(method, v) for method in ("mc-di", "ceiling") for v in VARIANTS[1:]):
        return []
    header = "|".join(("row", *_WAYS))
    learn = [method for method in TITLES if method in PREPARED]
    rows = [[TITLES[method], *(accuracy(t.row(method, v), interval=False) for v in VARIANTS)] for method in learn]
    rows.append(["largest eigenvalue", *(_eigenvalue(t.row("ceiling", v)) for v in VARIANTS)])
    every = [[TITLES[m], *(paired(t.row("mc-di", v), t.row(m, v)) for v in VARIANTS)] for m in _OTHERS]
    minus = [line for line in every if any(line[1:])]
    text = (
        "Accuracy in %, with the deviation over seeds. Last row: the largest eigenvalue of the Hessian of the trained heads' loss, mean over "
        "test tasks."
    )
    return [
        *_section("Preparation: SAM and augmentation", text, header, rows),
        *_section("Mc-Di minus the other rows, by preparation", "Both with the same preparation.", header, minus),
    ]


def _segments(t: Table) -> list[str]:
    found = {k: t.pick("mc-di", VARIANTS[0], segments=k) for k in sorted({e["segments"] for e in t.entries})}
    points = [(k, entries, mean_of(entries, lambda e: e["weight_error"])) for k, entries in found.items() if entries]
    if len(points) < 2:
        return []
    figure, (left, right) = new_figure(2)
    numbers, half = [k for k, _, _ in points], [pooled_interval(entries) for _, entries, _ in points]
    left.errorbar(numbers, [mean_of(entries) for _, entries, _ in points], half, fmt="o-", ms=3, capsize=3)
    left.set(xlabel="segments k", ylabel="accuracy, %")
    right.plot(numbers, [error for _, _, error in points], "o-", ms=3)
    right.set(xlabel="segments k", ylabel="weight error (normalised RMS)", ylim=(0, None))
    rows = [[k, len(entries), accuracy(entries), f"{error:.3f}"] for k, entries, error in points]
    text = "Weight error: root mean square distance to the trained weights of the same task, in normalised weights."
    return [
        *_section("Number of segments k (the paper's figure 4)", text, "k|seeds|accuracy, %|weight error", rows),
        *_figure(t, "segments", png(figure), "accuracy and weight error against k"),
    ]


def _theorem_one(t: Table) -> list[str]:
    entries = t.pick("analysis", VARIANTS[0])
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
    rows = [
        [TITLES[m], *(f"{curve[end, i]:.3f} (nearest: {int(curve[end].argmin()) + 1})" for i, end in enumerate(ends))]
        for m, curve in curves.items()
    ]
    text = (
        "Distance of x_t to target i at t = e_i, and the target that is nearest there. Root mean square in weights normalised by Mc-Di's "
        "normaliser, mean over test tasks."
    )
    header = "|".join(("chain", *(f"target {i} at t = {end}" for i, end in enumerate(ends, 1))))
    chains = "chains of one task in a plane of weight space, over its loss"
    return [
        *_section("Does the chain hit the local targets? (Theorem 1, figure 1)", text, header, rows),
        *_figure(t, "theorem1", png(figure), "distance to each local target along the chain"),
        *_figure(t, "chains", plot_chains(entries[0]), chains),
    ]


def _novelty(t: Table) -> list[str]:
    entries = t.pick("analysis", VARIANTS[0])
    if not entries:
        return []
    titles = {
        "generated": "generated for new tasks",
        "trained": "trained for the same new tasks",
        "training": "training rows, nearest other one",
    }
    mean = {key: np.mean([[e["novelty"][key][n] for n in ("median", "least")] for e in entries], 0) for key in titles}
    rows = [[title, *(f"{value:.3f}" for value in mean[key])] for key, title in titles.items()]
    text = (
        f"Distance of a class's row of weights to the nearest of {entries[0]['novelty']['training_rows']} training rows: root mean square in "
        "normalised weights, mean over seeds. A copy has distance 0."
    )
    return _section("Are generated heads new?", text, "rows|median|least", rows)


def _selection(t: Table) -> list[str]:
    changes: dict[str, list[Entry]] = {}
    for entry in sorted(t.entries, key=lambda e: int(e["seed"])):
        if entry["change"]:
            changes.setdefault(entry["change"], []).append(entry)
    default = changes.pop("default", [])
    if not default:
        return []
    against = {name: paired(entries, default) for name, entries in changes.items()}
    order = sorted(changes, key=lambda name: -(against[name] or Difference(0, 0)).mean)
    rows = []
    for name, entries in [("default", default), *((name, changes[name]) for name in order)]:
        mean = f"{mean_of(entries):.2f} ± {pooled_interval(entries):.2f}"
        time = f"{np.median([e['adapt_ms'] for e in entries]):.2f}"
        seeds = ", ".join(str(e["seed"]) for e in entries)
        rows.append([name, seeds, mean, against.get(name), time, _seconds(entries, "training_seconds")])
    text = (
        f"Mc-Di on {len(default[0]['correct'])} validation tasks a seed. ± behind an accuracy is half of the 95 % interval over tasks. Seeds have "
        "tasks of their own, so compare differences, not accuracies of rows with other seeds."
    )
    header = "change|seeds|accuracy, %|minus the default|one task, ms|training, s"
    return _section("One change at a time (validation characters)", text, header, rows)


def _plot_rows(t: Table) -> list[str]:
    rows = {title.strip("*"): t.row(method) for method, title in TITLES.items() if t.row(method)}
    if not rows:
        return []
    figure, ax = new_figure()
    for y, (title, entries) in enumerate(rows.items()):
        color = "C1" if title == "Mc-Di" else "C0"
        ax.errorbar(mean_of(entries), y, xerr=pooled_interval(entries), fmt="o", color=color, capsize=4)
        ax.plot([e["accuracy_mean"] for e in entries], [y] * len(entries), "|", color="0.5")
    ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel="accuracy, %")
    ax.invert_yaxis()
    return _figure(t, "accuracy", png(figure), "accuracy of every row")
