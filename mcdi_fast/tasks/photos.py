"""Few-shot classification of natural images: what a generator writes is the difference from a head that the training classes suggest.

`ClassPrior` knows what classes look like in the encoder's features; its head is the base of every task, and the condition. Trajectories,
generated weights and fine-tuning are differences from it, so 0 is the base itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcdi_fast import heads
from mcdi_fast.config import AtLeastOne, EvaluateConfig, PrepareConfig, Share, TrainConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks import Data, Setup, TaskBatch, register
from mcdi_fast.tasks.encoders import Projection, encode, load_encoder
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions
from mcdi_fast.tasks.images import LabelledRows, check_class_splits, join, load
from mcdi_fast.tasks.prior import ClassPrior, informed_head, ridge_head

BASE = 9.0  # length of the base head: that of heads trained on every image of a class (measured on validation classes)


@dataclass(frozen=True)
class PhotoOptions(HeadOptions):
    """A few-shot task on photographs."""

    source: str = "tiny-imagenet"
    """Data set: a packed name, a folder with a sub-folder a class, or a file of features (docs/images.md)."""
    encoder: str = "efficientnet-lite0"
    """Turns images into features; package.module:function for one of your own. Not used for a file of features."""
    components: AtLeastOne = 256
    """Principal components of the training classes' features (measured on validation classes: 128 is 0.7 % worse)."""
    support_loss_weight: Share | None = 0.3
    """Share of a trajectory's loss that its support images have. The base knows the support, so the rest counts more than in `heads`."""


@dataclass(frozen=True)
class TransferOptions(PhotoOptions):
    """New classes of a data set with class splits train, val and test, or another data set."""

    target: str | None = None
    """Another data set, all of whose classes are the test tasks: transfer. The source's own test classes by default."""


@dataclass(frozen=True)
class DomainOptions(PhotoOptions):
    """A domain that training has not seen, of a data set whose every domain has the same classes."""

    source: str = "pacs"
    """Data set: a packed name, a folder DOMAIN/CLASS/image.jpg, or a file of features with domains (docs/images.md)."""
    held_out: str | None = None
    """The domain of the test tasks, by default the last one. Of the others two thirds of the images train and one third validates."""
    across: bool = False
    """Support and query of different domains: the support of a known one, the query of the one held out."""


@dataclass(frozen=True)
class DigitOptions(DomainOptions):
    """The same of digits."""

    source: str = "digits"
    """As of pacs."""


