"""Redraw what the records in bench/results/ say: some rows and the pictures in the README, all of it in docs/performance.md.

    python bench/report.py          # or: make bench-report

Reads the newest record of each device. Records without `"format": 2` are of an older benchmark and are passed over.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from mcdi_fast.report import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
BASELINES = ("loop", "vmap", "compiled", "stacked")
FASTEST = "3 steps"  # of our samplings: one step a segment
MATTERS = [  # the README's rows: what, size, ours, the other
    ("meta-step", "32x20", "ours", "loop"),
    ("meta-step", "32x20 depth 1", "ours", "vmap"),
    ("meta-step", "32x20 depth 1", "ours", "compiled"),
    ("meta-step", "33 tokens", "ours", "vmap"),
    ("preparation", "500 tasks", "ours", "loop"),
    ("preparation", "100 heads 5 x 1281", "ours", "loop"),
    ("preparation of networks", "500 tasks", "ours", "loop"),
    ("sampling", "1 tasks", FASTEST, "fine-tuning"),
    ("sampling", "1 tasks", FASTEST, "fine-tuning compiled"),
    ("sampling", "600 tasks", FASTEST, "fine-tuning"),
    ("sampling", "600 tasks", FASTEST, "fine-tuning compiled"),
    ("sampling", "4096 tasks", FASTEST, "eager"),
]
WORDS = {"1 tasks": "1 task", "ours": "", "loop": "a Python loop over tasks", "vmap": "`vmap(grad)`", "compiled": "`torch.compile` of it",
         "stacked": "batched eager torch", "eager": "batched eager torch", "fine-tuning": "batched fine-tuning by torch",
         "fine-tuning compiled": "the same by our own compiled code", FASTEST: ", in 3 steps"}  # fmt: skip
PANELS = [  # one question each: title, what, the axis and its sizes
    ("A meta-step: more tasks", "meta-step", "tasks of 16 rows", {"8x16": 8, "32x16": 32, "128x16": 128}),
    ("A meta-step: more rows", "meta-step", "rows of each of 32 tasks", {"32x16": 16, "32x20": 20, "32x60": 60}),
    ("A meta-step: a wider network", "meta-step", "width", {"32x20 width 128": 128, "32x20": 256, "32x20 width 512": 512}),
    ("A meta-step: more inner steps", "meta-step", "inner steps K", {"32x20 K 1": 1, "32x20": 3, "32x20 K 5": 5}),
    ("Preparation: more tasks", "preparation", "tasks of 100 rows", {f"{n} tasks": n for n in (8, 100, 500)}),
    ("Sampling: more tasks", "sampling", "tasks", {f"{n} tasks": n for n in (1, 4, 32, 600, 4096)}),
]  # fmt: skip
DRAWN = {"ours": "C0", "3 steps": "C9", "vmap": "C1", "stacked": "C2", "eager": "C3", "fine-tuning": "C4"}
TARGETS = {  # device: (what, size, ours over which, at least)
    "cpu": [
        ("meta-step", "32x16", "vmap", 3.0),
        ("meta-step", "32x16", "loop", 4.0),
        ("meta-step", "128x8", "vmap", 6.0),
        ("preparation", "500 tasks", "loop", 30.0),
        ("preparation", "100 heads 5 x 1281", "loop", 30.0),
        ("meta-step", "32x20 depth 1", "loop", 8.0),
        ("meta-step", "32x20 depth 1", "vmap", 5.0),
        ("meta-step", "32x20 depth 1", "compiled", 3.0),
        *(("meta-step", f"{tokens} tokens", "vmap", 3.0) for tokens in (33, 81, 192)),
        *(("meta-step", f"{tokens} tokens", "compiled", 2.0) for tokens in (33, 81, 192)),
        ("preparation of networks", "500 tasks", "loop", 10.0),
    ],
    "cuda": [
        ("meta-step", "32x20", "compiled", 3.0),
        ("meta-step", "32x20", "cuda-graph", 3.0),
        ("preparation", "500 tasks", "stacked", 10.0),
    ],
}
LINEAR = [  # what, fewer tasks, more tasks: a task may cost at most so many times more among the many
    ("meta-step", "32x16", "128x16"),
    ("preparation", "100 tasks", "500 tasks"),
    ("sampling", "600 tasks", "4096 tasks"),
]
LINEAR_WITHIN = 1.2
LATENCY_MS = {"cpu": {1: 0.25, 4: 0.6}, "cuda": {1: 0.25}}  # of so many heads in 3 steps
FINETUNING = {1: 60.0, 600: 5.0}  # times it takes in 3 steps, by tasks
SHARE = {"cpu": 0.7, "cuda": 0.6}  # of the sgemm floor, low-rank terms counted
OWN = {  # our own products: what a share is of, and what the peak is of
    "tiles": ("the tile units", "float32 by tile units"),
    "vectors": ("our products", "our own products, in cache"),
}
PEAK = 0.6  # share of the sgemm peak, of many heads
WHOLE = ("meta-step", "preparation", "sampling")  # rows of the table; single operations stay in the record


class Record:
    """A record by (what, size, provider)."""

    def __init__(self, path: Path):
        """Read it."""
        self.path, self.data = path, json.loads(path.read_text())
        self.peak, self.machine = self.data.get("peak", {}), self.data["machine_info"]
        entries = [entry["extra_info"] for entry in self.data["benchmarks"] if "what" in entry["extra_info"]]
        self.rows = {(e["what"], e["size"], e["provider"]): e for e in entries}
        self.device = next((e["device"] for e in entries), "cpu")

    def get(self, what: str, size: str, provider: str) -> dict[str, Any] | None:
        """One row; a loop that was timed at fewer tasks stands in for more of them, its cost being linear in tasks."""
        found = self.rows.get((what, size, provider))
        if found is None and what.startswith("preparation") and provider in ("loop", "pytorch_optimizer"):
            found = self.rows.get((what, "8 tasks", provider)) if size in ("100 tasks", "500 tasks") else None
        return found

    def per_work(self, what: str, size: str, provider: str) -> float | None:
        """Milliseconds a unit of work (a task, a row)."""
        row = self.get(what, size, provider)
        return row["median_ms"] / row["work"] if row and "median_ms" in row else None

    def ratio(self, what: str, size: str, other: str, ours_is: str = "ours") -> float | None:
        """How many times ours is faster: in turns, where that was measured."""
        row = self.get(what, size, other)
        if row and "in_turns" in row and ours_is == "ours":
            return row["in_turns"]
        ours, theirs = self.per_work(what, size, ours_is), self.per_work(what, size, other)
        return theirs / ours if ours and theirs else None

    def kinds(self) -> dict[str, list[str]]:
        """Sizes of each kind of work, as benchmarked."""
        found: dict[str, list[str]] = {}
        for what, size, _ in self.rows:
            if size not in found.setdefault(what, []):
                found[what].append(size)
        return found


def records(folder: Path = RESULTS) -> list[Record]:
    """The newest record of each device (file names begin with the date)."""
    newest: dict[str, Record] = {}
    for path in sorted(folder.glob("*.json")):
        if json.loads(path.read_text()).get("format") == 2:
            record = Record(path)
            newest[record.device] = record
    return list(newest.values())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def speed_table(record: Record) -> list[str]:
    """Ours in ms, the others as multiples of it: above 1 a win, below 1 a loss."""
    rows = []
    for what, sizes in record.kinds().items():
        for size in sizes:
            ours = record.get(what, size, "ours")
            if not ours or "median_ms" not in ours or not what.startswith(WHOLE):
                continue
            names = [provider for kind, at, provider in record.rows if (kind, at) == (what, size)]
            cells = [_number(record.ratio(what, size, name)) for name in BASELINES]
            cells = [f"{cell} x" if cell else "" for cell in cells]
            others = [name for name in names if name not in (*BASELINES, "ours")]
            cells.append(", ".join(f"{name} {_number(record.ratio(what, size, name))} x" for name in others))
            share = f"{100 * ours['share_of_peak']:.0f} %{' of a copy' * (ours['nearest_peak'] == 'memory')}"
            for name, (of, _) in OWN.items():
                if f"share_of_{name}" in ours:
                    share += f", {100 * ours[f'share_of_{name}']:.0f} % of {of}"
            rows.append([what, size, _number(ours["median_ms"]), *cells, share])
    return table("|size|ours, ms|loop|vmap|compiled|stacked|others|share of peak".split("|"), rows)


def target_table(record: Record) -> list[str]:
    """Every target with what was measured, met or by how much it is missed."""
    out = ["| target | measured | |", "| --- | --- | --- |"]

    def line(text: str, found: float | None, wanted: float, unit: str, higher: bool = True) -> None:
        if found is None:
            return
        met = found >= wanted if higher else found <= wanted
        gap = abs(found / wanted - 1)
        out.append(f"| {text} | {_number(found)}{unit} | {'met' if met else f'missed by {100 * gap:.0f} %'} |")

    for what, size, other, wanted in TARGETS[record.device]:
        line(f"{what} {size}: at least {wanted:g} times {other}", record.ratio(what, size, other), wanted, " times")
    share = 100 * SHARE[record.device]
    for size in ("32x20", "32x20 depth 1"):
        floor = record.ratio("meta-step", size, "floor")
        text = f"meta-step {size}: at least {share:.0f} % of the sgemm floor, low-rank terms counted"
        line(text, floor and 100 * floor, share, " %")
    for tasks in (600, 4096):
        row = record.get("sampling", f"{tasks} tasks", "ours")
        text = f"{tasks} heads: at least {100 * PEAK:.0f} % of the sgemm peak"
        line(text, row and 100 * row["share_of_peak"], 100 * PEAK, " %")
    for tasks, wanted in LATENCY_MS[record.device].items():
        row = record.get("sampling", f"{tasks} tasks", FASTEST)
        line(f"{tasks} heads in 3 steps: at most {wanted:g} ms", row and row["median_ms"], wanted, " ms", higher=False)
    for tasks, wanted in FINETUNING.items():
        for other in ("fine-tuning", "fine-tuning compiled"):
            ratio = record.ratio("sampling", f"{tasks} tasks", other, FASTEST)
            line(f"{tasks} heads in 3 steps: at least {wanted:g} times {other}", ratio, wanted, " times")
    for what, fewer, more in LINEAR:
        few, many = record.per_work(what, fewer, "ours"), record.per_work(what, more, "ours")
        text = f"{what}: a task of {more} costs at most {LINEAR_WITHIN:g} times one of {fewer}"
        line(text, many / few if few and many else None, LINEAR_WITHIN, " times", higher=False)
    return out


def _head(record: Record, link: str) -> str:
    m, peak = record.machine, record.peak
    head = f"{m['processor']}, {m.get('device', 'cpu')}, {m['threads']} threads, torch {m['torch']}, git {m['git']}"
    if peak:
        own = "".join(
            f" {peak[f'{name}_gflop_per_s']:.0f} ({says}),"
            for name, (_, says) in OWN.items()
            if f"{name}_gflop_per_s" in peak
        )
        head += f"; peaks measured in the same run {peak['gflop_per_s']:.0f} GFLOP/s (sgemm),{own} {peak['gb_per_s']:.1f} GB/s (copy)"
    return f"{head} ([record]({link}bench/results/{record.path.name}))."


def short(record: Record) -> str:
    """The README's section: the rows that matter and the main job."""
    out = [_head(record, ""), "", "| | ours, ms | against | times faster |", "| --- | --- | --- | --- |"]
    for what, size, ours, other in MATTERS:
        row, times = record.get(what, size, ours), record.ratio(what, size, other, ours)
        if row and times:
            name = f"{what}, {WORDS.get(size, size)}{WORDS[ours]}"
            out.append(f"| {name} | {_number(row['median_ms'])} | {WORDS[other]} | {_number(times)} |")
    fine, few = record.get("sampling", "1 tasks", "fine-tuning"), record.get("sampling", "1 tasks", FASTEST)
    if fine and few and "generated_accuracy" in fine:
        reached = "" if fine["reached"] else ", the most accurate tried"
        out += [
            "",
            f"Fine-tuning takes {fine['adam_steps']} Adam steps ({fine['accuracy']:.1f} %{reached}); the generated heads have "
            f"{fine['generated_accuracy']:.1f} %, in three steps {few['accuracy']:.1f} %, on the benchmark's own Gaussian classes.",
        ]
    return "\n".join([*out, "", "Every size and provider: [docs/performance.md](docs/performance.md#the-record)."])


