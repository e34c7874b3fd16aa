"""A disk that is really full, a folder that is really read-only: file systems of their own, mounted in a user namespace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mcdi_fast import store

ROOT = Path(__file__).parents[1]
SMALL = (
    "--task.backbone.steps 4 --task.backbone.ways 8 --task.backbone.images-per-class 3 --prepare.tasks 60 --prepare.steps 6 --task.augmentation 0 "
    "--diffusion.steps 6 --denoiser.width 96 --denoiser.depth 2 --meta.steps 1500 --meta.meta-batch 4 --meta.checkpoint-every 50 "
    "--evaluate.tasks 6 --evaluate.validation-tasks 6 --evaluate.finetune-steps 3"
).split()


def can_mount():
    if not shutil.which("unshare"):
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not can_mount(), reason="needs user namespaces with mounts")]


def mounted(place, script):
    """Run a shell script with a small tmpfs at `place`; ($1: the command)."""
    command = " ".join([sys.executable, "-m", "mcdi_fast.train", *SMALL])
    text = f'set -u\nmount -t tmpfs -o size=$SIZE none {place}\ntrain="{command} --cache-dir {place.parent}/cache"\n{script}'
    environment = {**os.environ, "SIZE": "4m", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", text], env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_full_disk(tmp_path):
    """Filled while the run goes on: it stops with the path and the reason, what is there is valid, and with space it goes on to the end."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f"""
    $train --run-dir {tmp_path}/whole || exit 10
    ( while [ ! -f {place}/run/checkpoint.safetensors ]; do sleep 0.02; done
      dd if=/dev/zero of={place}/ballast bs=64k 2>/dev/null ) &
    $train --run-dir {place}/run && exit 11
    wait
    rm {place}/ballast
    cp -r {place}/run {tmp_path}/stopped
    $train --run-dir {place}/run || exit 12
    cp -r {place}/run {tmp_path}/done
    """
    done = mounted(place, script)
    assert done.returncode == 0, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in error
    assert str(place / "run") in error
    assert not list((tmp_path / "stopped").rglob(".*.tmp"))
    store.load_tensors(tmp_path / "stopped" / "checkpoint.safetensors", "meta-checkpoint")
    for name in ("checkpoint.safetensors", "metrics.jsonl", "generator/model.safetensors"):
        assert (tmp_path / "done" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_read_only_folder(tmp_path):
    """Refused at once and by name; a finished run in it can still be read."""
    place = tmp_path / "disk"
    place.mkdir()
    script = f"""
    $train --run-dir {place}/run || exit 10
    mount -o remount,ro {place}
    $train --run-dir {place}/run && exit 11
    $train --run-dir {place}/other && exit 12
    {sys.executable} -c "from mcdi_fast import *; print(WeightGenerator.from_pretrained('{place}/run/generator').layout.width)"
    """
    done = mounted(place, script)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("Read-only file system" in error and str(place) in error for error in errors)
    assert done.stdout.splitlines()[-1] == "65"
