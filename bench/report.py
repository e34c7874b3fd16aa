"""Redraw what the records in bench/results/ say: plots, the table in the README and the targets.

    python bench/report.py          # or: make bench-report

Reads the newest record of each device. Records without `"format": 2` are of an older benchmark and are passed over.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
BASELINES = ("loop", "vmap", "compiled", "stacked")
TARGETS = {  # device: (what, size, ours over which, at least)
    "cpu": [
        ("meta-step", "32x16", "vmap", 3.0),
        ("meta-step", "32x16", "loop", 4.0),
        ("meta-step", "128x8", "vmap", 6.0),
        ("preparation", "500 tasks", "loop", 30.0),
        ("sampling", "1 tasks", "fine-tuning", 10.0),
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
LATENCY_MS = {"cpu": 3.0, "cuda": 0.25}  # of one head, T = 20
SHARE = {"cpu": 0.8, "cuda": 0.6}  # of the peak, default size of the meta-step


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
        if found is None and what == "preparation" and provider in ("loop", "pytorch_optimizer"):
            found = self.rows.get((what, "8 tasks", provider)) if size in ("100 tasks", "500 tasks") else None
        return found

    def per_work(self, what: str, size: str, provider: str) -> float | None:
        """Milliseconds a unit of work (a task, a row)."""
        row = self.get(what, size, provider)
        return row["median_ms"] / row["work"] if row and "median_ms" in row else None

    def ratio(self, what: str, size: str, other: str) -> float | None:
        """How many times ours is faster."""
        ours, theirs = self.per_work(what, size, "ours"), self.per_work(what, size, other)
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
    out = ["| | size | ours, ms (p20 to p80) | loop | vmap | compiled | stacked | others | share of peak |"]
    out.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for what, sizes in record.kinds().items():
        for size in sizes:
            ours = record.get(what, size, "ours")
            if not ours or "median_ms" not in ours:
                continue
            names = [provider for kind, at, provider in record.rows if (kind, at) == (what, size)]
            cells = [_number(record.ratio(what, size, name)) for name in BASELINES]
            cells = [f"{cell} x" if cell else "" for cell in cells]
            others = [
                f"{name} {_number(record.ratio(what, size, name))} x"
                for name in names
                if name not in (*BASELINES, "ours")
            ]
            cells.append(", ".join(others))
            spread = f"{_number(ours['median_ms'])} ({_number(ours['p20_ms'])} to {_number(ours['p80_ms'])})"
            share = f"{100 * ours['share_of_peak']:.0f} % ({ours['nearest_peak']})"
            out.append(f"| {what} | {size} | {spread} | " + " | ".join(cells) + f" | {share} |")
    return out


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
    default = record.get("meta-step", "32x20", "ours")
    share = SHARE[record.device]
    line(
        f"meta-step 32x20: at least {100 * share:.0f} % of its bound",
        default and 100 * default["share_of_peak"],
        100 * share,
        " %",
    )
    floor = record.ratio("meta-step", "32x20", "floor")
    line(
        f"meta-step 32x20: at least {100 * share:.0f} % of the sgemm floor, low-rank terms counted",
        floor and 100 * floor,
        100 * share,
        " %",
    )
    one = record.get("sampling", "1 tasks", "ours")
    wanted = LATENCY_MS[record.device]
    line(f"one head sampled in at most {wanted:g} ms", one and one["median_ms"], wanted, " ms", higher=False)
    for what, fewer, more in LINEAR:
        few, many = record.per_work(what, fewer, "ours"), record.per_work(what, more, "ours")
        cost = many / few if few and many else None
        line(
            f"{what}: a task of {more} costs at most {LINEAR_WITHIN:g} times one of {fewer}",
            cost,
            LINEAR_WITHIN,
            " times",
            higher=False,
        )
    return out


def text(record: Record) -> str:
    """The README's section of one record."""
    m, peak = record.machine, record.peak
    head = f"{m['processor']}, {m.get('device', 'cpu')}, {m['threads']} threads, torch {m['torch']}, git {m['git']}"
    if peak:
        head += f"; peaks measured in the same run {peak['gflop_per_s']:.0f} GFLOP/s (sgemm), {peak['gb_per_s']:.1f} GB/s (copy)"
    out = [f"{head} ([record](bench/results/{record.path.name})).", "", *speed_table(record), "", *target_table(record)]
    fine = record.get("sampling", "1 tasks", "fine-tuning")
    if fine and "generated_accuracy" in fine:
        reached = "" if fine["reached"] else ", the most accurate tried"
        out += [
            "",
            f"Fine-tuning takes {fine['adam_steps']} Adam steps ({fine['accuracy']:.1f} %{reached}); the generated heads have "
            f"{fine['generated_accuracy']:.1f} %, on the benchmark's own Gaussian classes.",
        ]
    short, ratio = record.get("sampling", "1 tasks", "3 steps"), record.ratio("sampling", "1 tasks", "3 steps")
    if fine and short and ratio:
        times = record.ratio("sampling", "1 tasks", "fine-tuning") or 0
        out[-1] += (
            f" In three steps, one a segment, a head takes {_number(short['median_ms'])} ms, {_number(times / ratio)} times less than "
            f"fine-tuning, and has {short['accuracy']:.1f} %."
        )
    job = record.get("main job", "glyphs", "ours")
    if job:
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in job["stages"].items())
        out += [
            "",
            f"Main job, seconds: {job['seconds']:.0f} ({stages}); outside the core {100 * job['outside_core']:.0f} %.",
        ]
    memory = record.get("memory", "1000 and 8000 tasks", "ours")
    if memory:
        few, many = memory["few"], memory["many"]
        out += [
            "",
            f"Memory of preparation, MiB at 1000 and 8000 tasks: in use {few['held']:.0f} and {many['held']:.0f}, "
            f"peak resident {few['peak']:.0f} and {many['peak']:.0f}.",
        ]
    return "\n".join(out)