def whole(record: Record) -> str:
    """The section of docs/performance.md: everything."""
    out = [_head(record, "../"), "", *speed_table(record), *target_table(record)]
    job = record.get("main job", "glyphs", "ours")
    if job:
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in job["stages"].items())
        outside = f"outside the core {100 * job['outside_core']:.0f} %."
        out += ["", f"Main job, seconds: {job['seconds']:.0f} ({stages}); {outside}"]
    memory = record.get("memory", "1000 and 8000 tasks", "ours")
    if memory:
        (few, many), says = (memory["few"], memory["many"]), "Memory of preparation, MiB at 1000 and 8000 tasks"
        out += [
            "",
            f"{says}: in use {few['held']:.0f} and {many['held']:.0f}, peak resident {few['peak']:.0f} and {many['peak']:.0f}.",
        ]
    return "\n".join(out)


def apart(places: list[float], gap: float) -> list[float]:
    """The nearest places in the same order with at least `gap` between them, from the lowest up."""
    order, found = sorted(range(len(places)), key=places.__getitem__), list(places)
    for below, above in pairwise(order):
        found[above] = max(found[above], found[below] + gap)
    return found


def draw(axis: Any, record: Record, title: str, what: str, label: str, sizes: dict[str, int]) -> list[Any]:
    """One panel: ms over the axis, a line a provider with its name at its end; returns the names."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    lines = {}
    for provider in DRAWN:
        rows = {x: record.get(what, size, provider) for size, x in sizes.items()}
        points = [(x, row["median_ms"]) for x, row in rows.items() if row and "median_ms" in row]
        if len(points) > 1:
            lines[provider] = points
            style = {"marker": "o", "ms": 3, "lw": 2.5 if provider == "ours" else 1.2}
            axis.loglog(*zip(*points, strict=True), color=DRAWN[provider], **style)
    axis.set(title=title, xlabel=label, ylabel="ms")
    axis.xaxis.set(major_locator=FixedLocator(list(sizes.values())), minor_locator=NullLocator())
    axis.yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5), numticks=8), minor_locator=NullLocator(), major_formatter="{x:g}"
    )
    axis.set_xticklabels([str(x) for x in sizes.values()])
    axis.set_ylim(*axis.get_ylim())  # settles where a name goes
    axis.spines[["top", "right"]].set_visible(False)
    to_axis = axis.transScale + axis.transLimits
    places = apart([float(to_axis.transform(points[-1])[1]) for points in lines.values()], 0.09)
    return [
        axis.annotate(
            provider, points[-1], (1.04, place), textcoords="axes fraction", color=DRAWN[provider], va="center", fontsize=9,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": DRAWN[provider], "shrinkA": 0, "shrinkB": 3},
        )
        for (provider, points), place in zip(lines.items(), places, strict=True)
    ]  # fmt: skip


def plots(record: Record, folder: Path = RESULTS) -> list[Path]:
    """Milliseconds, one question a panel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [panel for panel in PANELS if sum(record.get(panel[1], size, "ours") is not None for size in panel[3]) > 1]
    if not panels:
        return []
    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels, strict=False):
        draw(axis, record, *panel)
    path = folder / f"speed-{record.device}.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return [path]


def rewrite(name: str, document: str, section: str) -> str:
    """The document with what stands between the two comments replaced."""
    if BEGIN not in document or END not in document:
        raise SystemExit(f"error: {name} lacks {BEGIN} … {END}, between which the record goes")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{section}\n{END}", document, flags=re.DOTALL)


def main() -> None:
    """Redraw everything."""
    found = records()
    if not found:
        sys.exit("error: bench/results holds no record of this benchmark; run make bench first")
    drawn = [path for record in found for path in plots(record)]
    pictures = [f"![speed](bench/results/{path.name})" for path in drawn]
    for name, sections in {
        "README.md": [*map(short, found), *pictures], "docs/performance.md": [*map(whole, found)]
    }.items():  # fmt: skip
        path = ROOT / name
        path.write_text(rewrite(name, path.read_text(), "\n\n".join(sections)))
    print("wrote README.md, docs/performance.md,", ", ".join(str(path.relative_to(ROOT)) for path in drawn))


if __name__ == "__main__":
    main()
