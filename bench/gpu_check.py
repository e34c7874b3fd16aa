"""Everything a GPU has to say about the kernels, in one command:

    python bench/gpu_check.py [--output FILE] [--skip tests sanitizer main-job timings]
    python bench/gpu_check.py --dry-run            # every timed case once, tiny, in Triton's interpreter: checks this script itself

In this order: the kernel tests compiled; compute-sanitizer on the kernels, where there is one; the main job on glyphs, short, on the GPU against
the CPU; the timings. Writes bench/results/<date>-gpu.json after every part, so that one that is cut short leaves what it had: milliseconds of
each kernel and of its torch reference on the same GPU and the same inputs, alone and as a CUDA graph, the bytes and operations where they
are counted, and their share of the peaks measured in the same run (a large copy, large products).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"  # before anything imports triton

import torch
import triton

from mcdi_fast.backend import PRECISIONS
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.config import DenoiserConfig, MetaConfig, PrepareConfig
from mcdi_fast.denoiser import denoise, init_parameters, parameter_shapes
from mcdi_fast.diffusion import InnerBatch, chain_table, make_objective, make_schedule
from mcdi_fast.diffusion import sample_chain as torch_chain
from mcdi_fast.heads import head_layout
from mcdi_fast.inner import inner_loop
from mcdi_fast.kernels import api as K
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.outer import OuterState, outer_scalars
from mcdi_fast.report import machine
from mcdi_fast.sampler import Sampler

ROOT = Path(__file__).parents[1]


def cases(device: str, tiny: bool):
    """(name, {implementation: function}) at default sizes."""
    g = torch.Generator().manual_seed(0)
    b, k, s, n, d, c, h, depth, steps = (3, 2, 2, 3, 5, 4, 9, 1, 4) if tiny else (32, 3, 4, 5, 65, 64, 256, 2, 20)
    heads, rows, features = (2, 6, 5) if tiny else (1000, 100, 64)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(device)

    schedule = make_schedule(steps, 3)
    objective = make_objective(schedule, "local-consistency")
    tables = K.noising_tables(objective)
    segment = torch.randint(3, (b,), generator=g)
    step = (torch.rand(b, k, s, generator=g) * objective.ends[segment][:, None, None]).long().to(device)
    segment, target = segment.to(device), normal(b, n, d)
    tables32, streams = tables.float().to(device), torch.arange(b, device=device)
    seeds = torch.arange(5 if tiny else 4096, device=device)
    signal = tables32[segment[:, None, None], step]
    eps_shape = (b, k, s, n, d)

    def noising_torch():  # what a torch implementation on the GPU would do, with torch's own generator
        eps = torch.randn(eps_shape, device=device)
        a, e, w, skip, _ = signal[..., None, None, :].unbind(-1)
        x = a * target[:, None, None] + e * eps
        return x, w * eps - skip * x

    yield (
        "noising",
        {"triton": lambda: K.noising(target, segment, step, 0, streams, tables32), "torch": noising_torch},
    )
    yield (
        "normal_noise, 4096 tasks",
        {
            "triton": lambda: K.normal_noise(seeds, (n, d)),
            "torch": lambda: torch.randn(len(seeds), n, d, device=device),
        },
    )

    net, gain, wanted = normal(b, s, n, d), normal(b, s), normal(b, s, n, d)
    yield (
        "consistency_loss",
        {
            "triton": lambda: K.consistency_loss(net, gain, wanted),
            "torch": lambda: K.consistency_loss_ref(net, gain, wanted),
        },
    )

    x, weight, bias = normal(b, s * n, h), normal(h, h) / h**0.5, normal(b, s, h)
    earlier = (normal(k - 1, b, s * n, h), normal(k - 1, b, s * n, h))
    fused = dict(broadcast=K.Broadcast(bias, n), activation="silu")
    yield (
        "task_linear",
        {f"triton {p}": lambda p=p: K.task_linear(x, weight, earlier, 0.005, **fused, precision=p) for p in PRECISIONS}
        | {"torch": lambda: K.task_linear_ref(x, weight, earlier, 0.005, **fused)},
    )

    inputs, gradients = normal(k, b, s * n, h), normal(k, b, s * n, h)
    yield (
        "reptile_delta",
        {f"triton {p}": lambda p=p: K.reptile_delta(inputs, gradients, 0.005, precision=p) for p in PRECISIONS}
        | {"torch": lambda: K.reptile_delta_ref(inputs, gradients, 0.005)},
    )

    weights = normal(b, h, h)
    yield (
        "sgd_step",
        {
            f"triton {p}": lambda p=p: K.sgd_step_(weights, inputs[0], gradients[0], 1e-6, precision=p)
            for p in PRECISIONS
        }
        | {"torch": lambda: weights.baddbmm_(inputs[0].mT, gradients[0], alpha=-1e-6)},
    )

    theta, gradient = normal(heads, n * d), normal(heads, n * d)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    yield "sam_ascent", {
        "triton": lambda: K.sam_ascent(theta, gradient, 0.05), "torch": lambda: K.sam_ascent_ref(theta, gradient, 0.05)
    }  # fmt: skip
    yield (
        "adam_step",
        {
            "triton": lambda: K.adam_step_(theta, gradient, first, second, 1e-6, 1.0),
            "torch": lambda: K.adam_step_ref(theta, gradient, first, second, 1e-6, 1.0),
        },
    )

    size = 50 if tiny else sum(i * o for i, o in parameter_shapes(d, c, steps, h, depth).values())
    state, delta = OuterState(*(normal(size) for _ in range(3)), normal(size).abs()), normal(size)
    scalars = outer_scalars(MetaConfig(outer_lr=1e-6), 5)
    on_device, good = torch.tensor(scalars, device=device), torch.ones(1, dtype=torch.int32, device=device)
    yield (
        "outer_update",
        {
            "triton": lambda: K.outer_update_(state, delta, on_device, good, "adam"),
            "torch": lambda: K.outer_update_ref(state, delta, scalars, "adam"),
        },
    )

    config = PrepareConfig(steps=3) if tiny else PrepareConfig()
    start, images = normal(heads, 5, features + 1) * 0.01, normal(2, heads, rows, features)
    labels = torch.randint(5, (heads, rows), generator=g).to(device)
    sample_weight = torch.full((rows,), 1 / rows, device=device)
    pick = torch.randint(2, (config.steps, heads, rows), generator=g, dtype=torch.int32).to(device)
    for name, rho in (("head_trajectory SAM", config.rho), ("head_trajectory Adam", 0.0)):
        chosen = replace(config, rho=rho)
        yield (
            name,
            {
                f"triton {p}": lambda p=p, chosen=chosen: K.head_trajectory(
                    start, images, labels, chosen, 3, pick, sample_weight, precision=p
                )
                for p in PRECISIONS
            }
            | {
                "torch": lambda chosen=chosen: K.head_trajectory_ref(
                    start, images, labels, chosen, 3, pick, sample_weight
                )
            },
        )

    phi = init_parameters(d, c, steps, h, depth, 0)
    phi = {name: normal(*value.shape) / value.shape[0] ** 0.5 for name, value in phi.items()}
    condition = normal(b, n, c)
    batch = InnerBatch(normal(*eps_shape), step, condition, normal(b, k, s).abs() + 0.5, normal(*eps_shape))
    yield (
        "meta step, inner loops",
        {
            f"triton {p} {name}": lambda p=p, stacked=stacked: K.inner_loop_triton(
                phi, batch, 0.005, stacked=stacked, precision=p
            )
            for p in PRECISIONS
            for name, stacked in (("low-rank", False), ("stacked", True))
        }
        | {
            "torch fused": lambda: inner_loop(phi, batch, 0.005, "torch"),
            "torch vmap(grad)": lambda: inner_loop(phi, batch, 0.005, "vmap"),
        },
    )

    chain_steps, coefficients = chain_table(schedule, objective)
    chain_steps, coefficients = chain_steps.to(device), coefficients.float().to(device)
    skip, scale = objective.skip.tolist(), objective.scale.tolist()
    at = torch.arange(steps, device=device).view(-1, 1)
    packed = {p: K.pack_weights(phi, torch.bfloat16 if p == "bf16" else torch.float32) for p in PRECISIONS}
    for tasks in (3,) if tiny else (1, 32, 600, 4096):
        noise, c_tasks = normal(tasks, n, d), normal(tasks, n, c)

        def f(x, t, c_tasks=c_tasks):
            return torch.add(skip[t] * x, denoise(phi, x.unsqueeze(-3), at[t], c_tasks).squeeze(-3), alpha=scale[t])

        yield (
            f"sampler, {tasks} tasks",
            {
                f"triton {p}": lambda p=p, noise=noise, c_tasks=c_tasks: K.sample_chain(
                    packed[p], noise, c_tasks, chain_steps, coefficients, precision=p
                )
                for p in PRECISIONS
            }
            | {"torch": lambda f=f, noise=noise: torch_chain(f, noise, schedule)},
        )


def engine_cases(device: str, tiny: bool, folder: Path):
    """The same for what people call: a whole outer step, and `Sampler.sample` with its seeds on the device."""
    layout, (tasks, width) = head_layout(5, 64), (8, 16) if tiny else (2000, 256)
    bank = TrajectoryBank.create(folder, layout, 3, 65)
    g = torch.Generator().manual_seed(0)
    bank.append(torch.randn(tasks, 3, 5, 65, generator=g), torch.randn(tasks, 5, 65, generator=g))
    meta = MetaConfig(steps=10**6, meta_batch=2 if tiny else 32)
    options = dict(denoiser=DenoiserConfig(width=width), device=device)
    ours = {p: MetaTrainer(bank, meta, **options, impl="triton", precision=p) for p in PRECISIONS}
    plain = MetaTrainer(bank, meta, **options, impl="torch")
    yield (
        "outer step, whole",
        {f"triton {p} (a graph inside)": trainer.outer_step for p, trainer in ours.items()}
        | {"torch": plain.outer_step},
    )
    generator = plain.generator()
    for tasks in (2,) if tiny else (1, 32, 4096):
        condition = torch.randn(tasks, 5, 65, generator=g).to(device)
        seeds = torch.arange(tasks, device=device)
        samplers = {f"triton {p}": Sampler(generator, device, impl="triton", precision=p) for p in PRECISIONS}
        samplers["torch"] = Sampler(generator, device, impl="torch")
        yield (
            f"sampler.sample, {tasks} tasks",
            {
                name: lambda sampler=sampler, condition=condition, seeds=seeds: sampler.sample(condition, seeds)
                for name, sampler in samplers.items()
            },
        )


def work() -> dict[str, dict[str, float]]:
    """Bytes that must move and operations that must be done, at the sizes of `cases` (docs/kernels.md, Floors)."""
    b, k, s, n, d, h, rows = 32, 3, 4, 5, 65, 256, 20
    scores = 2 * rows * (k - 1) * rows * (h + h)
    return {
        "noising": {"bytes": 4 * (2 * b * k * s * n * d + b * n * d)},
        "normal_noise, 4096 tasks": {"bytes": 4 * 4096 * n * d},
        "task_linear": {
            "bytes": 4 * (b * rows * h * (3 + 2 * (k - 1)) + h * h),
            "flop": b * (2 * rows * h * h + scores),
        },
        "reptile_delta": {"bytes": 4 * (2 * k * b * rows * h + h * h), "flop": 2 * k * b * rows * h * h},
        "sgd_step": {"bytes": 4 * (2 * b * h * h + 2 * b * rows * h), "flop": 2 * b * rows * h * h},
        "sam_ascent": {"bytes": 4 * 3 * 1000 * n * d},
        "adam_step": {"bytes": 4 * 7 * 1000 * n * d},
        "meta step, inner loops": {"flop": 4.0e9},
    }


def peaks() -> dict[str, float]:
    """GB/s of a large copy (bytes read plus bytes written) and TFLOP/s of large products, random data."""
    x = torch.randn(2**28, device="cuda")
    out = torch.empty_like(x)
    found = {"copy GB/s": 2 * x.numel() * 4 / milliseconds(lambda: out.copy_(x)) / 1e6}
    a, w = torch.randn(8192, 8192, device="cuda"), torch.randn(8192, 8192, device="cuda")
    for name, kind, allowed in (
        ("ieee", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        left, right = a.to(kind), w.to(kind)
        found[f"{name} TFLOP/s"] = 2 * 8192**3 / milliseconds(lambda left=left, right=right: left @ right) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def main_job(folder: Path) -> dict:
    """The command on glyphs, short, once on each device: the same draws, so the same numbers to rounding and Adam's sensitivity to it."""
    short = "--task.backbone.steps 100 --prepare.tasks 1000 --meta.steps 500 --evaluate.tasks 200".split()
    found = {}
    for device in ("cpu", "cuda"):
        began = time.perf_counter()
        command = [sys.executable, "-m", "mcdi_fast.train", "--device", device, *short]
        command += ["--run-dir", str(folder / device), "--cache-dir", str(folder / "cache")]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
        )  # fmt: skip
        if done.returncode:
            return found | {device: f"failed: {done.stderr[-500:]}"}
        report = json.loads((folder / device / "report.json").read_text())
        accuracy = {name: round(method["mean"], 3) for name, method in report["methods"].items()}
        found[device] = {"seconds": time.perf_counter() - began, "stages": report["seconds"], "accuracy": accuracy}
        print(f"main job, {device}: {found[device]}", flush=True)
    return found


