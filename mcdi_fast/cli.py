"""What the commands share: the command line, the run folder, progress, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

from mcdi_fast.errors import McdiError
from mcdi_fast.meta import FREE
from mcdi_fast.store import (
    difference,
    locked,
    make_folder,
    read_json,
    remove_temporaries,
    show_path,
    user_path,
    write_json,
)

Config = TypeVar("Config")


class StoppedError(McdiError):
    """Something went wrong after work had begun: what was made so far is kept."""


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Context in which an error of ours means that work had begun."""
    try:
        yield
    except McdiError as error:
        raise StoppedError(str(error)) from error


@contextlib.contextmanager
def open_run(folder: Path, config: Any, free: Collection[str]) -> Iterator[None]:
    """Take the run folder: make it, lock it, and see that it belongs to this configuration (a dataclass), but for the fields `free`.

    Raises:
        McdiError: the folder cannot be written; another process has it; it holds a run with other settings.
    """
    make_folder(folder)
    busy = f"{show_path(folder)}: another run is writing there; wait for it or choose another --run-dir"
    with locked(folder / ".lock", 0, busy):
        for place in (folder, folder / "generator"):  # the bank looks after its own
            remove_temporaries(place)
        path = folder / "config.json"
        ours = json.loads(json.dumps(asdict(config), default=str))
        if path.exists():
            found = read_json(path)
            for key in [key for key in ours if key not in free]:
                theirs, now = (_bound(config.get(key)) for config in (found if isinstance(found, dict) else {}, ours))
                if theirs != now:
                    raise McdiError(
                        f"{show_path(path)}: made with another {difference(key, theirs, now)}; "
                        "give the same options as before, or another --run-dir"
                    )
        write_json(path, ours)
        yield


def _bound(value: Any) -> Any:
    return {name: entry for name, entry in value.items() if name not in FREE} if isinstance(value, dict) else value


class Stages:
    """A progress bar and a stopwatch for each stage."""

    def __init__(self, show: bool = True) -> None:
        """show: whether the bars are drawn; the stopwatch runs either way. seconds: by name, of the stages that are done."""
        self.seconds: dict[str, float] = {}
        self.show = show

    @contextlib.contextmanager
    def __call__(self, name: str, total: int, unit: str) -> Iterator[Any]:
        """A stage of `total` units: yields its bar."""
        from tqdm import tqdm

        start = time.perf_counter()
        bar = tqdm(
            total=total, unit=f" {unit}", desc=f"{name:14}", dynamic_ncols=True, smoothing=0.05, disable=not self.show
        )
        with bar:
            yield bar
        self.seconds[name] = time.perf_counter() - start


def say(line: str) -> None:
    """Print a line to stderr, above the progress bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


class _Output:
    """A text stream that never raises: what its encoding lacks is escaped, and a reader that has gone is not missed.

    stream: None where the process was started without one (`>&-`).
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (until the process ends)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *arguments: str) -> None:
        try:
            call(*arguments)
        except (OSError, ValueError):  # a pipe or terminal that is gone, a full disk; ValueError: closed
            with contextlib.suppress(OSError, ValueError):  # from now on, and when Python flushes at its end, to nobody
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_command(main: Callable[[], Any]) -> int:
    """Run a command, from its command line on; errors of ours become one line.

    Whatever becomes of stdout and stderr (another encoding, a pipe closed early, a full disk), the work goes on.
    Exit codes: 0 done, 1 stopped on the way, 2 nothing started, 130 Ctrl-C.
    """
    output: Any = _Output(sys.stdout), _Output(sys.stderr)
    with contextlib.redirect_stdout(output[0]), contextlib.redirect_stderr(output[1]):
        try:
            main()
        except McdiError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1 if isinstance(error, StoppedError) else 2
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            return 130
        finally:
            for stream in output:  # before Python does, which would complain
                stream.flush()
    return 0


def parse(
    kind: Callable[[str], tuple[Any, Config]], name: str, arguments: Sequence[str] | None, dataset: str = "glyphs"
) -> Config:
    """The command line as a configuration. `~` in a path is the home folder.

    Called inside `run_command`: its --help must survive any stdout.

    Args:
        kind: of a `--dataset`: the dataclass to parse as, and its defaults. name: of the module, for --help. dataset: the default one.
    """
    import tyro

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--dataset", default=dataset)
    form, default = kind(peek.parse_known_args(arguments)[0].dataset)
    return _expanded(tyro.cli(form, default=default, prog=f"python -m {name}", args=arguments))


def _expanded(config: Any) -> Any:
    """A configuration with `~` expanded in its paths, those of the dataclasses in it too."""
    changed = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            changed[field.name] = user_path(value)
        elif is_dataclass(value):
            changed[field.name] = _expanded(value)
    return replace(config, **changed)
