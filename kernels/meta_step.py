"""One meta-step on a GPU, from the drawn indices to the new phi: noise, inner loops, outer step. One CUDA graph after a few steps.

The reference is `meta.MetaTrainer.outer_step` through torch.

Everything that changes from step to step is a row of an int64 table: the draws of 100 steps are one copy, made while the GPU still works on
the steps before, and a counter on the device says whose turn it is, so the graph is all that the host launches. Nothing waits for the GPU. A
loss or difference that is not finite therefore cannot raise at once: the device remembers the first such step and changes nothing from then
on, and `failure` asks for it; or, by choice, it leaves phi as it is in such steps alone and counts them.

With several processes one all-reduce stands between the inner loops and the outer step, in the graph too (NCCL's can be captured; no GPU has
run it).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mcdi_fast.backend import check_precision
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import MetaConfig
from mcdi_fast.diffusion import Draws
from mcdi_fast.kernels.inner_loop import InnerLoop, prefer_stacked
from mcdi_fast.kernels.launch import Turn, capture, pinned
from mcdi_fast.kernels.load_batch import block_starts, load_batch_
from mcdi_fast.kernels.noise_batch import noise_batch
from mcdi_fast.kernels.outer_update import Verdict, judge_, outer_update_
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.outer import OuterScalars, OuterState
from mcdi_fast.ranks import ALONE, Ranks

AHEAD = 100  # steps whose draws go to the device in one copy
EAGER_STEPS = 3  # before capture: they compile the kernels and settle the allocator
RESIDENT_SHARE = (
    0.5  # of the GPU's free memory: a smaller bank moves there whole, of a larger one each step's rows are copied
)


class MetaStep:
    """A meta-step of fixed shapes.

    Attributes:
        loss: float32 [], mean over base learners before their first inner step; overwritten by the next step.
    """

    def __init__(
        self,
        state: OuterState,
        bank: TrajectoryBank,
        choose: Callable[[int], tuple[Draws, OuterScalars]],
        tables: Tensor,
        normalizer: Normalizer,
        condition_normalizer: Normalizer,
        mask: Tensor | None,
        shapes: dict[str, tuple[int, int]],
        meta: MetaConfig,
        *,
        seed: int,
        precision: str,
        ranks: Ranks = ALONE,
    ):
        """Make the buffers.

        Args:
            choose: the draws of a step, this process's, and its scalars. tables: float64, of noise_tables.
            mask: float32 [N, D], 0 at padding, None without.
            shapes: of phi. ranks: the processes that share a meta-batch.
        """
        device = state.phi.device
        check_precision(precision)
        self.state, self.bank, self.device, self.meta, self.seed = state, bank, device, meta, seed
        (b, k, s), (n, d) = choose(0)[0].step.shape, bank.layout.mask.shape
        counts = {"row": b, "task": b, "segment": b, "step": b * k * s, "streams": b, "number": 1, "scalars": 4}
        pitch = sum(counts.values())
        self._inbox = torch.zeros(1 + AHEAD * pitch, dtype=torch.int64, device=device)
        self._turn = Turn(self._inbox[:1], pitch, AHEAD)
        parts = dict(zip(counts, self._inbox[1 : 1 + pitch].split(list(counts.values())), strict=True))
        self._choose, self._drawn = choose, dict[int, Draws]()
        self._row, self._task, self._segment = parts["row"], parts["task"], parts["segment"]
        self._streams, self._number = parts["streams"], parts["number"]
        self._step, self._scalars = parts["step"].view(b, k, s), parts["scalars"].view(torch.float64)

        def to_device(tensor: Tensor) -> Tensor:
            return tensor.float().to(device)

        self._tables = to_device(tables)
        rows, columns = bank.condition_rows, bank.condition_width
        self._moments = [
            to_device(value).expand(shape).contiguous()
            for of, shape in ((normalizer, (n, d)), (condition_normalizer, (rows, columns)))
            for value in (of.mean, of.std)
        ]
        new = state.phi.new_empty
        self._target, self._read = new(b, n, d), (new(b, n, d), new(b, rows, columns))
        # one exchange: the mean difference, then the losses [K, B] of every base learner
        every, self._ranks = meta.meta_batch, ranks
        self._sent = new(state.phi.numel() + k * every)
        self._delta, losses = self._sent.split([state.phi.numel(), k * every])
        self._losses, self._mine, self._part = losses.view(k, every), ranks.share(every), b / every
        sizes = (b, k, s, n, d)
        self._loop = InnerLoop(
            state.phi, shapes, sizes, stacked=prefer_stacked(sizes, shapes["out.token"][0]), precision=precision, mask=mask,
            delta=self._delta,
        )  # fmt: skip
        self._starts, self._num_steps = block_starts(self._loop.blocks), tables.shape[1]
        position = shapes["in.condition"][0] - columns
        if position:  # which token is which stands behind the condition, the same for all tasks
            there = self._loop.enter.unflatten(-2, (s, n))[..., d + columns : d + columns + position]
            there.copy_(to_device(bank.layout.position()).expand_as(there))
        self._verdict = Verdict.start(self._losses)
        self.loss = self._verdict.loss[0]
        self._resident = self._move_bank()
        self._steps_taken = 0
        self._replay: Callable[[], None] | None = None

    def _move_bank(self) -> tuple[Tensor, Tensor] | None:
        """The whole bank on the device, targets [tasks * k, N, D], where it fits."""
        target, condition = self._read
        bytes_ = 4 * len(self.bank) * (self.bank.num_segments * target[0].numel() + condition[0].numel())
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else math.inf
        if bytes_ > RESIDENT_SHARE * free:
            return None
        targets, condition = self.bank.gather(range(len(self.bank)))
        return targets.flatten(0, 1).to(self.device), condition.to(self.device)

    def _draw(self, first: int) -> None:
        """The draws of the next steps, from `first` on, in one copy."""
        self._drawn.clear()
        rows = [torch.zeros(1, dtype=torch.int64, device="cpu")]  # whose turn it is
        every = torch.arange(len(self._row), device="cpu")
        for number in range(first, max(first + 1, min(first + self._turn.rows, self.meta.steps))):
            draws, scalars = self._choose(number)
            self._drawn[number] = draws
            # where a target and a condition are: in the bank on the device, or among this step's, copied
            row, task = every, every
            if self._resident is not None:
                row, task = draws.task * self.bank.num_segments + draws.segment, draws.task
            one = torch.tensor([number], device="cpu")
            rows += [row, task, draws.segment, draws.step.flatten(), draws.streams, one]
            rows.append(torch.tensor(scalars, dtype=torch.float64, device="cpu").view(torch.int64))
        drawn = torch.cat(rows)
        self._copy(self._inbox[: len(drawn)], drawn)

    def step(self, number: int) -> Tensor:
        """Take outer step `number`; returns `loss`, on the device, without waiting for it."""
        if next(iter(self._drawn), None) != number:  # the first one, or one that goes on from elsewhere
            self._draw(number)
        draws = self._drawn[number]
        if self._resident is None:
            targets, condition = self.bank.gather(draws.task)
            chosen = targets[torch.arange(len(targets), device="cpu"), draws.segment]
            self._copy(self._read[0], chosen)
            self._copy(self._read[1], condition)
        if self._replay is None and self.device.type == "cuda" and self._steps_taken >= EAGER_STEPS:
            self._replay = capture(self._run, self.device)
        (self._replay or self._run)()
        self._steps_taken += 1
        del self._drawn[number]
        if not self._drawn and number + 1 < self.meta.steps:
            self._draw(number + 1)
        return self.loss

    def _copy(self, there: Tensor, here: Tensor) -> None:
        there.copy_(pinned(here, self.device), non_blocking=True)

    @torch.no_grad()
    def _run(self) -> None:
        """From `_inbox` on: launches alone, nothing is read back."""
        loop, losses, verdict = self._loop, self._loop.parts, self._verdict
        targets, conditions = self._resident or self._read
        mean, std, condition_mean, condition_std = self._moments
        load_batch_(
            targets, conditions, self._row, self._task, self._step, mean, std, condition_mean, condition_std,
            self._target, loop.enter, loop.blocks, self._target.shape[-1], 2 * loop.width, self._num_steps, self._starts,
            self._turn,
        )  # fmt: skip
        x, loss_target, gain = loop.noised
        noise_batch(
            self._target, self._segment, self._step, self.seed, self._streams, self._tables, loop.mask,
            turn=self._turn, x=x, loss_target=loss_target, gain=gain,
        )  # fmt: skip
        loop.run(self.meta.inner_lr)
        if self._ranks.size > 1:
            losses = self._losses.unsqueeze(-1)
            losses.zero_()
            self._losses[:, self._mine] = loop.losses
            self._delta.mul_(self._part)
            self._ranks.sum_(self._sent)
        skip = self.meta.on_bad_step == "skip"
        judge_(verdict, self._delta.sum().view(1), losses, self._number, self._scalars, skip, self._turn)
        outer_update_(self.state, self._delta, verdict.scalars, verdict.good, self.meta.outer)

    def reset(self) -> None:
        """Forget failed and skipped steps: the state is another one, of a checkpoint."""
        self._verdict.failed.fill_(-1)
        self._verdict.skipped.zero_()

    def failure(self) -> tuple[int, Tensor] | None:
        """Waits for the GPU. None, or the number of the first step that was not finite and its losses [B, K]; phi is as before it."""
        number = int(self._verdict.failed)
        return None if number < 0 else (number, self._verdict.failed_losses.T.cpu())

    def skipped(self) -> int:
        """Waits for the GPU. Steps that were not finite and left phi as it was."""
        return int(self._verdict.skipped)
