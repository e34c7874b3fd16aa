"""Labelled images and features: what a data set is here, and how it is read from packed zips, folders and files of features.

A source is read whole and checked before any work begins. Nothing is ever extracted to the disk, and no pickle is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mcdi_fast.errors import McdiError

_NAMED = 3  # how many of many bad things a message names


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Images or features of one data set, or of one split of it. Rows are sorted by class, and by domain within a class.

    Classes may have different numbers of rows: `counts` and `starts` say where they lie.

    Attributes:
        rows: uint8 [n, side, side, 3] images, or float32 [n, F] features.
        labels: int64 [n], the class of each row, 0 to classes - 1.
        class_names: one a class.
        domains: int64 [n], the domain of each row; None where there are no domains.
        domain_names: one a domain.
    """

    rows: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        rows: Tensor,
        labels: Tensor,
        class_names: Sequence[str] | None = None,
        domains: Tensor | None = None,
        domain_names: Sequence[str] | None = None,
        what: str = "data",
    ) -> LabelledRows:
        """Check the parts and sort the rows.

        Args:
            rows: [n, ...], uint8 or floating, which becomes float32. labels, domains: integers [n].
            class_names, domain_names: "0", "1", … by default.
            what: named in errors.

        Raises:
            McdiError: no rows; parts of different lengths; a label or domain out of range; a class without rows; a name twice; NaN or infinity.
        """
        if rows.ndim < 2 or len(rows) == 0:
            raise McdiError(f"{what}: rows of shape {list(rows.shape)}, expected [n, ...] with n >= 1")
        if rows.dtype != torch.uint8:
            if not rows.is_floating_point():
                raise McdiError(f"{what}: rows of {rows.dtype}, expected uint8 images or floating features")
            rows = rows.float()
            bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten()
            if len(bad):
                raise McdiError(
                    f"{what}: {len(bad)} of {len(rows)} rows hold NaN or infinity (first: row {int(bad[0])}); "
                    "expected finite numbers: make them again"
                )
        labels, class_names = _checked_codes(labels, class_names, len(rows), "label", what)
        order = labels
        if domains is not None:
            domains, domain_names = _checked_codes(domains, domain_names, len(rows), "domain", what)
            order = labels * len(domain_names) + domains
        empty = torch.bincount(labels, minlength=len(class_names)) == 0
        if empty.any():
            raise McdiError(
                f"{what}: class {_some([class_names[i] for i in empty.nonzero().flatten().tolist()])} has no rows; leave it out"
            )
        order = order.argsort(stable=True)
        return cls(
            rows[order],
            labels[order],
            tuple(class_names),
            None if domains is None else domains[order],
            () if domains is None else tuple(domain_names or ()),
        )

    def __len__(self) -> int:
        """Rows, of all classes."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes."""
        return len(self.class_names)

    @cached_property
    def counts(self) -> Tensor:
        """int64 [classes], rows of each class."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    @cached_property
    def starts(self) -> Tensor:
        """int64 [classes], the first row of each class."""
        return self.counts.cumsum(0) - self.counts

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any of the contents."""
        digest = hashlib.sha256()
        for tensor in (self.rows, self.labels, self.domains):
            if tensor is not None:
                tensor = tensor.detach().cpu().contiguous()
                digest.update(repr((tensor.dtype, list(tensor.shape))).encode() + tensor.numpy().data)
        digest.update(repr((self.class_names, self.domain_names)).encode())
        return digest.hexdigest()[:16]

    def select(
        self, classes: Sequence[str | int] | None = None, domains: Sequence[str | int] | None = None
    ) -> LabelledRows:
        """The rows of some classes and some domains, by name or number, renumbered in the order given; all by default.

        Raises:
            McdiError: a class or domain that is not there or given twice; a class without rows in those domains.
        """
        class_of = _renumbered(classes, self.class_names, "class")
        labels, keep = class_of[self.labels], class_of[self.labels] >= 0
        names, places = _names_at(class_of, self.class_names), self.domains
        domain_names = self.domain_names
        if domains is not None:
            if places is None:
                raise McdiError("this data has no domains to choose from; leave the domains out")
            domain_of = _renumbered(domains, self.domain_names, "domain")
            places = domain_of[places]
            keep &= places >= 0
            domain_names = _names_at(domain_of, self.domain_names)
        what = f"classes {_some(names)}, domains {_some(domain_names)}" if domain_names else f"classes {_some(names)}"
        return LabelledRows.of(
            self.rows[keep], labels[keep], names, None if places is None else places[keep], domain_names, what
        )

    def with_rows(self, rows: Tensor) -> LabelledRows:
        """The same labels and domains with other rows [n, ...]: the features of images."""
        assert len(rows) == len(self), f"{len(rows)} rows for {len(self)} labels"
        return replace(self, rows=rows)

    def check_counts(self, least: int, what: str) -> None:
        """Raise McdiError, naming the classes, unless every class has at least so many rows."""
        few = (self.counts < least).nonzero().flatten().tolist()
        if few:
            listed = _some([f"{self.class_names[i]} ({int(self.counts[i])})" for i in few])
            raise McdiError(
                f"{what}: {len(few)} of {self.num_classes} classes have fewer than {least} rows: {listed}; "
                "leave them out, or ask for fewer shots and queries"
            )