def graphed(function):
    """The same launches as one CUDA graph, or None where they cannot be captured."""
    try:
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        return None


def milliseconds(function) -> float:
    """Median time of a call on the GPU, with the L2 cleared before each."""
    from triton.testing import do_bench

    with torch.no_grad():
        return float(do_bench(function, warmup=50, rep=200, return_mode="median"))


def run_tests(command: list[str], *selection: str, seconds: int = 540) -> dict:
    """Run the kernel tests compiled."""
    began = time.perf_counter()
    command = [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *selection]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=seconds
        )  # fmt: skip
        code, tail = done.returncode, done.stdout.splitlines()[-15:]
    except subprocess.TimeoutExpired:
        code, tail = 124, [f"cut after {seconds} s"]
    print("\n".join(tail), flush=True)
    return {"returncode": code, "seconds": round(time.perf_counter() - began), "tail": tail}


def time_case(name: str, functions: dict, measured_peaks: dict[str, float]) -> dict:
    """One row: milliseconds, and rates where the work is counted."""
    row: dict = {}
    for implementation, function in functions.items():
        try:
            row[implementation] = milliseconds(function)
            replay = None if "outer step" in name else graphed(function)
            if replay:
                row[f"{implementation}, CUDA graph"] = milliseconds(replay)
        except Exception as error:  # report every case, then fail
            row[implementation] = f"failed: {' '.join(str(error).split())[:300]}"
    counted, rates = work().get(name, {}), {}
    for implementation, ms in row.items():
        if isinstance(ms, str):
            continue
        precision = next((p for p in PRECISIONS if p in implementation), "ieee")
        rates[implementation] = rate = {}
        for what, unit, peak in (("bytes", "GB/s", "copy GB/s"), ("flop", "TFLOP/s", f"{precision} TFLOP/s")):
            if what in counted:
                rate[unit] = counted[what] / ms / (1e6 if what == "bytes" else 1e9)
                rate[f"share of peak {unit}"] = rate[unit] / measured_peaks[peak]
    return {"milliseconds": row, "work": counted, "rates": rates}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--skip", nargs="+", default=[], choices=("tests", "sanitizer", "main-job", "timings"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.dry_run:
            for name, functions in (*cases("cpu", True), *engine_cases("cpu", True, Path(folder))):
                for function in functions.values():
                    with torch.no_grad():
                        function()
                print(f"{name}: {', '.join(functions)}", flush=True)
            return 0
        if not torch.cuda.is_available():
            sys.exit(
                "error: torch finds no CUDA device; this check is for a machine with a GPU (--dry-run checks the script without one)"
            )
        return check(options, Path(folder))


