"""No circle of imports: not through kernels/, and not through imports inside functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by name; kernels/ is reached by its link, which a walk does not follow."""
    found = {}
    for folder, name in ((root / "mcdi_fast", "mcdi_fast"), (root / "kernels", "mcdi_fast.kernels")):
        for file in folder.rglob("*.py"):
            if folder.name == "kernels" or "kernels" not in file.relative_to(folder).parts:
                parts = [name, *file.relative_to(folder).with_suffix("").parts]
                found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(node: ast.AST) -> Iterator[str]:
    """Names of modules, and of what is taken from them, anywhere below `node` but under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from imported(other)
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported(child)


def edges(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules each module imports. A submodule needs its package only where it says so."""
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        names = imported(ast.parse(file.read_text(encoding="utf-8")))
        found[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys() - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each set of modules that reach one another, by name."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def test_no_circle():
    files = modules(ROOT)
    assert "mcdi_fast.kernels.launch" in files
    assert "mcdi_fast.sampler" in files
    found = circles(edges(files))
    assert not found, "\n".join(f"a circle of imports: {' -> '.join([*group, group[0]])}" for group in found)


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "mcdi_fast").mkdir()
    (tmp_path / "kernels").mkdir()
    for name, text in {
        "mcdi_fast/one.py": "def f():\n    from mcdi_fast.kernels.two import g\n",
        "kernels/two.py": "from mcdi_fast import one\n",
        "mcdi_fast/three.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mcdi_fast.four import g\n",
        "mcdi_fast/four.py": "import mcdi_fast.three\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert circles(edges(modules(tmp_path))) == [["mcdi_fast.kernels.two", "mcdi_fast.one"]]
