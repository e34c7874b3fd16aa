"""Everything a GPU has to say about the kernels.

    python bench/gpu_check.py --output FOLDER [--groups NAME …]
    python bench/gpu_check.py --output FOLDER --dry-run     # every group, tiny, in Triton's interpreter: checks this script itself

Needs torch, triton, numpy, einops and safetensors; more is used where it is there (pytest, compute-sanitizer). Each group is a process of its
own, for an error of the device poisons a process. A group may take --seconds (590), then it and its children are ended. It writes
FOLDER/<group>.json after every part, so that one that is cut short leaves what it had. Exits with 1 where a group failed.

The groups, in this order:
    facts        clocks, floors, peaks of this card
    accuracy     every operation at default size against float64
    repeats      the same bits again and again, beside a busy stream: what moves is a race
    graph        a meta-step's replay against its eager run; NaN in a replay
    timings      in graphs, with shares of the measured peaks, and against compiled and graphed torch
    tests        tests/kernels, compiled
    memcheck, initcheck, racecheck, synccheck    compute-sanitizer on one launch of each operation
    profile      ten replayed meta-steps
    main-job     glyphs on the GPU. To compare: run --groups main-job --device cpu before, and give its main-job.json as --cpu-report
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"  # before anything imports triton
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # found without an installation, too

import torch
import triton
import triton.language as tl

from mcdi_fast.backend import PRECISIONS
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig, PrepareConfig
from mcdi_fast.heads import head_layout
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels import meta_step
from mcdi_fast.kernels.launch import capture
from mcdi_fast.kernels.operations import (
    DEFAULT,
    TINY,
    Maker,
    Operation,
    Sizes,
    convert,
    each,
    inner_batch,
    relative_error,
)
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.report import machine
from mcdi_fast.sampler import Sampler, StaticSampler

CHAINS = (1, 2, 600, 4096)
NOT_IN_TORCH = ("normal_noise", "noise_batch", "inner_loop", "outer_update_")  # references that are not timed
SANITIZERS = ("memcheck", "initcheck", "racecheck", "synccheck")


@triton.jit
def nothing_kernel(x):
    """The floor of a launch."""


@triton.jit
def stream_kernel(x, out, count, repeat, BLOCK: tl.constexpr):
    """Reads `count` numbers `repeat` times, past the L1."""
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, repeat):
        for first in range(0, count, BLOCK):
            total += tl.load(x + first + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


@dataclass
class Run:
    """One group's run: where it computes, and its record, written after every part."""

    group: str
    folder: Path
    device: str
    cpu_report: Path | None
    failed: bool = False

    def __post_init__(self) -> None:
        self.record: dict[str, Any] = {"group": self.group, "dry run": DRY, **machine(), "triton": triton.__version__}
        if torch.cuda.is_available():
            self.record["gpu"] = torch.cuda.get_device_name()
        self.sizes: Sizes = TINY if DRY else DEFAULT
        self.keep("began", time.strftime("%F %T"))

    def keep(self, part: str, value: Any) -> None:
        """Add to the record and write it."""
        self.record[part] = value
        (self.folder / f"{self.group}.json").write_text(json.dumps(self.record, indent=1) + "\n")
        print(f"{self.group}: {part}: {json.dumps(value)[:300]}", flush=True)

    def attempt(self, part: str, function: Callable[[], Any]) -> None:
        """Keep what the function gives, or how it failed: one failing part does not cost the others."""
        try:
            self.keep(part, function())
        except Exception as error:
            self.failed = True
            self.keep(part, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}")

    def attempt_each(self, function: Callable[[Operation, Sizes, str | None], Any]) -> None:
        """Attempt it with every operation, size and precision to look at."""
        for name, *case in each(self.sizes, () if DRY else CHAINS):
            self.attempt(name, partial(function, *case))


def microseconds(function: Callable[[], Any]) -> float:
    """Of one call among many in a CUDA graph, the L2 warm: no launch from the host in between. Median."""
    with torch.no_grad():
        if DRY:
            function()
            return 0.0
        from triton.testing import do_bench_cudagraph

        return 1e3 * float(do_bench_cudagraph(function, rep=20, return_mode="median"))


