"""What the README tells people to type works."""

import re
from pathlib import Path

import torch

from mcdi_fast import DiffusionConfig, WeightGenerator
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.heads import head_layout
from mcdi_fast.weights import Normalizer

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    normalizers = [Normalizer(torch.zeros(1, width), torch.ones(1, width)) for width in (65, 65)]
    phi = init_parameters(65, 65, 20, 32, 1, seed=0)
    WeightGenerator(phi, head_layout(5, 64), *normalizers, DiffusionConfig()).save_pretrained(
        "runs/glyphs-seed0/generator"
    )
    names = {
        "support_features": torch.randn(3, 5, 1, 64),
        "query_features": torch.randn(3, 15, 64),
        "head": torch.nn.Linear(64, 5),
    }
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (3, 15, 5)
    assert all(p.isfinite().all() for p in names["net"].parameters())


def test_files_it_names_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"`((?:mcdi_fast|kernels|docs|bench)/[\w/]*\w(?:\.py|\.md)?/?)`|\((docs/[\w.]+)\)", README):
        name = path[0] or path[1]
        assert (root / name).exists(), name
