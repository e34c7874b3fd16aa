"""What Mc-Di is compared with: Reptile on the head and on the whole network, and single-level diffusion in the manner of OCD.

docs/baselines.md says what was taken from each publication and what was left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcdi_fast.backbone import FEATURE_WIDTH, conv4, to_float
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.checkpoint import optimizer_tensors, restore_optimizer
from mcdi_fast.config import PrepareConfig, TaskConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.heads import head_gradient, head_layout, prototype_head, support_condition
from mcdi_fast.noise import PREPARATION, REPTILE, draw_generator
from mcdi_fast.prepare import SHARD_TASKS, head_trajectory
from mcdi_fast.store import load_tensors, save_tensors
from mcdi_fast.tasks import ClassImages, sample_episodes

_BETAS = (0.0, 0.999)  # Adam without momentum, as published: momentum would carry a step of one task into the next


@dataclass(frozen=True)
class ReptileConfig:
    """Reptile (Nichol et al., 2018): the published Omniglot recipe, with a budget of its own."""

    head_steps: int = 1000
    """Outer steps of the head version, alike to the diffusion rows (ours)."""
    head_batch: int = 32
    """Tasks an outer step of the head version, as many as the diffusion rows have base learners (ours; published: 3 to 5)."""
    head_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Inner Adam rates tried for the head version; validation tasks choose."""
    net_steps: int = 100
    """Outer steps of the whole-network version, which starts from the trained backbone (published: 100000 from scratch); none is tried too."""
    net_batch: int = 5
    """Tasks an outer step of the whole-network version (published: 3 to 5)."""
    net_rates: tuple[float, ...] = (0.0001, 0.0003)
    """Inner Adam rates tried for the whole network; validation tasks choose (published: 0.0004 to 0.0015)."""
    inner_steps: int = 5
    """Inner steps on a training task (published: 5 to 12)."""
    inner_batch: int = 10
    """Images an inner step (published: 5 to 15)."""
    train_shots: int = 10
    """Images a class of a training task, more than a test task has (published: 9 to 12)."""
    outer_lr: float = 1.0
    """Outer step at the start; it falls linearly to 0 (published: 0.7 to 1)."""
    test_steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Gradient steps on a new task that are tried; validation tasks choose (published: 86 to 100)."""
    net_test_steps: tuple[int, ...] = (2, 5, 10)
    """The same for the whole network, where a step costs a hundred times more."""
    net_validation_tasks: int = 100
    """Validation tasks that choose rate and steps of the whole-network version (at most --evaluate.validation-tasks)."""
    checkpoint_every: int = 50
    """Outer steps between checkpoints of the whole-network version."""


def check_reptile(config: ReptileConfig) -> None:
    """Raise McdiError, naming the option, for a value out of range."""
    for name in ("head_steps", "head_batch", "net_steps", "net_batch", "inner_steps", "inner_batch", "train_shots"):
        if getattr(config, name) < 1:
            raise McdiError(f"--reptile.{name.replace('_', '-')} = {getattr(config, name)}: expected at least 1")
    for name in ("checkpoint_every", "net_validation_tasks"):
        if getattr(config, name) < 1:
            raise McdiError(f"--reptile.{name.replace('_', '-')} = {getattr(config, name)}: expected at least 1")
    for name in ("head_rates", "net_rates", "test_steps", "net_test_steps"):
        values = getattr(config, name)
        if not values or min(values) <= 0:
            raise McdiError(f"--reptile.{name.replace('_', '-')} = {values}: expected one or more positive values")
    if not 0 < config.outer_lr <= 1:
        raise McdiError(f"--reptile.outer-lr = {config.outer_lr}: expected above 0, at most 1")


def minibatches(rows: int, batch: int, steps: int, count: int, generator: torch.Generator) -> Tensor:
    """Which rows each inner step sees: int64 [steps, count, min(batch, rows)]; no row twice before all have been seen."""
    batch = min(batch, rows)
    passes = -(-steps * batch // rows)
    order = torch.rand(count, passes, rows, generator=generator).argsort(-1).flatten(1)
    return order[:, : steps * batch].view(count, steps, batch).transpose(0, 1)


def momentumless_adam(theta: Tensor, gradient: Tensor, second: Tensor, step: int, rate: float) -> None:
    """One step of Adam with beta1 = 0, in place; `step` counts from 1."""
    second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    theta.addcdiv_(gradient, second.sqrt().div_((1 - _BETAS[1] ** step) ** 0.5).add_(1e-8), value=-rate)


@dataclass
class HeadStart:
    """What Reptile learns for the head: a start that a few gradient steps adapt.

    Attributes:
        head: [ways, F + 1]. second: Adam's second moment there, carried from task to task. steps: Adam steps behind it. rate: inner rate.
    """

    head: Tensor
    second: Tensor
    steps: int
    rate: float


def reptile_head(
    features: Tensor,
    ways: int,
    config: ReptileConfig,
    rate: float,
    seed: int,
    on_step: Callable[[], Any] = lambda: None,
) -> HeadStart:
    """Meta-train the head's start on training classes, all tasks of an outer step at once.

    features: [classes, images_per_class, F]. The tasks are those of `sample_episodes` with this seed. The published loop has one task after
    another and lets Adam's second moment run through; here the tasks of an outer step start from the same one and leave their mean.
    """
    classes, images_per_class, width = features.shape
    shots = min(config.train_shots, images_per_class)
    label = torch.arange(ways).repeat_interleave(shots)
    start = HeadStart(torch.zeros(ways, width + 1), torch.zeros(ways, width + 1), 0, rate)
    generator = torch.Generator().manual_seed(seed)
    count = config.head_batch
    for outer in range(config.head_steps):
        episodes = sample_episodes(
            classes, images_per_class, ways=ways, shots=shots, queries=0, seed=seed, start=outer * count, count=count
        )
        rows = episodes.take(features)[0].flatten(1, 2)
        head, second = (value.expand(count, -1, -1).clone() for value in (start.head, start.second))
        for pick in minibatches(rows.shape[1], config.inner_batch, config.inner_steps, count, generator):
            x = rows.gather(1, pick.unsqueeze(-1).expand(-1, -1, width))
            start.steps += 1
            momentumless_adam(head, head_gradient(head, x, label[pick]), second, start.steps, rate)
        start.second = second.mean(0)
        start.head = start.head + config.outer_lr * (1 - outer / config.head_steps) * (head.mean(0) - start.head)
        on_step()
    return start


def adapt_head(start: HeadStart, support: Tensor, steps: Sequence[int]) -> list[Tensor]:
    """Adam from the learned start on the whole support: the head [B, ways, F + 1] after each of `steps` (rising) steps.

    support: [B, ways, shots, F].
    """
    tasks, ways, shots, _ = support.shape
    label = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    rows = support.flatten(1, 2)
    head, second = (value.expand(tasks, -1, -1).clone() for value in (start.head, start.second))
    kept = []
    for step in range(1, steps[-1] + 1):
        momentumless_adam(head, head_gradient(head, rows, label), second, start.steps + step, start.rate)
        if step in steps:
            kept.append(head.clone())
    return kept


class ReptileNet:
    """Reptile on the whole network: backbone and head, from the trained backbone and a head of zeros.

    Batch norm keeps the backbone's running statistics, in training and on new tasks: nothing of a query image ever reaches another
    (the "no transduction" of the publication), and its affine part is learned.

    Attributes:
        net: backbone + head, at the learned start between calls. step: outer steps done.
    """

    def __init__(self, backbone: nn.Module, ways: int, config: ReptileConfig, rate: float, seed: int):
        """Copy the backbone. rate: of the inner Adam."""
        self.config, self.rate, self.seed, self.ways, self.step = config, rate, seed, ways, 0
        body = conv4()
        body.load_state_dict(backbone.state_dict())
        head = nn.Linear(FEATURE_WIDTH, ways)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.device = next(backbone.parameters()).device
        self.net = nn.Sequential(body, head).to(self.device).eval()
        self.parameters = list(self.net.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=rate, betas=_BETAS)

    def _inner_step(self, x: Tensor, label: Tensor) -> float:
        x, label = x.to(self.device), label.to(self.device)
        loss = F.cross_entropy(self.net(x.contiguous(memory_format=torch.channels_last)), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def outer_step(self, images: ClassImages) -> float:
        """One outer step over `net_batch` training tasks; returns the loss of their first inner steps."""
        c = self.config
        shots, pixels = min(c.train_shots, images.images_per_class), torch.from_numpy(images.images)
        label = torch.arange(self.ways).repeat_interleave(shots)
        episodes = sample_episodes(
            images.num_classes,
            images.images_per_class,
            ways=self.ways,
            shots=shots,
            queries=0,
            seed=self.seed,
            start=self.step * c.net_batch,
            count=c.net_batch,
        )
        generator = draw_generator(self.seed, REPTILE, self.step)
        picks = minibatches(len(label), c.inner_batch, c.inner_steps, c.net_batch, generator)
        start = [p.detach().clone() for p in self.parameters]
        total = [torch.zeros_like(p) for p in start]
        loss = 0.0
        for task in range(c.net_batch):
            self._assign(start)
            x = to_float(pixels[episodes.classes[task][:, None], episodes.support[task]])
            for inner, pick in enumerate(picks[:, task]):
                value = self._inner_step(x[pick], label[pick])
                loss += value / c.net_batch if inner == 0 else 0.0
            torch._foreach_add_(total, [p.detach() for p in self.parameters])
        if not all(bool(t.isfinite().all()) for t in total):
            raise McdiError(
                f"Reptile on the whole network: weights not finite at outer step {self.step}; lower --reptile.net-rates (now {self.rate})"
            )
        weight = c.outer_lr * (1 - self.step / c.net_steps)
        self._assign([p + weight * (t / c.net_batch - p) for p, t in zip(start, total, strict=True)])
        self.step += 1
        return loss

    @torch.no_grad()
    def _assign(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def adapt(self, support: Tensor, label: Tensor, query: Tensor, steps: Sequence[int]) -> list[Tensor]:
        """Adapt to one task on its whole support; the logits [Q, ways] of `query` after each of `steps` (rising) gradient steps.

        support: float32 [R, 1, 28, 28]. label: int64 [R]. query: [Q, 1, 28, 28]. The learned start is put back.
        """
        start = [p.detach().clone() for p in self.parameters]
        state = {name: value.clone() for name, value in optimizer_tensors(self.optimizer).items()}
        kept = []
        for step in range(1, steps[-1] + 1):
            self._inner_step(support, label)
            if step in steps:
                with torch.no_grad():
                    kept.append(self.net(query.to(self.device).contiguous(memory_format=torch.channels_last)).cpu())
        self._assign(start)
        restore_optimizer(self.optimizer, state)
        return kept

    def save(self, path: Path, meta: dict[str, Any]) -> None:
        """Write a checkpoint atomically, with `meta` of the caller's."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        meta = {"step": self.step, "rate": self.rate, "caller": meta}
        save_tensors(path, tensors | optimizer_tensors(self.optimizer), meta, "reptile-checkpoint")

    def restore(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint; returns the caller's meta."""
        tensors, meta = load_tensors(path, "reptile-checkpoint")
        self.net.load_state_dict({n.removeprefix("net."): v for n, v in tensors.items() if n.startswith("net.")})
        restore_optimizer(self.optimizer, {n: v for n, v in tensors.items() if not n.startswith("net.")})
        self.step = int(meta["step"])
        return meta["caller"]


def overfit_heads(
    images: Tensor, base: Tensor, shots: int, config: PrepareConfig, generator: torch.Generator
) -> Tensor:
    """Adam (+ SAM) from a base head, with the loss of the preparation: what OCD's diffusion learns to imitate.

    Args:
        images: features [copies, B, ways, images_per_class, F], the support first. base: [B, ways, F + 1].

    Returns:
        [B, ways, F + 1]
    """
    copies, tasks, ways, images_per_class, _ = images.shape
    label = torch.arange(ways, device=images.device).repeat_interleave(images_per_class).repeat(tasks, 1)
    weight = row_shares(ways, images_per_class, shots, config.support_loss_weight)
    weight = None if weight is None else weight.to(images.device)
    rows, pick = images.flatten(2, 3), None
    if copies > 1:
        pick = torch.randint(copies, (config.steps, tasks, ways * images_per_class), generator=generator)
        pick = pick.int().to(images.device)
    return head_trajectory(base, rows, label, config, 1, pick, weight)[:, -1]


def row_shares(ways: int, images_per_class: int, shots: int, support_loss_weight: float | None) -> Tensor | None:
    """The share of each row in the preparation's loss, [ways * images_per_class]; None where all count alike."""
    if support_loss_weight is None or shots >= images_per_class:
        return None
    weight = torch.full((ways, images_per_class), (1 - support_loss_weight) / (ways * (images_per_class - shots)))
    weight[:, :shots] = support_loss_weight / (ways * shots)
    return weight.flatten()


def prepare_difference_bank(
    folder: Path,
    features: Tensor,
    task: TaskConfig,
    config: PrepareConfig,
    seed: int,
    *,
    meta: dict[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_tasks: Callable[[int], None] | None = None,
) -> TrajectoryBank:
    """The bank of the OCD row: k = 1, target = overfitted head minus base head, base = the prototype head of the support.

    As `prepare.prepare_bank` otherwise: the same tasks for a seed, resumable by shards.
    """
    _, classes, images_per_class, width = features.shape
    bank = TrajectoryBank.create(folder, head_layout(task.ways, width), 1, width + 1, meta)
    if on_start:
        on_start(len(bank))
    while len(bank) < config.tasks:
        count = min(SHARD_TASKS, config.tasks - len(bank))
        episodes = sample_episodes(
            classes,
            images_per_class,
            ways=task.ways,
            shots=task.shots,
            queries=images_per_class - task.shots,
            seed=seed,
            start=len(bank),
            count=count,
        )
        rows = torch.cat([episodes.support, episodes.query], 2)
        x = features[:, episodes.classes.unsqueeze(-1).to(features.device), rows.to(features.device)]
        generator = draw_generator(seed, PREPARATION, bank.num_shards)
        support = x[0, :, :, : task.shots]
        base = prototype_head(support)
        difference = overfit_heads(x, base, task.shots, config, generator) - base
        bank.append(difference.unsqueeze(1), support_condition(support))
        if on_tasks:
            on_tasks(count)
    return bank
