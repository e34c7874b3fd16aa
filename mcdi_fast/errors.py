"""The one exception type of the project, and what becomes of others'."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class McdiError(Exception):
    """Something the user can mend: bad input, a broken file, a full disk.

    The message is one line. It names the thing (file, option, tensor), the value found, what was expected
    and what to do. Commands print it as ``error: ...`` without a traceback.
    """


def reason_of(error: BaseException) -> str:
    """What went wrong, of anybody's exception, on one line of a message."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def needs(what: str, packages: str, extra: str) -> Iterator[None]:
    """Context of an import that may be absent. what: needs it. extra: what to install."""
    try:
        yield
    except ImportError as error:
        raise McdiError(f"{what} needs {packages}, not installed here; run pip install {extra}") from error
