"""Why one of our programs ended, by its exit code and the last line that the program wrote."""

from __future__ import annotations

import re

from sempervirt.core.errors import ImageLocked, InvalidRequest, SempervirtError, Unavailable
from sempervirt.host.process import Exit

_ERROR_LINE = re.compile(r"\S+: error: (?P<cause>.*?)(?:; (?P<remedy>[^;]*))?")
# Exit codes of the programs that serve an image.
_LOCKED, _UNUSABLE = 3, 4


def describe_end(end: Exit, last_words: str) -> str:
    """The reason of an end in one line: what the process said, or else how it ended."""
    match = _ERROR_LINE.fullmatch(last_words)
    return f"{end}: {match['cause']}" if match else str(end)


def refusal(what: str, program: str, end: Exit, last_words: str) -> SempervirtError:
    """Why the first process of `what`, for instance "disk web/root", would not serve; `program` is
    what that process is called, for instance "the backend".
    """
    match = _ERROR_LINE.fullmatch(last_words)
    cause = match["cause"] if match else last_words or str(end)
    remedy = (match["remedy"] or "") if match else ""
    message = f"{what}: {cause}"
    if end.code == _LOCKED:
        return ImageLocked(message, remedy=remedy or "end the program that uses the image")
    if end.code == _UNUSABLE:
        return InvalidRequest(message, remedy=remedy)
    return Unavailable(f"{what}: {program} ended at once ({end}): {cause}", remedy=remedy)
