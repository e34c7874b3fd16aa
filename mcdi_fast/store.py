"""The one way to and from the disk: atomic writes, strict JSON, safetensors files with a header of ours.

No pickle anywhere. A file from a stranger can at worst be refused: a limit is put on the header before it is read, and
safetensors checks what it declares against the file's size before anything is allocated. `~` is the home folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mcdi_fast.errors import McdiError, reason_of

FORMAT_VERSION = 1
# Largest JSON (a file, or the header of a safetensors file) that is read. Our own are a few kilobytes; parsed JSON
# takes some 30 times its size in memory, so a stranger's file costs half a gigabyte at worst.
MAX_JSON_BYTES = 16 * 2**20
_HEADER_KEY = "mcdi_fast"

_FREE_SPACE = "free space and run the same command again: nothing made so far is lost"
_WRITE_ADVICE = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: "make the folder writable or choose another one",
    errno.EPERM: "make the folder writable or choose another one",
    errno.EROFS: "choose a folder that is writable",
    errno.ENOENT: "make the folder first or choose another one",
    errno.ENOTDIR: "part of the path is a file: choose another folder",
    errno.EISDIR: "the path is a folder: choose another name",
}


def show_path(path: str | os.PathLike[str]) -> str:
    """The path for a one-line message: as it is where printable, else escaped."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path a person gave, `~` expanded. Raises McdiError where that is nobody's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise McdiError(f"{show_path(path)}: {reason_of(error)}; write the folder out") from error


def _cannot_write(path: str | os.PathLike[str], error: BaseException, advice: str = "") -> NoReturn:
    if not advice:
        advice = _WRITE_ADVICE.get(getattr(error, "errno", None) or 0, "mend that and run the same command again")
    raise McdiError(f"cannot write {show_path(path)}: {reason_of(error)}; {advice}") from error


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and those above it (no complaint where it exists). Raises McdiError naming it."""
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        _cannot_write(folder, error)
    return folder


def output_file(path: str | os.PathLike[str]) -> Path:
    """A file that a person wants written later: its folder made, seen to be writable, and what killed writes left of it removed.

    Raises:
        McdiError: the path is a folder; its own folder cannot be made or written to.
    """
    path = user_path(path)
    make_folder(path.parent)
    try:
        if path.is_dir():
            raise McdiError(f"cannot write {show_path(path)}: it is a folder, expected a file; name a file in it")
        remove_temporaries(path.parent, path.name)
        descriptor, probe = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
        os.close(descriptor)
        os.unlink(probe)
    except (OSError, ValueError) as error:
        _cannot_write(path, error)
    return path


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Create or replace a file; a kill or power cut at any moment leaves the old content or the new, never a mixture.

    A temporary file in the same folder is written, fsynced and renamed, then the folder is fsynced.

    Raises:
        McdiError: naming path, reason (disk full, read-only, missing folder, …) and what to do. The file that was there
            is untouched, and the temporary file is gone.
    """
    path = user_path(path)
    # A name of its own for every write: two processes must not write into one temporary file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") if path.name else path
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _cannot_write(path, error)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: float, busy: str) -> Iterator[None]:
    """Context in which this process alone holds the lock file `path`. The kernel frees it when a process dies, however it dies.

    Args:
        wait: seconds to wait for another process. busy: what to say when it still has the lock then.

    Raises:
        McdiError: another process has it; the file cannot be made.
    """
    import filelock  # torch depends on it

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout as error:
        raise McdiError(busy) from error
    except (OSError, ValueError, NotImplementedError) as error:
        _cannot_write(path, error)
    try:
        yield
    finally:
        lock.release()


