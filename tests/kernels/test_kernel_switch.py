"""The switch, and what importing the kernels may not need or do. Run in processes of their own, for the environment decides at import."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mcdi_fast import backend as impl
from mcdi_fast.backend import interpreted, resolve
from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.launch import capture, recording
from mcdi_fast.kernels.noise_batch import noise_batch
from mcdi_fast.kernels.normal_noise import normal_noise
from mcdi_fast.sampler import StaticSampler

ROOT = Path(__file__).parents[2]


def python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MCDI_IMPL")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
    )


def test_auto_on_a_cpu_is_torch(monkeypatch):
    monkeypatch.delenv("MCDI_IMPL", raising=False)
    assert resolve("auto", "cpu") == resolve("torch", "cpu") == "torch"
    assert resolve("auto", "cuda") == "triton"
    monkeypatch.setenv("MCDI_IMPL", "torch")
    assert resolve("auto", "cuda") == "torch"


@pytest.mark.skipif(not interpreted(), reason="compiled run")
def test_triton_runs_interpreted(monkeypatch):
    assert resolve("triton", "cpu") == "triton"
    monkeypatch.setenv("MCDI_IMPL", "triton")
    assert resolve("auto", "cpu") == "triton"
    assert resolve("torch", "cpu") == "torch"


def test_unknown_names(monkeypatch):
    with pytest.raises(McdiError, match="impl = 'cuda': expected one of auto, triton, torch"):
        resolve("cuda", "cpu")
    monkeypatch.setenv("MCDI_IMPL", "fast")
    with pytest.raises(McdiError, match="environment variable MCDI_IMPL = 'fast'"):
        resolve("auto", "cpu")


def test_triton_that_cannot_run_says_why():
    code = """
import torch
from mcdi_fast.kernels.sam_adam import sam_ascent
from mcdi_fast import backend as impl
from mcdi_fast.errors import McdiError
from mcdi_fast.backend import resolve
assert resolve("auto", "cpu") == "torch"
for call in (lambda: resolve("triton", "cpu"), lambda: sam_ascent(torch.ones(1, 2), torch.ones(1, 2), 0.1)):
    try:
        call()
    except McdiError as error:
        print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("impl = 'triton' cannot run: torch finds no CUDA device")
    assert second.startswith("sam_ascent cannot run: torch finds no CUDA device")


def test_core_does_not_import_kernels():
    code = "import sys, mcdi_fast, mcdi_fast.meta, mcdi_fast.sampler; assert not any('kernels' in m and 'mcdi' in m for m in sys.modules)"
    done = python(code)
    assert done.returncode == 0, done.stderr


def inspect(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "mcdi_fast.kernels.inspect", *arguments],
        cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return [line for line in done.stdout.splitlines() if line.startswith("| ") and ":" in line]


def table(target, *options):
    """Rows of the table by kernel: dicts by column."""
    names = ("registers", "spills", "shared", "kind", "copies")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inspect("--target", target, *options)]
    return {row[0]: dict(zip(names, row[2:], strict=True)) for row in rows}


def test_compiles_for_hopper():
    """The products of the default precision, wide copies and no spills (inspect exits with 1 otherwise); the rest is slow."""
    rows = table("cuda:90", "--only", "tf32")
    assert len(rows) == 20
    # the deltas take both operands as they lie, across the sum: not wgmma's way; a few chains are summed in float32, from registers
    kinds = {
        "head_trajectory of many tf32": "mma tf32",
        "reptile_delta_ tf32": "mma tf32",
        "sgd_step_ tf32": "mma tf32",
        "run_chain tf32 2 tasks": "none",
        "layered_chain tf32": "none",  # the launch that copies rows
    }
    for name, row in rows.items():
        assert kinds.get(name, "wgmma tf32") in row["kind"], name
        assert "async 16" in row["copies"] or name == "head_trajectory tf32" or kinds.get(name) == "none", name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_without_spills(target):
    rows = table(target)
    assert {"sam_ascent", "task_linear token ieee", "run_chain bf16 600 tasks"} <= rows.keys()
    assert ("resident_chain" in rows) == target.startswith("cuda")  # its packets are inline PTX
    wanted = {"cuda:80": "mma ", "cuda:90": "mma ", "hip:gfx942": "v_mfma_"}[target]
    products = {name: row for name, row in rows.items() if re.search(r" (tf32|bf16)\b", name)}
    assert len(products) == 43
    for name, row in products.items():  # every product of low precision is on the matrix units
        assert (
            wanted in row["kind"]
            or re.fullmatch(r"layered_chain \w+", name)
            or (name.endswith(" 2 tasks") and "cuda" in target)
        ), name


