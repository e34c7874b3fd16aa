"""Drawn characters as few-shot tasks: images by class, a Conv4 trained on the training classes, heads on its features."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mcdi_fast import backbone as bb
from mcdi_fast.config import AtLeastZero, TrainConfig
from mcdi_fast.errors import McdiError, reason_of
from mcdi_fast.store import make_folder
from mcdi_fast.tasks import Setup
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions


@dataclass(frozen=True)
class ClassImages:
    """Images by class: uint8 [classes, images_per_class, height, width], 0 = paper, 255 = ink."""

    images: np.ndarray

    @property
    def num_classes(self) -> int:
        """Classes of this split."""
        return self.images.shape[0]

    @property
    def images_per_class(self) -> int:
        """Images a class."""
        return self.images.shape[1]


@dataclass(frozen=True)
class FewShotData:
    """Three splits with no class in common. `fingerprint` changes with their pixels."""

    name: str
    train: ClassImages
    val: ClassImages
    test: ClassImages
    fingerprint: str


SIDE = 28


def preprocess(image: Any) -> np.ndarray:
    """A drawing of any square size as the backbones see it: uint8 [28, 28], 0 = paper, 255 = ink.

    Args:
        image: a path, a PIL image, or a uint8 array [H, W] or [H, W, 3 or 4]. Dark ink on light paper, or the other way round: ink never covers half.
            Ink in the alpha channel counts, whatever its colour.

    Raises:
        McdiError: no image, or a blank one.
    """
    from PIL import Image

    try:
        if isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        grey = image.convert("L")
        if image.mode in ("LA", "RGBA") or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A")
            if alpha.getextrema() != (255, 255):  # the ink is what is not transparent, whatever its colour
                grey = Image.eval(alpha, lambda value: 255 - value)
        small = _shrunk(grey)
        if int(small.sum()) < 128 * small.size:  # white on black
            small = _shrunk(Image.eval(grey, lambda value: 255 - value))
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise McdiError(f"drawing: no image ({reason_of(error)})") from error
    if int(small.sum()) == 255 * small.size:
        raise McdiError("drawing: a blank image, without ink in its colours or its alpha channel")
    return 255 - small


def _shrunk(grey: Any) -> np.ndarray:
    from PIL import Image

    return np.frombuffer(grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes(), np.uint8).reshape(SIDE, SIDE)


@dataclass(frozen=True)
class DrawingOptions(HeadOptions):
    """A few-shot task on drawn characters."""

    augmentation: AtLeastZero = 0
    """Augmented versions of each training image, beside the image itself, that preparation picks from (paper: some; record, five seeds:
    one is 0.07 ± 0.03 % worse than none)."""
    backbone: bb.BackboneConfig = field(default_factory=bb.BackboneConfig)


def drawing_defaults(config: TrainConfig) -> TrainConfig:
    """The quickest sizes that are level with the best on validation characters (docs/choices.md, "What accuracy costs")."""
    return replace(
        config,
        prepare=replace(config.prepare, tasks=2000),
        denoiser=replace(config.denoiser, depth=1),
        meta=replace(config.meta, steps=500),
    )


def check_drawings(data: FewShotData, options: DrawingOptions) -> None:
    """Raise McdiError unless such tasks can be drawn from every split: known before minutes of training."""
    for split in ("train", "val", "test"):
        part = getattr(data, split)
        counts = torch.full((part.num_classes,), part.images_per_class)
        HeadFamily.check_split(split, ClassRows(torch.zeros(1, 1), counts), options)


def drawing_family(load: Callable[[], FewShotData], options: DrawingOptions, setup: Setup) -> HeadFamily:
    """Load the images, train or load the backbone, take features once, and make heads on them.

    Raises:
        McdiError: tasks that cannot be drawn from the data; a backbone that cannot be trained or loaded.
    """
    with setup.stage("data", 1, "set") as bar:
        data = load()
        bar.update()
    check_drawings(data, options)
    setup.begin()
    config = options.backbone
    with setup.stage("backbone", config.steps, "episodes") as bar:
        folder = make_folder(setup.cache_dir / "backbones")
        done: dict[str, Any] = {"on_start": bar.update, "on_step": lambda *_: bar.update()}
        network = bb.train_backbone(data, config, folder, device=setup.device, **done)
    versions = 1 + options.augmentation
    images = sum(p.num_classes * p.images_per_class for p in [data.train] * versions + [data.val, data.test])
    with setup.stage("features", images, "images") as bar:
        take = partial(bb.extract_features, network, progress=bar.update, views=config.views)
        train = torch.stack([take(data.train, augment_seed=version or None) for version in range(versions)])
        grids = {"train": train, "val": take(data.val), "test": take(data.test)}
    provenance = {
        "dataset": data.name,
        "data_fingerprint": data.fingerprint,
        **bb.features_provenance(data, config, network),
        # what makes other tasks or other targets: the backbone has its fingerprint, queries are evaluation
        "task": {name: getattr(options, name) for name in ("ways", "shots", "support_loss_weight", "augmentation")},
    }
    splits = {name: ClassRows.of_grid(grid) for name, grid in grids.items()}
    return HeadFamily(splits, options, provenance, setup.device)
