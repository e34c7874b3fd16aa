"""Float32 products by the bfloat16 tile units of recent Intel processors (AMX), in compiled code (numba, the extra `cpu`).

A float32 is the sum of two bfloat16, hi + lo, and a rest of 2^-16 of it at most. So a b is hi hi + hi lo + lo hi, three products of the tile units,
which sum in float32. What is left out is at most 3 x 2^-16 of the sum of |a| |b|, 4e-6 of a result in the root mean square: ten to twenty times what
float32 products lose by rounding, a sixtieth of what TF32 does. A product takes a quarter to a half of sgemm's time (docs/performance.md).

First a matrix is packed, in panels of 32 x 32: four tiles, hi of 16 and of the next 16, then lo. A tile has 16 rows of 16 pairs. A pair are two
neighbours along the dimension that is summed. A tile of the left factor has a row for each of its rows, one of the right factor a row for each pair,
so one is the other transposed. Every entry is summed in the same order, wherever it lies: a row is the same to the bit in any company.

numba has no such operations, so they are assembly. Where it cannot be assembled nothing is, and `available` is false.
"""

# numba gives an intrinsic its first argument
# mypy: disable-error-code="call-arg"

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from mcdi_fast.cpu_assembly import assembly, compiled_for, transposition

_PANEL = 32
_FLOATS = _PANEL * _PANEL  # of memory, a panel
_BYTES = 4 * _FLOATS
_ORDER, _SETTING, _SPACE = 0, 16, 32  # parts of a workspace, in float32
_ALL = 0xFFFFFFFF
ROWS = 48
"""From which a product of a single task is worth packing both factors."""


