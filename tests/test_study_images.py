"""The comparison on natural images, small: cells, resuming, the page, and intervals pooled from means and variances."""

import dataclasses

import numpy as np
import pytest
import torch

from mcdi_fast.config import DenoiserConfig, EvaluateConfig, MetaConfig, PrepareConfig
from mcdi_fast.evaluate import interval
from mcdi_fast.store import read_json, write_json
from mcdi_fast.study import images
from mcdi_fast.study.images import Flow, ImagesConfig, images_study, pooled, render
from mcdi_fast.tasks import find_family


def source(path, classes, domains=(), seed=0, per_class=24):
    """Features of classes in three splits, or in domains."""
    rng = np.random.default_rng(seed)
    label = np.arange(classes).repeat(per_class)
    rows = 1.5 * rng.normal(size=(classes, 6))[label] + rng.normal(size=(len(label), 6))
    splits = np.array(["train", "val", "test"])[np.minimum(label // (classes // 3), 2)]
    more = {"domains": np.resize(domains, len(label))} if domains else {"splits": splits}
    np.savez(path, features=rows.astype(np.float32), labels=label, **more)
    return str(path)


def small(dataset, folder, **task):
    config = ImagesConfig(**vars(find_family(dataset).config()))
    return dataclasses.replace(
        config,
        run_dir=folder,
        seeds=(1,),
        target_tasks=6,
        task=dataclasses.replace(config.task, ways=3, queries=4, components=5, **task),
        prepare=dataclasses.replace(config.prepare, tasks=12, steps=3),
        denoiser=DenoiserConfig(width=32, depth=1),
        meta=MetaConfig(steps=3, checkpoint_every=3),
        evaluate=EvaluateConfig(tasks=8, validation_tasks=6),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(images, "_REPTILE_STEPS", 2)
    monkeypatch.setattr(images, "_LOGISTIC_STEPS", 5)
    monkeypatch.setattr(images, "_FLOW_BATCH", 32)


def test_new_classes_and_another_data_set(tmp_path, monkeypatch):
    other = source(tmp_path / "other.npz", 6, ("ink", "chalk"), 1, 44)
    config = dataclasses.replace(
        small("tiny-imagenet", tmp_path / "run", source=source(tmp_path / "source.npz", 12)), targets=(other,)
    )
    page = images_study(config)
    cell = read_json(tmp_path / "run" / "cells" / "tiny-imagenet-3way1shot-seed1.json")
    assert set(cell["splits"]) == {"test", "test, all 4", "ink", "ink, all 6", "chalk", "chalk, all 6"}
    assert set(cell["splits"]["test"]["mean"]) == set(images.TITLES)
    assert all(25 < mean <= 100 for one in cell["splits"].values() for mean in one["mean"].values())  # chance: 33, 17
    text = page.read_text()
    assert "| ink, all 6 |" in text
    assert "| **Mc-Di, 3 steps** |" in text
    monkeypatch.setattr(images, "_cell", lambda *given: pytest.fail("made again"))
    assert images_study(config).read_text() == text
    # a seed without further data sets counts on new classes alone
    cell["seed"], cell["splits"] = 2, {"test": cell["splits"]["test"]}
    write_json(tmp_path / "run" / "records" / "images" / "tiny-imagenet-3way1shot-seed2.json", cell)
    text = render(tmp_path / "run").read_text()
    assert "2 seeds" in text
    assert "| ink | " in text
    assert (tmp_path / "run" / "figures" / "images-distance.png").exists()


@pytest.mark.parametrize("across", [False, True])
def test_a_domain_held_out(tmp_path, across):
    path = source(tmp_path / "source.npz", 5, ("ink", "paint", "chalk"), per_class=48)
    for held_out in ("ink", "paint"):
        config = small("pacs", tmp_path / held_out, source=path, held_out=held_out, across=across)
        text = images_study(dataclasses.replace(config, baselines_only=True, out=tmp_path)).read_text()
        name = f"pacs-{held_out}-across-3way1shot" if across else f"pacs-{held_out}-3way1shot"
        assert f"| {name} | " in text
        assert ("| **pacs, mean, " in text) == (held_out == "paint")


def test_pooled_differences_are_those_of_all_tasks():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=g, dtype=torch.float64) + n / 10 for n in (5, 9, 14)]
    cells = [
        {"splits": {"test": {"tasks": len(x), "minus": {"a - b": [float(x.mean()), float(x.var())]}}}} for x in parts
    ]
    mean, half = pooled([*cells, {"splits": {}}], "test", "a - b")
    every = torch.cat(parts)
    assert mean == pytest.approx(float(every.mean()))
    assert half == pytest.approx(interval(every))


def test_flow_matching_learns(tmp_path):
    """More steps of training, nearer to the trained heads than the noise and than their mean."""
    family = find_family("tiny-imagenet").family(
        small("tiny-imagenet", tmp_path, source=source(tmp_path / "source.npz", 12)).task, images.Setup()
    )
    recipe = PrepareConfig(tasks=64, steps=30, learning_rate=0.1, weight_decay=0.03, start_std=0.0)
    bank = images.prepare_bank(tmp_path / "bank", family, recipe, 3, 0)
    like = images.fit(bank, MetaConfig(steps=1), denoiser=DenoiserConfig(width=64), seed=0, progress=False)
    targets, condition = bank.gather(torch.arange(64))
    tasks = images.TaskBatch(condition, {}, {}, {})

    def error(flow):
        theta = flow.sample(tasks, 20, 0)
        return float((like.normalizer.normalize(theta) - like.normalizer.normalize(targets[:, -1])).square().mean())

    assert error(Flow.fit(bank, like, 300, 0)) < 0.7 * error(Flow.fit(bank, like, 1, 0))