def check(options: argparse.Namespace, folder: Path) -> int:
    """All parts; 1 where a test or a timed case failed."""
    record: dict = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        **machine(),
    }
    path = options.output or ROOT / "bench" / "results" / f"{record['date'][:10]}-gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(**parts) -> None:
        record.update(parts)
        path.write_text(json.dumps(record, indent=1) + "\n")

    if "tests" not in options.skip:
        keep(tests=run_tests([], "tests/kernels"))
    if "sanitizer" not in options.skip:
        sanitizer = shutil.which("compute-sanitizer")
        small = ("tests/kernels", "-k", "not engine and not switch")  # one kernel at a time
        command = [sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9"]
        keep(memcheck=run_tests(command, *small) if sanitizer else "compute-sanitizer not found")
    if "main-job" not in options.skip:
        keep(main_job=main_job(folder))
    if "timings" not in options.skip:
        keep(peaks=peaks(), timings={})
        print(record["peaks"], flush=True)
        for name, functions in (*cases("cuda", False), *engine_cases("cuda", False, folder / "bank")):
            row = record["timings"][name] = time_case(name, functions, record["peaks"])
            keep()
            shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row["milliseconds"].items()}
            print(f"{name}: {', '.join(f'{k} {v}' for k, v in shown.items())}", flush=True)
    print(f"wrote {path}")
    failed = [
        record.get("tests", {}).get("returncode"),
        isinstance(record.get("memcheck"), dict) and record["memcheck"]["returncode"],
        any(isinstance(part, str) for part in record.get("main_job", {}).values()),
        any(isinstance(v, str) for row in record.get("timings", {}).values() for v in row["milliseconds"].values()),
    ]
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