def remove_temporaries(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove what killed `atomic_write`s of a file (None: of any) left in a folder. Only where nobody writes there at the moment."""
    pattern = rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{8}}\.tmp"
    for leftover in Path(folder).glob(".*.tmp"):
        if re.fullmatch(pattern, leftover.name):
            with contextlib.suppress(OSError):
                leftover.unlink()


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write strict JSON atomically. Raises McdiError for NaN, infinity, what JSON cannot hold, as `atomic_write`."""
    atomic_write(path, (dumps(obj, path, indent=1) + "\n").encode())


def dumps(obj: Any, path: str | os.PathLike[str], indent: int | None = None) -> str:
    """Strict JSON text of obj. Raises McdiError naming the path it is for."""
    try:
        return json.dumps(obj, allow_nan=False, indent=indent)
    except (ValueError, TypeError, RecursionError) as error:
        _cannot_write(path, error, "expected only finite numbers, text, lists and dicts")


def difference(name: str, found: Any, ours: Any) -> str:
    """What differs first between two values of JSON, for a message: 'meta.seed (0, now 1)'."""
    if isinstance(found, dict) and isinstance(ours, dict):
        for key in [*ours, *found]:
            if found.get(key) != ours.get(key):
                return difference(f"{name}.{key}" if name else str(key), found.get(key), ours.get(key))
    return f"{name} ({found!r:.60}, now {ours!r:.60})"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read strict JSON: UTF-8, no NaN or infinity, at most `MAX_JSON_BYTES`.

    Raises McdiError naming the file and what is wrong with it.
    """
    path = user_path(path)
    data = _read(path, MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise McdiError(f"{show_path(path)}: expected JSON of at most {MAX_JSON_BYTES} bytes; is it the right file?")
    return _loads(data, path, "the file")


def _loads(data: bytes | str, path: Path, what: str) -> Any:
    """Parse JSON strictly; `what` (of the file) is named in the error."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise McdiError(
            f"{show_path(path)}: {what} is not valid JSON ({reason_of(error)}); it is damaged or not made by mcdi_fast"
        ) from error


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def _read(path: Path, most: int) -> bytes:
    """The first bytes, or all where they are fewer."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would hang, /dev/zero never ends
            raise McdiError(f"cannot read {show_path(path)}: it is no regular file; check the path")
        with open(path, "rb") as file:
            return file.read(min(most, status.st_size))
    except (OSError, ValueError) as error:
        raise McdiError(
            f"cannot read {show_path(path)}: {reason_of(error)}; check the path and its permissions"
        ) from error


def check_format(path: Path, found: Any, *known: int) -> None:
    """Raise McdiError, naming both, unless the format of a file is one of those that are read."""
    if type(found) is not int or found not in known:
        raise McdiError(
            f"{show_path(path)}: made by format {found!r:.40}, this mcdi_fast reads {' and '.join(map(str, known))}; "
            "use the version that made it, or make it again"
        )


def digest(*parts: Tensor | np.ndarray | str) -> str:
    """16 hex digits of tensors, arrays and text, one behind the other: the identity of what is made of them."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):  # as bytes: NumPy has no bfloat16
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(part.encode() if isinstance(part, str) else part.data)
    return found.hexdigest()[:16]


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any], kind: str
) -> None:
    """Write one safetensors file atomically.

    Its metadata holds, under "mcdi_fast", the JSON of {"format": FORMAT_VERSION, "kind": kind, "meta": meta}.

    Args:
        path: the file.
        tensors: any shapes, devices and strides; tied ones are stored apart. dtypes that safetensors knows.
        meta: JSON-able.
        kind: what the file is ("bank-shard", "generator", …); `load_tensors` asks for the same.

    Raises:
        McdiError: as `atomic_write`; a meta that is no strict JSON; a tensor that safetensors cannot hold.
    """
    header = dumps({"format": FORMAT_VERSION, "kind": kind, "meta": dict(meta)}, path)
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, Tensor):
            raise McdiError(
                f"cannot write {show_path(path)}: entry {name!r} is {type(tensor).__name__}, expected a named tensor"
            )
        try:
            tensor = tensor.detach().cpu().contiguous()
            # safetensors refuses tensors that share a storage
            storage = tensor.untyped_storage()
            if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
                tensor = tensor.clone()
            storages.add(tensor.untyped_storage().data_ptr())
            ready[name] = tensor
        except (RuntimeError, NotImplementedError) as error:  # sparse, meta device
            _cannot_write(path, error, f"expected tensor {name!r} to be dense")
    try:
        data = safetensors.torch.save(ready, {_HEADER_KEY: header})
    except Exception as error:  # a dtype unknown to the format; the library has no one exception for it
        _cannot_write(path, error, "expected dtypes that safetensors holds")
    if int.from_bytes(data[:8], "little") > MAX_JSON_BYTES:  # never write what load_tensors will not read
        raise McdiError(
            f"cannot write {show_path(path)}: names and meta exceed {MAX_JSON_BYTES} bytes; store less of them"
        )
    atomic_write(path, data)


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `save_tensors`, bit for bit, on the CPU.

    The tensors are memory-mapped, private to this process: pages are read when touched, and writing to a tensor never
    reaches the file. A file that is later replaced by `atomic_write` stays readable through tensors loaded before.

    Returns:
        (tensors, meta).

    Raises:
        McdiError: naming the file: missing, truncated, not made by mcdi_fast, of another format version or another
            kind.
    """
    path = user_path(path)
    length = int.from_bytes(_read(path, 8), "little")
    if length > MAX_JSON_BYTES:
        raise McdiError(
            f"{show_path(path)}: declares a header of {length} bytes, expected at most {MAX_JSON_BYTES}; "
            "it is damaged or no safetensors file"
        )
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # whatever the parser or torch finds wrong with it: no one exception
        raise McdiError(
            f"{show_path(path)}: damaged, cut short or no safetensors file ({reason_of(error)}); make or copy it again"
        ) from error
    if text is None:
        raise McdiError(
            f"{show_path(path)}: not made by mcdi_fast (no header of its own); give a file made by mcdi_fast"
        )
    ours = _loads(text, path, "its mcdi_fast header")
    if not isinstance(ours, dict) or not isinstance(ours.get("meta"), dict):
        raise McdiError(f"{show_path(path)}: its mcdi_fast header is no dict with a meta; the file is damaged")
    check_format(path, ours.get("format"), FORMAT_VERSION)
    if ours.get("kind") != kind:
        raise McdiError(
            f"{show_path(path)}: holds {ours.get('kind')!r:.60}, expected {kind!r}; give the path of a {kind} file"
        )
    return tensors, ours["meta"]