def test_narrow_copies_are_seen():
    from mcdi_fast.kernels.inspect import copies, faults

    loop = """
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	st.shared.b32 [ %r3 ], %r4;
	st.shared.v4.b32 [ %r3 ], { %r4, %r5, %r6, %r7 };
	@%p1 bra $L__BB0_1;
	cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
"""
    assert copies(loop) == {"async 4": 1, "async 16": 1, "turned 4": 1, "turned 16": 1}
    good = {"spills": 0, "shared": 0, "copies": "2 x async 16, 1 x turned 8"}
    assert not faults(good, "cuda:90")
    for change, message in [
        ({"copies": "1 x async 4"}, "narrow copies"), ({"copies": "1 x turned 4"}, "narrow copies"), ({"spills": 4}, "spills"),
        ({"shared": 2**18}, "more shared memory than the chip has"),
    ]:  # fmt: skip
        assert faults(good | change, "cuda:90") == message


def test_hot_paths_neither_wait_nor_mix_devices():
    done = python(f"import runpy; runpy.run_path({str(Path(__file__).with_name('fake_cuda.py'))!r})")
    assert done.returncode == 0, done.stderr[-3000:]
    launches = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert launches["sampler, no padding"] == "2 launches"
    for heads in ("5 x 64", "5 x 1280", "100 x 512"):
        assert launches[f"heads of {heads}"] == "1 launches"
    counts = [count for name, count in launches.items() if name.startswith("meta-step")]
    assert counts == 4 * ["38 launches and 2 of torch"]
    # the draws of 100 steps in one copy; targets and conditions of each step where the bank does not fit
    counts = [count for name, count in launches.items() if name.startswith("200 steps")]
    assert counts == 2 * ["2 copies", "402 copies"]


@pytest.mark.parametrize(
    ("capability", "message"),
    [((7, 5), "cuda:0 (Old) has compute capability 7.5, expected at least 8.0"), ((8, 0), ""), ((9, 0), "")],
)
def test_a_gpu_that_is_too_old(capability, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert impl._unsupported.__wrapped__(0) == message
    monkeypatch.setattr(impl, "interpreted", lambda: False)
    monkeypatch.setattr(impl, "_unsupported", lambda index: message)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if message:
        with pytest.raises(McdiError, match=r"impl = 'triton' cannot run: cuda:0 \(Old\).*use impl='torch'"):
            resolve("triton", "cuda")
        impl._say_once.cache_clear()
        with pytest.warns(UserWarning, match=r"torch computes on cuda, not the Triton kernels: cuda:0 \(Old\)") as said:
            assert [resolve("auto", "cuda"), resolve("auto", "cuda")] == ["torch", "torch"]
        assert len(said) == 1
    else:
        assert resolve("triton", "cuda") == resolve("auto", "cuda") == "triton"
        impl._say_once.cache_clear()  # what has no kernel goes to torch, and that is said once
        with pytest.warns(
            UserWarning, match=r"torch computes on cuda, not the Triton kernels: its chain holds"
        ) as said:
            assert {resolve("auto", "cuda", "its chain holds at most 4096 tokens") for _ in range(3)} == {"torch"}
        assert len(said) == 1


def test_grids_fit_a_gpu():
    """Only the first dimension of a grid may exceed 65,535: what grows with tasks or numbers stands there."""
    with recording() as launches:
        normal_noise(torch.zeros(2, dtype=torch.int64), (70_000, 1_000), mask=None, out=torch.empty(2, 70_000, 1_000))
        noise_batch(
            torch.empty(1, 300, 10_000), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 5, 5, dtype=torch.int64), 0,
            torch.zeros(1, dtype=torch.int64), torch.empty(1, 1, 5),
        )  # fmt: skip
    for launch in launches:
        assert launch.grid[0] > 65_535
        assert len(launch.grid) == 1


