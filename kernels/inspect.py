"""Compile every kernel ahead of time, in the configurations launched at default sizes, and print what the compiler made of it.

    python -m mcdi_fast.kernels.inspect [--target cuda:90 …] [--only NAME]

Needs no GPU. Exits with 1 where a kernel spills registers, or asks for more shared memory than a program of the chip can have (the
compiler itself does not check that).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mcdi_fast.backend import interpreted
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig, PrepareConfig
from mcdi_fast.denoiser import parameter_shapes
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.consistency_loss import consistency_loss_kernel
from mcdi_fast.kernels.denoiser import task_linear_kernel
from mcdi_fast.kernels.head_trajectory import head_blocks, head_options, head_trajectory_kernel
from mcdi_fast.kernels.inner_update import delta_chunks, outer_kernel
from mcdi_fast.kernels.launch import BLOCK_COLUMNS, element_block, row_block, stages, sum_block
from mcdi_fast.kernels.noising import noising_kernel
from mcdi_fast.kernels.normal_noise import normal_noise_kernel
from mcdi_fast.kernels.outer_update import outer_update_kernel
from mcdi_fast.kernels.sam_adam import adam_kernel, sam_kernel
from mcdi_fast.kernels.sample_chain import chain_blocks, chain_columns, chain_options, sample_chain_kernel
from mcdi_fast.optim import SAM_TINY

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}


@dataclass(frozen=True)
class Spec:
    """One launch: `arguments` in order, a tensor as its type ("*fp32"), everything else as its value."""

    name: str
    kernel: Any
    arguments: tuple
    options: dict[str, int] = field(default_factory=dict)


def specs() -> list[Spec]:
    """Every configuration launched at default sizes: 5-way heads of 64 features, 100 rows a task, conditions of width 65."""
    meta, width, depth = MetaConfig(), DenoiserConfig().width, DenoiserConfig().depth
    diffusion, prepare = DiffusionConfig(), PrepareConfig()
    b, k, s, n, d, c, ways, features, rows = meta.meta_batch, meta.inner_steps, meta.samples, 5, 65, 65, 5, 64, 100
    f, i64 = "*fp32", "*i64"
    found = [
        Spec("sam", sam_kernel, (f, f, f, 0.05, n * d, SAM_TINY, element_block(n * d))),
        Spec("adam", adam_kernel, (f, f, f, f, 0.1, 0.1, 0.1, 0.001, 1e-8, 20000 * n * d, 1024)),
        Spec("normal_noise", normal_noise_kernel, (i64, f, f, 0, n * d, False, element_block(n * d))),
    ]
    size = sum(i * o for i, o in parameter_shapes(d, c, diffusion.steps, width, depth).values())
    found += [
        Spec(
            f"outer_update {outer}",
            outer_update_kernel,
            (f,) * 6 + ("*i32", 0.1, 0.001, 1e-8, size, outer == "adam", 1024),
        )
        for outer in ("adam", "reptile")
    ]
    for kind in (f, "*bf16"):
        end = "" if kind == f else " from bf16"
        found += [
            Spec(
                f"consistency_loss{end}", consistency_loss_kernel,
                (kind, kind, kind, f, f, s, n * d, element_block(s * n * d)),
            ),
            Spec(
                f"noising{end}", noising_kernel,
                (kind, i64, i64, i64, f, kind, f, f, f, 3, k * s, n * d, diffusion.steps, False, element_block(k * s * n * d)),
            ),
        ]  # fmt: skip

    def linear(
        name, r, i, o, precision, *, stacked=False, backward=False, add=False, broadcast=False, activation="none"
    ):
        weight_in, weight_out = (1, i) if backward else (o, 1)
        return Spec(
            f"task_linear {name} {precision}", task_linear_kernel,
            (f, f, f, f, f, f, f, f, 0.005, 1.0, b, r, 0 if stacked else (k - 1) * r, i, o, i * o if stacked else 0,
             weight_in, weight_out, n if broadcast else 1, s if broadcast else 1, add, broadcast, activation, precision,
             BLOCK_COLUMNS, row_block(r), BLOCK_COLUMNS, sum_block(precision)),
            {"num_stages": stages(precision)},
        )  # fmt: skip

    sample_rows = width + diffusion.steps
    for precision in ("ieee", "tf32", "bf16"):
        found += [
            linear("in", s * n, d, width, precision, broadcast=True),
            linear("token", s * n, width, width, precision, broadcast=True, activation="silu"),
            linear("token stacked", s * n, width, width, precision, stacked=True, broadcast=True, activation="silu"),
            linear("sample", s, sample_rows, width, precision),
            linear("out", s * n, width, width, precision, add=True),
            linear("last", s * n, width, d, precision),
            linear("out backward", s * n, width, width, precision, backward=True, activation="silu_backward"),
            linear("token backward", s * n, width, width, precision, backward=True, add=True, broadcast=True),
            linear("sample backward", s, width, sample_rows, precision, backward=True),
        ]
        total = k * b * s * n
        chunks = delta_chunks(total)
        blocks = (BLOCK_COLUMNS, BLOCK_COLUMNS, sum_block(precision))
        found += [
            Spec(
                f"reptile_delta {precision}", outer_kernel,
                (f, f, f, -0.1, total, triton.cdiv(total, chunks), width, width, False, precision, *blocks),
                ),
            Spec(
                f"sgd_step {precision}", outer_kernel,
                (f, f, f, -0.1, b * s * n, s * n, width, width, True, precision, *blocks),
                ),
            Spec(
                f"head_trajectory {precision}", head_trajectory_kernel,
                (f, f, i64, "*i32", f, f, f, prepare.rho, prepare.weight_decay, 0.1, 0.001, 1e-8, 1000, rows, features, ways,
                 diffusion.segments, prepare.steps // diffusion.segments, True, True, True, SAM_TINY, precision,
                 *head_blocks(rows, ways, features)),
                head_options(),
            ),
        ]  # fmt: skip
        for tasks in (32, 600):
            per_program, tokens = chain_blocks(tasks, n)
            w = "*bf16" if precision == "bf16" else f
            found.append(
                Spec(
                    f"sample_chain B={tasks} {precision}", sample_chain_kernel,
                    (f, i64, f, f, w, w, w, w, w, w, f, f, tasks, n, d, c, width, diffusion.steps, depth, diffusion.steps,
                     32 * triton.cdiv(d + depth * width, 32), False, precision, per_program, tokens, chain_columns(per_program * tokens, precision),
                     sum_block(precision)),
                    chain_options(per_program * tokens),
                )
            )  # fmt: skip
    return found


def build(spec: Spec, target: str) -> Any:
    """Compile as the launcher would: pointers and multiples of 16 are known to be, an integer of 1 is a constant."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes = {}
    if len(spec.arguments) != len(spec.kernel.params):
        raise McdiError(f"{spec.name}: {len(spec.arguments)} arguments, expected {len(spec.kernel.params)}")
    for index, (parameter, value) in enumerate(zip(spec.kernel.params, spec.arguments, strict=True)):
        fixed = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or fixed:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, str):
            signature[parameter.name], attributes[(index,)] = value, [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    options = {k: v for k, v in spec.options.items() if k != "maxnreg" or target.startswith("cuda")}
    source = ASTSource(spec.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def report(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, bytes or registers spilled, shared bytes, and which matrix instructions."""
    if target.startswith("hip"):
        text = compiled.asm["amdgcn"]

        def count(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            return int(found[1]) if found else 0

        kinds = Counter(re.findall(r"\bv_mfma_[a-z0-9]+_\w+?x\w+?x\d+_?[a-z0-9]*", text))
        return {
            "registers": f"{count('vgpr_count')} v + {count('sgpr_count')} s",
            "spills": count(
                "vgpr_spill_count"
            ),  # a scalar register spills to a lane of a vector register, not to memory
            "shared": compiled.metadata.shared,
            "kind": kinds.most_common(1)[0][0] if kinds else "none",
        }
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        arch = "sm_90a" if target == "cuda:90" else f"sm_{target.split(':')[1]}"
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={arch}",
            str(ptx),
            "-o",
            str(Path(folder, "out")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"Used (\d+) registers", said)
    if numbers is None or used is None:
        raise McdiError(
            f"ptxas -v: {said!r:.200}, expected spills and registers; this Triton's assembler speaks differently"
        )
    kinds = Counter(re.findall(r"\b(wgmma)\.mma_async\S*\.(tf32|bf16)\.", compiled.asm["ptx"]))
    kinds += Counter(re.findall(r"\b(mma)\.sync\S*\.(tf32|bf16)\.", compiled.asm["ptx"]))
    return {
        "registers": int(used[1]),
        "spills": int(numbers[1]) + int(numbers[2]),
        "shared": compiled.metadata.shared,
        "kind": ", ".join(sorted(" ".join(kind) for kind in kinds)) or "none",
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 where nothing spills and everything fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    if interpreted():
        raise McdiError("TRITON_INTERPRET=1 is set: kernels defined under it cannot be compiled; unset it")
    print(
        f"Triton {triton.__version__}. Spills to memory in bytes (CUDA) or vector registers (HIP); shared memory in bytes.\n"
    )
    print(
        "| kernel | target | registers | spills | shared memory | matrix instructions |\n| --- | --- | --- | --- | --- | --- |"
    )
    bad = 0
    for spec in specs():
        if options.only not in spec.name:
            continue
        for target in options.target:
            try:
                row = report(build(spec, target), target)
            except (RuntimeError, ValueError, triton.CompilationError) as error:
                print(f"| {spec.name} | {target} | failed: {' '.join(str(error).split())[:200]} | | | |", flush=True)
                bad += 1
                continue
            bad += row["spills"] > 0 or row["shared"] > SHARED_LIMIT[target]
            print(f"| {spec.name} | {target} | {' | '.join(str(value) for value in row.values())} |", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except McdiError as problem:
        sys.exit(f"error: {problem}")
