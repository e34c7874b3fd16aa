"""The whole main job on glyphs with its stages, and the memory of weight preparation against the number of tasks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import providers as P
import pytest

ROOT = Path(__file__).parents[1]
CORE = ("backbone", "features", "trajectories", "meta-training")  # learning; the rest is loading, evaluation, plots

SHORT = "--task.backbone.steps 60 --prepare.tasks 1000 --meta.steps 500"  # a minute; MCDI_BENCH_JOB="" runs the whole job, about five

_MEMORY = """
import ctypes, json, re, resource, sys, tempfile, torch
from pathlib import Path
from mcdi_fast.config import PrepareConfig
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions

def anonymous():
    return int(re.search("RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

features = torch.randn(1, 100, 20, 64, generator=torch.Generator().manual_seed(0))
with tempfile.TemporaryDirectory() as folder:
    family = HeadFamily({"train": ClassRows.of_grid(features)}, HeadOptions())
    prepare_bank(Path(folder) / "bank", family, PrepareConfig(tasks=int(sys.argv[1]), steps=6), 3, 0)
    found = {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "anonymous": anonymous()}
    ctypes.CDLL(None).malloc_trim(0)
    found["held"] = anonymous()
print(json.dumps(found))
"""


def memory_mib(tasks):
    """Of preparing that many tasks, in a process of its own: peak resident, anonymous at the end, and of that what is still in use."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tasks)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


def test_main_job(benchmark, tmp_path):
    benchmark.group = "main job"
    options = os.environ.get("MCDI_BENCH_JOB", SHORT).split()
    command = [sys.executable, "-m", "mcdi_fast.train", "--dataset", "glyphs", "--run-dir", tmp_path / "run"]
    command += ["--cache-dir", tmp_path / "cache", *options]
    benchmark.pedantic(
        lambda: subprocess.run(command, check=True, capture_output=True, cwd=ROOT), rounds=1, iterations=1
    )
    seconds = json.loads((tmp_path / "run" / "report.json").read_text())["seconds"]
    total = benchmark.stats.stats.median
    outside = total - sum(seconds[name] for name in CORE)  # start-up, loading, evaluation, plots, writing
    benchmark.extra_info.update(
        what="main job", provider="ours", size="glyphs", device=P.DEVICE, stages=seconds, options=options
    )
    benchmark.extra_info.update(seconds=total, outside_core=outside / total)
    if not options:  # the whole job
        assert outside < total / 5, f"{outside:.1f} of {total:.1f} s outside the core"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_tasks(benchmark):
    """What is in use must not grow; the peak, recorded beside it, holds what malloc has not given back and the mapped shards."""
    benchmark.group = "memory of preparation"
    few = memory_mib(1000)
    many = benchmark.pedantic(lambda: memory_mib(8000), rounds=1, iterations=1)
    labels = {"what": "memory", "provider": "ours", "size": "1000 and 8000 tasks", "device": P.DEVICE}
    benchmark.extra_info.update(labels, few=few, many=many)
    assert many["held"] < few["held"] + 8, (
        f"{few['held']:.0f} MiB in use after 1000 tasks, {many['held']:.0f} after 8000"
    )