def test_a_capture_lets_other_threads_be(monkeypatch):
    """In "global" mode an allocation of any thread of the process would end it."""
    asked = {}

    @contextlib.contextmanager
    def graph(graph, **options):
        asked.update(options)
        yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert capture(lambda: asked.update(run=True), torch.device("cuda", 0)) == "replay"
    assert asked == {"capture_error_mode": "thread_local", "run": True}


def test_a_static_sampler_holds_a_graph(monkeypatch):
    """Made once, again when phi has changed, and never inside a capture of the caller's."""
    done, capturing = [], False
    monkeypatch.setattr(
        "mcdi_fast.kernels.launch.capture",
        lambda run, device: done.append("capture") or (lambda: done.append("replay")),
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr("mcdi_fast.sampler.resolve", lambda *_: "triton")
    folded = ["of phi"]
    static = object.__new__(StaticSampler)
    generator = SimpleNamespace(folded=lambda: folded[0])
    static._sampler = SimpleNamespace(device=torch.device("cuda", 0), impl="auto", generator=generator)
    static.condition, static.weights, static._graph = torch.zeros(2, 5, 3), "weights", None
    static._fill = lambda: done.append("fill")
    for expected in (["fill", "capture"], ["replay"], ["replay"]):
        done.clear()
        assert static() == "weights"
        assert done == expected
    capturing = True
    static()
    assert done == ["replay", "fill"]
    capturing, folded[0] = False, "of another phi"
    static()
    assert done[2:] == ["fill", "capture"]


@pytest.mark.slow
def test_gpu_check_goes_through_every_group(tmp_path):
    command = [sys.executable, "bench/gpu_check.py", "--output", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name, result in json.loads((tmp_path / "summary.json").read_text()).items():
        assert result["status"] == 0, name
        assert json.loads((tmp_path / f"{name}.json").read_text())["ended"] == "well"


@pytest.mark.slow
def test_the_main_job_through_the_kernels(tmp_path):
    """The command itself, every stage that has a kernel through it, against the same run through torch."""
    reports = {}
    for name in ("triton", "torch"):
        options = {
            "run-dir": tmp_path / name, "cache-dir": tmp_path / "cache", "impl": name, "task.ways": 3, "task.queries": 3,
            "task.backbone.steps": 2, "task.backbone.ways": 4, "prepare.tasks": 4, "prepare.steps": 3, "diffusion.steps": 4,
            "denoiser.width": 16, "denoiser.depth": 1, "meta.steps": 3, "meta.meta-batch": 3, "meta.samples": 2,
            "evaluate.tasks": 4, "evaluate.validation-tasks": 2, "evaluate.finetune-steps": 2,
        }  # fmt: skip
        arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        code = f"import sys; from mcdi_fast.train import main; sys.exit(main({arguments!r}))"
        done = python(code, TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stderr[-3000:]
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
    kernels, plain = reports["triton"], reports["torch"]
    for method, found in kernels["methods"].items():
        assert found["mean"] == pytest.approx(plain["methods"][method]["mean"], abs=3), method
    assert kernels["norms"]["generated"] == pytest.approx(plain["norms"]["generated"], rel=1e-3)
    assert kernels["norms"]["target"] == pytest.approx(plain["norms"]["target"], rel=1e-3)


@pytest.mark.slow
def test_launchers_compile():
    done = python("import compile_launches", PYTHONPATH=f"{ROOT}:{Path(__file__).parent}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("compiled 15 kernels")


def test_inspect_refuses_the_interpreter():
    done = python("from mcdi_fast.kernels.inspect import main; main([])", TRITON_INTERPRET="1")
    assert "TRITON_INTERPRET=1 is set" in done.stderr
