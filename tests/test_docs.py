"""What the docs tell people to type works, what they name exists, and the API reference is the docstrings'."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from test_sampler import make

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Every ```python block that is not marked `notest`, a page's in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if any("diffusers_scheduler" in block for block in blocks):
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    make(torch.nn.Linear(4, 3)).save_pretrained("runs/glyphs-seed0/generator")
    names = {"condition": torch.randn(2, 6), "head": torch.nn.Linear(4, 3), "x": torch.randn(2, 7, 4)}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_api_reference_is_up_to_date():
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "api.md").read_text() == module.main(), "run python docs/make_api.py"
