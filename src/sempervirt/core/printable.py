"""Text that a guest or another program wrote, as it may be shown, logged and put on record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """`text` in one line, with a mark in the place of each character that is none for people: those
    that command a terminal, and halves of a surrogate pair, which no encoding takes.
    """
    return "".join(one if one.isprintable() else REPLACEMENT for one in text.replace("\t", " "))


def has_nul(value: object) -> bool:
    """Whether a text in it, at any depth, holds a NUL: no path, no name and no argument of a
    program can, and Python raises ValueError where one is used.
    """
    # Not by recursion: others choose the depth.
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() | Path() as text if "\0" in str(text):
                return True
            case str() | Path() | bytes():
                pass
            case Mapping() as table:
                waiting += table.keys()
                waiting += table.values()
            case Iterable() as many:
                waiting += many
            case _:
                pass
    return False
