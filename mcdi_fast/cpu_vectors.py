"""Float32 products by AVX512 in assembly, for compiled code (numba, the extra `cpu`), where torch's BLAS is not at home.

On an AMD EPYC (Zen 4) MKL's products copy both factors first, and reach 75 to 86 % of the peak with many rows, 39 with five. These read factors where
they lie, and reach 89 to 95 and 91 (docs/performance.md).

Where the right factor's rows are contiguous its columns fill the vectors, and each entry of the left factor is multiplied by a row of it
(`_by_columns`): up to 12 rows and 32 columns of the result stay in registers. A transposed right factor is turned part by part on the way. Where both
factors are contiguous along what is summed and few columns are wanted, that fills the vectors (`_by_sums`): up to 5 rows and 4 columns, added up at
the end. Every entry is summed in the same order, wherever it lies: a row is the same to the bit in any company.
"""

# numba gives an intrinsic its first argument
# mypy: disable-error-code="call-arg"

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from mcdi_fast.cpu_assembly import assembly, compiled_for, processor, stack, transposition

_f32 = np.float32
_ITEM = 4  # bytes of a float32
_LANES = 16  # float32 of a vector
_HIGH, _WIDE = 12, 2 * _LANES  # rows and columns of a block of the result, by columns
_SUMS_HIGH, _SUMS_WIDE = 5, 4  # and by sums
_ALL = 0xFFFFFFFF
_DEEP = 256  # rows of a panel
_LARGE = 1 << 21  # numbers of a right factor from which copies of its parts pay

assembled = compiled_for("avx512f", "avx512bw")
available = assembled and processor().startswith("znver")
"""Whether products are theirs: measured on Zen 4, whose like Zen 5 is. On Intel's processors MKL is at home."""

# a block's list: which text; addresses of the factors and the result, of each the bytes from row to row (of the right factor by sums: from column to
# column), of the left one from column to column too (by sums: the mask of the last vector that is summed); how many rows, or vectors, are summed; the
# mask of the columns; beta
_CHOICE, _LEFT, _LEFT_ROW, _LEFT_COLUMN, _RIGHT, _RIGHT_ROW, _COUNT, _OUT, _OUT_ROW, _COLUMNS, _BETA = range(11)
_REST = _LEFT_COLUMN  # by sums
_KINDS = [types.int64] * _BETA + [types.float32]
_POINTERS = "r8", "r9", "r10", "r11"
_SCRATCH = "rax", "rcx", "rdx", "rsi", "rdi", *_POINTERS
_FEW = "rax", "rcx", "rdx", "rdi"  # where arguments need registers too


def _field(number: int) -> str:
    return f"{8 * number}($0)"


def _rows(rows: int) -> list[str]:
    """Where rows are: the pointers are three apart, rax is from one to the next."""
    return [f"(%{_POINTERS[r // 3]}{('', ',%rax,1', ',%rax,2')[r % 3]})" for r in range(rows)]


def _find(first: int, step: int) -> list[str]:
    """So that they are."""
    lines = [f"mov {_field(first)}, %r8", f"mov {_field(step)}, %rax", "lea (%rax,%rax,2), %r11"]
    return [*lines, "lea (%r8,%r11), %r9", "lea (%r9,%r11), %r10", "add %r10, %r11"]


def _store(sums: list[list[int]]) -> list[str]:
    """The result = sums + beta times the result: of each row the vectors."""
    lines = [*_find(_OUT, _OUT_ROW), f"vbroadcastss {_field(_BETA)}, %zmm31"]
    lines += [f"testl $$0x7fffffff, {_field(_BETA)}", "jz 9f"]  # by 0 the result is only written: it may be NaN
    places = [
        (vector, f"{64 * v}{at}", f"{{%k{1 + v}}}")
        for row, at in zip(sums, _rows(len(sums)), strict=True)
        for v, vector in enumerate(row)
    ]
    lines += [f"vfmadd231ps {at}, %zmm31, %zmm{vector} {mask}" for vector, at, mask in places]
    return [*lines, "9:", *(f"vmovups %zmm{vector}, {at} {mask}" for vector, at, mask in places)]


