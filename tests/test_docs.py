"""What the docs tell people to type works, what they name exists, and the API reference is the docstrings'."""

import importlib.util
import re
from pathlib import Path

import pytest
from test_readme import finished_run

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Every ```python block that is not marked `notest` (needs a network), a page's in one namespace; twice, as people do."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for extra, package in (
        ("diffusers_scheduler", "diffusers"),
        ("mcdi_fast.hub", "huggingface_hub"),
        ("import peft", "peft"),
        ("efficientnet-lite0", "efficientnet_lite_pytorch"),
    ):
        if any(extra in block for block in blocks):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = finished_run(tmp_path)
    for block in blocks * 2:
        exec(block, names)


def test_blocks_of_an_example_are_the_example_s():
    """```python examples/…: the lines stand there, one after the other."""

    def lines(text):
        return "\n".join(line.strip() for line in text.splitlines() if line.strip())

    found = [
        block
        for page in PAGES
        for block in re.findall(r"```python (examples/\S+)\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(found) == 2
    for example, block in found:
        assert lines(block) in lines((ROOT / example).read_text()), example


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
