"""Few-shot tasks: what a task family must offer, and episodes over it. One file a family: glyphs.py, omniglot.py."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcdi_fast.errors import McdiError

FAMILIES = ("glyphs", "omniglot")


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


@dataclass(frozen=True)
class Episodes:
    """B tasks as indices into [classes, images_per_class]; the images themselves stay where they are.

    Attributes:
        classes: int64 [B, ways], the class of each way; no class twice in a task.
        support: int64 [B, ways, shots], images_per_class. query: int64 [B, ways, queries], other images_per_class.
    """

    classes: Tensor
    support: Tensor
    query: Tensor

    def take(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Support [B, ways, shots, ...] and query [B, ways, queries, ...] out of features [classes, images_per_class, ...]."""
        way = self.classes.unsqueeze(-1)
        return features[way, self.support], features[way, self.query]


def sample_episodes(
    num_classes: int, images_per_class: int, *, ways: int, shots: int, queries: int, seed: int, start: int, count: int
) -> Episodes:
    """Draw tasks `start` to `start + count - 1` of an endless, reproducible sequence.

    Task b depends on (seed, b) and the sizes alone, so the tasks are the same whatever the batches they are drawn in.

    Raises:
        McdiError: fewer than 2 ways, more ways than classes, shots < 1, queries < 0, more shots + queries than images_per_class.
    """
    check_episodes(num_classes, images_per_class, ways=ways, shots=shots, queries=queries)
    classes = np.empty((count, ways), np.int64)
    images = np.empty((count, ways, shots + queries), np.int64)
    for i in range(count):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, start + i))))
        classes[i] = rng.choice(num_classes, ways, replace=False)
        images[i] = rng.random((ways, images_per_class)).argsort(1)[:, : shots + queries]
    order = torch.from_numpy(images)
    return Episodes(torch.from_numpy(classes), order[..., :shots], order[..., shots:])


def check_episodes(num_classes: int, images_per_class: int, *, ways: int, shots: int, queries: int) -> None:
    """Raise McdiError, naming the option, unless such episodes can be drawn from the split."""
    if ways < 2:
        raise McdiError(f"--task.ways = {ways}: expected at least 2 classes a task")
    if ways > num_classes:
        raise McdiError(f"--task.ways = {ways}: more than the {num_classes} classes there are; ask for fewer ways")
    if shots < 1:
        raise McdiError(f"--task.shots = {shots}: expected at least 1 support image a class")
    if queries < 0:
        raise McdiError(f"--task.queries = {queries}: expected 0 or more query images a class")
    if shots + queries > images_per_class:
        raise McdiError(
            f"--task.shots {shots} + --task.queries {queries} = {shots + queries}: "
            f"more than the {images_per_class} images of a class; ask for fewer"
        )


def load_dataset(name: str, data_dir: Path | None, cache_dir: Path) -> FewShotData:
    """Load a task family by name.

    Args:
        name: one of `FAMILIES`. data_dir: where the user keeps the data, None to look in MCDI_DATA_DIR, then download.
        cache_dir: where downloads are kept.

    Raises:
        McdiError: another name; whatever is wrong with the data, naming the file.
    """
    if name not in FAMILIES:
        raise McdiError(f"--dataset {name!r}: expected one of {', '.join(FAMILIES)}")
    family = importlib.import_module(f"{__name__}.{name}")
    if name == "glyphs":
        return family.load()
    return family.load(data_dir, cache_dir)
