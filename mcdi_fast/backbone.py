"""Conv4-64: the frozen feature extractor whose classification heads are generated."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mcdi_fast.config import AtLeastOne, AtLeastTwo, AtLeastZero, Positive
from mcdi_fast.errors import McdiError, reason_of
from mcdi_fast.optim import adam_scalars, adam_step
from mcdi_fast.store import digest, load_tensors, save_tensors, show_path, user_path

if TYPE_CHECKING:
    from mcdi_fast.tasks.drawings import ClassImages, FewShotData

FEATURE_WIDTH = 64
_STATE = "optimizer."
_RECIPE = 2  # raise when the code below trains another network from the same configuration
_PART = 80  # images that go through together: 16 MB a tensor, memory that is used again; of 64 MB or more every tensor is fresh pages


@dataclass(frozen=True)
class BackboneConfig:
    """Conv4-64, trained on training classes only, frozen afterwards."""

    steps: AtLeastOne = 1500
    """Training episodes."""
    ways: AtLeastTwo = 32
    """Classes an episode (measured, docs/choices.md: 64 classes of 6 images need three times the images)."""
    images_per_class: AtLeastTwo = 4
    """Each in turn is the support, the others are queries (measured likewise)."""
    learning_rate: Positive = 0.004
    """Adam's, of the first convolution, biases and batch norms; five times as much for the other convolutions, which Muon trains. Both fall to
    zero by a cosine (measured, docs/choices.md)."""
    seed: AtLeastZero = 0
    """The backbone's own, so that runs with other seeds share it."""
    checkpoint_every: AtLeastOne = 200
    """Steps between checkpoints of the backbone's training."""
    views: AtLeastOne = 1
    """Views of an image, itself and augmented ones, whose features are averaged. The training of the backbone is the same. Nine cost nine times
    the time for features and buy 0.3 % (measured, docs/choices.md)."""


