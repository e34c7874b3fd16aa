"""Stage 2, meta-training: Reptile over the denoiser."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from mcdi_fast import outer
from mcdi_fast.backend import (
    DEFAULT_PRECISION,
    check_device,
    check_precision,
    numba_module,
    one_thread,
    requested,
    resolve,
)
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.bounds import check
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig
from mcdi_fast.denoiser import Parameters, init_parameters, parameter_shapes, token_condition
from mcdi_fast.diffusion import Draws, InnerBatch, diffusion_tables, draw_steps, make_inner_batch
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator, describe
from mcdi_fast.inner import ORACLES, inner_loop
from mcdi_fast.noise import META_TRAINING, check_seed, draw_generator, philox_normal
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.outer import OuterState, flattened, named_views, outer_scalars
from mcdi_fast.ranks import ALONE, Ranks
from mcdi_fast.store import difference, digest, load_tensors, output_file, save_tensors, show_path

if TYPE_CHECKING:
    from mcdi_fast.kernels.meta_step import MetaStep

_FIT_TASKS = 4096  # for the normalisers: enough for two digits of a column's deviation, and little memory
_RECIPE = 5  # raise when the code below makes another phi from the same configuration, or writes another checkpoint
FREE = ("checkpoint_every", "on_bad_step")  # settings that may change when a run goes on
_SHOW_EVERY = 20  # outer steps between losses in the progress bar: reading one waits for the device
_FEW = 2**20  # numbers of a meta-batch up to which torch makes it on one thread, beside compiled code
CHECK_EVERY = 100  # outer steps between looks at the device for a step that was not finite, where the kernels run


class MetaTrainer:
    """State and one outer step of meta-training. Everything random is a function of (seed, step), so a resumed run needs no RNG state.

    Attributes:
        state: the parameters being trained, their average (which `generator()` uses), Adam's moments. step: outer steps done.
        impl: what runs: "triton", "torch", "auto" (torch or, on a CPU, compiled code) or an oracle.
        ranks: the processes that share the meta-batch; all of them take every step, and their states stay the same.
    """

    def __init__(
        self,
        bank: TrajectoryBank,
        meta: MetaConfig | None = None,
        diffusion: DiffusionConfig | None = None,
        denoiser: DenoiserConfig | None = None,
        seed: int = 0,
        *,
        start: WeightGenerator | None = None,
        device: torch.device | str = "cpu",
        impl: str = "auto",
        precision: str = DEFAULT_PRECISION,
        ranks: Ranks = ALONE,
    ):
        """Fit the normalisers on the bank and draw phi, or take both from `start`.

        Args:
            bank: of at least one task. Tasks appended to it later are not seen.
            diffusion, denoiser: defaults: those of `start`, else the defaults.
            start: of `fit`. impl: backend.py, or one of `inner.ORACLES`. precision: of products (backend.py).
        """
        self.bank, self.precision, self.ranks = bank, precision, ranks
        self.device = check_device(device)
        check_precision(precision)
        self.impl = impl if impl in ORACLES else resolve(impl, self.device)
        if self.impl == "torch":
            self.impl = requested(impl)
        self.meta = check(meta or MetaConfig(), "--meta.")
        check_meta(self.meta, ranks)
        self.seed = check_seed(seed)
        self.diffusion = check(diffusion or (start.diffusion if start else DiffusionConfig()), "--diffusion.")
        self.denoiser = check(denoiser or (start.denoiser if start else DenoiserConfig()), "--denoiser.")
        if len(bank) == 0:
            raise McdiError(f"bank {show_path(bank.folder)}: holds no task; append trajectories first")
        if bank.num_segments != self.diffusion.segments:
            raise McdiError(
                f"segments k = {self.diffusion.segments}, but the bank {show_path(bank.folder)} holds {bank.num_segments} "
                "local targets a task; set k to that"
            )
        _, self.objective = diffusion_tables(self.diffusion)
        condition_width = bank.condition_width + bank.layout.position_width
        sizes = (bank.layout.width, condition_width, self.diffusion.steps, self.denoiser.width, self.denoiser.depth)
        self._shapes = parameter_shapes(*sizes)
        if start is not None:
            _check_start(start, bank, self.diffusion, self.denoiser)
            start = start.to("cpu")
            self.normalizer, self.condition_normalizer = start.normalizer, start.condition_normalizer
            phi = {name: start.phi[name] for name in self._shapes}
        else:
            self.normalizer, self.condition_normalizer = _fit_normalizers(bank, self.meta.normalizer_floor)
            phi = init_parameters(*sizes, self.seed)
        self.state = OuterState.start(phi, self.device)
        statistics = (part for one in (self.normalizer, self.condition_normalizer) for part in (one.mean, one.std))
        self._start = None if start is None else digest(self.state.phi, *statistics)
        self._bank: dict[str, Any] = {"tasks": len(bank), "contents": bank.contents()}
        mask = bank.layout.mask
        self._mask = None if mask.all() else mask.to(torch.float32)
        code = numba_module("cpu_outer") if self.device.type == "cpu" and self.impl == "auto" else None
        self._compiled, self._outer = code is not None, code or outer
        samples = self.meta.meta_batch * self.meta.inner_steps * self.meta.samples
        self._few = self._compiled and samples * mask.numel() <= _FEW
        self.step = 0
        self._skipped = self._skipped_before = 0
        self._saved: tuple[Path, int] | None = None
        self._kernels = self._meta_step() if self.impl == "triton" else None

    def _meta_step(self) -> MetaStep:
        from mcdi_fast.kernels.meta_step import MetaStep
        from mcdi_fast.kernels.noise_batch import noise_tables

        return MetaStep(
            self.state,
            self.bank,
            lambda step: (self._share(self.draws(step)), outer_scalars(self.meta, step)),
            noise_tables(self.objective),
            self.normalizer,
            self.condition_normalizer,
            self._mask,
            self._shapes,
            self.meta,
            seed=self.seed,
            precision=self.precision,
            ranks=self.ranks,
        )

    @property
    def phi(self) -> Parameters:
        """The parameters being trained, by name: views, on the device."""
        return named_views(self.state.phi, self._shapes)

    def draws(self, step: int) -> Draws:
        """The random choices of an outer step, a function of (seed, step)."""
        m = self.meta
        generator = draw_generator(self.seed, META_TRAINING, step)
        task = torch.randint(self._bank["tasks"], (m.meta_batch,), generator=generator, device="cpu")
        choices = torch.tensor(self.objective.targets, device="cpu")
        segment = choices[torch.randint(len(choices), (m.meta_batch,), generator=generator, device="cpu")]
        steps = draw_steps(self.objective, segment, m.inner_steps, m.samples, generator)
        return Draws(task, segment, steps, (step << 32) + torch.arange(m.meta_batch, device="cpu"))

    def _share(self, draws: Draws) -> Draws:
        """This process's tasks of a meta-batch."""
        mine = self.ranks.share(self.meta.meta_batch)
        return Draws(*(choice[mine] for choice in draws))

    def batch(self, step: int) -> InnerBatch:
        """The meta-batch of an outer step, this process's share of it: a function of (seed, step), not of the number of processes."""
        draws, layout = self._share(self.draws(step)), self.bank.layout
        targets, condition = self.bank.gather(draws.task)
        target = self.normalizer.normalize(targets[torch.arange(len(targets), device="cpu"), draws.segment])
        shape = (*draws.step.shape, layout.num_tokens, layout.width)
        # by Philox, which the kernel draws too: the same noise on every path
        compiled = numba_module("cpu_noise") if self.impl == "auto" else None
        draw = compiled.philox_normal if compiled else philox_normal
        eps = draw([self.seed] * len(target), math.prod(shape[1:]), draws.streams.tolist()).view(shape)
        if self._mask is not None:  # padding stays exactly 0 in x, eps and target
            eps = eps * self._mask
        condition = self.condition_normalizer.normalize(condition).expand(-1, layout.num_tokens, -1)
        condition = token_condition(condition, layout.position())
        batch = make_inner_batch(self.objective, target, condition, draws.segment, draws.step, eps, self._mask)
        return batch.to(self.device)

    def outer_step(self) -> Tensor:
        """One meta-step.

        Returns:
            the mean loss of the base learners before their first inner step, a number on the device; not finite in a step that was
            skipped. Through the kernels nothing waits for it: reading it does, and the next step overwrites it.

        Raises:
            McdiError: a loss that is not finite, naming the step, the task and the last checkpoint; phi is still the last good one. Through
                the kernels it comes up to `CHECK_EVERY` steps later, with phi as it was before the bad one. With `on_bad_step="skip"`
                only when the last `CHECK_EVERY` steps were all skipped. Another process of the run that has ended.
        """
        if self._kernels is not None:
            loss = self._kernels.step(self.step)
        else:
            with one_thread(self._few):
                batch = self.batch(self.step)
            delta, losses = inner_loop(self.phi, batch, self.meta.inner_lr, self.impl, precision=self.precision)
            loss = self._learn(delta, losses)
        self.step += 1
        if self.step % CHECK_EVERY == 0:
            self.check()
            if self.skipped - self._skipped_before == CHECK_EVERY:
                self._stop(self.step - 1, None)
            self._skipped_before = self.skipped
        return loss

    def _learn(self, delta: Parameters, losses: Tensor) -> Tensor:
        """The outer step of what the inner loops found, if that is finite; the mean first loss."""
        with one_thread(self._compiled):
            flat = flattened(delta)
        if self.ranks.size > 1:
            flat, losses = self._sum(flat, losses)
        # one number decides: a NaN anywhere in the inner loop reaches the last loss or the delta
        if losses.isfinite().all() and self._outer.finite(flat):
            self._outer.outer_update(self.state, flat, outer_scalars(self.meta, self.step), self.meta.outer)
        elif self.meta.on_bad_step == "skip":
            self._skipped += 1
        else:
            self._stop(self.step, losses)
        return losses[:, 0].mean()

    def _sum(self, delta: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Mean delta [P] and losses [B, K] over the meta-batch, from those of this process's share: one exchange."""
        mine, (count, inner_steps) = self.ranks.share(self.meta.meta_batch), losses.shape
        total = delta.new_zeros(len(delta) + self.meta.meta_batch * inner_steps)
        together, every = total.split([len(delta), total.numel() - len(delta)])
        every = every.view(-1, inner_steps)
        torch.mul(delta, count / self.meta.meta_batch, out=together)
        every[mine] = losses
        self.ranks.sum_(total)
        return together, every

    @property
    def skipped(self) -> int:
        """Steps skipped because they were not finite. Waits for the device."""
        return self._skipped + (self._kernels.skipped() if self._kernels is not None else 0)

    def check(self) -> None:
        """Wait for the device. Raises McdiError where a step since the last check was not finite; `step` and phi are then as before it."""
        failure = self._kernels.failure() if self._kernels is not None else None
        if failure is not None:
            self.step = failure[0]
            self._stop(*failure)

    def _stop(self, step: int, losses: Tensor | None) -> NoReturn:
        """Raise for a step whose losses [B, K] were not finite; None: for the last `CHECK_EVERY` steps, all skipped."""
        if losses is None:
            where = f"in each of the {CHECK_EVERY} outer steps up to {step}, all skipped"
        else:
            draws = self.draws(step)
            bad = (~losses.isfinite()).any(1).nonzero().flatten().tolist()
            who = "task unknown"
            if bad:
                who = f"task {int(draws.task[bad[0]])} of the bank, target {int(draws.segment[bad[0]]) + 1}"
            where = f"at outer step {step}, {who}"
        kept = "there is no checkpoint yet" if self.ranks.is_main else "rank 0 names the last good checkpoint"
        if self._saved:
            kept = f"the last good checkpoint is {show_path(self._saved[0])}, step {self._saved[1]}"
        raise McdiError(
            f"meta-training: loss not finite {where}; lower --meta.inner-lr (now {self.meta.inner_lr}) or --meta.outer-lr "
            f"(now {self.meta.outer_lr}) in another run, or go on with --meta.on-bad-step skip; {kept}"
        )

    def checkpoint_due(self) -> bool:
        """Whether the step just done is one after which a checkpoint is written."""
        return self.step % self.meta.checkpoint_every == 0 or self.step == self.meta.steps

    def generator(self, provenance: dict[str, Any] | None = None) -> WeightGenerator:
        """A weight generator from the averaged parameters, on the CPU. Raises as `check`."""
        self.check()
        phi = named_views(self.state.average.cpu().clone(), self._shapes)
        return WeightGenerator(
            phi, self.bank.layout, self.normalizer, self.condition_normalizer, self.diffusion, provenance or {}
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: settings, seed, bank and start. Not device or processes: a run may move."""
        meta = {name: value for name, value in asdict(self.meta).items() if name not in FREE}
        return {
            "recipe": _RECIPE,
            "meta": meta,
            "diffusion": asdict(self.diffusion),
            "denoiser": asdict(self.denoiser),
            "seed": self.seed,
            "bank": self._bank,
            "start": self._start,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint atomically: one safetensors file. Raises as `check`."""
        self.check()
        tensors = {name: value.cpu() for name, value in vars(self.state).items()}
        meta = {"step": self.step, "skipped": self.skipped, "made_from": self.identity()}
        save_tensors(path, tensors, meta, "meta-checkpoint")
        self._saved = Path(path), self.step

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint.

        Raises:
            McdiError: naming the file, when it is damaged or belongs to other settings, another seed, bank or start (says which).
        """
        tensors, found = load_tensors(path, "meta-checkpoint")
        trouble = self._stranger(found.get("made_from"))
        if trouble:
            raise McdiError(
                f"{show_path(path)}: {trouble}; give what it was made with, or another checkpoint (of the command: another --run-dir), "
                "or remove it to train from the beginning"
            )
        for name in ("step", "skipped"):
            if type(found.get(name)) is not int or not 0 <= found[name] <= self.meta.steps:
                raise McdiError(
                    f"{show_path(path)}: {name} is {found.get(name)!r:.40}, expected 0 to {self.meta.steps}; it is damaged"
                )
        for name, value in vars(self.state).items():
            tensor = tensors.get(name)
            if tensor is None or tensor.shape != value.shape or tensor.dtype != value.dtype:
                raise McdiError(
                    f"{show_path(path)}: {name} is {describe(tensor)}, expected {describe(value)}; it is damaged"
                )
        for name, value in vars(self.state).items():
            value.copy_(tensors[name])
        if self._kernels is not None:
            self._kernels.reset()
        self.step, self._skipped = found["step"], found["skipped"]
        self._skipped_before = self._skipped
        self._saved = Path(path), self.step

    def _stranger(self, theirs: Any) -> str:
        """What of a checkpoint's identity differs from ours, in words; empty where nothing does."""
        ours = self.identity()
        if not isinstance(theirs, dict) or theirs.get("recipe") != _RECIPE:
            return "made by another version of mcdi_fast"
        if theirs.get("bank") != ours["bank"]:
            tasks = theirs["bank"].get("tasks") if isinstance(theirs.get("bank"), dict) else None
            where = show_path(self.bank.folder)
            if tasks != self._bank["tasks"]:
                return f"made with a bank of {tasks!r:.20} tasks, {where} holds {self._bank['tasks']} (start= goes on with a bank that has grown)"
            return f"made with a bank of other contents than {where}, with as many tasks ({tasks})"
        if theirs.get("start") != ours["start"]:
            return f"made {'without a' if theirs.get('start') is None else 'from another'} start"
        return "" if theirs == ours else f"made with another {difference('', theirs, ours)}"

    def start_together(self) -> None:
        """Take rank 0's state, so that all processes start from the same one."""
        for value in vars(self.state).values():
            self.ranks.broadcast_(value)
        self.step, self._skipped = (self.ranks.broadcast_number(number) for number in (self.step, self._skipped))
        self._skipped_before = self._skipped


def check_meta(meta: MetaConfig, ranks: Ranks = ALONE) -> None:
    """Raise McdiError for too small a meta-batch for so many processes."""
    if meta.meta_batch < ranks.size:
        raise McdiError(
            f"--meta.meta-batch = {meta.meta_batch}: fewer tasks than the {ranks.size} processes; start fewer or raise it"
        )


def _fit_normalizers(bank: TrajectoryBank, floor: float) -> tuple[Normalizer, Normalizer]:
    """Of weights and of conditions."""
    every = torch.linspace(0, len(bank) - 1, min(len(bank), _FIT_TASKS), dtype=torch.float64, device="cpu").long()
    targets, condition = bank.gather(every)
    whole = torch.ones(condition.shape[1:], dtype=torch.bool, device="cpu")
    return Normalizer.fit(targets, bank.layout.mask, floor), Normalizer.fit(condition.unsqueeze(1), whole, floor)


def _check_start(
    start: WeightGenerator, bank: TrajectoryBank, diffusion: DiffusionConfig, denoiser: DenoiserConfig
) -> None:
    """Raise McdiError, naming what differs, unless training can go on from a generator."""
    pairs = {
        "layout": (start.layout.to_dict(), bank.layout.to_dict()),
        "condition_width": (start.condition_width, bank.condition_width),
        "diffusion": (asdict(start.diffusion), asdict(diffusion)),
        "denoiser": (asdict(start.denoiser), asdict(denoiser)),
    }
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            whose = (
                f"the bank {show_path(bank.folder)} has" if name in ("layout", "condition_width") else "asked for is"
            )
            raise McdiError(
                f"start: a generator with another {difference(name, theirs, ours)}, as {whose}; "
                "start from one that fits, or without"
            )


def fit(
    bank: TrajectoryBank | str | os.PathLike[str],
    meta: MetaConfig | None = None,
    diffusion: DiffusionConfig | None = None,
    denoiser: DenoiserConfig | None = None,
    *,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    start: WeightGenerator | None = None,
    progress: bool | None = None,
    on_step: Callable[[MetaTrainer, Tensor], None] | None = None,
    on_start: Callable[[MetaTrainer], None] | None = None,
    provenance: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    precision: str = DEFAULT_PRECISION,
    ranks: Ranks = ALONE,
) -> WeightGenerator:
    """Train a weight generator from a bank.

    Args:
        bank: or its folder. meta, diffusion, denoiser: defaults where not given (config.py).
        checkpoint: a file, written every `meta.checkpoint_every` steps; where it exists training goes on from it, bit for bit as if it had
            not stopped. Its folder is made.
        start: a generator to go on from, with its phi and normalisers, its diffusion and the sizes of its denoiser; `meta.steps` more steps,
            with fresh moments and the rates from the beginning. The bank may have grown. Another seed gives other draws than before.
        progress: whether a bar is drawn; None: where tqdm is installed and stderr is a terminal.
        on_start: called once with the trainer (its `step` says where it starts). on_step: called after each outer step with its loss, a
            number on the device: reading it waits for the device.
        device: "cpu", "cuda" or "cuda:<number>". impl: "auto", "triton" or "torch" (backend.py). precision: of products (backend.py).
        ranks: the processes that share the work, each of which calls `fit` alike, on the same bank; rank 0 alone touches the checkpoint.
            The result is that of one process up to rounding.

    Raises:
        McdiError: NaN in the bank (naming the shard), bad configuration, a checkpoint that does not belong or cannot be written, a start
            that does not fit, a loss that is not finite, another process that has ended.
    """
    if not isinstance(bank, TrajectoryBank):
        bank = TrajectoryBank.open(bank)
    file = output_file(checkpoint) if checkpoint is not None and ranks.is_main else None
    bank.check_finite()
    trainer = MetaTrainer(
        bank, meta, diffusion, denoiser, seed, start=start, device=device, impl=impl, precision=precision, ranks=ranks
    )
    if file is not None and file.exists():
        trainer.restore(file)
    trainer.start_together()
    if on_start:
        on_start(trainer)
    with _bar(trainer, progress if ranks.is_main else False) as show:
        while trainer.step < trainer.meta.steps:
            loss = trainer.outer_step()
            if on_step:  # before the checkpoint: what it writes must not lack a step that the checkpoint has
                on_step(trainer, loss)
            show(loss)
            if file is not None and trainer.checkpoint_due():
                trainer.save(file)
    return trainer.generator(provenance)


@contextlib.contextmanager
def _bar(trainer: MetaTrainer, progress: bool | None) -> Iterator[Callable[[Tensor], None]]:
    """What is to be called with the loss after each step."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise McdiError("progress = True: tqdm is not installed; install it, or leave progress out") from error
        yield lambda loss: None
        return
    hidden = None if progress is None else not progress  # None: tqdm looks whether stderr is a terminal
    options: dict[str, Any] = {"unit": " steps", "dynamic_ncols": True, "smoothing": 0.05, "disable": hidden}
    with tqdm(total=trainer.meta.steps, initial=trainer.step, desc="meta-training", **options) as bar:

        def show(loss: Tensor) -> None:
            if not bar.disable and trainer.step % _SHOW_EVERY == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            bar.update()

        yield show
