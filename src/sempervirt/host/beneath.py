"""Files below directories that were named by somebody who is trusted: openat2(2).

The kernel resolves the path and refuses what would lead out of the directory, by "..", by a link,
or by a link of /proc. What was looked at may be another file by the time that it is opened by name:
who can write to the directory can do that, and the directories are named with that in mind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from sempervirt.core.errors import NotAllowed, Unavailable

# The number is the same on every architecture.
_SYS_OPENAT2 = 437
# struct open_how: flags, mode, resolve.
_OPEN_HOW = struct.Struct("=QQQ")
_RESOLVE_NO_MAGICLINKS, _RESOLVE_BENEATH = 0x02, 0x08
_LIBC = ctypes.CDLL(None, use_errno=True)


def require_beneath(path: Path, roots: Iterable[Path], remedy: str) -> None:
    """Raises NotAllowed unless `path` leads to something below one of `roots`; Unavailable when the
    kernel cannot tell. A path that leads nowhere is let pass if its directory is below.
    """
    for root in roots:
        if not path.is_absolute() or ".." in path.parts or not path.is_relative_to(root):
            continue
        inner = path.relative_to(root)
        found = _resolve(root, inner)
        if found == errno.ENOENT:
            found = _resolve(root, inner.parent)
        if found in (0, errno.ENOENT):
            return
        if found in (errno.ENOSYS, errno.EPERM):
            raise Unavailable(
                f"the kernel does not tell whether {path} is below {root}",
                remedy="openat2 needs Linux 5.6, and a container that allows it",
            )
    raise NotAllowed(f"{path} is not below a directory that others may name", remedy=remedy)


def require_new(path: Path, roots: Iterable[Path], remedy: str) -> None:
    """As `require_beneath`, for a file that is to be made: raises NotAllowed when it is there."""
    require_beneath(path, roots, remedy)
    if os.path.lexists(path):
        raise NotAllowed(f"{path} is there, and is not replaced", remedy="choose another name")


def _resolve(root: Path, inner: Path) -> int:
    """0 if `inner` leads to something below `root`, otherwise why not (errno)."""
    try:
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.ENOENT
    try:
        how = _OPEN_HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
        found = _LIBC.syscall(_SYS_OPENAT2, directory, os.fsencode(inner), how, len(how))
        if found < 0:
            return ctypes.get_errno()
        os.close(found)
        return 0
    finally:
        os.close(directory)
