"""A trained weight generator and all the numbers that must travel with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.config import DiffusionConfig
from mcdi_fast.denoiser import Parameters, denoise, depth_of, init_parameters
from mcdi_fast.errors import McdiError
from mcdi_fast.schedule import Objective, Schedule, make_objective, make_schedule
from mcdi_fast.store import FORMAT_VERSION, load_tensors, make_folder, read_json, save_tensors, write_json
from mcdi_fast.weights import Normalizer, WeightLayout

_KIND = "generator"


@dataclass(frozen=True)
class WeightGenerator:
    """The denoiser with its schedule, normalisers and the layout of what it generates.

    Attributes:
        phi: parameters of the denoiser (denoiser.py), float32.
        layout: of the generated weights: N tokens of width D.
        normalizer: of weights. condition_normalizer: of conditions [B, N, C]; both [N, …] or [1, …].
        diffusion: schedule and objective it was trained with.
        provenance: free JSON: data, backbone fingerprint, git sha, configuration.
    """

    phi: Parameters
    layout: WeightLayout
    normalizer: Normalizer
    condition_normalizer: Normalizer
    diffusion: DiffusionConfig
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the parts fit each other: they may come from a stranger's file."""
        d = self.diffusion
        object.__setattr__(self, "_schedule", make_schedule(d.steps, d.segments, d.beta_start, d.beta_end))
        object.__setattr__(self, "_objective", make_objective(self.schedule, d.objective))
        width = self.phi["out.token"].shape[0] if "out.token" in self.phi else 0
        expected = init_parameters(
            self.layout.width, self.condition_width, d.steps, max(width, 1), max(depth_of(self.phi), 1), 0
        )
        for name in sorted(expected.keys() | self.phi.keys()):
            found, want = self.phi.get(name), expected.get(name)
            if found is None or want is None or found.shape != want.shape or found.dtype != want.dtype:
                raise McdiError(
                    f"generator: parameter {name} is {_describe(found)}, expected {_describe(want)}; its parts belong to different generators"
                )
            if not found.isfinite().all():
                raise McdiError(
                    f"generator: parameter {name} has NaN or infinity; train it again from the last good checkpoint"
                )
        if self.normalizer.mean.shape[1] != self.layout.width or self.normalizer.mean.shape[0] not in (
            1,
            self.layout.num_tokens,
        ):
            raise McdiError(
                f"generator: normalizer of shape {list(self.normalizer.mean.shape)}, "
                f"expected [1 or {self.layout.num_tokens}, {self.layout.width}]; its parts belong to different generators"
            )

    @property
    def schedule(self) -> Schedule:
        """Tables of the schedule."""
        return self._schedule  # type: ignore[attr-defined]

    @property
    def objective(self) -> Objective:
        """Tables of the objective."""
        return self._objective  # type: ignore[attr-defined]

    @property
    def condition_width(self) -> int:
        """C."""
        return self.condition_normalizer.mean.shape[1]

    def f(self, condition: Tensor) -> Callable[[Tensor, int], Tensor]:
        """f(x_t, t) = skip_t x_t + scale_t net(x_t, t, condition) for normalised x [B, N, D], with raw conditions [B, N, C]."""
        skip, scale = self.schedule.skip().tolist(), self.schedule.scale().tolist()
        normalized = self.condition_normalizer.normalize(condition)
        steps = torch.arange(self.schedule.num_steps, device=condition.device).view(-1, 1)

        def f(x: Tensor, t: int) -> Tensor:
            net = denoise(self.phi, x.unsqueeze(-3), steps[t], normalized).squeeze(-3)
            return torch.add(skip[t] * x, net, alpha=scale[t])

        return f

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` into `folder`, each atomically.

        Raises:
            McdiError: naming the path, when it cannot be written.
        """
        folder = make_folder(folder)
        tensors = {f"phi.{name}": value for name, value in self.phi.items()}
        for name in ("normalizer", "condition_normalizer"):
            tensors |= {f"{name}.mean": getattr(self, name).mean, f"{name}.std": getattr(self, name).std}
        save_tensors(folder / "model.safetensors", tensors, {}, _KIND)
        config = {
            "format": FORMAT_VERSION,
            "kind": _KIND,
            "diffusion": asdict(self.diffusion),
            "layout": self.layout.to_dict(),
            "condition_width": self.condition_width,
            "provenance": self.provenance,
        }
        write_json(folder / "config.json", config)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> WeightGenerator:
        """Read what `save_pretrained` wrote.

        Raises:
            McdiError: naming the file: missing, damaged, of another format or kind, or parts that do not fit.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        where = f"{folder / 'config.json'}"
        if not isinstance(config, dict) or config.get("kind") != _KIND:
            raise McdiError(
                f"{where}: not the configuration of a weight generator; give the folder that save_pretrained wrote"
            )
        if config.get("format") != FORMAT_VERSION:
            raise McdiError(
                f"{where}: made by format {config.get('format')!r:.40}, this mcdi_fast reads {FORMAT_VERSION}; use the version that made it"
            )
        tensors, _ = load_tensors(folder / "model.safetensors", _KIND)
        try:
            diffusion = DiffusionConfig(**config["diffusion"])
            for name, kind in DiffusionConfig.__annotations__.items():
                value = getattr(diffusion, name)
                if type(value) is not {"int": int, "float": float}.get(kind, str):
                    raise McdiError(f"{where}: diffusion.{name} = {value!r:.40}, expected {kind}")
            if not 1 <= diffusion.steps <= len(tensors.get("phi.block0.sample", ())):
                raise McdiError(
                    f"{where}: diffusion.steps = {diffusion.steps} does not fit model.safetensors; the two files belong to different generators"
                )
            normalizers = [
                Normalizer(tensors[f"{name}.mean"], tensors[f"{name}.std"])
                for name in ("normalizer", "condition_normalizer")
            ]
            phi = {name.removeprefix("phi."): value for name, value in tensors.items() if name.startswith("phi.")}
            return cls(
                phi, WeightLayout.from_dict(config["layout"]), *normalizers, diffusion, dict(config["provenance"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise McdiError(
                f"{where}: entry {error} is missing or malformed; the file is damaged or from another version"
            ) from error
        except McdiError as error:
            raise error if str(error).startswith(where) else McdiError(f"{folder}: {error}") from error


def _describe(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
