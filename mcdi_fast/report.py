"""The report of a run: `report.json` for machines, `report.md` with plots for people."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcdi_fast.evaluate import GRADIENTS, OBJECTIVE_TITLES, WHAT
from mcdi_fast.figures import new_figure, png
from mcdi_fast.store import atomic_write, write_json


def machine() -> dict[str, Any]:
    """What the numbers were made with: processor and the widest instructions torch uses of it, threads, versions, git sha."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "git": git_sha(),
    }


def git_sha() -> str:
    """Of the checkout this package runs from, `+` behind it where files differ; `unknown` outside of one."""
    try:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_report(folder: Path, result: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> None:
    """Write `report.json`, the plots and `report.md` into the run folder.

    Args:
        result: what `evaluate` returned, with `config`, `machine` and `seconds` (by stage) added; `figures` goes into files of its own.
        metrics: the lines of metrics.jsonl.
    """
    figures = result.pop("figures")
    write_json(folder / "report.json", result)
    name = result["metric"]["name"]
    plots = {
        "learning.png": ("Learning curves", _plot_learning(metrics, result)),
        "methods.png": (f"The {name} of each method, with 95 % intervals over tasks", _plot_methods(result)),
        "steps.png": (f"The {name} and the weight error against the number of sampling steps", _plot_steps(result)),
        "norms.png": ("Norm of generated against target weights", _plot_norms(result)),
        "chains.png": ("Sampling chains in a plane of weight space, over the task's loss", plot_chains(result)),
        **figures,
    }
    for file, (_, data) in plots.items():
        atomic_write(folder / file, data)
    atomic_write(folder / "report.md", _markdown(result, {n: title for n, (title, _) in plots.items()}).encode())


def _title(name: str) -> str:
    return f"{name} ({OBJECTIVE_TITLES[name]})" if name in OBJECTIVE_TITLES else name


def axis_label(metric: dict[str, Any]) -> str:
    """Name and unit."""
    return f"{metric['name']}, {metric['unit']}".rstrip(", ")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table, and a blank one behind it."""
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines), ""]


def number(value: float, like: float | None = None) -> str:
    """With two digits after the point, or three that count where it is small."""
    return f"{value:.2f}" if abs(like if like is not None else value) >= 1 else f"{value:.3g}"


def milliseconds(method: dict[str, Any]) -> str:
    """Of one task; "busy" where the machine was too busy to measure them."""
    return "busy" if method["latency_ms"] is None else f"{method['latency_ms']:.2f}"


def _markdown(result: dict[str, Any], plots: dict[str, str]) -> str:
    config, methods, axis = result["config"], result["methods"], axis_label(result["metric"])
    options = ", ".join(f"{k} {v}" for k, v in (config["task"] or {}).items() if not isinstance(v, dict))
    better = "higher" if result["metric"]["higher_is_better"] else "lower"
    lines = [
        f"# {config['dataset']}, seed {config['seed']}",
        "",
        f"{options}. {config['evaluate']['tasks']} test tasks, the same for every method. ± is the 95 % interval over tasks; {better} is better. "
        "Sampling steps and the settings of fine-tuning are chosen on validation tasks.".lstrip(". "),
        "",
    ]

    def row(name: str, m: dict[str, Any]) -> list[str]:
        drawn = f"weights drawn from noise in {m.get('steps')} steps, by this run's generator"
        what = WHAT.get(name, drawn if name in OBJECTIVE_TITLES else "")
        score = f"{number(m['mean'])} ± {number(m['ci95'], m['mean'])}"
        return [f"{_title(name)}: {what}", score, milliseconds(m), "yes" if name in GRADIENTS else "no"]

    lines += table(["method", axis, "one task, ms", "gradients at test time"], [row(n, m) for n, m in methods.items()])
    load = max(m["latency_load"] or 0.0 for m in methods.values())
    timing = "One task: lower quartile of some 30 calls on one thread"
    lines.append(f"{timing}; {load:.1f} processes wanted one of the cores at the time.")
    if any(m["latency_ms"] is None for m in methods.values()):
        busy = "calls scattered, or waited for a core. The same command on an idle machine measures again."
        lines.append(f"**busy**: {busy}")
    lines += ["", "Paired over the same tasks:", ""]
    for name, m in methods.items():
        if "generated_minus_this" in m:
            difference, half = m["generated_minus_this"], m["generated_minus_this_ci95"]
            size = max(abs(difference), abs(half))
            shown = f"{'+' * (difference >= 0)}{number(difference, size)} ± {number(half, size)}"
            lines.append(f"- generated minus {name}: {shown}")
    curve = [
        [p["steps"], f"{number(p['mean'])} ± {number(p['ci95'], p['mean'])}", f"{p['weight_error']:.3f}"]
        for p in result["sampling_steps"]
    ]
    lines += ["", *table(["sampling steps", axis, "weight error (normalised RMS)"], curve)]
    for name, title in plots.items():
        lines += [f"## {title}", "", f"![{title}]({name})", ""]
    seconds = [[stage, f"{value:.1f}"] for stage, value in result["seconds"].items()]
    lines += ["## Where the time went", "", *table(["stage", "s"], seconds)]
    if result.get("skipped_steps"):
        share = f"{result['skipped_steps']} of the {config['meta']['steps']} outer steps"
        lines += [f"**{share} were skipped: their loss was not finite.**", ""]
    lines += ["A stage that an earlier, interrupted run had (partly) done counts only what this one added.", ""]
    lines += ["## Machine", "", *(f"- {key}: {value}" for key, value in result["machine"].items()), ""]
    lines += ["Every setting is in `config.json`, every number above in `report.json`.", ""]
    return "\n".join(lines)


def _plot_learning(metrics: Sequence[dict[str, Any]], result: dict[str, Any]) -> bytes:
    figure, (left, right) = new_figure(2)
    step = np.array([m["step"] for m in metrics])
    loss = np.array([m["loss"] for m in metrics], float)  # None, of a step that was skipped, becomes NaN
    left.plot(step, loss, color="0.8", lw=0.8, label="one meta-batch")
    window = max(1, len(loss) // 40)
    if len(loss) > window:
        smooth = np.convolve(loss, np.ones(window) / window, "valid")
        left.plot(step[window - 1 :], smooth, color="C0", label=f"mean of {window}")
    left.set(xlabel="outer step", ylabel="loss before the inner steps")
    left.legend(frameon=False)
    points = [(m["step"], m["validation"]) for m in metrics if "validation" in m]
    if points:
        right.plot(*zip(*points, strict=True), "o-", ms=3)
    right.set(xlabel="outer step", ylabel=axis_label(result["metric"]) + ", validation tasks")
    return png(figure)


def _plot_methods(result: dict[str, Any]) -> bytes:
    figure, ax = new_figure()
    names = list(result["methods"])
    mean = [result["methods"][n]["mean"] for n in names]
    half = [result["methods"][n]["ci95"] for n in names]
    ax.errorbar(mean, range(len(names)), xerr=half, fmt="o", capsize=4)
    above: dict[str, Any] = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    for y, (m, h) in enumerate(zip(mean, half, strict=True)):
        ax.annotate(f"{number(m)} ± {number(h, m)}", (m, y), **above)
    ax.set(yticks=range(len(names)), yticklabels=[_title(n) for n in names], ylim=(-0.5, len(names) - 0.3))
    ax.set_xlabel(axis_label(result["metric"]))
    ax.margins(x=0.2)
    ax.invert_yaxis()
    return png(figure)


def _plot_steps(result: dict[str, Any]) -> bytes:
    figure, (left, right) = new_figure(2)
    curve = result["sampling_steps"]
    steps = [p["steps"] for p in curve]
    left.errorbar(steps, [p["mean"] for p in curve], [p["ci95"] for p in curve], fmt="o-", ms=3, capsize=3)
    left.set(xlabel="sampling steps", ylabel=axis_label(result["metric"]))
    right.plot(steps, [p["weight_error"] for p in curve], "o-", ms=3)
    right.set(xlabel="sampling steps", ylabel="RMS error to the trained target, normalised", ylim=(0, None))
    return png(figure)


def _plot_norms(result: dict[str, Any]) -> bytes:
    figure, ax = new_figure()
    generated, target = result["norms"]["generated"], result["norms"]["target"]
    ax.plot(target, generated, ".", ms=3, alpha=0.6)
    both = [min(*generated, *target), max(*generated, *target)]
    ax.plot(both, both, color="0.6", lw=0.8)
    ax.set(xlabel="norm of the trained target", ylabel="norm of the generated weights")
    return png(figure)


def plot_chains(result: dict[str, Any]) -> bytes:
    """A PNG of `result["plane"]`, which is `chain_plane`'s."""
    figure, ax = new_figure()
    plane = result["plane"]
    loss = ax.contourf(plane["x"], plane["y"], plane["log_loss"], levels=20, cmap="viridis", alpha=0.7)
    figure.colorbar(loss, label="log10 of the task's loss")
    for chain in plane["chains"]:
        ax.plot(*zip(*chain, strict=True), "-", color="white", lw=0.8)
        ax.plot(*chain[0], "o", color="white", ms=3)
        ax.plot(*chain[-1], "o", color="k", ms=3)
    for i, goal in enumerate(plane["targets"], 1):
        ax.plot(*goal, "*", color="red", ms=9)
        ax.annotate(f"target {i}", goal, xytext=(5, 4), textcoords="offset points", color="red", fontsize=8)
    ax.set(xlabel="first direction", ylabel="second direction")
    return png(figure)
