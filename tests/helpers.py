"""What many tests use."""

import pytest

from mcdi_fast import McdiError


def error_of(call, *args, **options):
    """The message of the McdiError that the call raises: one line that can be printed."""
    with pytest.raises(McdiError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.isprintable(), repr(message)
    return message
