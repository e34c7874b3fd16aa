"""Task families: everything that knows what a task is, behind one small class. docs/own-network.md makes one.

The way of the data: a family's tasks -> trajectories -> TrajectoryBank -> meta-training -> generator -> weights -> the family's score.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import grad, vmap

from mcdi_fast.backend import Backend
from mcdi_fast.config import PrepareConfig, TrainConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.optim import trajectory
from mcdi_fast.weights import WeightLayout

Data = dict[str, Tensor]
"""Tensors by name, the task first: [B, ...]. What they mean is the family's business."""

Maker = TypeVar("Maker", bound=Callable[..., Any])
BUILT_IN = {
    **{name: f"mcdi_fast.tasks.{name}" for name in ("glyphs", "omniglot", "waves")},
    **{name: "mcdi_fast.tasks.photos" for name in ("tiny-imagenet", "pacs", "digits")},
    "digit-networks": "mcdi_fast.tasks.digit_networks",
    "glue": "mcdi_fast.tasks.lora",
    "intents": "mcdi_fast.tasks.text",
}
"""Families that come with the package, by the module that registers each."""
_GRADIENT_CHUNK = 64  # tasks differentiated at a time (convolutions of 500 tasks: 3.5 times faster than all at once)
_CHUNK = 128  # tasks scored at a time: a network's activations of all tasks at once would not fit


@dataclass(frozen=True)
class TaskBatch:
    """B tasks.

    Attributes:
        condition: float32 [B, N or 1, C], all that the generator may know of a task.
        support: what any method may train on at test time.
        query: what it is scored on.
        train: what a trajectory is trained on. Of a training task it may hold more than the support; of a test task it makes the ceiling.
    """

    condition: Tensor
    support: Data
    query: Data
    train: Data

    def __len__(self) -> int:
        """B."""
        return len(self.condition)

    def __getitem__(self, rows: slice) -> TaskBatch:
        """Some of the tasks."""
        parts = ({name: value[rows] for name, value in data.items()} for data in (self.support, self.query, self.train))
        return TaskBatch(self.condition[rows], *parts)


class Metric(NamedTuple):
    """What `TaskFamily.score` measures, and how it is shown."""

    name: str = "loss"
    unit: str = ""
    higher_is_better: bool = False
    factor: float = 1.0
    """A shown number is factor times the score: 100 for a share shown in percent."""


class TaskFamily:
    """A family of tasks. Set `layout`, define `tasks` and `loss`; the rest has defaults that a family may replace by something faster.

    Attributes:
        layout: what is generated, N tokens of width D.
        metric: of `score`.
        fingerprint: text that changes with data and frozen weights. It is part of the identity of a bank and of a generator.
    """

    layout: WeightLayout
    metric: Metric = Metric()
    fingerprint: str = ""

    def tasks(self, split: str, start: int, count: int, seed: int) -> TaskBatch:
        """Tasks `start` to `start + count - 1` of an endless sequence.

        Args:
            split: "train", "val" or "test". Selection happens on val, the report is about test.
            seed: of the sequence. Task number b depends on (split, seed, b) alone, so it is the same in any batches.
        """
        raise NotImplementedError

    def loss(self, theta: Tensor, data: Data) -> Tensor:
        """Of ONE task: theta [N, D], data without its first dimension -> scalar. Runs under vmap(grad)."""
        raise NotImplementedError

    def score(self, theta: Tensor, data: Data) -> Tensor:
        """Of ONE task, in terms of `metric`: theta [N, D] -> scalar. The loss by default."""
        return self.loss(theta, data)

    def provenance(self) -> dict[str, Any]:
        """JSON: where data and frozen weights come from, for banks, generators and reports."""
        return {"fingerprint": self.fingerprint}

    def start(self, count: int, config: PrepareConfig, generator: torch.Generator) -> Tensor:
        """theta_0 of `count` tasks: [count, N, D], padding 0. Gaussian by default. Drawn on the CPU, whatever computes."""
        noise = torch.randn(count, self.layout.num_tokens, self.layout.width, generator=generator) * config.start_std
        return noise * self.layout.mask

    def gradient(self, theta: Tensor, data: Data, step: int = 0) -> Tensor:
        """Of each task's loss, [B, N, D] -> [B, N, D]: autograd under vmap by default. step: of the trajectory, for minibatches."""
        return vmap(grad(self.loss), randomness="different", chunk_size=_GRADIENT_CHUNK)(theta, data)

    def trajectories(
        self,
        data: Data,
        config: PrepareConfig,
        segments: int,
        generator: torch.Generator,
        backend: Backend = Backend(),  # noqa: B008 (a constant)
    ) -> Tensor:
        """Train every task on its data (a batch's `train` or `support`) and keep k points of each trajectory: [B, k, N, D]."""
        start = self.start(len(next(iter(data.values()))), config, generator).to(backend.device)

        def gradient(theta: Tensor, step: int) -> Tensor:
            return self.gradient(theta, data, step).add_(theta, alpha=config.weight_decay)

        return trajectory(start, gradient, config, segments, **optimizer_steps(backend))

    def scores(self, theta: Tensor, data: Data) -> Tensor:
        """Of all tasks: [B, N, D] -> float32 [B]. `score` under vmap by default."""
        with torch.no_grad():
            return vmap(self.score, randomness="different", chunk_size=_CHUNK)(theta, data)

    def save(self, folder: Path) -> None:
        """Write beside a generator what its user needs to make conditions. Nothing by default."""

    def baselines(self) -> dict[str, Callable[[TaskBatch], Tensor]]:
        """Further methods by name, tasks -> weights [B, N, D], beyond fine-tuning, trained targets and what the bank gives."""
        return {}

    def figures(
        self, tasks: TaskBatch, drawn: dict[str, Tensor], chain: list[tuple[int, Tensor]]
    ) -> dict[str, tuple[str, bytes]]:
        """Pictures for a run's report: file name -> (title, PNG). None by default.

        Args:
            tasks: a few test tasks. drawn: each method's weights for them, [B, N, D]. chain: (t, weights) along their sampling chains.
        """
        return {}