def wall_microseconds(function: Callable[[], Any], calls: int = 200) -> float:
    """Of one call, host and device together."""
    calls, began = 1 if DRY else calls, 0.0
    for count in (1, calls):
        began = time.perf_counter()
        for _ in range(count):
            function()
        if not DRY:
            torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / calls


# ---- groups


def peaks(run: Run) -> dict[str, float]:
    """GB/s of a large copy, GB/s of the L2, TFLOP/s of large products; random data."""
    count, side = (2**10, 8) if DRY else (2**28, 8192)
    x = torch.randn(count, device=run.device)
    out, found = torch.empty_like(x), {}

    def rate(amount: float, function: Callable[[], Any], unit: float) -> float:
        us = microseconds(function)
        return amount / us / unit if us else 0.0

    found["copy GB/s"] = rate(8 * count, lambda: out.copy_(x), 1e3)
    small, target = x[: 2**19], out[: 2**19]
    found["L2 copy GB/s"] = rate(8 * small.numel(), lambda: target.copy_(small), 1e3)
    a, w = (torch.randn(side, side, device=run.device) for _ in range(2))
    for name in PRECISIONS:
        kind, allowed = torch.bfloat16 if name == "bf16" else torch.float32, name != "ieee"
        torch.backends.cuda.matmul.allow_tf32 = allowed
        left, right = a.to(kind), w.to(kind)
        found[f"{name} TFLOP/s"] = rate(2 * side**3, lambda left=left, right=right: left @ right, 1e6)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def facts(run: Run) -> None:
    """Clocks, the floor of a launch, what a program gets from the L2, and the card's peaks."""
    if shutil.which("nvidia-smi"):
        asked = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv"], capture_output=True, text=True)
        run.keep("nvidia-smi", said.stdout.splitlines())
    x, count = torch.randn(2**10 if DRY else 2**18, device=run.device), 1 if DRY else 100

    def hundred() -> None:
        for _ in range(count):
            nothing_kernel[(1,)](x)

    def hundred_of_torch() -> None:
        for _ in range(count):
            x[:1].add_(0)

    run.attempt("empty kernel in a graph, us", lambda: microseconds(hundred) / count)
    run.attempt("add_ of one number in a graph, us", lambda: microseconds(hundred_of_torch) / count)
    for programs in (1,) if DRY else (1, 8, 32, 132):
        out = torch.empty(programs * 1024, device=run.device)

        def read(programs: int = programs, out: torch.Tensor = out) -> float:
            us = microseconds(lambda: stream_kernel[(programs,)](x, out, x.numel(), 20, 1024))
            return 20 * 4 * x.numel() / us / 1e3 if us else 0.0

        run.attempt(f"GB/s a program from the L2, {programs} programs", read)
    run.attempt("peaks", lambda: peaks(run))


def accuracy(run: Run) -> None:
    """Relative error of every operation against float64 on the same inputs, and torch's float32 beside it."""
    torch.backends.cudnn.allow_tf32 = False

    def errors(operation: Operation, sizes: Sizes, precision: str | None) -> dict[str, float]:
        inputs = operation.inputs(sizes, Maker(run.device))
        exact, plain = operation.exact(inputs), operation.exact(inputs, torch.float32)
        return {"error": relative_error(operation(inputs, precision), exact), "float32": relative_error(plain, exact)}

    run.attempt_each(errors)


def repeats(run: Run) -> None:
    """How many of the repeats gave other bits, half of them beside a stream that keeps the chip busy. 0 is right."""
    side = None if DRY else torch.cuda.Stream()
    busy = torch.randn(8 if DRY else 4096, 8 if DRY else 4096, device=run.device)

    def different(operation: Operation, sizes: Sizes, precision: str | None) -> int:
        made = operation.inputs(sizes, Maker(run.device))
        count, found, first = 2 if DRY else 30 if sizes.chains > 1000 else 200, 0, None
        for number in range(count):
            # an operation that updates its inputs starts from the same ones; these two only overwrite, and want one storage, which a copy loses
            overwrites = operation.changes is None or operation.name in ("load_batch_", "reptile_delta_")
            inputs = made if overwrites else convert(made)
            if side is not None and number % 2:
                with torch.cuda.stream(side):
                    busy @ busy
            again = [tensor.clone() for tensor in operation(inputs, precision)]
            first = first or again
            found += not all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        if found:
            run.failed = True
        return found

    run.attempt_each(different)


