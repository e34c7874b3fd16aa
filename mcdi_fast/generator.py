"""A trained weight generator and all the numbers that must travel with it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcdi_fast.bounds import check
from mcdi_fast.config import DenoiserConfig, DiffusionConfig
from mcdi_fast.denoiser import ChainDenoiser, FoldedDenoiser, Parameters, depth_of, parameter_shapes, token_condition
from mcdi_fast.diffusion import Objective, Schedule, check_num_steps, diffusion_tables, sampling_steps
from mcdi_fast.errors import McdiError, needs, reason_of
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.store import (
    check_format,
    digest,
    dumps,
    load_tensors,
    make_folder,
    read_json,
    remove_temporaries,
    save_tensors,
    show_path,
    user_path,
    write_json,
)
from mcdi_fast.weights import WeightLayout

FILES = ("config.json", "model.safetensors")
_NORMALIZERS = ("normalizer", "condition_normalizer")

FORMAT = 2
"""Of config.json. 1 told the network no positions: its tokens are read as exchangeable, as they were trained."""

_KIND = "generator"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, eq=False, repr=False)
class WeightGenerator:
    """The denoiser with its schedule, normalisers and the layout of what it generates.

    Two are equal that write the same weights: all of their parts but the provenance.

    Attributes:
        phi: parameters of the denoiser (denoiser.py), float32.
        layout: of the generated weights: N tokens of width D.
        normalizer: of weights. condition_normalizer: of conditions [B, N, C]; both [N, …] or [1, …], the latter where tokens are exchangeable
            and all rows are alike: it then fits any N.
        diffusion: schedule and objective it was trained with.
        provenance: free JSON: data, backbone fingerprint, git sha, configuration.
        num_steps: of a chain where its user names no number; None: T. The main job takes what validation tasks chose.
    """

    phi: Parameters
    layout: WeightLayout
    normalizer: Normalizer
    condition_normalizer: Normalizer
    diffusion: DiffusionConfig
    provenance: dict[str, Any] = field(default_factory=dict)
    num_steps: int | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit each other: they may come from a stranger's file."""
        schedule, objective = diffusion_tables(self.diffusion)
        object.__setattr__(self, "_schedule", schedule)
        object.__setattr__(self, "_objective", objective)
        object.__setattr__(self, "_skip_and_scale", (objective.skip.tolist(), objective.scale.tolist()))
        object.__setattr__(self, "num_steps", check_num_steps(self.num_steps))
        sampling_steps(schedule, objective.ends, self.num_steps)
        out = self.phi.get("out.token")
        width = out.shape[0] if out is not None and out.ndim == 2 else 1
        # shapes alone: what a file declares must not decide how much is allocated
        expected = parameter_shapes(
            self.layout.width,
            self.condition_width + self.layout.position_width,
            schedule.num_steps,
            max(width, 1),
            max(depth_of(self.phi), 1),
        )
        for name in sorted(expected.keys() | self.phi.keys()):
            found, expect = self.phi.get(name), expected.get(name)
            if found is None or found.shape != expect or found.dtype != torch.float32:
                want = "absent" if expect is None else f"{torch.float32} {list(expect)}"
                raise McdiError(
                    f"generator: parameter {name!r:.60} is {describe(found)}, expected {want}; its parts belong to different generators"
                )
            if not found.isfinite().all():
                raise McdiError(
                    f"generator: parameter {name!r} has NaN or infinity; train it again from the last good checkpoint"
                )
        for name, wide in (("normalizer", self.layout.width), ("condition_normalizer", self.condition_width)):
            rows, tokens = list(getattr(self, name).mean.shape), self.layout.num_tokens
            if rows not in ([1, wide], [tokens, wide]):
                raise McdiError(
                    f"generator: {name} of shape {rows}, expected [1 or {tokens}, {wide}]; its parts belong to different generators"
                )

    def __eq__(self, other: object) -> bool:
        """Whether both write the same weights."""
        if not isinstance(other, WeightGenerator):
            return NotImplemented
        same = all(getattr(self, part) == getattr(other, part) for part in ("layout", "diffusion", "num_steps"))
        mine, theirs = self._tensors(), other._tensors()
        return (
            same
            and mine.keys() == theirs.keys()
            and all(torch.equal(mine[name], theirs[name].to(mine[name])) for name in mine)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """One line."""
        d, count = self.diffusion, sum(value.numel() for value in self.phi.values())
        return (
            f"WeightGenerator({self.layout.num_tokens} tokens of width {self.layout.width} from conditions of width {self.condition_width}: "
            f"{d.objective}, T = {d.steps}, k = {d.segments}, {self.num_steps or d.steps} sampling steps, {count:,} parameters)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but what is made of phi when needed."""
        return {name: value for name, value in vars(self).items() if name != "_folded"}

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

    @property
    def denoiser(self) -> DenoiserConfig:
        """The sizes of the network."""
        return DenoiserConfig(len(self.phi["out.token"]), depth_of(self.phi))

    def f(self, condition: Tensor) -> ChainDenoiser:
        """f(x_t, t) = skip_t x_t + scale_t net(x_t, t, condition) for normalised x [B, N, D], with raw conditions [B, N, C]."""
        skip, scale = self._skip_and_scale  # type: ignore[attr-defined]
        return ChainDenoiser(self.folded(), self.network_condition(condition), skip, scale)

    def network_condition(self, condition: Tensor) -> Tensor:
        """What the network is given of each token, [B, N, C + P], of raw conditions [B, N or 1, C]: normalised, and the token's position."""
        return token_condition(self.condition_normalizer.normalize(condition), self.layout.position().to(condition))

    @property
    def any_number_of_tokens(self) -> bool:
        """Whether it writes any number of tokens: exchangeable ones, all normalised alike."""
        alike = len(self.normalizer.mean) == len(self.condition_normalizer.mean) == 1
        return alike and self.layout.exchangeable and len(self.layout.entries) == 1

    def folded(self) -> FoldedDenoiser:
        """Phi as a chain uses it, made again when phi has changed."""
        folded = self.__dict__.get("_folded")
        if folded is None or not folded.is_of(self.phi):
            folded = FoldedDenoiser(self.phi)
            object.__setattr__(self, "_folded", folded)
        return folded

    def to(self, device: torch.device | str) -> WeightGenerator:
        """The same with its tensors on another device; itself where all of them are there."""
        device = torch.device(device)
        parts = *self.phi.values(), self.normalizer.mean, self.condition_normalizer.mean
        if all(value.device == device for value in parts):
            return self
        phi = {name: value.to(device) for name, value in self.phi.items()}
        return replace(self, phi=phi, **{name: getattr(self, name).to(device) for name in _NORMALIZERS})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `model.safetensors` and `config.json` into `folder`, each atomically.

        Raises:
            McdiError: naming the path, when it cannot be written.
        """
        folder = make_folder(folder)
        tensors = {name: value.cpu() for name, value in self._tensors().items()}
        config = {
            "format": FORMAT,
            "kind": _KIND,
            "diffusion": asdict(self.diffusion),
            "layout": self.layout.to_dict(),
            "condition_width": self.condition_width,
            "num_steps": self.num_steps,
            "provenance": self.provenance,
        }
        dumps(config, folder / "config.json")  # complains before anything is written
        for name in FILES:
            remove_temporaries(folder, name)
        save_tensors(folder / "model.safetensors", tensors, {"config": _digest(config)}, _KIND)
        write_json(folder / "config.json", config)

    def _tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in a file."""
        tensors = {f"phi.{name}": value for name, value in self.phi.items()}
        for name in _NORMALIZERS:
            tensors |= {f"{name}.mean": getattr(self, name).mean, f"{name}.std": getattr(self, name).std}
        return tensors

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> WeightGenerator:
        """Read what `save_pretrained` wrote.

        Args:
            path_or_hub_id: a folder; or, where there is no folder "owner", "owner/name" on the Hugging Face Hub, which needs the extra `hub` and
                uses the hub's own cache (HF_HUB_OFFLINE=1 for that alone).
            revision: branch, tag or commit of a hub repository.

        Raises:
            McdiError: naming the file: missing, damaged, of another format or kind, or parts that do not fit; a hub that does not answer.
        """
        folder = user_path(path_or_hub_id)
        if isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id) and not folder.parent.exists():
            folder = fetch(path_or_hub_id, revision=revision)
        config = read_json(folder / "config.json")
        where, model = show_path(folder / "config.json"), show_path(folder / "model.safetensors")
        if not isinstance(config, dict) or config.get("kind") != _KIND:
            raise McdiError(
                f"{where}: not the configuration of a weight generator; give the folder that save_pretrained wrote"
            )
        check_format(folder / "config.json", config.get("format"), 1, FORMAT)
        tensors, meta = load_tensors(folder / "model.safetensors", _KIND)
        for name in [f"{normalizer}.{part}" for normalizer in _NORMALIZERS for part in ("mean", "std")]:
            if name not in tensors:
                raise McdiError(f"{model}: tensor {name} is missing; the file is damaged or from another version")
        try:
            # none may be left to a default: it can be another one by now
            settings, layout = config["diffusion"], config["layout"]
            if config["format"] == 1:
                settings = {"residual": "scaled"} | settings  # no setting then
                layout = layout | {"exchangeable": True}
                if settings["objective"] != "local-consistency":
                    raise McdiError(
                        f"{where}: objective {settings['objective']!r:.40} of format 1, which trained it with a wrong scale; train it again"
                    )
            given = {field.name: settings[field.name] for field in fields(DiffusionConfig)}
            diffusion = check(DiffusionConfig(**given | settings), f"{where}: diffusion.")
            if not isinstance(config["provenance"], dict):
                raise McdiError(f"{where}: provenance is {type(config['provenance']).__name__}, expected a dict")
            if meta.get("config") != _digest(config):
                raise McdiError(
                    f"{where}: not the one {model} was written with; the two files belong to different generators, or one was "
                    "edited: save or copy both again"
                )
            normalizer, condition_normalizer = (
                Normalizer(tensors[f"{name}.mean"], tensors[f"{name}.std"]) for name in _NORMALIZERS
            )
            phi = {name.removeprefix("phi."): value for name, value in tensors.items() if name.startswith("phi.")}
            return cls(
                phi,
                WeightLayout.from_dict(layout),
                normalizer,
                condition_normalizer,
                diffusion,
                config["provenance"],
                config.get("num_steps"),  # absent in older files: T
            )
        except (KeyError, TypeError, ValueError) as error:
            raise McdiError(
                f"{where}: entry {reason_of(error)} is missing or malformed; the file is damaged or from another version"
            ) from error
        except McdiError as error:
            raise error if str(error).startswith(where) else McdiError(f"{show_path(folder)}: {error}") from error


def fetch(repo_id: str, **options: Any) -> Path:
    """Download a generator's two files, or find them in the hub's cache (also offline); returns their folder.

    Args:
        repo_id: "owner/name". options: of `huggingface_hub.snapshot_download`: revision, cache_dir, local_files_only, …

    Raises:
        McdiError: no such repository, no network and nothing cached.
    """
    with needs("the hub", "huggingface_hub", "'mcdi_fast[hub]'"):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(FILES), **options))
    except Exception as error:  # the library has a dozen words for no network, no access, no such thing
        raise McdiError(
            f"hub repository {repo_id!r:.100}: cannot be read ({reason_of(error)}); check its name and the network, or give a folder"
        ) from error


def _digest(config: dict[str, Any]) -> str:
    """16 hex digits of all of config.json but the provenance: model.safetensors says which configuration it was saved with."""
    return digest(json.dumps({key: value for key, value in config.items() if key != "provenance"}, sort_keys=True))


def describe(tensor: Tensor | None) -> str:
    """What a tensor is, for a message."""
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
