"""Linear heads on frozen features: the family of few-shot classification. A task is N classes; what is generated is its head, a token a class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mcdi_fast import heads
from mcdi_fast.backend import Backend, numba_module
from mcdi_fast.config import AtLeastOne, AtLeastTwo, PrepareConfig, Share
from mcdi_fast.errors import McdiError
from mcdi_fast.tasks import Data, Metric, TaskBatch, TaskFamily, optimizer_steps


@dataclass(frozen=True)
class HeadOptions:
    """A few-shot task."""

    ways: AtLeastTwo = 5
    """Classes a task (paper)."""
    shots: AtLeastOne = 1
    """Support images a class (paper)."""
    queries: AtLeastOne = 15
    """Query images a class, in evaluation (protocol)."""
    support_loss_weight: Share | None = 0.8
    """Share of a trajectory's loss that its support images have; the other images of its classes share the rest. None weighs all alike.
    What a target owes to images that the condition does not show is noise to the generator (measured on validation characters, heads regressed on
    the condition: None 98.0, 0.5 98.3, 0.8 98.3, 1.0 98.35 %)."""


@dataclass(frozen=True)
class ClassRows:
    """Features of the images of some classes, sorted by class, and by domain within a class.

    Attributes:
        rows: float32 [n, F].
        counts: int64 [classes], or [classes, domains] where there are domains: images of each; they may differ.
        augmented: [A, n, F], further versions of each row.
        pairs: domains that a task may have, of its support and of its other images.
    """

    rows: Tensor
    counts: Tensor
    augmented: Tensor | None = None
    pairs: tuple[tuple[int, int], ...] = ((0, 0),)

    @classmethod
    def of_grid(cls, features: Tensor) -> ClassRows:
        """From features [classes, images_per_class, F], or [versions, classes, images_per_class, F] whose first version is the image itself."""
        versions = features if features.ndim == 4 else features[None]
        flat = versions.flatten(1, 2)
        counts = torch.full(versions.shape[1:2], versions.shape[2], dtype=torch.int64)
        return cls(flat[0], counts, flat[1:] if len(flat) > 1 else None)


def draw_episodes(
    counts: Tensor,
    ways: int,
    images: int,
    seed: int,
    start: int,
    count: int,
    shots: int = 0,
    pairs: tuple[tuple[int, int], ...] = ((0, 0),),
) -> Tensor:
    """Rows of tasks `start` to `start + count - 1` of an endless, reproducible sequence: int64 [count, ways, images].

    No class twice in a task, no image twice in a class. Task b depends on (seed, b) and the counts alone.

    Args:
        counts, pairs: of `ClassRows`; a task's pair is drawn. images: of each class of a task, of which the first `shots` are the support's.
    """
    sizes = counts.reshape(len(counts), -1).numpy()
    most, first = int(sizes.max()), (sizes.cumsum() - sizes.ravel()).reshape(sizes.shape)
    rows = np.empty((count, ways, images), np.int64)
    for i in range(count):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, start + i))))
        pair = pairs[rng.integers(len(pairs))] if len(pairs) > 1 else pairs[0]
        classes = rng.choice(len(sizes), ways, replace=False)
        order = rng.random((ways, most))
        for domain, part in zip(pair, (slice(shots), slice(shots, images)), strict=True):
            absent = np.arange(most) >= sizes[classes, domain, None]  # images that a smaller class does not have
            rows[i, :, part] = first[classes, domain, None] + np.where(absent, 2.0, order).argsort(1)[:, part]
    return torch.from_numpy(rows)


def train_heads(
    backend: Backend,
    start: Tensor,
    features: Tensor,
    labels: Tensor,
    config: PrepareConfig,
    base: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """`heads.head_trajectory`, with its options, in one launch of a kernel, or on a CPU by compiled code, where there is one; else by torch."""
    if backend.kernels and base is None:
        from mcdi_fast.kernels import head_trajectory as fused

        if fused.fits(start.shape[1]):
            return fused.head_trajectory(start, features, labels, config, precision=backend.precision, **options)
    elif backend.compiled and start.device.type == "cpu":
        compiled = numba_module("cpu_heads")
        if compiled and compiled.fits(start, features, labels, options.get("pick")):
            return compiled.head_trajectory(start, features, labels, config, base=base, **options)
    return heads.head_trajectory(start, features, labels, config, base=base, **options, **optimizer_steps(backend))


class HeadFamily(TaskFamily):
    """Heads [ways, F + 1] on features that are computed once.

    A batch's data are {"row": int64 [B, R], "label": int64 [B, R]}, rows of one table of all features, so a batch is small; `train` also has
    "weight" [B, R], each row's share of the loss. `splits` are the tables it was made of.
    """

    metric = Metric("accuracy", "%", True, 100.0)

    def __init__(
        self,
        splits: Mapping[str, ClassRows],
        options: HeadOptions,
        provenance: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ):
        """Check that such tasks can be drawn from each split.

        Args:
            splits: by name; "train" first, the others may lack what nobody asks for. Only "train" may have augmented versions.
            provenance: JSON, of data and encoder. device: where features are kept and heads are trained.

        Raises:
            McdiError: naming the option and the split; features that are not finite.
        """
        self.options, self.splits, self._provenance = options, dict(splits), provenance or {}
        self._first, total = {}, 0
        for split, part in splits.items():
            self.check_split(split, part, options)
            self._first[split], total = total, total + len(part.rows)
        self._features = torch.cat([part.rows for part in splits.values()]).to(device)
        augmented = splits["train"].augmented
        self._augmented = None if augmented is None else augmented.to(device)
        self._space: Tensor | None = None
        self.layout = heads.head_layout(options.ways, self._features.shape[1])
        self.fingerprint = str(self._provenance)

    @staticmethod
    def check_split(split: str, part: ClassRows, options: HeadOptions) -> None:
        """Raise McdiError, naming option and split, unless such tasks can be drawn from it."""
        classes, fewest = len(part.counts), int(part.counts.min()) if len(part.counts) else 0
        if options.ways > classes:
            raise McdiError(
                f"--task.ways = {options.ways}: more than the {classes} classes of the {split} split; ask for fewer ways"
            )
        needed = options.shots + options.queries
        if needed > fewest:
            raise McdiError(
                f"--task.shots {options.shots} + --task.queries {options.queries} = {needed}: "
                f"more than the {fewest} images of a class of the {split} split; ask for fewer"
            )
        if not part.rows.isfinite().all() or (part.augmented is not None and not part.augmented.isfinite().all()):
            raise McdiError(
                f"features of the {split} split: found NaN or infinity, expected finite numbers; look at their encoder"
            )

    def provenance(self) -> dict[str, Any]:
        """Of data and encoder."""
        return self._provenance

    def tasks(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        """Episodes of the split's classes. Trajectories train on every image of their classes, weighted towards the support."""
        o, part = self.options, self.splits[split]
        images = int(part.counts.min())
        rows = draw_episodes(part.counts, o.ways, images, seed, start, count, o.shots, part.pairs) + self._first[split]
        rows = rows.to(self._features.device)
        support, query = rows[..., : o.shots], rows[..., o.shots : o.shots + o.queries]
        train = self._data(rows)
        if o.support_loss_weight is not None and o.shots < images:
            weight = torch.full((o.ways, images), (1 - o.support_loss_weight) / (o.ways * (images - o.shots)))
            weight[:, : o.shots] = o.support_loss_weight / (o.ways * o.shots)
            train["weight"] = weight.flatten().to(rows.device).expand(count, -1)
        return TaskBatch(self.condition(self._features[support]), self._data(support), self._data(query), train)

    def _data(self, rows: Tensor) -> Data:
        """Of rows [B, ways, images]."""
        label = torch.arange(rows.shape[1], device=rows.device).repeat_interleave(rows.shape[2])
        return {"row": rows.flatten(1), "label": label.expand(len(rows), -1)}

    def condition(self, support: Tensor) -> Tensor:
        """What the generator is told of tasks: support features [B, ways, shots, F] -> [B, ways, C]."""
        return heads.support_condition(support)

    def features(self, data: Data) -> Tensor:
        """Of a batch's rows: [B, R, F]."""
        return self._features[data["row"]]

    def support_features(self, tasks: TaskBatch) -> Tensor:
        """[B, ways, shots, F]."""
        return self.features(tasks.support).unflatten(1, (self.options.ways, -1))

    def heads(self, theta: Tensor, data: Data) -> Tensor:
        """Whole heads of what is generated, of one task or of all."""
        return theta

    def base_of_heads(self, data: Data) -> tuple[Tensor, Tensor] | None:
        """base and trust, where `heads` is base + trust * theta: for `heads.head_trajectory`."""
        return None

    def loss(self, theta: Tensor, data: Data) -> Tensor:
        """Cross-entropy, the mean or by each row's weight."""
        theta, x = self.heads(theta, data), self._features[data["row"]]
        losses = F.cross_entropy(torch.addmm(theta[:, -1], x, theta[:, :-1].mT), data["label"], reduction="none")
        return (losses * data["weight"]).sum() if "weight" in data else losses.mean()

    def score(self, theta: Tensor, data: Data) -> Tensor:
        """Share of the images that the head gets right."""
        theta = self.heads(theta, data)
        logits = torch.addmm(theta[:, -1], self._features[data["row"]], theta[:, :-1].mT)
        return (logits.argmax(-1) == data["label"]).float().mean()

    def scores(self, theta: Tensor, data: Data) -> Tensor:
        """The same of all tasks at once."""
        return heads.head_accuracy(self.heads(theta, data), self.features(data), data["label"])

    def gradient(self, theta: Tensor, data: Data, step: int = 0) -> Tensor:
        """By hand: heads.head_gradient."""
        weight = data["weight"][0] if "weight" in data else None
        return heads.head_gradient(self.heads(theta, data), self.features(data), data["label"], 0.0, weight)

    def trajectories(
        self,
        data: Data,
        config: PrepareConfig,
        segments: int,
        generator: torch.Generator,
        backend: Backend = Backend(),  # noqa: B008 (a constant)
    ) -> Tensor:
        """By `train_heads`; with augmented versions every step picks one for each row."""
        rows = data["row"]
        start = self.start(len(rows), config, generator).to(rows.device)
        x, pick = self._versions(rows), None
        if len(x) > 1:  # int32 on the way to a GPU
            pick = torch.randint(len(x), (config.steps, *rows.shape), generator=generator).int().to(rows.device)
        weight = data["weight"][0] if "weight" in data else None
        label, base = data["label"].contiguous(), self.base_of_heads(data)
        options = {"segments": segments, "pick": pick, "sample_weight": weight}
        return train_heads(backend, start, x, label, config, base, **options)

    def _versions(self, rows: Tensor) -> Tensor:
        """Features of rows [B, R] in all their versions: [A, B, R, F]; only training images have more than one."""
        flat, parts = rows.flatten(), [self._features]
        if self._augmented is not None and int(flat.max()) < self._augmented.shape[1]:
            parts += list(self._augmented)
        shape = (len(parts), len(flat), self._features.shape[1])
        # scratch that stays: freed and taken anew for every shard, it fragments the heap, and memory grows with the tasks
        if self._space is None or self._space.shape[0] != shape[0] or self._space.shape[1] < shape[1]:
            self._space = self._features.new_empty(shape)
        for part, out in zip(parts, self._space, strict=True):
            torch.index_select(part, 0, flat, out=out[: len(flat)])
        return self._space[:, : len(flat)].unflatten(1, rows.shape)

    def baselines(self) -> dict[str, Callable[[TaskBatch], Tensor]]:
        """The nearest class mean."""
        return {"nearest-prototype": lambda tasks: heads.prototype_head(self.support_features(tasks))}
