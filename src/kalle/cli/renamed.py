"""Messages of the library with the flags of a command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kalle.errors import UserError


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Replace in a UserError of the block each argument that the library calls ``names``' key by the command's flag."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for theirs, ours in names.items():
            message = message.replace(theirs, ours)
        raise UserError(message) from None  # a subclass may take other arguments than its message
