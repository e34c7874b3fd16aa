"""What every kernel shares: the checks of a launcher, block sizes, and the one `dot`. Whether kernels run at all: mcdi_fast/backend.py.

The folder has no `__init__.py`: a namespace package gives way to the package `kernels` that others publish, should this one be found at
the top level.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.backend import interpreted
from mcdi_fast.errors import McdiError

FLOATS = (torch.float32, torch.bfloat16)
"""What a kernel reads. It computes and writes float32."""

_INTERPRETED = tl.constexpr(interpreted())


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


def output(name: str, given: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The caller's float32 output, checked, or a new one. Every element of it is written by the kernel."""
    if given is None:
        return torch.empty(shape, device=device)
    check_tensor(name, given, shape, (torch.float32,), device)
    return given


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Launch where the tensors are, which need not be the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor from where a copy to `device` need not wait; torch keeps the memory until the copy is done."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


# Block sizes. No autotuning: in-place kernels would run twice, and the shapes are few. The reasons, not measurements (no GPU yet):
# - 128 threads move 1024 float32 as two 16-byte loads each;
# - a product has the weights' columns as its M, for Hopper's wgmma takes M = 64 only, and a task's rows, often fewer than 64, as its N;
# - 4 warps, Triton's default, are one group of Hopper's tensor cores.
BLOCK_COLUMNS = 64


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


def all_registers() -> dict[str, int]:
    """Launch option: NVIDIA's assembler may use every register. On its own it aims for more programs a multiprocessor, and spills."""
    return {} if torch.version.hip else {"maxnreg": 255}


@triton.jit
def _round_to_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32, with operands as PRECISION says: float32 ("ieee"), "tf32" or "bf16"."""
    if PRECISION != "bf16":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    elif (
        _INTERPRETED
    ):  # the interpreter computes with raw bf16 bits; round by hand and multiply in float32, which is exact
        a, b = _round_to_bf16(a.to(tl.float32)), _round_to_bf16(b.to(tl.float32))
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    return acc