@contextlib.contextmanager
def trainers(run: Run, count: int = 1, **options: Any) -> Iterator[list[MetaTrainer]]:
    """Meta-trainers on a bank of random targets."""
    tasks, width = (8, 16) if DRY else (2000, DenoiserConfig().width)
    layout, g = head_layout(5, 4 if DRY else 64), torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bank = TrajectoryBank.create(Path(folder, "bank"), layout, 3, layout.width)
        targets = torch.randn(tasks, 3, 5, layout.width, generator=g)
        bank.append(targets, torch.randn(tasks, 5, layout.width, generator=g))
        meta = MetaConfig(steps=10**6, meta_batch=2 if DRY else 32)
        settings: Any = {"device": run.device, "impl": "triton", "denoiser": DenoiserConfig(width=width)}
        if DRY:
            settings["diffusion"] = DiffusionConfig(steps=4)
        yield [MetaTrainer(bank, meta, **(settings | options)) for _ in range(count)]


def graph(run: Run) -> None:
    """A replay gives the eager step's bits; a NaN during a replay changes nothing and is reported."""
    steps = 2 if DRY else meta_step.AHEAD + 20  # beyond the first copy of draws

    def same_bits() -> bool:
        with trainers(run, 2) as (graphed, eager):
            kept = meta_step.EAGER_STEPS
            losses = [float(graphed.outer_step()) for _ in range(steps)]
            meta_step.EAGER_STEPS = 10**9
            others = [float(eager.outer_step()) for _ in range(steps)]
            meta_step.EAGER_STEPS = kept
            same = losses == others and torch.equal(graphed.state.phi, eager.state.phi)
        run.failed |= not same
        return same

    def stops() -> str:
        with trainers(run) as (one,):
            for _ in range(steps):
                one.outer_step()
            before = one.state.phi.clone()
            one._kernels._resident[0].fill_(float("nan"))  # type: ignore[union-attr, index]
            one.outer_step()
            assert torch.equal(one.state.phi, before), "a step that is not finite changed phi"
            failure = one._kernels.failure()  # type: ignore[union-attr]
            assert failure is not None
            assert failure[0] == steps, failure
        return "phi as before, step reported"

    run.attempt("a graph's bits are the eager ones", same_bits)
    run.attempt("NaN during a replay", stops)
    if not DRY:
        run.attempt("sampler's graph", lambda: graphed_sampler(run))


def graphed_sampler(run: Run) -> bool:
    """A captured StaticSampler call gives the eager call's bits."""
    with trainers(run) as (one,):
        static = StaticSampler(Sampler(one.generator(), run.device, impl="triton"), 1)
        static.condition.normal_()
        eager = static().tokens.clone()
        replay = capture(static, torch.device(run.device))
        static.weights.tokens.zero_()
        replay()
        return torch.equal(static.weights.tokens, eager)