class PhotoFamily(HeadFamily):
    """Differences [ways, K + 1] from the base head, on K components. Data also have "base" [B, ways, K + 1] and "trust" [B, 1, 1].

    A head is base + trust * difference. Far from the training classes, where a generator has seen nothing, trust goes to 0.
    """

    def __init__(
        self, splits: dict[str, ClassRows], options: PhotoOptions, prior: ClassPrior, projection: Projection, *rest: Any
    ):
        """prior, projection: fitted on the training classes. rest: of `HeadFamily`."""
        super().__init__(splits, options, *rest)
        self.prior, self.projection = prior, projection

    def save(self, folder: Path) -> None:
        """Projection and prior, without which nobody can tell the generator of a task (docs/images.md)."""
        self.projection.save(folder / "projection.safetensors")
        self.prior.save(folder / "class-prior.safetensors")

    def tasks(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        """Of `HeadFamily`; a training task also has "flip", signs of the components that make other features of the same geometry of it."""
        tasks = super().tasks(split, start, count, seed)
        trust = 1 - self.prior.distance(self.support_features(tasks))
        base = {"base": BASE * tasks.condition, "trust": trust[:, None, None]}
        train, condition = tasks.train | base, tasks.condition
        if split == "train":
            signs = [
                np.random.default_rng((seed, number, 1)).integers(2, size=condition.shape[-1] - 1)
                for number in range(start, start + count)
            ]
            flip = torch.from_numpy(2.0 * np.stack(signs) - 1).to(condition)
            train["flip"] = torch.cat([flip, torch.ones_like(flip[:, :1])], 1).unsqueeze(1)  # the bias stays
            condition = condition * train["flip"]
        return TaskBatch(condition, tasks.support | base, tasks.query | base, train)

    def condition(self, support: Tensor) -> Tensor:
        """The base head at length 1."""
        return informed_head(self.prior, support)

    def heads(self, theta: Tensor, data: Data) -> Tensor:
        """base + trust * theta."""
        return data["base"] + data["trust"] * theta

    def base_of_heads(self, data: Data) -> tuple[Tensor, Tensor]:
        """Of `heads`."""
        return data["base"], data["trust"]

    def gradient(self, theta: Tensor, data: Data, step: int = 0) -> Tensor:
        """By hand."""
        return data["trust"] * super().gradient(theta, data)

    def trajectories(self, data: Data, *others: Any, **more: Any) -> Tensor:
        """Adam + SAM on the difference, whose decay pulls towards the base."""
        found = super().trajectories(data, *others, **more)
        return found * data["flip"].unsqueeze(1) if "flip" in data else found

    def baselines(self) -> dict[str, Callable[[TaskBatch], Tensor]]:
        """The base alone, and heads that know the support only: nearest class mean, ridge regression, Adam from zero.

        Penalty, rate and decay are the best on validation classes of Tiny-ImageNet; the decay falls with the number of images.
        """

        def away(head: Callable[[Tensor], Tensor], tasks: TaskBatch) -> Tensor:
            return (head(self.support_features(tasks)) - tasks.support["base"]) / tasks.support["trust"].clamp_min(1e-6)

        adam = partial(heads.head_by_adam, steps=100, lr=0.02, decay=1 / self.options.shots)
        return {
            "class-prior": lambda tasks: torch.zeros_like(tasks.support["base"]),
            "nearest-prototype": partial(away, heads.prototype_head),
            "ridge": partial(away, partial(ridge_head, penalty=1.0)),
            "head-finetune": partial(away, adam),
        }


@dataclass(frozen=True)
class HeadWriter:
    """A generator with what it needs to know of a task, as a run leaves them in its folder `generator`."""

    sampler: Sampler
    projection: Projection
    prior: ClassPrior

    @classmethod
    def load(cls, folder: Path) -> HeadWriter:
        """Of a run's `generator`. Raises McdiError for files that are missing or damaged."""
        return cls(
            Sampler(WeightGenerator.from_pretrained(folder)),
            Projection.load(folder / "projection.safetensors"),
            ClassPrior.load(folder / "class-prior.safetensors"),
        )

    def __call__(self, support: Tensor, seed: int = 0) -> Tensor:
        """Heads on projected features: an encoder's features [B, ways, shots, F] -> [B, ways, K + 1], for any number of ways."""
        support = self.projection(support)
        condition = informed_head(self.prior, support)
        theta = self.sampler.sample(condition, range(seed, seed + len(condition))).tokens
        return BASE * condition + (1 - self.prior.distance(support))[:, None, None] * theta

    def labels(self, head: Tensor, features: Tensor) -> Tensor:
        """Which class each image is of: one task's head [ways, K + 1], an encoder's features [n, F] -> int64 [n]."""
        return heads.head_logits(head[None], self.projection(features)[None])[0].argmax(-1)


def photo_family(
    data: dict[str, LabelledRows],
    options: PhotoOptions,
    setup: Setup,
    parts_of: Callable[[dict[str, LabelledRows]], dict[str, LabelledRows]] = lambda data: data,
    pairs: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType({}),
) -> PhotoFamily:
    """From images or features to a family.

    Args:
        data: data sets or splits by name. parts_of: divides them, as features, into the family's splits: train, val, test and any others.
        pairs: of `ClassRows`, of splits with domains; every domain with itself by default.

    Raises:
        McdiError: too few images of a class; an encoder that is not there.
    """

    def rows_of(name: str, part: LabelledRows) -> ClassRows:
        return ClassRows(
            part.rows, part.cells, pairs=pairs.get(name, tuple((d, d) for d in range(part.cells.shape[1])))
        )

    bare = {name: part.with_rows(torch.zeros(len(part), 1)) for name, part in data.items()}
    for split, part in parts_of(bare).items():  # before minutes of encoding
        HeadFamily.check_split(split, rows_of(split, part), options)
    setup.begin()
    made_by = "features"
    if any(part.rows.ndim == 4 for part in data.values()):
        encoder = load_encoder(options.encoder, setup.device)
        made_by = f"{options.encoder} {encoder.fingerprint}"
        data = {name: encode(encoder, part, setup.cache_dir, setup.stage) for name, part in data.items()}
    parts = parts_of(data)
    projection = Projection.fit(parts["train"].rows, options.components)
    parts = {split: part.with_rows(projection(part.rows)) for split, part in parts.items()}
    across = any(support != query for support, query in pairs.get("train", ()))
    prior = ClassPrior.fit(parts["train"], across=across)
    provenance = {
        "source": {split: part.fingerprint for split, part in parts.items()},
        "encoder": made_by,
        "projection": projection.fingerprint,
        "class_prior": prior.fingerprint,
        "task": {name: getattr(options, name) for name in ("ways", "shots", "support_loss_weight")},
    }
    splits = {split: rows_of(split, part) for split, part in parts.items()}
    return PhotoFamily(splits, options, prior, projection, provenance, setup.device)


def photo_defaults(config: TrainConfig) -> TrainConfig:
    """For heads on features, as differences from the class prior's."""
    return replace(
        config,
        prepare=PrepareConfig(tasks=4000, steps=30, learning_rate=0.1, weight_decay=0.03, start_std=0.0),
        meta=replace(config.meta, steps=400, checkpoint_every=100),
        evaluate=EvaluateConfig(sampling_steps=3, finetune_lrs=(0.003, 0.01, 0.03), finetune_decays=(0.03, 0.1, 0.3)),
    )


def transfer_defaults(config: TrainConfig) -> TrainConfig:
    """The smallest size that was tried at 1 and 5 shots is level with the best (validation classes; docs/choices.md, "What accuracy costs")."""
    config = photo_defaults(config)
    return replace(config, denoiser=replace(config.denoiser, width=32, depth=1), meta=replace(config.meta, steps=100))


def _load(setup: Setup, *names: str) -> list[dict[str, LabelledRows]]:
    with setup.stage("data", len(names), "sets") as bar:
        found = []
        for name in names:
            found.append(load(name, data_dir=setup.data_dir, stage=setup.stage))
            bar.update()
    return found


def transfer_family(options: TransferOptions, setup: Setup, further: Sequence[str] = ()) -> PhotoFamily:
    """New classes of the source, or those of the target.

    Args:
        further: more data sets, each a split of its own, or one for each of its domains.

    Raises:
        McdiError: splits that are missing or share a class; too few images of a class; an encoder that is not there.
    """
    targets = [options.target] if options.target is not None else []
    source, *others = _load(setup, options.source, *targets, *further)
    target, more = others[: len(targets)], [join(list(one.values())) for one in others[len(targets) :]]
    wanted = ["train", "val"] if target else ["train", "val", "test"]
    if missing := [split for split in wanted if split not in source]:
        raise McdiError(
            f"--task.source {options.source}: no {missing[0]} split; expected classes split into train, val and test (docs/images.md)"
        )
    parts = {split: source[split] for split in wanted}
    check_class_splits(parts, options.source)
    if target:
        parts["test"] = join(list(target[0].values()))  # all of its classes, whatever its splits
    for name, data in zip(further, more, strict=True):
        parts |= {domain: data.select(domains=[domain]) for domain in data.domain_names} or {name: data}
    return photo_family(parts, options, setup)


@register(transfer_defaults)
def tiny_imagenet(options: TransferOptions, setup: Setup) -> PhotoFamily:
    """Natural images: classes of Tiny-ImageNet, of a folder of photos or of a file of features."""
    return transfer_family(options, setup)


def domain_family(options: DomainOptions, setup: Setup) -> PhotoFamily:
    """Leave one domain out.

    Raises:
        McdiError: a source without domains; a domain that is not there; too few images of a class in a domain.
    """
    (source,) = _load(setup, options.source)
    names = join(list(source.values())).domain_names
    if len(names) < (3 if options.across else 2):
        raise McdiError(
            f"--task.source {options.source}: {len(names)} domains, expected at least {3 if options.across else 2}: DOMAIN/CLASS/image.jpg"
        )
    held_out = options.held_out if options.held_out is not None else names[-1]
    if held_out not in names:
        raise McdiError(f"--task.held-out {held_out}: not among the domains of {options.source}: {', '.join(names)}")
    known = [name for name in names if name != held_out]

    def parts_of(data: dict[str, LabelledRows]) -> dict[str, LabelledRows]:
        whole = join(list(data.values()))
        seen = whole.select(domains=known)
        third = seen.places % 3 == 2
        return {
            "train": seen.rows_where(~third),
            "val": seen.rows_where(third),
            "test": whole.select(domains=[*known, held_out] if options.across else [held_out]),
        }

    pairs = {}
    if options.across:
        every = range(len(known))
        seen_pairs = tuple((a, b) for a in every for b in every if a != b)
        pairs = {"train": seen_pairs, "val": seen_pairs, "test": tuple((a, len(known)) for a in every)}
    return photo_family(source, options, setup, parts_of, pairs)


@register(photo_defaults)
def pacs(options: DomainOptions, setup: Setup) -> PhotoFamily:
    """Photos, paintings, cartoons and sketches of the same classes: one of them is left out of training."""
    return domain_family(options, setup)


@register(photo_defaults)
def digits(options: DigitOptions, setup: Setup) -> PhotoFamily:
    """Digits written and printed, one source left out of training."""
    return domain_family(options, setup)