def optimizer_steps(backend: Backend) -> dict[str, Any]:
    """`ascend` and `update` of `optim.trajectory`, through the kernels where they run."""
    if not backend.kernels:
        return {}
    from mcdi_fast.kernels import sam_adam

    return {"ascend": sam_adam.sam_ascent, "update": sam_adam.adam_step_}


# ---------------------------------------------------------------------- the door


Stage = Callable[[str, int, str], contextlib.AbstractContextManager[Any]]
"""`with stage(name, total, unit) as bar: bar.update(n)` shows progress."""


@contextlib.contextmanager
def no_stage(name: str, total: int, unit: str) -> Iterator[Any]:
    """A `Stage` that shows nothing."""
    yield type("Bar", (), {"update": lambda self, n=1: None})()


@dataclass(frozen=True)
class Setup:
    """What a family may use while it is made.

    Attributes:
        data_dir: where the user keeps data; None: look in MCDI_DATA_DIR, then download. cache_dir: for what is made once.
        device: of tensors. stage: `with stage(name, total, unit) as bar: bar.update(n)` shows progress.
        begin: to be called when what people gave has been checked and long work begins; the run folder is taken then.
    """

    data_dir: Path | None = None
    cache_dir: Path = Path("runs/cache")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stage: Stage = no_stage
    begin: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class NoOptions:
    """A family without options."""


@dataclass(frozen=True)
class Entry:
    """A family by name.

    Attributes:
        make: a function that takes any of `options` and `setup` and returns a TaskFamily. options: the dataclass of its options.
        defaults: changes TrainConfig's defaults to those that suit the family.
    """

    name: str
    make: Callable[..., TaskFamily]
    options: type
    defaults: Callable[[TrainConfig], TrainConfig]

    def config(self) -> TrainConfig:
        """The family's defaults."""
        return self.defaults(TrainConfig(dataset=self.name, task=self.options()))

    def family(self, options: Any, setup: Setup) -> TaskFamily:
        """Make it."""
        wanted = inspect.signature(self.make).parameters
        given = {"options": options, "setup": setup}
        made = self.make(**{name: value for name, value in given.items() if name in wanted})
        if not isinstance(made, TaskFamily):
            raise McdiError(f"--dataset {self.name}: gave {type(made).__name__}, expected a mcdi_fast.tasks.TaskFamily")
        return made


def register(defaults: Callable[[TrainConfig], TrainConfig]) -> Callable[[Maker], Maker]:
    """Give the function that makes a family its own defaults: `@register(lambda config: replace(config, meta=…))`."""

    def mark(make: Maker) -> Maker:
        make.defaults = defaults  # type: ignore[attr-defined]
        return make

    return mark


def find_family(name: str) -> Entry:
    """The family of a `--dataset`: a built-in name, or package.module:function for one of the user's own.

    Raises:
        McdiError: another name; a module or function that is not there; options that are no dataclass with defaults.
    """
    place = f"{BUILT_IN[name]}:{name.replace('-', '_')}" if name in BUILT_IN else name
    module, _, function = place.partition(":")
    if not function:
        raise McdiError(
            f"--dataset {name!r}: expected one of {', '.join(BUILT_IN)}, or package.module:function of your own"
        )
    if "" not in sys.path:  # a file beside the user, as `python -m` would find it
        sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise McdiError(f"--dataset {name}: cannot import it ({error}); give package.module:function") from error
    hint = typing.get_type_hints(make).get("options", NoOptions)
    if not dataclasses.is_dataclass(hint) or not isinstance(hint, type):
        raise McdiError(f"--dataset {name}: its options are {hint!r:.60}, expected a dataclass")
    try:
        hint()
    except TypeError as error:
        raise McdiError(f"--dataset {name}: options of {hint.__name__} without a default ({error})") from error
    return Entry(name, make, hint, getattr(make, "defaults", lambda config: config))


