"""Assembly in compiled code on a CPU (numba, the extra `cpu`), for what LLVM's own choice would not do."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target


def compiled_for(*features: str) -> bool:
    """Whether numba compiles for Linux on an x86 with these. It keeps what it compiles by the same words."""
    triple, _, known = cpu_target.target_context.codegen().magic_tuple()
    found = triple.startswith("x86_64") and sys.platform == "linux"
    found = found and {f"+{feature}" for feature in features} <= set(known.split(","))
    if found:
        binding.initialize_native_asmparser()
    return found


def processor() -> str:
    """LLVM's name of the processor that numba compiles for."""
    return cpu_target.target_context.codegen().magic_tuple()[1]


def assembly(text: str, kinds: Sequence[Any], scratch: Sequence[str], assembled: bool, listed: bool = False) -> Any:
    """What an intrinsic of such arguments returns; nothing is done where it is not `assembled`.

    text: $0, $1 ... are its arguments, or, `listed`, $0 is where they lie, eight bytes each; then it is a function of its own, once for all callers.
    scratch: registers that it may use, besides vectors and k1 to k4.
    """
    used = ["memory", "flags", *scratch, *(f"k{n}" for n in range(1, 5)), *(f"xmm{n}" for n in range(32))]
    word, nothing = ir.IntType(64), ir.VoidType()

    def inline(builder, given):
        constraints = ",".join(["r"] * len(given) + [f"~{{{name}}}" for name in used])
        builder.call(
            ir.InlineAsm(ir.FunctionType(nothing, [word] * len(given)), text, constraints, side_effect=True), given
        )

    def function(module):
        name = f"mcdi_fast_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if name not in module.globals:
            made = ir.Function(module, ir.FunctionType(nothing, [word]), name)
            made.linkage = "linkonce_odr"  # alike in all modules, of which one is kept
            made.attributes.add("noinline")
            builder = ir.IRBuilder(made.append_basic_block())
            inline(builder, made.args)
            builder.ret_void()
        return module.globals[name]

    def codegen(context, builder, signature, values):
        if assembled and listed:
            every = cgutils.alloca_once(builder, word, len(values))
            for number, value in enumerate(values):
                place = builder.gep(every, [word(number)])
                builder.store(value, builder.bitcast(place, value.type.as_pointer()))
            builder.call(function(builder.module), [builder.ptrtoint(every, word)])
        elif assembled:
            inline(builder, list(values))
        return context.get_dummy_value()

    return types.void(*kinds), codegen


def transposition(rows: list[str]) -> list[str]:
    """Of the 16 x 16 pairs of bfloat16, or float32, in zmm0 to 15, to rows in memory: exchanges of single ones, of two, then of lanes of four."""
    lines = []
    for row in range(0, 16, 2):
        for half, to in (("l", 16 + row), ("h", 17 + row)):
            lines.append(f"vpunpck{half}dq %zmm{row + 1}, %zmm{row}, %zmm{to}")
    for group in range(0, 16, 4):  # register group + c then has, in lane l, column 4 l + c of the group's four rows
        for side in range(2):
            for half, to in (("l", group + 2 * side), ("h", group + 2 * side + 1)):
                lines.append(f"vpunpck{half}qdq %zmm{18 + group + side}, %zmm{16 + group + side}, %zmm{to}")
    even, odd = 0x88, 0xDD
    for c in range(4):
        for which, to in ((even, 16), (odd, 18)):
            lines.append(f"vshufi32x4 $${which}, %zmm{4 + c}, %zmm{c}, %zmm{to}")
            lines.append(f"vshufi32x4 $${which}, %zmm{12 + c}, %zmm{8 + c}, %zmm{to + 1}")
        for which, of, column in ((even, 16, 0), (odd, 16, 8), (even, 18, 4), (odd, 18, 12)):
            lines.append(f"vshufi32x4 $${which}, %zmm{of + 1}, %zmm{of}, %zmm20")
            lines.append(f"vmovdqa64 %zmm20, {rows[column + c]}")
    return lines


def stack(count: int) -> Any:
    """What an intrinsic returns that gives the address of so many float32 on the stack, from a cache line on, while its function runs."""

    def codegen(context, builder, signature, values):
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), count))
        memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(), codegen
