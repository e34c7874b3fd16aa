"""The switch, and what importing the kernels may not need or do. Run in processes of their own, for the environment decides at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcdi_fast.errors import McdiError
from mcdi_fast.impl import interpreted, resolve

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
from mcdi_fast.kernels.api import sam_ascent
from mcdi_fast.errors import McdiError
from mcdi_fast.impl import resolve
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


def test_compiles_for_hopper():
    """One configuration of every kernel; the rest is slow."""
    rows = inspect("--target", "cuda:90", "--only", "tf32")
    assert len(rows) == 14
    for row in rows:  # the products really use Hopper's own instruction
        assert "wgmma tf32" in row


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942"])
def test_compiles_without_spills(target):
    assert len(inspect("--target", target)) == 48


@pytest.mark.slow
def test_launchers_compile():
    done = python(f"import runpy; runpy.run_path({str(Path(__file__).with_name('compile_launches.py'))!r})")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("compiled 8 kernels")


def test_inspect_refuses_the_interpreter():
    done = python("from mcdi_fast.kernels.inspect import main; main([])", TRITON_INTERPRET="1")
    assert "TRITON_INTERPRET=1 is set" in done.stderr