def check_family(family: TaskFamily, backend: Backend = Backend()) -> None:  # noqa: B008 (a constant)
    """Try every method of a family on two tasks: shapes, dtypes, reproducibility, padding, gradient against autograd.

    Raises:
        McdiError: naming the method, what was found and what was expected.
    """
    layout, config = family.layout, PrepareConfig(tasks=2, steps=2, learning_rate=0.01, start_std=0.1)
    shape = (2, layout.num_tokens, layout.width)

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise McdiError(f"{type(family).__name__}.{what}")

    for split in ("train", "val", "test"):
        tasks, again = family.tasks(split, 1, 2, 7), family.tasks(split, 2, 1, 7)
        found = list(tasks.condition.shape)
        expect(
            len(found) == 3 and found[0] == 2 and found[1] in (1, shape[1]) and tasks.condition.dtype == torch.float32,
            f"tasks({split!r}): condition {tasks.condition.dtype} {found}, expected float32 [2, {shape[1]} or 1, C]",
        )
        for part in ("support", "query", "train"):
            data, other = getattr(tasks, part), getattr(again, part)
            expect(bool(data), f"tasks({split!r}): {part} is empty, expected a dict of tensors [2, ...]")
            for name, value in data.items():
                expect(
                    len(value) == 2, f"tasks({split!r}): {part}[{name!r}] {list(value.shape)}, expected 2 tasks first"
                )
                expect(
                    _same(value[1:], other[name]),
                    f"tasks({split!r}): task 2 of seed 7 has another {part}[{name!r}] in another batch; "
                    "draw it from (seed, its number) alone",
                )
        expect(_same(tasks.condition[1:], again.condition), f"tasks({split!r}): task 2 differs between two batches")
        other_seed = family.tasks(split, 1, 2, 8)
        expect(not torch.equal(tasks.condition, other_seed.condition), f"tasks({split!r}): seeds 7 and 8 give the same")

    tasks = family.tasks("train", 0, 2, 0)
    theta = family.start(2, config, torch.Generator().manual_seed(0)).to(backend.device)
    mask = layout.mask.to(backend.device)
    expect(theta.shape == shape, f"start: {list(theta.shape)}, expected {list(shape)}")
    expect(not theta[:, ~mask].any(), "start: padding is not 0; multiply by layout.mask")
    for name, data in (("train", tasks.train), ("support", tasks.support)):
        slope = family.gradient(theta, data).detach()
        auto = vmap(grad(family.loss), randomness="same")(theta, data).detach()
        expect(slope.shape == shape, f"gradient: {list(slope.shape)}, expected {list(shape)}")
        error, size = float((slope - auto).norm()), float(auto.norm())
        expect(
            error <= 1e-4 * size + 1e-6,
            f"gradient on {name}: off from autograd of the loss by {error:.2g} of {size:.2g}",
        )
        expect(not slope[:, ~mask].any(), f"gradient on {name}: not 0 at padding; read theta by layout.unpack")
        loss = vmap(family.loss, randomness="same")(theta, data)
        expect(
            loss.shape == (2,) and bool(loss.isfinite().all()),
            f"loss on {name}: {loss}, expected a finite number a task",
        )
    end = family.trajectories(tasks.train, config, 2, torch.Generator().manual_seed(0), backend)
    expect(end.shape == (2, 2, *shape[1:]), f"trajectories: {list(end.shape)}, expected {[2, 2, *shape[1:]]}")
    expect(bool(end.isfinite().all()) and not end[:, :, ~mask].any(), "trajectories: not finite, or not 0 at padding")
    scores = family.scores(end[:, -1], tasks.query)
    one = torch.stack([family.score(end[b, -1], {n: v[b] for n, v in tasks.query.items()}) for b in range(2)])
    expect(scores.shape == (2,), f"scores: {list(scores.shape)}, expected [2]")
    expect(torch.allclose(scores, one.to(scores), rtol=1e-4, atol=1e-6), f"scores {scores} differ from score {one}")
    for name, baseline in family.baselines().items():
        found = list(baseline(tasks).shape)
        expect(found == list(shape), f"baselines[{name!r}]: {found}, expected {list(shape)}")


def _same(found: Tensor, expected: Tensor) -> bool:
    """To the bit for integers; floats computed in batches of other sizes may round otherwise."""
    if not found.is_floating_point():
        return torch.equal(found, expected)
    return found.shape == expected.shape and bool(((found - expected).abs() <= 1e-4 * expected.abs().max()).all())
