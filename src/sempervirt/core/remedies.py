"""What can be done about an error of the system, where nobody knows better."""

from __future__ import annotations

import errno

from sempervirt.core.errors import SempervirtError

_NO_ROOM = "make room there (df -h), and try again"
_NO_RIGHT = "do it as root (sudo), or as whoever owns that"
_REMEDIES = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: "raise the limit for the size of a file (ulimit -f)",
    errno.EROFS: "choose a place that can be written, or mount it for writing",
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: _NO_RIGHT,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def of_system(error: OSError) -> str:
    """What can be done about `error`, as an imperative."""
    number = error.errno or 0
    return _REMEDIES.get(number, "see that what is named is there, and may be used by you")


def remedy_of(error: SempervirtError) -> str:
    """That of `error`; where it has none and the system was the cause, what helps there."""
    cause = error.__cause__
    return error.remedy or (of_system(cause) if isinstance(cause, OSError) else "")