class Standardize(nn.Module):
    """(x - mean) / scale: features of mean 0 and mean square norm 1 over the training images, set once after training.

    One scale for all columns: a scale a column would change which prototype is nearest (98.4 to 97.0 % on validation characters).
    A norm of 1 puts a head's bias on a par with its weights, so that Adam learns it: regressed heads went from 97.8 to 98.1 %,
    fine-tuned ones from 97.9 to 98.0 %, against a mean square of 1 a column.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int):
        """The identity, until `fit`."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def fit(self, features: Tensor) -> None:
        """Set from features [..., width]."""
        flat = features.flatten(0, -2).double()
        self.mean.copy_(flat.mean(0))
        self.scale.copy_((flat - flat.mean(0)).square().sum(-1).mean().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return (x - self.mean) / self.scale


def conv4() -> nn.Sequential:
    """Conv4-64 (Vinyals et al., 2016): four of conv 3x3 of 64 channels, batch norm, max-pool 2, ReLU. [B, 1, 28, 28] -> [B, 64].

    ReLU and max-pool commute, and behind the pool ReLU has a quarter of the values.
    """
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.MaxPool2d(2), nn.ReLU()]
    # channels-last is 1.8 times faster to train on two CPU cores (705 against 1242 images/s in float32)
    return nn.Sequential(*layers, nn.Flatten(), Standardize(FEATURE_WIDTH)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied in hardware (on such a CPU autocast is 2.5 to 2.9 times faster, elsewhere slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for convolutions, Adam for the rest.

    Before the step, a convolution's momentum [out, in 3 3] gives way to a nearly orthogonal matrix, so that no direction of it waits for the others.
    On validation characters that is worth three times the images (docs/choices.md).
    """

    MOMENTUM, GAIN = 0.95, 5.0  # GAIN: Muon's rate by Adam's

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], rate: float):
        """rate: Adam's; `step` takes the one in param_groups."""
        super().__init__([{"params": matrices}, {"params": others}], {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter."""
        matrices, others = self.param_groups
        for p in matrices["params"]:
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].mul_(self.MOMENTUM).add_(p.grad)
            update = orthogonal(p.grad.add(state["momentum"], alpha=self.MOMENTUM).flatten(1))
            p.sub_(update.view(p.shape), alpha=self.GAIN * matrices["lr"])
        for p in others["params"]:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            scalars = adam_scalars(int(state["step"]), others["lr"])
            adam_step(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *scalars)

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors of a checkpoint, named `optimizer.<index>.<name>`."""
        state = self.state_dict()["state"]
        return {f"{_STATE}{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take what is the optimizer's out of `tensors` and load it; rates stay as constructed."""
        state: dict[int, dict[str, Tensor]] = {}
        for key in [key for key in tensors if key.startswith(_STATE)]:
            index, name = key.removeprefix(_STATE).split(".", 1)
            state.setdefault(int(index), {})[name] = tensors.pop(key).clone()
        self.load_state_dict({"state": state, "param_groups": self.state_dict()["param_groups"]})


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T, singular values between 0.7 and 1.2: five Newton-Schulz steps with Muon's coefficients. [m, n], m <= n."""
    x = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small random affine maps: turn, shear, scale and shift within what images_per_class differ by. float32 [B, 1, 28, 28] in and out.

    Drawn on the CPU wherever the images are: the same draws on every device.
    """
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    angle, shear = uniform(-0.17, 0.17), uniform(-0.15, 0.15)
    scale, shift = uniform(0.88, 1.14, 2), uniform(-0.12, 0.12, 2)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos * scale[:, 0], shear - sin, shift[:, 0], sin, cos * scale[:, 1], shift[:, 1]], 1)
    grid = F.affine_grid(theta.view(n, 2, 3).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def to_float(images: Tensor) -> Tensor:
    """uint8 [..., H, W] -> float32 [prod, 1, H, W], ink = 1."""
    return images.reshape(-1, 1, *images.shape[-2:]).float().div_(255)


def training_features(backbone: nn.Sequential, x: Tensor) -> Tensor:
    """What backbone(x) gives in training mode, the running statistics moved alike; in bfloat16 where that is native. [B, 1, 28, 28] -> [B, 64].

    The first batch norm would read and write the largest tensors of the pass several times. But mean and variance of a convolution's output
    follow from mean and covariance of its patches, 9 values where there is one channel. So it goes into the convolution's weights, anew in each pass.
    """
    conv, norm, *rest = backbone
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert conv.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        height, width = x.shape[-2:]
        padded = F.pad(x[:, 0], (1, 1, 1, 1))
        patches = torch.stack([padded[:, i : i + height, j : j + width].flatten() for i in range(3) for j in range(3)])
        count = patches.shape[1]
        center = patches.mean(1, keepdim=True)
        patches -= center
        covariance = patches @ patches.mT / count
    kernel = conv.weight.flatten(1)
    mean, variance = (kernel @ center)[:, 0] + conv.bias, ((kernel @ covariance) * kernel).sum(1)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum or 0.0)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum or 0.0)
        norm.num_batches_tracked += 1
    scale = norm.weight * (variance + norm.eps).rsqrt()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=native_bfloat16(x.device)):
        weight, bias = conv.weight * scale.view(-1, 1, 1, 1), (conv.bias - mean) * scale + norm.bias
        x = F.conv2d(x.to(memory_format=torch.channels_last), weight, bias, padding=1)
        for layer in rest:
            x = layer(x)
    return x


def episode_loss(features: Tensor) -> Tensor:
    """Cross-entropy of the nearest support by squared distance, each image of a class in turn its support. [ways, images_per_class, F] -> scalar.

    It costs the pass that one support costs, and every image serves as query and as prototype.
    """
    ways, images, _ = features.shape
    rows = features.transpose(0, 1).flatten(0, 1)
    distance = torch.cdist(rows, rows).square().view(images, ways, images, ways)  # of queries, of supports
    own = (-distance).log_softmax(-1).diagonal(dim1=1, dim2=3)  # [queries, supports, ways]
    return -own[~torch.eye(images, dtype=torch.bool, device=own.device)].mean()


def fingerprint(data: FewShotData, config: BackboneConfig) -> str:
    """16 hex digits that change with the training images and the recipe; not with the machine, which `weights_digest` tells apart."""
    # views are of the features, not of the training
    recipe = {name: value for name, value in asdict(config).items() if name != "views"}
    return digest(json.dumps([_RECIPE, data.name, data.fingerprint, recipe]))


def features_provenance(data: FewShotData, config: BackboneConfig, backbone: nn.Module) -> dict[str, Any]:
    """What made the features: `backbone`, the fingerprint that is its file's name, `backbone_weights`, and `views` where they are several."""
    views = {"views": config.views} if config.views > 1 else {}
    return {"backbone": fingerprint(data, config), "backbone_weights": weights_digest(backbone), **views}


def weights_digest(backbone: nn.Module) -> str:
    """16 hex digits of the trained weights themselves: the same recipe ends elsewhere on another kind of processor."""
    return digest(*backbone.state_dict().values())


def load_backbone(provenance: dict[str, Any], cache_dir: str | Path = "runs/cache") -> nn.Sequential:
    """The frozen backbone whose features a generator knows: `load_backbone(generator.provenance)`, in eval mode.

    Args:
        cache_dir: of the run that trained it (--cache-dir).

    Raises:
        McdiError: a generator without a backbone; a file that is not there, or holds another backbone.
    """
    name, digest = provenance.get("backbone"), provenance.get("backbone_weights")
    if not isinstance(name, str) or not isinstance(digest, str):
        raise McdiError("provenance: names no backbone; this generator was not made from drawings by the command")
    path = user_path(cache_dir) / "backbones" / f"{name}.safetensors"
    network = _loaded(path)
    found = weights_digest(network)
    if found != digest:
        raise McdiError(
            f"{show_path(path)}: weights {found}, the generator knows {digest}; the same recipe trains others on another kind of processor: "
            "copy the file from where the generator was made"
        )
    return network


def _loaded(path: Path) -> nn.Sequential:
    tensors, _ = load_tensors(path, "backbone")
    network = conv4()
    with _fitting(path):
        network.load_state_dict(tensors)
    return network.eval()


def folded(backbone: nn.Sequential) -> nn.Sequential:
    """The same function in eval mode, to rounding: each batch norm behind a convolution goes into its weights."""
    layers: list[nn.Module] = []
    for layer in backbone:
        if isinstance(layer, nn.BatchNorm2d) and layers and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def extract_features(
    backbone: nn.Sequential,
    images: ClassImages,
    augment_seed: int | None = None,
    progress: Callable[[int], None] | None = None,
    views: int = 1,
) -> Tensor:
    """Features of every image: float32 [classes, images_per_class, 64], where the backbone is. By bfloat16 where that is native.

    Args:
        augment_seed: of an augmented copy of each image instead. progress: called with the number of images that are done.
        views: average the features of so many: the image (or that copy) and augmented ones.
    """
    network = folded(backbone.eval())
    device = next(backbone.parameters()).device
    classes, images_per_class = images.images.shape[:2]
    generator = torch.Generator().manual_seed(augment_seed or 0)
    out = []
    for start in range(0, classes, 64):
        x = to_float(torch.from_numpy(images.images[start : start + 64]).to(device))
        total = torch.zeros((), device=device)
        for view in range(views):
            seen = x if view == 0 and augment_seed is None else augment(x, generator)
            parts = seen.to(memory_format=torch.channels_last).split(_PART)
            with torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device)):
                total = total + torch.cat([network(part) for part in parts])
        out.append(total / views)
        if progress:
            progress(len(x))
    return torch.cat(out).view(classes, images_per_class, -1)


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """A word for a file of the right kind that holds other tensors."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise McdiError(
            f"{show_path(path)}: does not fit this backbone ({reason_of(error)}); remove it, it is made again"
        ) from error


def train_backbone(
    data: FewShotData,
    config: BackboneConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
    on_start: Callable[[int], None] | None = None,
) -> nn.Sequential:
    """Train on the training classes only, as a prototypical network (Snell et al., 2017), or load the same one made before.

    Prototypical episodes got further than a cosine classifier in the same time (98.3 against 94.4 % nearest prototype on validation
    characters after 4 and 1.7 minutes; the classifier was stopped there).

    Args:
        folder: where `<fingerprint>.safetensors` is kept; an interrupted training goes on from `<fingerprint>.partial.safetensors`,
            to the same result bit for bit.
        on_start: called with the steps already done. on_step: called as on_step(step, loss).
    """
    device = torch.device(device)
    name = fingerprint(data, config)
    final, partial = folder / f"{name}.safetensors", folder / f"{name}.partial.safetensors"
    if final.exists():
        return _loaded(final).to(device)
    backbone = conv4()
    images = torch.from_numpy(data.train.images).to(device)
    classes, images_per_class = images.shape[:2]
    ways, per_class = min(config.ways, classes), min(config.images_per_class, images_per_class)
    if ways < 2 or per_class < 2:
        raise McdiError(
            f"backbone episodes of {ways} ways x {per_class} images: expected at least 2 of each; "
            f"the data has {classes} classes x {images_per_class} images"
        )
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    backbone.to(device)
    matrices = {name: p for name, p in backbone.named_parameters() if p.ndim == 4 and p.shape[1] > 1}
    others = [p for name, p in backbone.named_parameters() if name not in matrices]
    optimizer = Muon([*matrices.values()], others, config.learning_rate)
    first = 0
    if partial.exists():
        tensors, meta = load_tensors(partial, "backbone-checkpoint")
        with _fitting(partial):
            first = int(meta["step"])
            generator.set_state(tensors.pop("generator"))
            optimizer.restore(tensors)
            backbone.load_state_dict(tensors)
    if on_start:
        on_start(first)

    def save() -> None:
        tensors = {**backbone.state_dict(), **optimizer.tensors(), "generator": generator.get_state()}
        save_tensors(partial, tensors, {"step": step}, "backbone-checkpoint")

    backbone.train()
    step = first
    for step in range(first + 1, config.steps + 1):
        rate = config.learning_rate * 0.5 * (1 + np.cos(np.pi * (step - 1) / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randperm(classes, generator=generator)[:ways]
        image = torch.rand(ways, images_per_class, generator=generator).argsort(1)[:, :per_class]
        x = augment(to_float(images[chosen[:, None].to(device), image.to(device)]), generator)
        loss = episode_loss(training_features(backbone, x).float().view(ways, per_class, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise McdiError(
                f"backbone training: loss {loss.item()} at step {step}; lower --backbone.learning-rate (now {config.learning_rate})"
            )
        if on_step:
            on_step(step, loss.item())
        if step % config.checkpoint_every == 0 and step < config.steps:
            save()
    standardize = backbone[-1]
    assert isinstance(standardize, Standardize)
    standardize.fit(extract_features(backbone, data.train))
    save_tensors(final, dict(backbone.state_dict()), {"data": data.name, "config": asdict(config)}, "backbone")
    partial.unlink(missing_ok=True)
    return backbone
