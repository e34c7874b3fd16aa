"""What the README tells people to type works."""

import re
from pathlib import Path

import numpy as np
import torch

from mcdi_fast import DiffusionConfig, WeightGenerator, train
from mcdi_fast.backbone import conv4, weights_digest
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.heads import head_layout
from mcdi_fast.noise import draw_generator
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.store import make_folder, save_tensors
from mcdi_fast.tasks import TaskBatch, check_family

README = (Path(__file__).parents[1] / "README.md").read_text()


def finished_run(place):
    """What `make train` leaves, as far as the docs use it, untrained; and the names that their blocks take for given."""
    normalizers = [Normalizer(torch.zeros(1, width), torch.ones(1, width)) for width in (65, 65)]
    phi = init_parameters(65, 65, 20, 32, 1, seed=0)
    network = conv4()
    provenance = {"backbone": "0123456789abcdef", "backbone_weights": weights_digest(network)}
    parts = phi, head_layout(5, 64), *normalizers, DiffusionConfig(), provenance
    WeightGenerator(*parts).save_pretrained(place / "runs/glyphs-seed0/generator")
    cache = make_folder(place / "runs/cache/backbones")
    save_tensors(cache / "0123456789abcdef.safetensors", network.state_dict(), {}, "backbone")
    return {
        "support_features": torch.randn(3, 5, 1, 64),
        "query_features": torch.randn(3, 15, 64),
        "head": torch.nn.Linear(64, 5),
        "draw_tasks": draw_tasks,
        "condition": torch.randn(2, 5, 65),
        "x": torch.randn(2, 7, 64),
        "images": torch.randint(256, (2, 5, 1, 28, 28), dtype=torch.uint8),
        "query_images": torch.randint(256, (2, 7, 28, 28), dtype=torch.uint8),
        "labels": torch.randint(5, (2, 7)),
        "drawing": np.pad(np.zeros((9, 9), np.uint8), 48, constant_values=255),
    }


def draw_tasks(split, start, count, seed):
    """Of the family that the README has a network for."""
    keys = [draw_generator(seed, len(split), number) for number in range(start, start + count)]
    a = torch.stack([torch.randn(1, generator=g) for g in keys])
    x = torch.linspace(-1, 1, 8)[:, None].expand(count, -1, -1)
    data = {"x": x, "y": a[:, None] * x}
    return TaskBatch(a[:, None], data, data, data)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = finished_run(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    trained = []
    monkeypatch.setattr(train, "train", lambda config, family: trained.append((config, family)))
    for block in blocks * 2:  # people run things again
        exec(block, names)
    assert trained[0][0].dataset == "mine"
    assert trained[0][1].provenance() == trained[1][1].provenance()  # else the second is refused: another start
    check_family(trained[0][1])
    assert names["logits"].shape == (3, 15, 5)


def test_files_it_names_exist():
    root = Path(__file__).parents[1]
    for path in re.findall(r"`((?:mcdi_fast|kernels|docs|bench)/[\w/]*\w(?:\.py|\.md)?/?)`|\((docs/[\w.]+)\)", README):
        name = path[0] or path[1]
        assert (root / name).exists(), name
