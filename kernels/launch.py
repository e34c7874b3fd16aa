"""What every kernel shares: the one launch, the checks of a launcher, block sizes, and the one `dot`. Whether kernels run at all: backend.py.

The folder has no `__init__.py`: a namespace package gives way to the package `kernels` that others publish, should this one be found at
the top level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import check_runs, interpreted
from mcdi_fast.errors import McdiError

FLOATS = (torch.float32, torch.bfloat16)
"""What a kernel reads. It computes and writes float32."""

_INTERPRETED = tl.constexpr(interpreted())


class Chip(NamedTuple):
    """What launchers ask of a GPU. capability: NVIDIA's, 90 for 9.0; 0 for other makes. shared: bytes of shared memory a program can have."""

    capability: int
    multiprocessors: int
    shared: int


HOPPER = Chip(90, 132, 227 * 1024)


class Launch(NamedTuple):
    """A kernel with everything it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Turn(NamedTuple):
    """Which row of a table of int64 a launch reads: `at`, int64 [1] on the device, so that a CUDA graph reads another one at every replay. What
    a launcher is given of the table is its part of row 0; there are `rows`, `pitch` numbers apart."""

    at: Tensor
    pitch: int
    rows: int


def turn_arguments(turn: Turn | None, device: torch.device) -> dict[str, Any]:
    """Of a kernel that may read a table. Raises McdiError unless launches on `device` can read it."""
    if turn is None:
        return {"turn": None, "pitch": 0}
    check_tensor("turn", turn.at, (1,), (torch.int64,), device)
    return {"turn": turn.at, "pitch": turn.pitch}


_recording: ContextVar[tuple[list[Launch], Chip] | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(chip: Chip = HOPPER) -> Iterator[list[Launch]]:
    """Launchers only list what they would launch on `chip`: for ahead-of-time compilation, counts and tests. Needs no GPU."""
    launches: list[Launch] = []
    token = _recording.set((launches, chip))
    try:
        yield launches
    finally:
        _recording.reset(token)


def launch(
    what: str, kernel: Any, grid: tuple[int, ...], device: torch.device, options: dict[str, Any] | None = None, **arguments
) -> None:  # fmt: skip
    """Launch where the tensors are, which need not be the current device; an absent tensor is None.

    Raises:
        McdiError: saying why `what` cannot run on `device`.
    """
    recorded = _recording.get()
    if recorded is not None:
        recorded[0].append(Launch(kernel, grid, arguments, options or {}))
        return
    check_runs(device, what)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **(options or {}))


def compiled(device: torch.device) -> bool:
    """Whether launches go to a GPU, whose programs run at the same time, or are listed for one; the interpreter's go one by one."""
    return _recording.get() is not None or (device.type == "cuda" and not interpreted())