def plots(record: Record, folder: Path = RESULTS) -> list[Path]:
    """Speed against work and share of peak, a panel a kind of work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [what for what in ("meta-step", "preparation", "sampling") if what in record.kinds()]
    if not kinds:
        return []
    figure, axes = plt.subplots(2, len(kinds), figsize=(4 * len(kinds), 6), squeeze=False)
    for column, what in enumerate(kinds):
        for provider in dict.fromkeys(p for w, _, p in record.rows if w == what):
            rows = [r for (w, s, p), r in record.rows.items() if (w, p) == (what, provider) and "median_ms" in r]
            if what == "meta-step":
                rows = [r for r in rows if "width" not in r["size"]]
            rows.sort(key=lambda row: row["work"])
            style = {"marker": "o", "ms": 3, "label": provider, "lw": 2 if provider == "ours" else 1}
            axes[0][column].loglog([r["work"] for r in rows], [r["median_ms"] for r in rows], **style)
            axes[1][column].semilogx([r["work"] for r in rows], [100 * r["share_of_peak"] for r in rows], **style)
        axes[0][column].set(title=what, ylabel="ms")
        axes[1][column].set(
            xlabel="rows of all tasks and steps" if what == "meta-step" else "tasks", ylabel="share of peak, %"
        )
        axes[0][column].legend(fontsize=6)
    figure.tight_layout()
    path = folder / f"speed-{record.device}.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return [path]


def rewrite(readme: str, section: str) -> str:
    """The README with what stands between the two comments replaced."""
    if BEGIN not in readme or END not in readme:
        raise SystemExit(f"error: README.md lacks {BEGIN} … {END}, between which the table goes")
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{section}\n{END}", readme, flags=re.DOTALL)


def main() -> None:
    """Redraw everything."""
    found = records()
    if not found:
        sys.exit("error: bench/results holds no record of this benchmark; run make bench first")
    drawn = [path for record in found for path in plots(record)]
    pictures = "\n".join(f"![speed](bench/results/{path.name})" for path in drawn)
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text(), "\n\n".join([text(record) for record in found] + [pictures])))
    print("wrote README.md,", ", ".join(str(path.relative_to(ROOT)) for path in drawn))


if __name__ == "__main__":
    main()