def timings(run: Run) -> None:
    """Microseconds of every operation and of its reference in torch on the same inputs, in graphs; shares of the peaks measured here."""
    run.attempt("peaks", lambda: peaks(run))
    found = run.record["peaks"] if isinstance(run.record["peaks"], dict) else {}

    def row(operation: Operation, sizes: Sizes, precision: str | None) -> dict[str, Any]:
        inputs = operation.inputs(sizes, Maker(run.device))
        us = microseconds(lambda: operation(inputs, precision))
        work, row = operation.work(sizes), {"us": us}
        for amount, unit, peak in ((work.bytes, 1e3, "copy GB/s"), (work.flop, 1e6, f"{precision or 'ieee'} TFLOP/s")):
            if amount and us and found.get(peak):
                row[f"share of {peak}"] = amount / us / unit / found[peak]
        if precision in (None, "tf32") and operation.name not in NOT_IN_TORCH:
            try:
                row["torch us"] = microseconds(lambda: operation.reference(**inputs))
            except Exception as error:  # one that looks at a number cannot be captured
                row["torch us"] = f"not captured: {type(error).__name__}"
        return row

    run.attempt_each(row)
    make = Maker(run.device)
    phi, batch = make.phi(run.sizes), inner_batch(run.sizes, make)
    fused = lambda: inner_loop(phi, batch, 0.005)  # noqa: E731
    run.attempt("inner loops, torch, us", lambda: wall_microseconds(fused, 20))
    run.attempt("inner loops, torch in a graph, us", lambda: microseconds(fused))
    vmapped: Callable[..., Any] = lambda: inner_loop(phi, batch, 0.005, "vmap")  # noqa: E731
    run.attempt("inner loops, vmap, us", lambda: wall_microseconds(vmapped, 20))
    if not DRY:
        compiled = torch.compile(vmapped, dynamic=False)
        run.attempt("inner loops, compiled vmap, us", lambda: wall_microseconds(compiled, 20))
    for precision in PRECISIONS:

        def whole(precision: str = precision) -> dict[str, float]:
            with trainers(run, precision=precision) as (one,):
                for _ in range(2 if DRY else meta_step.EAGER_STEPS + 2):
                    one.outer_step()
                times = {"whole us": wall_microseconds(one.outer_step)}
                replay = one._kernels._replay  # type: ignore[union-attr]
                if replay is not None:
                    times["graph alone us"] = wall_microseconds(replay)
                return times

        run.attempt(f"meta-step {precision}", whole)
    for tasks in (1,) if DRY else (1, 32, 4096):

        def sampling(tasks: int = tasks) -> dict[str, float]:
            with trainers(run) as (one,):
                times = {}
                for impl in ("triton", "torch"):
                    static = StaticSampler(Sampler(one.generator(), run.device, impl=impl), tasks)
                    times[f"{impl} us"] = wall_microseconds(static, 20)
                    if not DRY and impl == "triton":
                        times["in a graph us"] = wall_microseconds(capture(static, torch.device(run.device)))
                return times

        run.attempt(f"sampling {tasks} tasks", sampling)


