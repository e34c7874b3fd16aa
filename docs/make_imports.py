"""Draw docs/figures/imports.png: every module on its floor, above all that it imports. python docs/make_imports.py"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from test_imports import circles, edges, modules  # noqa: E402

COLOURS = {"kernels": "C1", "tasks": "C2", "study": "C3"}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """How many imports lie below each module, at most. Needs a graph without circles."""
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((floor(other) for other in graph[name]), default=-1)
        return found[name]

    for name in graph:
        floor(name)
    return found


def main() -> None:
    files = {name: file for name, file in modules(ROOT).items() if name != "mcdi_fast"}
    graph = edges(files)
    assert not circles(graph), circles(graph)
    level = floors(graph)
    rows: dict[int, list[str]] = {}
    for name in sorted(level, key=lambda name: (name.split(".")[1], name)):
        rows.setdefault(level[name], []).append(name)
    place = {name: ((i + 0.5) / len(row), n) for n, row in rows.items() for i, name in enumerate(row)}
    figure = Figure(figsize=(17, 0.72 * len(rows) + 1), dpi=90, layout="constrained")
    ax = figure.subplots()
    for name, others in graph.items():
        for other in sorted(others):  # the same picture from the same imports
            ax.plot(*zip(place[name], place[other], strict=True), color="0.85", lw=0.5, zorder=1)
    for name, (x, y) in place.items():
        part = name.split(".")[1]
        short = name.removeprefix("mcdi_fast.")
        box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": COLOURS.get(part, "C0"), "lw": 1.2}
        ax.text(x, y, short, ha="center", va="center", fontsize=7.5, bbox=box, zorder=2)
    ax.set_axis_off()
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_title(
        f"{len(files)} modules on {len(rows)} floors; lines lead down, to what is imported (also inside functions); no circle",
        fontsize=10,
    )
    figure.savefig(ROOT / "docs" / "figures" / "imports.png")


if __name__ == "__main__":
    main()
