"""The loaders under atheris for a fixed budget. What it has found is kept as tests beside the module."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SECONDS = 15


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["json", "bank", "generator", "zip"])
def test_loaders_survive_the_fuzzer(tmp_path, loader):
    pytest.importorskip("atheris")
    script = Path(__file__).parent / "fuzz_loaders.py"
    command = [sys.executable, script, loader, f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"]
    memory = (
        "/dev/shm" if os.path.isdir("/dev/shm") else None
    )  # every case is written to a file: ten times as many as on a disk
    with tempfile.TemporaryDirectory(dir=memory) as place:
        environment = {**os.environ, "TMPDIR": place}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20 * SECONDS
        )
    assert done.returncode == 0, (done.stderr[-3000:], [path.read_bytes() for path in tmp_path.glob("crash-*")])
    print(loader, re.search(r"Done (\d+) runs", done.stderr).group())
