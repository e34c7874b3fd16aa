"""The one exception type of the project."""


class McdiError(Exception):
    """Something the user can mend: bad input, a broken file, a full disk.

    The message is one line. It names the thing (file, option, tensor), the value found, what was expected
    and what to do. Commands print it as ``error: ...`` without a traceback.
    """


def reason_of(error: BaseException) -> str:
    """What went wrong, of anybody's exception, on one line of a message."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]
