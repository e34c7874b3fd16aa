"""Several processes, one run: what each is to do, and the few tensors they exchange.

`torchrun --nproc-per-node 2 -m mcdi_fast.train …` starts them; `join` reads torchrun's environment. What is computed does not depend on their
number: every process draws the whole meta-batch and takes its own tasks of it. Files are the business of rank 0 alone.

Nothing here looks for a process group by itself, so that `fit` inside somebody's distributed program does what it is told: a `Ranks` is handed in.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcdi_fast.backend import check_device
from mcdi_fast.errors import McdiError, reason_of

# A process that dies is noticed at once, by its closed connections; this is for one that hangs. The others wait this long while rank 0 trains
# the backbone.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of a run, which talk through torch's default process group.

    Attributes:
        rank: 0 to size - 1. size: number of processes; with 1 every method below does nothing.

    Raises:
        McdiError: by every exchange, when another process has ended.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` items are this process's: contiguous, sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> None:
        """Sum over the processes, in place; every one has the same bits afterwards."""
        if self.size > 1:
            with self._exchange():
                dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite with rank 0's."""
        if self.size > 1:
            with self._exchange():
                dist.broadcast(tensor, 0)

    def broadcast_number(self, number: int) -> int:
        """Rank 0's number."""
        found = torch.tensor([number], device="cpu")
        self.broadcast_(found)
        return int(found)

    def send_to_main(self, tensor: Tensor) -> None:
        """Send to rank 0, which calls `receive`."""
        with self._exchange():
            dist.send(tensor, 0)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Fill the tensor with what rank `source` sends."""
        with self._exchange():
            dist.recv(tensor, source)
        return tensor

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo and NCCL alike, with stack traces in the text
            reason = " ".join(str(error).split("\n")[0].split())[:160]
            raise McdiError(
                f"rank {self.rank} of {self.size}: another process of this run has ended or cannot be reached ({reason}); see its message, "
                "then give the same command again: it goes on from the last checkpoint"
            ) from error


ALONE = Ranks()


@contextlib.contextmanager
def join(device: str) -> Iterator[tuple[Ranks, str]]:
    """Take this process's place in the run that torchrun's environment describes; alone where there is none.

    Args:
        device: "cuda" becomes the GPU of this process, cuda:<LOCAL_RANK>.

    Yields:
        Ranks and the device.

    Raises:
        McdiError: an environment that contradicts itself; the other processes do not answer. Inside: SIGTERM, by which torchrun stops the
            processes that are left when one has died, raises it too.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE, device
        return
    if not dist.is_available():
        raise McdiError("WORLD_SIZE is set, but this torch is built without torch.distributed; run one process")
    ranks = Ranks(_number("RANK", -1), size)
    if device == "cuda":
        device = f"cuda:{_number('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.cuda.set_device(check_device(device))
    try:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise McdiError(
            f"rank {ranks.rank} of {size}: cannot meet the other processes ({reason_of(error)}); start them by torchrun"
        ) from error
    try:
        with _stopped_by_sigterm(ranks):
            yield ranks, device
    finally:
        with contextlib.suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


@contextlib.contextmanager
def _stopped_by_sigterm(ranks: Ranks) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise McdiError(
            f"rank {ranks.rank} of {ranks.size}: told to stop (SIGTERM), as torchrun does when another process has ended; see its message, "
            "then give the same command again: it goes on from the last checkpoint"
        )

    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise McdiError(f"environment variable {name} = {text!r:.40}: expected a number; start the run by torchrun")
    return int(text)
