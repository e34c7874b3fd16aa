"""Column statistics of targets and conditions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mcdi_fast.errors import McdiError

_CHUNK_ENTRIES = 2**21  # of targets at a time: 16 MiB in float64


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Column statistics of targets: `normalize` gives columns mean 0 and deviation 1, and leaves padding exactly 0.

    Rows that are all alike become one row, which serves any number of tokens.

    Attributes:
        mean: float32 [N or 1, D]; 0 where padded.
        std: float32 [N or 1, D], positive; 1 where padded and where a column is constant.

    Raises:
        McdiError: on construction, for other shapes or dtypes, entries that are not finite, std not positive.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        """Check: it may come from a stranger's file."""
        for name, tensor in (("mean", self.mean), ("std", self.std)):
            if tensor.ndim != 2 or tensor.dtype != torch.float32 or tensor.shape != self.mean.shape:
                raise McdiError(
                    f"normalizer: {name} is {tensor.dtype} {list(tensor.shape)}, expected float32 [N or 1, D], "
                    "mean and std alike; fit it again"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise McdiError(f"normalizer: {name} has entries that are not finite; fit it again")
        if not bool((self.std > 0).all()):
            raise McdiError(f"normalizer: std has entry {float(self.std.min())}, expected positive ones; fit it again")
        if len(self.mean) > 1 and bool(((self.mean == self.mean[:1]) & (self.std == self.std[:1])).all()):
            object.__setattr__(self, "mean", self.mean[:1])
            object.__setattr__(self, "std", self.std[:1])

    @classmethod
    def fit(cls, targets: Tensor, mask: Tensor, floor: float = 0.0) -> Normalizer:
        """Mean and (population) deviation of every column, over tasks, segments and those tokens that have the column.

        Two passes in float64, a chunk of tasks at a time. A column whose deviation is within float32's rounding of its
        largest entry is constant: its deviation becomes 1, so that rounding is not blown up to unit variance.

        Args:
            targets: floating point [tasks, k, N, D], as of a bank.
            mask: bool [N, D], `layout.mask`.
            floor: least deviation of a column as a share of the root mean square of all columns' deviations. Blown up
                to unit variance, a column that hardly moves (a nearly dead feature) has entries of a hundred deviations.

        Returns:
            mean and std on the CPU: the same row for every token, except for 0 and 1 on padding.

        Raises:
            McdiError: other shapes; no task; an entry that is not finite (names the task).
        """
        if mask.ndim != 2 or mask.dtype != torch.bool or targets.ndim != 4 or targets.shape[2:] != mask.shape:
            raise McdiError(
                f"targets: shape {list(targets.shape)} with mask {mask.dtype} {list(mask.shape)}, "
                "expected [tasks, k, N, D] with bool [N, D]; pass layout.mask"
            )
        if not targets.is_floating_point() or targets.shape[0] == 0 or targets.shape[1] == 0:
            raise McdiError(
                f"targets: {targets.dtype} {list(targets.shape)}, expected floating point with at least one "
                "task and segment; prepare trajectories first"
            )
        mask = mask.to(targets.device)
        chunk = max(1, _CHUNK_ENTRIES // max(1, targets[0].numel()))  # tasks
        count = targets.shape[0] * targets.shape[1] * mask.sum(0, dtype=torch.float64).clamp(min=1)  # [D]
        total = torch.zeros_like(count)
        largest = torch.zeros_like(count)
        for start in range(0, targets.shape[0], chunk):
            part = targets[start : start + chunk].double().masked_fill(~mask, 0)
            finite = torch.isfinite(part).flatten(1).all(1)
            if not bool(finite.all()):
                task = start + int((~finite).nonzero()[0])
                raise McdiError(
                    f"targets: task {task} has entries that are not finite, expected finite weights; "
                    "drop it or prepare it again"
                )
            total += part.sum((0, 1, 2))
            largest = torch.maximum(largest, part.abs().amax((0, 1, 2)))
        mean = total / count
        squares = torch.zeros_like(count)
        for start in range(0, targets.shape[0], chunk):
            part = (targets[start : start + chunk].double() - mean).masked_fill(~mask, 0)
            squares += part.square().sum((0, 1, 2))
        std = (squares / count).sqrt()
        single = torch.finfo(torch.float32)
        constant = std <= (largest * single.eps).clamp(min=single.tiny)
        std = torch.where(constant, 1.0, std)
        if floor > 0 and not bool(constant.all()):
            std = std.clamp_min(floor * float(std[~constant].square().mean().sqrt()))
        return cls(
            torch.where(mask, mean, 0.0).float().cpu().contiguous(),
            torch.where(mask, std, 1.0).float().cpu().contiguous(),
        )

    def to(self, device: torch.device | str) -> Normalizer:
        """The same on another device."""
        return Normalizer(self.mean.to(device), self.std.to(device))

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / std for x [..., N, D]. Raises McdiError for another shape."""
        self._check(x)
        return (x - self.mean.to(x.device)) / self.std.to(x.device)

    def denormalize(self, x: Tensor) -> Tensor:
        """x * std + mean for x [..., N, D]: undoes `normalize` up to rounding. Raises McdiError for another shape."""
        self._check(x)
        return x * self.std.to(x.device) + self.mean.to(x.device)

    def _check(self, x: Tensor) -> None:
        rows, width = self.mean.shape
        if not x.is_floating_point():
            raise McdiError(f"normalizer: tokens of {x.dtype}, expected floating point; convert them by .float()")
        if x.ndim < 2 or x.shape[-1] != width or (rows != 1 and x.shape[-2] != rows):
            raise McdiError(
                f"normalizer: tokens of shape {list(x.shape)}, expected [..., {'N' if rows == 1 else rows}, {width}]; "
                "they belong to another layout"
            )
