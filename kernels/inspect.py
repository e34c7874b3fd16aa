"""Compile every operation ahead of time, as its launcher launches it at default sizes, and print what the compiler made of it.

    python -m mcdi_fast.kernels.inspect [--target cuda:90 …] [--only NAME]

Needs no GPU. Exits with 1 where a kernel spills registers, asks for more shared memory than a program of the chip can have (the compiler
itself does not check that), or copies tiles of a product less than 16 bytes at a time in a loop.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mcdi_fast.backend import interpreted
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import HOPPER, Chip, Launch, recording
from mcdi_fast.kernels.operations import DEFAULT, Maker, each


class Target(NamedTuple):
    """What to compile for."""

    gpu: GPUTarget
    chip: Chip
    arch: str = ""


TARGETS = {
    "cuda:80": Target(GPUTarget("cuda", 80, 32), Chip(80, 108, 163 * 1024), "sm_80"),
    "cuda:90": Target(GPUTarget("cuda", 90, 32), HOPPER, "sm_90a"),
    "hip:gfx942": Target(GPUTarget("hip", "gfx942", 64), Chip(0, 304, 64 * 1024)),
}


class _NoDriver:
    """Stands where Triton looks for a GPU; it can only be asked what to compile for."""

    def __init__(self, gpu: GPUTarget):
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.gpu

    def get_current_device(self) -> int:
        """A number of its own: Triton keeps what it has compiled by device."""
        return [target.gpu for target in TARGETS.values()].index(self.gpu)

    def get_current_stream(self, device: int | None = None) -> int:
        """Nothing is launched."""
        return 0


def compile_launch(launch: Launch, gpu: GPUTarget) -> Any:
    """By the path of a real launch: what is 1, a multiple of 16 or None becomes part of the kernel."""
    driver.set_active(_NoDriver(gpu))
    return launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)


def launches(target: str, only: str = "") -> Iterator[tuple[str, Launch]]:
    """Every configuration launched at default sizes, and the chain of many tasks."""
    for name, operation, sizes, precision in each(DEFAULT, (2, 600)):
        if operation.name == "resident_chain" and not TARGETS[target].chip.capability:
            continue  # NVIDIA's alone: its packets are inline PTX
        if only in name and operation.name != "inner_loop":  # the operations before it, one after the other
            with recording(TARGETS[target].chip) as recorded:
                operation(operation.inputs(sizes, Maker()), precision)
            # the same kernel again and again is one row
            yield from {f"{name} {one.arguments.get('MODE', '')}".strip(): one for one in recorded}.items()


def hot_loops(ptx: str) -> Iterator[list[str]]:
    """The lines of each innermost loop, which LLVM marks as such: from its label to the last branch back to it."""
    lines = ptx.splitlines()
    for first, line in enumerate(lines):
        label = re.match(r"(\$L\w+):", line)
        comments = [line]
        for following in lines[first + 1 :]:
            if not following.lstrip().startswith("//"):
                break
            comments.append(following)
        if label and any("Inner Loop Header" in comment for comment in comments):
            back = [
                n for n in range(first, len(lines)) if re.search(rf"\bbra(\.uni)?\s+{re.escape(label[1])};", lines[n])
            ]
            yield lines[first : max(back, default=first) + 1]


def copies(ptx: str) -> Counter[str]:
    """How often each width stands in the hot loops of products: "async 16", bytes from global to shared memory; "turned 4", bytes stored to shared
    memory between them and the tensor cores, at 4 a bank conflict."""
    found: Counter[str] = Counter()
    for loop in hot_loops(ptx):
        here = Counter(
            f"async {int(c[1], 16)}"
            for line in loop
            if (c := re.search(r"cp\.async\.\w+\.shared\.global.*?\],\s*(0x\w+)\s*,", line))
        )
        found += here
        for line in loop if here else ():
            if store := re.search(r"\bst\.shared(\S*)\.[bfsu](\d+)\b", line):
                width = re.search(r"\.v(\d)", store[1])
                found[f"turned {int(store[2]) // 8 * (int(width[1]) if width else 1)}"] += 1
    return found


def report(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, bytes or registers spilled, shared bytes, which matrix instructions, and copies in loops."""
    if target.startswith("hip"):
        text = compiled.asm["amdgcn"]

        def count(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            return int(found[1]) if found else 0

        kinds = Counter(re.findall(r"\bv_mfma_[a-z0-9]+_\w+?x\w+?x\d+_?[a-z0-9]*", text))
        return {
            "registers": f"{count('vgpr_count')} v + {count('sgpr_count')} s",
            "spills": count("vgpr_spill_count"),  # a scalar register spills to a lane of a vector register, not to memory
            "shared": compiled.metadata.shared,
            "kind": kinds.most_common(1)[0][0] if kinds else "none",
            "copies": "",
        }  # fmt: skip
    text = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(text)
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={TARGETS[target].arch}",
            str(ptx),
        ]
        said = subprocess.run(
            [*command, "-o", str(Path(folder, "out"))], capture_output=True, text=True, check=True
        ).stderr
    numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"Used (\d+) registers", said)
    if numbers is None or used is None:
        raise McdiError(
            f"ptxas -v: {said!r:.200}, expected spills and registers; this Triton's assembler speaks differently"
        )
    kinds = Counter(re.findall(r"\b(wgmma)\.mma_async\S*\.(tf32|bf16)\.", text))
    kinds += Counter(re.findall(r"\b(mma)\.sync\S*\.(tf32|bf16)\.", text))
    return {
        "registers": int(used[1]),
        "spills": int(numbers[1]) + int(numbers[2]),
        "shared": compiled.metadata.shared,
        "kind": ", ".join(sorted(" ".join(kind) for kind in kinds)) or "none",
        "copies": ", ".join(f"{count} x {width}" for width, count in sorted(copies(text).items())),
    }


def faults(row: dict[str, Any], target: str) -> str:
    """What is wrong with a report; empty where nothing is."""
    found = []
    if row["spills"]:
        found.append("spills")
    if row["shared"] > TARGETS[target].chip.shared:
        found.append("more shared memory than the chip has")
    if re.search(r"(async|turned) 4\b", row["copies"]):
        found.append("narrow copies")
    return ", ".join(found)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    if interpreted():
        raise McdiError("TRITON_INTERPRET=1 is set: kernels defined under it cannot be compiled; unset it")
    print(
        f"Triton {triton.__version__}. Spills in bytes (CUDA) or vector registers (HIP); shared memory in bytes; copies in loops, by bytes.\n\n"
        "| kernel | target | registers | spills | shared memory | matrix instructions | copies |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    bad = 0
    for target in options.target:
        for name, launch in launches(target, options.only):
            try:
                row = report(compile_launch(launch, TARGETS[target].gpu), target)
            except (RuntimeError, ValueError, triton.CompilationError) as error:
                print(f"| {name} | {target} | failed: {' '.join(str(error).split())[:200]} | | | | |", flush=True)
                bad += 1
                continue
            wrong = faults(row, target)
            bad += bool(wrong)
            print(
                f"| {name} | {target} | {' | '.join(map(str, row.values()))} |{wrong and f' WRONG: {wrong}'}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except McdiError as problem:
        sys.exit(f"error: {problem}")
