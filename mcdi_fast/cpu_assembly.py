"""Assembly in compiled code on a CPU (numba, the extra `cpu`): what neither numpy's operations nor LLVM's own choice give."""

from __future__ import annotations

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

    text: $0, $1 ... are its arguments, or, `listed`, $0 is where they lie, eight bytes each. scratch: registers that it may use, besides vectors and
    k1 to k4.
    """
    used = ["memory", "flags", *scratch, *(f"k{n}" for n in range(1, 5)), *(f"xmm{n}" for n in range(32))]

    def codegen(context, builder, signature, values):
        if assembled:
            given = list(values)
            if listed:
                every = cgutils.alloca_once(builder, ir.IntType(64), len(given))
                for number, value in enumerate(given):
                    place = builder.gep(every, [ir.IntType(64)(number)])
                    builder.store(value, builder.bitcast(place, value.type.as_pointer()))
                given = [builder.ptrtoint(every, ir.IntType(64))]
            constraints = ",".join(["r"] * len(given) + [f"~{{{name}}}" for name in used])
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(given))
            builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), given)
        return context.get_dummy_value()

    return types.void(*kinds), codegen
