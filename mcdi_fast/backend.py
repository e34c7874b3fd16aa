"""Which implementation runs where: the one switch between the Triton kernels and torch.

- impl="torch": plain torch, on any device.
- impl="triton": the kernels of `mcdi_fast.kernels`. Raises McdiError, saying why, where they cannot run: no CUDA device (and no
  TRITON_INTERPRET=1), a GPU that is too old, an operation that has no kernel for what was asked.
- impl="auto": the environment variable MCDI_IMPL (auto, triton or torch) where it is set; otherwise the kernels on a GPU wherever there is one
  for what was asked, and torch everywhere else, which is said once on a GPU; but on a CPU chains, inner loops with their noise and the
  trajectories of heads are compiled code where numba is installed (cpu_*.py).

TRITON_INTERPRET=1, set before triton is imported, runs the kernels in Python on the CPU: slow, for tests.

Triton itself is imported only where kernels run: it costs a quarter of a second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from mcdi_fast.errors import McdiError

Impl = Literal["auto", "triton", "torch"]
Precision = Literal["ieee", "tf32", "bf16"]
IMPLEMENTATIONS = ("auto", "triton", "torch")
PRECISIONS = ("ieee", "tf32", "bf16")

DEFAULT_PRECISION: Precision = "tf32"
"""How float32 are multiplied. ieee: as float32. tf32: on a GPU as tensor cores take them, with 11 bits; compiled code on a CPU with tile units as the
sum of two bfloat16, with 16 bits (cpu_tiles.py), elsewhere on a CPU as ieee. bf16: on a GPU with 8 bits, on a CPU as tf32. Sums are float32.

The default of what is called from outside kernels/. Measured on Omniglot (docs/choices.md): as accurate as float32 to a hundredth of a percent, and
the coarser bf16 likewise; of the two tensor-core precisions tf32 is the one that keeps tensors float32 and costs three digits less."""

OLDEST_CUDA = (8, 0)  # tf32 and bf16 products; the oldest target the kernels are compiled for ahead of time


class Backend(NamedTuple):
    """What computes, resolved once at the door and passed on inside."""

    device: torch.device = torch.device("cpu")
    kernels: bool = False
    """Whether the Triton kernels run; torch otherwise."""
    precision: Precision = DEFAULT_PRECISION
    """Of products (`DEFAULT_PRECISION`)."""
    compiled: bool = True
    """Whether code compiled by numba may run on a CPU, where it is installed."""

    @classmethod
    def at_door(
        cls, device: torch.device | str = "cpu", impl: str = "auto", precision: str = DEFAULT_PRECISION
    ) -> Backend:
        """From what a person asks for. Raises McdiError for an unknown or absent one, saying why."""
        found = check_device(device)
        check_precision(precision)
        kernels = resolve(impl, found) == "triton"
        return cls(found, kernels, precision, requested(impl) == "auto")  # type: ignore[arg-type]


@lru_cache
def numba_module(name: str) -> ModuleType | None:
    """mcdi_fast.<name>, code that numba compiles for a CPU; None where numba is not installed, or (which is said) cannot be used."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module(f"mcdi_fast.{name}")
    except ImportError as error:
        warnings.warn(f"numba is installed but cannot be used, torch computes instead: {error}", stacklevel=2)
        return None


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Torch's operations on one thread inside, where `wanted`; the calling thread's setting is as before behind it.

    Small operations are quicker so. And OpenMP's threads spin behind each parallel one, up to 1.5 ms, on the cores that compiled code wants next.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1 or not torch.backends.openmp.is_available():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def requested(impl: str) -> str:
    """What was asked for: `impl`, or for "auto" the environment variable MCDI_IMPL where it is set."""
    return (impl == "auto" and os.environ.get("MCDI_IMPL")) or impl


def resolve(impl: str, device: torch.device | str, missing: str | None = None) -> str:
    """Which implementation runs on `device`: "triton" or "torch".

    Args:
        impl: "triton", "torch" or "auto".
        missing: why there is no kernel for what is asked, where there is none: "auto" then takes torch.

    Raises:
        McdiError: an unknown name, or "triton" where it cannot run, saying why.
    """
    source = "impl" if impl != "auto" or not os.environ.get("MCDI_IMPL") else "environment variable MCDI_IMPL"
    impl = requested(impl)
    if impl not in IMPLEMENTATIONS:
        raise McdiError(f"{source} = {impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    device = torch.device(device)
    if impl == "auto":
        if device.type != "cuda" or _triton() is None:
            return "torch"
        trouble = missing or (_unsupported(_number(device)) if torch.cuda.is_available() else "")
        if trouble:
            _say_once(f"torch computes on {device}, not the Triton kernels: {trouble}")
        return "torch" if trouble else "triton"
    if impl == "triton":
        if missing:
            raise McdiError(f"{source} = 'triton' cannot run: {missing}; use impl='torch'")
        check_runs(device, f"{source} = 'triton'")
    return impl


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when triton was imported: kernels then run in Python, on any device."""
    triton = _triton()
    return triton is not None and bool(triton.knobs.runtime.interpret)


def _triton() -> Any:
    """The module; None where it is not installed, as on macOS, for which there are no wheels."""
    try:
        import triton
    except ImportError:
        return None
    return triton


def check_runs(device: torch.device, what: str) -> None:
    """Raise McdiError, saying why, where kernels cannot run on `device`. what: who asks, for the message."""
    if _triton() is None:
        raise McdiError(
            f"{what} cannot run: triton is not installed (it runs on Linux); use impl='torch', or install it there"
        )
    if interpreted():
        return
    if not torch.cuda.is_available():
        raise McdiError(
            f"{what} cannot run: torch finds no CUDA device; use impl='torch', or set TRITON_INTERPRET=1 before the start (slow, for tests)"
        )
    if device.type != "cuda":
        raise McdiError(f"{what} cannot run on device {device}: move the tensors to a CUDA device, or use impl='torch'")
    trouble = _unsupported(_number(device))
    if trouble:
        raise McdiError(f"{what} cannot run: {trouble}; use impl='torch'")


def _number(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


@lru_cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


@lru_cache
def _unsupported(index: int) -> str:
    """Why the kernels do not support this GPU; empty where they do."""
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return ""  # compiled ahead of time for gfx942 alone; the compiler itself refuses what a chip cannot do
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CUDA:
        found, oldest = (f"{major}.{minor}" for major, minor in (capability, OLDEST_CUDA))
        return f"cuda:{index} ({name}) has compute capability {found}, expected at least {oldest}"
    return ""


def check_precision(precision: str) -> None:
    """Raise McdiError for a precision that is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise McdiError(f"precision = {precision!r}: expected one of {', '.join(PRECISIONS)}")


def check_device(device: torch.device | str) -> torch.device:
    """The device by name, or McdiError where torch does not know it or cannot use it."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise McdiError(f"device {str(device)!r:.40}: expected cpu, cuda or cuda:<number>") from error
    if found.type not in ("cpu", "cuda"):
        raise McdiError(f"device {str(device)!r:.40}: expected cpu, cuda or cuda:<number>")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise McdiError(
                f"device {device}: torch finds no CUDA device; use cpu, or a CUDA build of torch on a machine with a GPU"
            )
        if (found.index or 0) >= torch.cuda.device_count():
            raise McdiError(f"device {device}: torch finds {torch.cuda.device_count()} CUDA device(s), counted from 0")
    return found