def tests(run: Run) -> None:
    """tests/kernels compiled, a process a file, as many at a time as there are cores to spare."""
    if importlib.util.find_spec("pytest") is None:
        run.keep("tests", "pytest is not installed")
        return
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))[: 1 if DRY else None]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    if DRY:
        command.append("--collect-only")
    waiting, running = files[::-1], {}
    while waiting or running:
        while waiting and len(running) < max(1, min(6, (os.cpu_count() or 2) // 2)):
            file = waiting.pop()
            running[file] = subprocess.Popen(
                [*command, str(file)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for file, process in list(running.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=1)
                run.failed |= process.returncode != 0
                run.keep(file.name, {"returncode": process.returncode, "tail": said.splitlines()[-8:]})
                del running[file]


def small(run: Run) -> None:
    """One launch of each operation at odd sizes: what compute-sanitizer runs."""
    for name, operation, sizes, precision in each(TINY, (1,)):
        if precision in (None, "tf32"):
            operation(operation.inputs(sizes, Maker(run.device)), precision)
            print(name, flush=True)
    if not DRY:
        torch.cuda.synchronize()


def sanitize(run: Run) -> None:
    """compute-sanitizer's tool of this name on `small`."""
    tool = shutil.which("compute-sanitizer")
    if DRY:
        small(run)
    if not tool:
        run.keep("result", "compute-sanitizer not found")
        return
    me = [sys.executable, __file__, "--group", "small", "--output", str(run.folder)]
    done = subprocess.run(
        [tool, "--tool", run.group, "--error-exitcode", "9", *me],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    run.failed = done.returncode != 0
    run.keep("result", {"returncode": done.returncode, "tail": (done.stdout + done.stderr).splitlines()[-40:]})


def profile(run: Run) -> None:
    """torch.profiler's table of ten replayed meta-steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with trainers(run) as (one,):
        for _ in range(1 if DRY else 5):
            one.outer_step()
        with profiler(activities=[ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA]) as found:
            for _ in range(1 if DRY else 10):
                one.outer_step()
            if not DRY:
                torch.cuda.synchronize()
    key = "self_cpu_time_total" if DRY else "self_cuda_time_total"
    run.keep("meta-step", found.key_averages().table(sort_by=key, row_limit=40).splitlines())


def main_job(run: Run) -> None:
    """The main job on glyphs, short, by its function; accuracies beside those of a CPU's report."""
    from mcdi_fast.tasks import find_family
    from mcdi_fast.train import train

    config: Any = find_family("glyphs").config()
    config = replace(
        config, device=run.device, cache_dir=run.folder / "cache", run_dir=run.folder / f"glyphs-{run.device}",
        prepare=replace(config.prepare, tasks=1000), evaluate=replace(config.evaluate, tasks=200),
        task=replace(config.task, backbone=replace(config.task.backbone, steps=100)),
    )  # fmt: skip
    if DRY:
        config = replace(
            config, impl="torch", prepare=PrepareConfig(tasks=4, steps=3), meta=MetaConfig(steps=2, meta_batch=2, samples=2),
            diffusion=DiffusionConfig(steps=4), denoiser=DenoiserConfig(width=16, depth=1),
            task=replace(config.task, ways=3, queries=3, backbone=replace(config.task.backbone, steps=2, ways=4)),
            evaluate=replace(config.evaluate, tasks=4, validation_tasks=2, finetune_steps=(2,)),
        )  # fmt: skip
    began = time.perf_counter()
    report = json.loads((train(config) / "report.json").read_text())
    run.keep("seconds", time.perf_counter() - began)
    run.keep("methods", report["methods"])
    if run.cpu_report:
        expected = json.loads(run.cpu_report.read_text())["methods"]
        run.keep("methods of the CPU", expected)


GROUPS: dict[str, tuple[Callable[[Run], None], dict[str, str]]] = {
    "facts": (facts, {}),
    "accuracy": (accuracy, {}),
    "repeats": (repeats, {}),
    "graph": (graph, {}),
    "timings": (timings, {}),
    "tests": (tests, {}),
    **{name: (sanitize, {}) for name in SANITIZERS},
    "profile": (profile, {}),
    # cuBLAS and cuDNN round to tf32 where they are let (cuDNN: by default), which the CPU's report does not
    "main-job": (main_job, {"NVIDIA_TF32_OVERRIDE": "0"}),
    "small": (small, {}),
}


def ended(command: list[str], environment: dict[str, str], seconds: float) -> int:
    """The command's exit status; it and all its children are ended after so many seconds (124)."""
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[name for name in GROUPS if name != "small"])
    parser.add_argument("--group", choices=GROUPS, help="run this one in this process")
    parser.add_argument("--seconds", type=float, default=590.0, help="for each group")
    parser.add_argument("--device", help="cuda; cpu for the report to compare the main job with")
    parser.add_argument("--cpu-report", type=Path)
    options = parser.parse_args()
    device = options.device or ("cpu" if options.dry_run else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; --dry-run checks this script without one")
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output.resolve()
    if options.group:
        run = Run(options.group, folder, device, options.cpu_report)
        GROUPS[options.group][0](run)
        run.keep("ended", "failed" if run.failed else "well")
        return int(run.failed)
    results = {}
    for name in options.groups:
        command = [sys.executable, str(Path(__file__).resolve()), "--group", name]
        command += ["--output", str(folder), "--device", device]
        command += ["--dry-run"] if options.dry_run else []
        command += ["--cpu-report", str(options.cpu_report.resolve())] if options.cpu_report else []
        began = time.perf_counter()
        status = ended(command, GROUPS[name][1], options.seconds)
        results[name] = {"status": status, "seconds": round(time.perf_counter() - began, 1)}
        (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"== {name}: {results[name]}", flush=True)
    return int(any(result["status"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
