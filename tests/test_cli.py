"""The door of every command: whatever becomes of stdout and stderr, the work is done; `~` is the home folder."""

import io
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tqdm import tqdm

from mcdi_fast import store, train
from mcdi_fast.cli import Stages, StoppedError, parse, run_command
from mcdi_fast.errors import McdiError


class Broken(io.RawIOBase):
    """A pipe whose reader is gone, a full disk, a terminal that was hung up."""

    def __init__(self, number, after=0):
        self.number, self.left = number, after

    def writable(self):
        return True

    def write(self, data):
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.left -= 1
        return len(data)


def work(done):
    """A command with a bar, a line that no narrow encoding holds, and an end that tells that it was reached."""

    def main():
        stages = Stages()
        with stages("Möbius", 300, "steps") as bar:
            for i in range(300):
                bar.update()
                bar.set_postfix(loss=f"{i} ±", refresh=True)
        tqdm.write("written ±", file=sys.stderr)
        print("95.62 ± 0.38 %", "日本", "\udcff", "x" * 100_000)
        done.append(True)

    return main


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_any_encoding(monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    done = []
    assert run_command(work(done)) == 0
    assert done
    assert {name: getattr(sys, name) for name in streams} == streams
    text = streams["stdout"].buffer.getvalue().decode(encoding)
    assert ("95.62 \\xb1 0.38" if encoding == "ascii" else "95.62 ± 0.38") in text
    assert ("日本" if "utf" in encoding else "\\u65e5\\u672c") in text


def test_an_error_in_any_encoding(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)

    def stop():
        raise StoppedError("±: stopped")

    assert run_command(stop) == 1
    assert stream.buffer.getvalue() == b"error: \\xb1: stopped\n"


@pytest.mark.parametrize("number", [32, 28, 5], ids=["pipe", "full", "hung up"])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_breaks(monkeypatch, name, number, after):
    stream = io.TextIOWrapper(io.BufferedWriter(Broken(number, after), 64), "utf-8")
    monkeypatch.setattr(sys, name, stream)
    done = []
    assert run_command(work(done)) == 0
    assert done
    stream.buffer.raw.left = -1  # else pytest, when it closes it


@pytest.mark.parametrize("gone", [None, "closed"])
def test_a_stream_that_is_not_there(monkeypatch, gone):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
        stream.close()
        monkeypatch.setattr(sys, name, stream if gone else None)
    done = []
    assert run_command(work(done)) == 0
    assert done


SCRIPT = """
import sys, time
from tqdm import tqdm
from mcdi_fast.cli import run_command
def main():
    sys.stdin.readline()
    for _ in tqdm(range(50), mininterval=0):
        print("±" * 2000)
    open(sys.argv[1], "w").close()
sys.exit(run_command(main))
"""


@pytest.mark.parametrize("shut", ["stdout", "both"])
def test_a_pipe_closed_early_in_a_process(tmp_path, shut):
    """Exit code 0 and no word of Python's about a broken pipe at its end."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "done")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if shut == "both" else subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    pipes = {"stdout": process.stdout, "stderr": process.stderr}
    (pipes.pop("stdout" if shut == "both" else shut)).close()
    said = process.communicate(b"go\n", timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()
    assert b"Exception ignored" not in (said[1] or b"")


def test_help_in_any_encoding(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    assert b"--dataset" in stream.buffer.getvalue()


def test_help_may_be_cut_off():
    """`--help | head` ends without a traceback."""
    command = [sys.executable, "-m", "mcdi_fast.train", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 0


@dataclass(frozen=True)
class Inner:
    index: Path = Path("a")


@dataclass(frozen=True)
class Outer:
    dataset: str = "x"
    data_dir: Path | None = None
    inner: Inner = field(default_factory=Inner)


def test_home_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--run-dir=~/run", "--data-dir=~", "--cache-dir", "~/cache"]
    config = parse(train.kind_of(train.TrainConfig), "mcdi_fast.train", options)
    assert (config.run_dir, config.data_dir, config.cache_dir) == (tmp_path / "run", tmp_path, tmp_path / "cache")
    nested = parse(lambda _: (Outer, Outer()), "x", ["--inner.index", "~/b"])
    assert nested == Outer(inner=Inner(tmp_path / "b"))
    assert store.user_path("a/~") == Path("a/~")
    with pytest.raises(McdiError, match=r"~nobody-of-that-name/x: .*; write the folder out"):
        store.user_path("~nobody-of-that-name/x")