def _columns_text(rows: int, vectors: int) -> str:
    """A block of the result by columns. zmm24 to 29 hold entries of the left factor, 30 and 31 a row of the right one."""
    sums = [[vectors * r + v for v in range(vectors)] for r in range(rows)]
    lines = [f"kmovw {_field(_COLUMNS)}, %k1", f"kmovw 2 + {_field(_COLUMNS)}, %k2", *_find(_LEFT, _LEFT_ROW)]
    lines += [f"mov {_field(_LEFT_COLUMN)}, %rcx", f"mov {_field(_RIGHT)}, %rsi", f"mov {_field(_RIGHT_ROW)}, %rdx"]
    lines += [f"mov {_field(_COUNT)}, %rdi", *(f"vpxord %zmm{n}, %zmm{n}, %zmm{n}" for row in sums for n in row), "1:"]
    lines += [f"vmovups {64 * v}(%rsi), %zmm{30 + v} {{%k{1 + v}}} {{z}}" for v in range(vectors)]
    for r, at in enumerate(_rows(rows)):
        lines.append(f"vbroadcastss {at}, %zmm{24 + r % 6}")
        lines += [f"vfmadd231ps %zmm{30 + v}, %zmm{24 + r % 6}, %zmm{n}" for v, n in enumerate(sums[r])]
    lines += ["add %rdx, %rsi", *(f"add %rcx, %{pointer}" for pointer in _POINTERS[: (rows + 2) // 3])]
    return "\n".join([*lines, "dec %rdi", "jnz 1b", *_store(sums)])


def _sums_text(rows: int) -> str:
    """A block by sums. zmm20 to 23 hold vectors of the right factor's columns, zmm24 one of the left factor."""
    sums = [[4 * r + c for c in range(4)] for r in range(rows)]
    columns = ["(%rsi)", "(%rsi,%rdx,1)", "(%rsi,%rdx,2)", "(%rsi,%rcx,1)"]
    lines = ["kxnorw %k1, %k1, %k1", *_find(_LEFT, _LEFT_ROW), f"mov {_field(_RIGHT)}, %rsi"]
    lines += [f"mov {_field(_RIGHT_ROW)}, %rdx", "lea (%rdx,%rdx,2), %rcx", f"mov {_field(_COUNT)}, %rdi"]
    lines += [*(f"vpxord %zmm{n}, %zmm{n}, %zmm{n}" for row in sums for n in row), "1:", "dec %rdi", "jnz 2f"]
    lines += [f"kmovw {_field(_REST)}, %k1", "2:"]
    lines += [f"vmovups {at}, %zmm{20 + c} {{%k1}} {{z}}" for c, at in enumerate(columns)]
    for row, at in zip(sums, _rows(rows), strict=True):
        lines.append(f"vmovups {at}, %zmm24 {{%k1}} {{z}}")
        lines += [f"vfmadd231ps %zmm{20 + c}, %zmm24, %zmm{n}" for c, n in enumerate(row)]
    lines += [*(f"add $$64, %{pointer}" for pointer in ("r8", "r9", "rsi")), "test %rdi, %rdi", "jnz 1b"]
    for a, b, c, d in sums:  # the 16 sums in each of four become a vector of four, in the first
        for first, second in ((a, b), (c, d)):
            lines += [f"vunpckhps %zmm{second}, %zmm{first}, %zmm20", f"vunpcklps %zmm{second}, %zmm{first}, %zmm21"]
            lines.append(f"vaddps %zmm20, %zmm21, %zmm{first}")
        lines += [
            f"vunpckhpd %zmm{c}, %zmm{a}, %zmm20",
            f"vunpcklpd %zmm{c}, %zmm{a}, %zmm21",
            "vaddps %zmm20, %zmm21, %zmm20",
        ]
        lines += ["vextractf64x4 $$1, %zmm20, %ymm21", "vaddps %zmm20, %zmm21, %zmm20"]
        lines += ["vextractf32x4 $$1, %zmm20, %xmm21", f"vaddps %zmm20, %zmm21, %zmm{a}"]
    lines.append(f"kmovw {_field(_COLUMNS)}, %k1")
    return "\n".join([*lines, *_store([row[:1] for row in sums])])


def _any_of(texts: list[str]) -> str:
    """All of them, of which the number in the list says which is taken: the first are the common ones."""
    choices = [line for n in range(len(texts)) for line in (f"cmpq $${n}, {_field(_CHOICE)}", f"je 10{n}f")]
    parts = [line for n, text in enumerate(texts) for line in (f"10{n}:", text, "jmp 99f")]
    return "\n".join([*choices, *parts, "99:"])


_BY_COLUMNS = _any_of([_columns_text(rows, vectors) for rows in range(_HIGH, 0, -1) for vectors in (2, 1)])
_BY_SUMS = _any_of([_sums_text(rows) for rows in range(_SUMS_HIGH, 0, -1)])


@intrinsic
def _by_columns(typingctx, choice, left, left_row, left_column, right, right_row, count, out, out_row, columns, beta):
    return assembly(_BY_COLUMNS, _KINDS, _SCRATCH, assembled, listed=True)


@intrinsic
def _by_sums(typingctx, choice, left, left_row, rest, right, right_row, count, out, out_row, columns, beta):
    return assembly(_BY_SUMS, _KINDS, _SCRATCH, assembled, listed=True)


@intrinsic
def _turn(typingctx, from_, row, rows, mask, to):
    """Up to 16 rows of up to 16 float32, so many bytes apart, become as many columns of a panel at the address `to`."""
    lines = ["mov $2, %rcx", "mov $0, %rax", "mov $3, %rdx", "kmovw %edx, %k1"]
    for n in range(16):  # what is not read is garbage in columns that nobody reads
        lines += [f"vmovups (%rax), %zmm{n} {{%k1}} {{z}}", "add $1, %rax", "dec %rcx", "jz 1f"]
    lines += ["1:", *transposition([f"{4 * _WIDE * n}($4)" for n in range(16)])]
    return assembly("\n".join(lines), [types.int64] * 5, _FEW, assembled)


@intrinsic
def _copy(typingctx, from_, row, rows, mask, to):
    """Rows of up to 32 float32 become rows of a panel; as `_turn`."""
    lines = [
        "mov $2, %rcx",
        "mov $0, %rax",
        "mov $3, %rdx",
        "kmovd %edx, %k1",
        "kshiftrd $$16, %k1, %k2",
        "mov $4, %rdi",
        "1:",
    ]
    for n in range(2):
        lines += [f"vmovups {64 * n}(%rax), %zmm{n} {{%k{1 + n}}} {{z}}", f"vmovaps %zmm{n}, {64 * n}(%rdi)"]
    lines += ["add $1, %rax", f"add $${4 * _WIDE}, %rdi", "dec %rcx", "jnz 1b"]
    return assembly("\n".join(lines), [types.int64] * 5, _FEW, assembled)


@intrinsic
def _panel(typingctx):
    """The address of memory for one."""
    return stack(_DEEP * _WIDE)


@njit
def product_at(left, left_row, left_column, right, right_row, right_column, out, out_row, m, n, k, beta):
    """out [m, n] = left [m, k] right [k, n] + beta out, as `cpu_core.product`; by addresses, and bytes from row to row and from column to column."""
    across, vectors, turned = right_column != _ITEM, (k + _LANES - 1) // _LANES, (n + _LANES - 1) // _LANES
    # cycles of a row; to add a sum up costs two more. How many rows there are does not count, or the company would tell in the bits
    if across and left_column == _ITEM and n * (vectors + 2) < k * turned:
        _product_by_sums(left, left_row, right, right_column, out, out_row, m, n, k, beta)
    elif across or k * n > _LARGE:
        step = right_column if across else right_row
        _product_by_panels(left, left_row, left_column, right, step, across, out, out_row, m, n, k, beta)
    else:
        for j in range(0, n, _WIDE):
            columns, by = min(_WIDE, n - j), j * _ITEM
            _strip(left, left_row, left_column, right + by, right_row, out + by, out_row, m, columns, k, beta)


@njit
def _strip(left, left_row, left_column, right, right_row, out, out_row, m, columns, k, beta):
    """Up to 32 columns of the result. By addresses and bytes, as all below, so that it is compiled once."""
    blocks, narrow, mask = (m + _HIGH - 1) // _HIGH, columns <= _LANES, _ALL >> (_WIDE - columns)
    for block in range(blocks):
        first = block * m // blocks
        rows = (block + 1) * m // blocks - first
        from_left, to = left + first * left_row, out + first * out_row
        _by_columns(
            2 * (_HIGH - rows) + narrow, from_left, left_row, left_column, right, right_row, k, to, out_row, mask, beta
        )


@njit
def _product_by_panels(left, left_row, left_column, right, right_row, across, out, out_row, m, n, k, beta):
    """Parts of the right factor, 32 columns of up to 256 rows, are copied, or turned, before they are used."""
    panel: int = _panel()
    for j in range(0, n, _WIDE):
        columns = min(_WIDE, n - j)
        for start in range(0, k, _DEEP):
            deep = min(_DEEP, k - start)
            if across:
                for c in range(0, columns, _LANES):
                    for i in range(0, deep, _LANES):
                        part = right + (j + c) * right_row + (start + i) * _ITEM
                        mask = 0xFFFF >> max(0, _LANES - (deep - i))
                        _turn(part, right_row, min(_LANES, columns - c), mask, panel + (i * _WIDE + c) * _ITEM)
            else:
                _copy(right + start * right_row + j * _ITEM, right_row, deep, _ALL >> (_WIDE - columns), panel)
            from_left, before = left + start * left_column, beta if start == 0 else _f32(1)
            _strip(
                from_left,
                left_row,
                left_column,
                panel,
                _WIDE * _ITEM,
                out + j * _ITEM,
                out_row,
                m,
                columns,
                deep,
                before,
            )


@njit
def _product_by_sums(left, left_row, right, right_row, out, out_row, m, n, k, beta):
    """The same. The last four columns are read again where some of them are done already; where there are fewer, one is read four times."""
    blocks, vectors = (m + _SUMS_HIGH - 1) // _SUMS_HIGH, (k + _LANES - 1) // _LANES
    rest = 0xFFFF >> (_LANES * vectors - k)
    for block in range(blocks):
        first = block * m // blocks
        choice = _SUMS_HIGH - ((block + 1) * m // blocks - first)
        for j in range(0, n, _SUMS_WIDE if n >= _SUMS_WIDE else 1):
            start, step, mask = j, right_row, 0xF
            if n < _SUMS_WIDE:
                step, mask = 0, 1
            elif j > n - _SUMS_WIDE:
                start = n - _SUMS_WIDE
                mask = 0xF << (j - start) & 0xF
            from_left, from_right, to = (
                left + first * left_row,
                right + start * right_row,
                out + first * out_row + start * _ITEM,
            )
            _by_sums(choice, from_left, left_row, rest, from_right, step, vectors, to, out_row, mask, beta)
