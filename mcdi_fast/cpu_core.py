"""What compiled code on a CPU (numba, the extra `cpu`) is made of: matrix products without the interpreter, exp, and threads.

A product goes to the `sgemm` of the BLAS that torch brings, by its Fortran interface, which every BLAS has. Called from compiled code it takes
less than a microsecond to start, and on Intel reaches 70 % of its peak with five rows and 90 % with eighty (docs/performance.md); through torch's
operations five rows reach a sixth. On AMD it does not, and most products are our own (cpu_vectors.py). Where torch has no such symbol to offer this
module cannot be imported, and torch computes instead.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from mcdi_fast import cpu_vectors

_f32 = np.float32
_SGEMM = "mcdi_fast_sgemm"
_ITEM = 4  # bytes of a float32
LINE = 16  # float32 in a cache line
_VECTORS = cpu_vectors.available  # a constant, by which numba leaves out the other way

FAST: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
"""Options of `njit`. numpy's error model: a division that looks for zeros is not vectorised."""


def _torch_library() -> ctypes.CDLL:
    """The library with torch's CPU operations, in which, or in what it links to, its BLAS is."""
    names = "libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"
    found = [path for path in (Path(torch.__file__).parent / "lib" / name for name in names) if path.exists()]
    if not found:
        raise ImportError("torch's library of CPU operations is not where its wheels have it")
    return ctypes.CDLL(str(found[0]))


_library = _torch_library()
try:
    binding.add_symbol(_SGEMM, ctypes.cast(_library.sgemm_, ctypes.c_void_p).value)
except AttributeError as error:
    raise ImportError("torch's library offers no sgemm") from error


def _threads_of_products(library: Any) -> Callable[[int], int]:
    """Sets how many threads the products of the calling thread alone take, and returns how many it were."""
    if hasattr(library, "MKL_Set_Num_Threads_Local"):
        return library.MKL_Set_Num_Threads_Local
    if not hasattr(library, "omp_set_num_threads"):
        return lambda count: count

    def swap(count: int) -> int:  # OpenBLAS, which asks OpenMP
        before = library.omp_get_max_threads()
        library.omp_set_num_threads(count)
        return before

    return swap


_own_threads = _threads_of_products(_library)


def compiled(function: Callable) -> Any:
    """`njit` of what Python calls: kept on disk, and other threads run meanwhile."""
    try:
        return njit(cache=True, nogil=True, **FAST)(function)
    except RuntimeError:  # no folder to keep it in
        return njit(nogil=True, **FAST)(function)


@intrinsic
def _sgemm(typingctx, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """Fortran's: all by address, columns first."""
    kinds: list[Any] = [types.uint8] * 2 + [types.int64] * 3
    kinds += [types.float32, types.intp, types.int64, types.intp, types.int64, types.float32, types.intp, types.int64]
    pointers = {6, 8, 11}

    def codegen(context, builder, signature, values):
        byte = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [byte] * 13), _SGEMM)
        given = []
        for number, value in enumerate(values):
            if number in pointers:
                given.append(builder.inttoptr(value, byte))
            else:  # of the integers a BLAS reads the lower half, or all
                given.append(builder.bitcast(cgutils.alloca_once_value(builder, value), byte))
        builder.call(function, given)
        return context.get_dummy_value()

    return types.void(*kinds), codegen


@njit
def product(a, b, out, beta):
    """out = a b + beta out, of matrices [m, k], [k, n], [m, n] of at least one number; with beta = 0 out is only written.

    Slices of columns will do, and of a and b transposed views.
    """
    (m, n), (a_row, a_column), (b_row, b_column) = out.shape, a.strides, b.strides
    left, right, to = a.ctypes.data, b.ctypes.data, out.ctypes.data
    _product(left, a_row, a_column, right, b_row, b_column, to, out.strides[0], m, n, a.shape[1], _f32(beta))