def _permitted() -> bool:
    """Linux lets a process use tiles once it has asked."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


assembled = compiled_for("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512bf16")
available = assembled and _permitted()
"""Whether this process may use the tile units."""


def used(precision: str) -> bool:
    """Whether products of a precision (`backend.DEFAULT_PRECISION`) are theirs."""
    return available and precision != "ieee"


def _assembly(text: str, count: int) -> Any:
    """Of `count` integers."""
    return assembly(text, [types.int64] * count, ("r8", "r9", "r10", "r11"), assembled)


# 1 to 16 rows of 32 columns to rows of a tile
_ROWS = """
mov $0, %r8
mov $4, %r9
mov $2, %r10
mov $3, %r11
kmovd %r11d, %k1
kshiftrd $$16, %k1, %k2
1:
vmovups (%r8), %zmm0 {%k1} {z}
vmovups 64(%r8), %zmm1 {%k2} {z}
vcvtne2ps2bf16 %zmm0, %zmm1, %zmm2
vmovdqa64 %zmm2, (%r9)
vpmovzxwd %ymm2, %zmm3
vextracti64x4 $$1, %zmm2, %ymm4
vpmovzxwd %ymm4, %zmm4
vpslld $$16, %zmm3, %zmm3
vpslld $$16, %zmm4, %zmm4
vsubps %zmm3, %zmm0, %zmm0
vsubps %zmm4, %zmm1, %zmm1
vcvtne2ps2bf16 %zmm0, %zmm1, %zmm2
vmovdqa64 %zmm2, 2048(%r9)
add $1, %r8
add $$64, %r9
dec %r10
jnz 1b
"""

# 1 to 32 rows of 16 columns to 16 rows of pairs, of zeros behind the last; $5: the order of a row's halves once they alternate
_PAIRS = """
mov $0, %r8
mov $4, %r9
mov $2, %r10
mov $3, %r11
kmovd %r11d, %k1
vmovdqa64 ($5), %zmm5
vpternlogd $$255, %zmm6, %zmm6, %zmm6
vpslld $$16, %zmm6, %zmm6
mov $$16, %r11
1:
vpxord %zmm0, %zmm0, %zmm0
vpxord %zmm1, %zmm1, %zmm1
cmp $$1, %r10
jl 2f
vmovups (%r8), %zmm0 {%k1} {z}
je 2f
vmovups (%r8,$1,1), %zmm1 {%k1} {z}
2:
vcvtne2ps2bf16 %zmm0, %zmm1, %zmm2
vpermw %zmm2, %zmm5, %zmm2
vmovdqa64 %zmm2, (%r9)
vpslld $$16, %zmm2, %zmm3
vpandd %zmm6, %zmm2, %zmm4
vsubps %zmm3, %zmm0, %zmm0
vsubps %zmm4, %zmm1, %zmm1
vcvtne2ps2bf16 %zmm0, %zmm1, %zmm2
vpermw %zmm2, %zmm5, %zmm2
vmovdqa64 %zmm2, 2048(%r9)
lea (%r8,$1,2), %r8
add $$64, %r9
sub $$2, %r10
dec %r11
jnz 1b
"""


def _multiplication(tall: bool, wide: bool) -> str:
    """Panels of the left factor at $0 times panels of the right one at $1, $2 of each, to the result at $3 of $4 bytes a row, added if $5.

    tall: more than 16 rows; wide: more than 16 columns. Tiles 0 to 3 are the result, 4 and 5 the left factor, 6 and 7 the right one.
    """
    result = [2 * row + column for row in range(1 + tall) for column in range(1 + wide)]
    find = ["mov $4, %r11", "mov $3, %r8", "lea (,%r11,8), %r9", "lea (%r8,%r9,2), %r9"]  # the result, and its 17th row
    lines = [*find, "test $5, $5", "jz 1f"]
    where = [f"{64 * (tile % 2)}(%{'r9' if tile // 2 else 'r8'},%r11,1)" for tile in result]
    lines += [f"tileloadd {at}, %tmm{tile}" for tile, at in zip(result, where, strict=True)]
    lines += ["jmp 2f", "1:", *(f"tilezero %tmm{tile}" for tile in result), "2:"]
    lines += ["mov $0, %r8", "mov $1, %r9", "mov $2, %r10", "mov $$64, %r11", "3:"]
    held: dict[int, int] = {}

    def load(tile: int, register: str, at: int) -> None:
        if held.get(tile) != at:
            lines.append(f"tileloadd {1024 * at}(%{register},%r11,1), %tmm{tile}")
            held[tile] = at

    hi, lo = 0, 2
    for left, right in ((hi, hi), (hi, lo), (lo, hi)):
        for tile in result:
            row, column = divmod(tile, 2)
            load(4 + row, "r8", left + row)
            load(6 + column, "r9", right + column)
            lines.append(f"tdpbf16ps %tmm{6 + column}, %tmm{4 + row}, %tmm{tile}")
    lines += [f"add $${_BYTES}, %r8", f"add $${_BYTES}, %r9", "dec %r10", "jnz 3b"]
    lines += find
    lines += [f"tilestored %tmm{tile}, {at}" for tile, at in zip(result, where, strict=True)]
    return "\n".join(lines)


@intrinsic
def _rows(typingctx, address, stride, rows, columns, out):
    return _assembly(_ROWS, 5)


@intrinsic
def _pairs(typingctx, address, stride, rows, columns, out, order):
    return _assembly(_PAIRS, 6)


@intrinsic
def _transpose(typingctx, address):
    rows = [f"{64 * row}($0)" for row in range(16)]  # where it lies
    loads = [f"vmovdqa64 {at}, %zmm{row}" for row, at in enumerate(rows)]
    return _assembly("\n".join([*loads, *transposition(rows)]), 1)


@intrinsic
def _configure(typingctx, setting):
    return _assembly("ldtilecfg ($0)", 1)


def _multiplier(tall: bool, wide: bool) -> Any:
    @intrinsic
    def multiply(typingctx, left, right, steps, out, stride, add):
        return _assembly(_multiplication(tall, wide), 6)

    return multiply


_multiply_16_16, _multiply_16_32 = _multiplier(False, False), _multiplier(False, True)
_multiply_32_16, _multiply_32_32 = _multiplier(True, False), _multiplier(True, True)


@intrinsic
def _release(typingctx):
    return _assembly("tilerelease", 0)


def packed(rows: int, columns: int) -> int:
    """float32 that a matrix takes in panels."""
    return ((rows + _PANEL - 1) // _PANEL) * ((columns + _PANEL - 1) // _PANEL) * _FLOATS


_packed = njit(packed)


@njit
def _steps(summed):
    return (summed + _PANEL - 1) // _PANEL


def workspace(summed: int, right: int = 0) -> int:
    """float32 that products need besides their factors and result, of so many numbers summed; right: of a right factor that is not packed already."""
    return _SPACE + packed(_PANEL, summed) + right


@njit
def prepare(space):
    """Memory of `workspace` for products."""
    order, setting = space[_ORDER:_SETTING].view(np.uint16), space[_SETTING:_SPACE].view(np.uint8)
    for i in range(16):
        order[2 * i], order[2 * i + 1] = i, 16 + i
    setting[:] = 0
    setting[0] = 1  # the palette


@njit
def pack(x, left, out, space):
    """The factor x [rows, summed], contiguous along one of the two, to panels in `out`; the right factor is given transposed."""
    size, summed = x.shape
    along = x.strides[1] == 4
    stride = x.strides[0] if along else x.strides[1]
    _pack(x.ctypes.data, stride, size, summed, along, left, out.ctypes.data, space.ctypes.data)


@njit
def _pack(address, stride, size, summed, along, left, out, order):
    """By addresses, so that it is compiled once."""
    steps = _steps(summed)
    for first in range(0, size, 16):
        for step in range(steps):
            start = step * _PANEL
            to = out + (first // _PANEL * steps + step) * _BYTES + first % _PANEL // 16 * 1024
            if along:
                mask = _ALL >> max(0, _PANEL - (summed - start))
                _rows(address + first * stride + start * 4, stride, min(16, size - first), mask, to)
            else:
                mask = 0xFFFF >> max(0, 16 - (size - first))
                _pairs(address + start * stride + first * 4, stride, min(_PANEL, summed - start), mask, to, order)
            if along != left:
                _transpose(to)
                _transpose(to + 2048)


@njit
def times(a, right, out, add, space):
    """out = a b (+ out), b packed already. A panel of a does not leave the cache before it is used."""
    left = space[_SPACE:]
    (m, n), steps = out.shape, _steps(a.shape[1])
    setting, set_rows, set_columns = space[_SETTING:_SPACE].view(np.uint8), 0, 0
    x, to, stride, onto = left.ctypes.data, out.ctypes.data, out.strides[0], 1 if add else 0
    for i in range(0, m, _PANEL):
        rows = min(_PANEL, m - i)
        pack(a[i : i + rows], True, left, space)
        for j in range(0, n, _PANEL):
            columns = min(_PANEL, n - j)
            w, at = right.ctypes.data + j // _PANEL * steps * _BYTES, to + i * stride + j * 4
            if rows != set_rows or columns != set_columns:
                set_rows, set_columns = rows, columns
                _set(setting, rows, columns)
                _configure(setting.ctypes.data)
            if rows > 16:
                if columns > 16:
                    _multiply_32_32(x, w, steps, at, stride, onto)
                else:
                    _multiply_32_16(x, w, steps, at, stride, onto)
            elif columns > 16:
                _multiply_16_32(x, w, steps, at, stride, onto)
            else:
                _multiply_16_16(x, w, steps, at, stride, onto)
    _release()


@njit
def _set(setting, rows, columns):
    """The sizes of the tiles of a block of the result."""
    for tile in range(8):
        setting[16 + 2 * tile] = 64  # bytes of a row
        setting[48 + tile] = 16  # rows
    for row in range(2):
        high = min(16, max(1, rows - 16 * row))
        setting[48 + 4 + row] = high
        for column in range(2):
            wide = 4 * min(16, max(1, columns - 16 * column))
            setting[48 + 2 * row + column] = high
            setting[16 + 2 * (2 * row + column)] = wide
            setting[16 + 2 * (6 + column)] = wide


@njit
def worth(m, k, n):
    """Whether `product` [m, k] [k, n] takes less time than sgemm (measured: widths 32 to 256, 20 to 768 rows)."""
    return min(m, n) >= ROWS and k >= 32


@njit
def worth_of_scores(rows, summed):
    """The same of some rows with as many others, where one factor is packed for several products (measured: 4 to 40 rows, 64 to 276 numbers)."""
    return rows >= 12 and summed >= 128


@njit
def workspace_of_left(summed):
    """Where memory for a right factor begins in a workspace, behind what a product takes for the left one."""
    return _SPACE + _packed(_PANEL, summed)


@njit
def product(a, b, out, add, space):
    """out = a b (+ out), as `cpu_core.product`."""
    right = space[workspace_of_left(a.shape[1]) :]
    pack(b.T, False, right, space)
    times(a, right, out, add, space)
