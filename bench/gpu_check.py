"""Everything a GPU has to say about the kernels, in one command:

    python bench/gpu_check.py [--output FILE]      # tests compiled, compute-sanitizer where there is one, then the timings
    python bench/gpu_check.py --dry-run            # every timed case once, tiny, in Triton's interpreter: checks this script itself

Writes bench/results/<date>-gpu.json: milliseconds of each kernel and of its torch reference on the same GPU and the same inputs.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

DRY = "--dry-run" in sys.argv
os.environ["TRITON_INTERPRET"] = "1" if DRY else "0"  # before anything imports triton

import torch

from mcdi_fast.config import PrepareConfig
from mcdi_fast.denoiser import denoise, init_parameters
from mcdi_fast.diffusion import sample_chain as torch_chain
from mcdi_fast.inner import InnerBatch, inner_loop
from mcdi_fast.kernels import api as K
from mcdi_fast.report import machine
from mcdi_fast.schedule import make_objective, make_schedule

ROOT = Path(__file__).parents[1]
PRECISIONS = ("ieee", "tf32", "bf16")


def cases(device: str, tiny: bool):
    """(name, {implementation: function}) at default sizes."""
    g = torch.Generator().manual_seed(0)
    b, k, s, n, d, c, h, depth, steps = (3, 2, 2, 3, 5, 4, 9, 1, 4) if tiny else (32, 3, 4, 5, 65, 64, 256, 2, 20)
    heads, rows, features = (2, 6, 5) if tiny else (1000, 100, 64)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(device)

    schedule = make_schedule(steps, 3)
    objective = make_objective(schedule, "local-consistency")
    tables = K.noising_tables(schedule, objective)
    segment, seeds = torch.randint(3, (b,), generator=g), list(range(b))
    step = (torch.rand(b, k, s, generator=g) * objective.ends[segment][:, None, None]).long().to(device)
    segment, target = segment.to(device), normal(b, n, d)
    tables32, seeds_tensor = tables.float().to(device), torch.tensor(seeds, device=device)
    signal = tables32[segment[:, None, None], step]
    eps_shape = (b, k, s, n, d)

    def noising_torch():  # what a torch implementation on the GPU would do, with torch's own generator
        eps = torch.randn(eps_shape, device=device)
        a, e, w, skip, _ = signal[..., None, None, :].unbind(-1)
        x = a * target[:, None, None] + e * eps
        return x, w * eps - skip * x

    yield (
        "noising",
        {"triton": lambda: K.noising(target, segment, step, seeds_tensor, tables32), "torch": noising_torch},
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
            "triton": lambda: K.adam_step_(theta, gradient, first, second, 1, 1e-6),
            "torch": lambda: K.adam_step_ref(theta, gradient, first, second, 1, 1e-6),
        },
    )

    config = PrepareConfig(steps=3) if tiny else PrepareConfig()
    start, images = normal(heads, 5, features + 1) * 0.01, normal(2, heads, rows, features)
    labels = torch.randint(5, (heads, rows), generator=g).to(device)
    pick = torch.randint(2, (config.steps, heads, rows), generator=g, dtype=torch.int32).to(device)
    for name, rho in (("head_trajectory SAM", config.rho), ("head_trajectory Adam", 0.0)):
        chosen = replace(config, rho=rho)
        yield (
            name,
            {
                f"triton {p}": lambda p=p, chosen=chosen: K.head_trajectory(
                    start, images, labels, chosen, 3, pick, precision=p
                )
                for p in PRECISIONS
            }
            | {"torch": lambda chosen=chosen: K.head_trajectory_ref(start, images, labels, chosen, 3, pick)},
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

    chain_steps, coefficients = K.chain_table(schedule)
    chain_steps, coefficients = chain_steps.to(device), coefficients.float().to(device)
    skip, scale = schedule.skip().tolist(), schedule.scale().tolist()
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


def tests(command: list[str]) -> dict:
    """Run the kernel tests compiled."""
    began = time.perf_counter()
    done = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", "-m", "not slow"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    tail = done.stdout.splitlines()[-15:]
    print("\n".join(tail))
    return {"returncode": done.returncode, "seconds": round(time.perf_counter() - began), "tail": tail}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.dry_run:
        for name, functions in cases("cpu", True):
            for function in functions.values():
                with torch.no_grad():
                    function()
            print(f"{name}: {', '.join(functions)}")
        return 0
    if not torch.cuda.is_available():
        sys.exit(
            "error: torch finds no CUDA device; this check is for a machine with a GPU (--dry-run checks the script without one)"
        )
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        **machine(),
    }
    record["tests"] = tests([])
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        record["compute-sanitizer memcheck"] = tests([sanitizer, "--tool", "memcheck", "--error-exitcode", "9"])
    else:
        record["compute-sanitizer memcheck"] = "not found"
    record["milliseconds"] = {}
    for name, functions in cases("cuda", False):
        row = {}
        for implementation, function in functions.items():
            try:
                row[implementation] = milliseconds(function)
                replay = graphed(function) if name.startswith(("meta", "sampler")) else None
                if replay:
                    row[f"{implementation}, CUDA graph"] = milliseconds(replay)
            except Exception as error:  # report every case, then fail
                row[implementation] = f"failed: {' '.join(str(error).split())[:300]}"
        record["milliseconds"][name] = row
        print(
            f"{name}: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
            flush=True,
        )
    path = options.output or ROOT / "bench" / "results" / f"{record['date'][:10]}-gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    failed = any(isinstance(v, str) for row in record["milliseconds"].values() for v in row.values())
    return 1 if failed or record["tests"]["returncode"] else 0


if __name__ == "__main__":
    sys.exit(main())