@njit
def _product(a, a_row, a_column, b, b_row, b_column, out, out_row, m, n, k, beta):
    """By addresses and strides, so that it is compiled once."""
    if _VECTORS:
        cpu_vectors.product_at(a, a_row, a_column, b, b_row, b_column, out, out_row, m, n, k, beta)
        return
    # a matrix in rows is its transpose in columns, so out' = b' a'
    across_a, across_b = a_column != _ITEM, b_column != _ITEM
    lda = max(a_column // _ITEM, m) if across_a else max(a_row // _ITEM, k)
    ldb = max(b_column // _ITEM, k) if across_b else max(b_row // _ITEM, n)
    trans_a, trans_b = np.uint8(84 if across_a else 78), np.uint8(84 if across_b else 78)  # T, N
    ldc = max(out_row // _ITEM, n)
    _sgemm(trans_b, trans_a, n, m, k, _f32(1), b, ldb, a, lda, beta, out, ldc)  # type: ignore[call-arg]


@njit(inline="always")
def exp(v):
    """e^v of a float32 to two units in the last place (Cephes expf), in operations that fill vector registers."""
    v = min(max(v, _f32(-87.0)), _f32(87.0))
    n = np.floor(v * _f32(1.44269504) + _f32(0.5))
    r = v - n * _f32(0.693359375) + n * _f32(2.12194440e-4)
    p = _f32(1.9875691500e-4)
    p = p * r + _f32(1.3981999507e-3)
    p = p * r + _f32(8.3334519073e-3)
    p = p * r + _f32(4.1665795894e-2)
    p = p * r + _f32(1.6666665459e-1)
    p = p * r + _f32(5.0000001201e-1)
    power = np.int32((np.int32(n) + 127) << 23).view(np.float32)  # 2^n, by the exponent's bits
    return (p * r * r + r + _f32(1.0)) * power


@njit(**FAST)
def copy(x, out):
    """The rows of x into the first columns of out, one by one: an assignment of slices would compile for two seconds, for its error message."""
    for i in range(len(out)):
        row, to = x[i], out[i]
        for j in range(len(row)):
            to[j] = row[j]


@intrinsic
def _pointer(typingctx, array, at):
    """To an entry of a contiguous array, whose strides it does not look at."""

    def codegen(context, builder, signature, values):
        return builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]])

    return types.CPointer(array.dtype)(array, types.intp), codegen


@njit
def bare(a):
    """The same numbers of a contiguous array, which the caller holds: views of it are made without counting them, 4 % of a small meta-step."""
    return carray(_pointer(a, 0), a.shape)  # type: ignore[call-arg]


@njit
def matrix(flat, at, rows, columns):
    """A view [rows, columns] of a contiguous flat one from an entry on, which the caller holds."""
    return carray(_pointer(flat, at), (rows, columns))  # type: ignore[call-arg]


def lines(size: int) -> int:
    """size, rounded up to whole cache lines: what `take` takes of scratch."""
    return (size + LINE - 1) // LINE * LINE


_lines = njit(lines)


@njit
def take(scratch, rows, columns):
    """The first rows x columns of scratch as a matrix, and the rest of scratch, which starts at a cache line as scratch does."""
    size = rows * columns
    return scratch[:size].reshape(rows, columns), scratch[_lines(size) :]


@njit
def take_lines(scratch, rows, columns):
    """`take`, every row from a cache line on: sgemm takes 6 to 17 % less time."""
    found, scratch = take(scratch, rows, _lines(columns))
    return found[:, :columns], scratch


def aligned(size: int) -> np.ndarray:
    """float32 [size], uninitialised, from a cache line on: a BLAS may round otherwise at other addresses."""
    memory = np.empty(size + LINE, _f32)
    return memory[-memory.ctypes.data % 64 // _ITEM :][:size]


def kept(size: int) -> np.ndarray:
    """`aligned` memory that a thread keeps from call to call, for scratch: fresh memory is cleared page by page, up to a third of a meta-step."""
    found = vars(_kept).get("memory")
    if found is None or len(found) < size:
        found = _kept.memory = aligned(size)
    return found[:size]


_kept = threading.local()


def by_threads(run: Callable[[int, int], Any], tasks: int, least: int = 1) -> list[Any]:
    """What run(first, end) returns for each share of the tasks, a share a thread, on as many threads as torch has.

    least: tasks a thread must have to be worth starting.
    """
    threads = max(1, min(torch.get_num_threads(), tasks // least))

    def share(number: int) -> Any:
        before = _own_threads(1)
        try:
            return run(number * tasks // threads, (number + 1) * tasks // threads)
        finally:
            _own_threads(before)

    if threads == 1:
        return [share(0)]
    others = [_workers().submit(share, number) for number in range(1, threads)]
    try:
        return [share(0), *(other.result() for other in others)]
    finally:
        wait(others)  # whatever was raised: they write to what the caller may give back


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    """Threads that stay: to start one costs as much as a head."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "mcdi_fast")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a fork has none of its parent's threads
