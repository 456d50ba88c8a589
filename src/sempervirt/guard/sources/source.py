"""What a source of signs is.

A source is asked by one thread, again and again (`guard.watch`). It may wait in `look`, be wrong,
or raise: nothing but its own thread is held up by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sempervirt.guard.signs import Sign

# Of a file of /proc or /sys; those that are read here have some hundred bytes.
FILE_BYTES_MAX = 64 << 10


class AbsentError(Exception):
    """This host has no such source, or does not let us see it; the message says which and why."""


class Source(Protocol):
    """One place where signs can be seen.

    `name` is for people. `interval_s` is how long the watch waits between two looks: 0 for a source
    that waits in `look` by itself.
    """

    name: str
    interval_s: float

    def look(self, patience_s: float) -> Sequence[Sign]:
        """What was seen since the last look; waits for at most `patience_s` seconds.

        What was there before the first look is no sign: the host has lived with that. Raises
        AbsentError, OSError, ValueError.
        """

    def close(self) -> None:
        """Gives back what is open. Only the source's own thread calls it."""


def read_text(path: Path, limit_bytes: int = FILE_BYTES_MAX) -> str:
    """The beginning of a file, all of a small one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(limit_bytes).decode(errors="replace")


def read_number(path: Path) -> int:
    """A file that holds a number. Raises OSError, ValueError."""
    text = read_text(path).strip()
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{path} holds no number: {text[:40]!r}") from error