def join(parts: Sequence[LabelledRows]) -> LabelledRows:
    """All rows of several parts (the splits of a data set, say). Classes and domains of one name become one.

    Raises:
        McdiError: rows of different shapes; domains in some parts only.
    """
    shapes = sorted({str(list(part.rows.shape[1:])) for part in parts})
    if len(shapes) != 1:
        raise McdiError(f"parts with rows of shapes {', '.join(shapes)}: expected one shape; read them at one side")
    if len({part.domains is None for part in parts}) != 1:
        raise McdiError("some parts have domains and some have none: expected them in all or none")
    class_names = list(dict.fromkeys(name for part in parts for name in part.class_names))
    domain_names = list(dict.fromkeys(name for part in parts for name in part.domain_names))
    labels = [torch.tensor([class_names.index(name) for name in part.class_names])[part.labels] for part in parts]
    domains = [
        torch.tensor([domain_names.index(name) for name in part.domain_names])[part.domains]
        for part in parts
        if part.domains is not None
    ]
    return LabelledRows.of(
        torch.cat([part.rows for part in parts]),
        torch.cat(labels),
        class_names,
        torch.cat(domains) if domains else None,
        domain_names,
    )


def check_class_splits(splits: Mapping[str, LabelledRows], what: str) -> None:
    """Raise McdiError, naming them, if a class is in two splits: few-shot tasks are tested on new classes."""
    seen: dict[str, str] = {}
    twice = [
        f"{name} ({first}, {split})"
        for split, part in splits.items()
        for name in part.class_names
        if (first := seen.setdefault(name, split)) != split
    ]
    if twice:
        raise McdiError(
            f"{what}: {len(twice)} classes are in two splits: {_some(twice)}; expected each class in one split only"
        )


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(f"{name if name.isprintable() else repr(name):.60}" for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _checked_codes(
    codes: Tensor, names: Sequence[str] | None, rows: int, kind: str, what: str
) -> tuple[Tensor, Sequence[str]]:
    """int64 [n] codes within the names, and the names."""
    if codes.ndim != 1 or len(codes) != rows or codes.is_floating_point() or codes.is_complex():
        raise McdiError(f"{what}: {kind}s are {codes.dtype} {list(codes.shape)}, expected integers [{rows}], one a row")
    codes = codes.long()
    low, high = int(codes.min()), int(codes.max())
    if names is None:
        names = [str(i) for i in range(high + 1)] if 0 <= high < 2**20 else []
    if low < 0 or high >= len(names):
        raise McdiError(f"{what}: {kind}s from {low} to {high}, expected 0 to {max(len(names) - 1, 0)}")
    if len(set(names)) != len(names):
        raise McdiError(f"{what}: a {kind} name stands twice in {_some(sorted(names))}; give each its own")
    return codes, names


def _renumbered(chosen: Sequence[str | int] | None, names: tuple[str, ...], kind: str) -> Tensor:
    """int64 [names], the new number of each, -1 where it was not chosen."""
    new = torch.full((len(names),), -1)
    for number, choice in enumerate(range(len(names)) if chosen is None else chosen):
        old = choice if isinstance(choice, int) else names.index(choice) if choice in names else -1
        if not 0 <= old < len(names):
            raise McdiError(f"{kind} {choice!r:.60}: not among the {len(names)} there are ({_some(names)})")
        if new[old] >= 0:
            raise McdiError(f"{kind} {choice!r:.60}: given twice; name each once")
        new[old] = number
    return new


def _names_at(new: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
    order = sorted((number, name) for number, name in zip(new.tolist(), names, strict=True) if number >= 0)
    return tuple(name for _, name in order)
