"""What must not be in the source at all."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "mcdi_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "examples").glob("*.py")]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "np.load",
    "numpy.load",
    "dist.gather_object",
    "dist.all_gather_object",
}
FORBIDDEN_METHODS = {"extract", "extractall", "broadcast_object_list", "scatter_object_list", "all_gather_object"}


def test_no_pickle_is_loaded():
    """Nor is code from a file run, an archive extracted, or an object sent between processes (which torch pickles)."""
    assert len(SOURCES) > 30
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            assert not FORBIDDEN_MODULES & set(names), (path, names)
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                options = {f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords}
                if options & {"allow_pickle=False", "weights_only=True"}:
                    continue
                assert called not in FORBIDDEN_CALLS, (path, node.lineno, called)
                assert not (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS), (
                    path,
                    node.lineno,
                )