def capture(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """`run` as a CUDA graph: a call launches all of it at once, on the memory of the capture. Run it before, for kernels compile at first.

    Other threads of the process may allocate and wait meanwhile ("thread_local").
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def chip(device: torch.device) -> Chip:
    """The chip's facts, asked of the chip once; Hopper's where the interpreter runs."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded[1]
    if device.type != "cuda":
        return HOPPER
    return _chip(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache
def _chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", 64 * 1024)
    capability = 0 if torch.version.hip else 10 * found.major + found.minor
    return Chip(capability, found.multi_processor_count, shared)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raise McdiError, naming the tensor, what was found and what was expected. No dimension may be empty (no tasks, no rows)."""
    if tuple(tensor.shape) != tuple(shape) or 0 in tensor.shape:
        raise McdiError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)} with no empty dimension")
    if tensor.dtype not in dtypes:
        raise McdiError(f"{name}: {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if device is not None and tensor.device != device:
        raise McdiError(f"{name}: on device {tensor.device}, expected {device}, where the first argument is")
    if contiguous and not tensor.is_contiguous():
        raise McdiError(f"{name}: strides {tensor.stride()}, expected a contiguous tensor; call .contiguous()")


def check_rank(name: str, tensor: Tensor, letters: str) -> tuple[int, ...]:
    """The shape of `tensor`, one number a letter, or McdiError."""
    if tensor.ndim != len(letters):
        raise McdiError(f"{name}: shape {tuple(tensor.shape)}, expected [{', '.join(letters)}]")
    return tuple(tensor.shape)


def check_apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise McdiError, naming both, where what is written shares memory with another operand. All are contiguous."""
    found = [(name, *_memory(tensor)) for name, tensor in (written | read).items()]
    for number, (name, storage, first, end) in enumerate(found[: len(written)]):
        for other, its_storage, its_first, its_end in found[number + 1 :]:
            if storage == its_storage and first < its_end and its_first < end:
                raise McdiError(
                    f"{name} is written and shares memory with {other}, expected memory of its own; call .clone()"
                )


def check_together(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise McdiError unless the tensors lie in one storage, as kernels expect that find all of them from the first one."""
    if len({_memory(tensor)[0] for tensor in tensors}) > 1:
        raise McdiError(f"{name}: tensors of several storages, expected views of one")


def _memory(tensor: Tensor) -> tuple[Any, Any, Any]:
    """Which storage, and the bytes of it from … to."""
    first = tensor.storage_offset() * tensor.element_size()
    return tensor.untyped_storage()._cdata, first, first + tensor.numel() * tensor.element_size()


def output(name: str, given: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The caller's float32 output, checked, or a new one. Every element of it is written by the kernel."""
    if given is None:
        return torch.empty(shape, device=device)
    check_tensor(name, given, shape, (torch.float32,), device)
    return given


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor from where a copy to `device` need not wait; torch keeps the memory until the copy is done."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


# Block sizes. No autotuning: in-place kernels would run twice, and the shapes are few. The reasons, not measurements (no GPU yet):
# - 128 threads move 1024 float32 as two 16-byte loads each;
# - a product has the weights' columns as its M, for Hopper's wgmma takes M = 64 only, and a task's rows, often fewer than 64, as its N;
# - 4 warps, Triton's default, are one group of Hopper's tensor cores.
BLOCK_COLUMNS = 64
PAD = 32
"""Rows that a product sums over end on a multiple of this, filled with zeros: no mask, and every copy is 16 bytes."""


def padded(width: int) -> int:
    """The next multiple of `PAD`."""
    return PAD * triton.cdiv(width, PAD)


def element_block(count: int) -> int:
    """Elements a program of an elementwise kernel handles at a time."""
    return min(1024, max(128, triton.next_power_of_2(count)))


def row_block(rows: int) -> int:
    """Rows of a task a program of a product handles: 16 (the least a tensor core takes as N without waste) to 64."""
    return min(64, max(16, triton.next_power_of_2(rows)))


def sum_block(precision: str) -> int:
    """Along the summed dimension: 32 numbers are a 128-byte line; float32 dots unroll it in registers and spilled with more than 16."""
    return 16 if precision == "ieee" else 32


def stages(precision: str) -> int:
    """Of a product's pipeline. For float32 two: what a third takes for addresses spilled on sm_80."""
    return 2 if precision == "ieee" else 3


def all_registers(device: torch.device) -> dict[str, int]:
    """Launch option: NVIDIA's assembler may use every register. On its own it aims for more programs a multiprocessor, and spills."""
    return {"maxnreg": 255} if chip(device).capability else {}


@triton.jit
def _round_to_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def across(x, PRECISION: tl.constexpr):
    """An operand whose memory runs across the sum: for tf32, rounded to its 10 bits.

    The rounding takes it through registers, and so the copy from global memory 16 bytes at a time: Hopper's tensor cores read tf32 from shared
    memory only along the sum, and without this the copy itself would turn the tile, 4 bytes at a time.
    """
    x = x.to(tl.float32)
    if PRECISION == "tf32":
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32, with operands as PRECISION says: float32 ("ieee"), "tf32" or "bf16"."""
    if PRECISION != "bf16":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    elif _INTERPRETED:  # it computes with raw bf16 bits; round by hand and multiply in float32, which is exact
        a, b = _round_to_bf16(a.to(tl.float32)), _round_to_bf16(b.to(tl.float32))
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    return acc
