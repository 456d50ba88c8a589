"""Files, sockets and directories of the agent that the user of one VM may use as well.

The run directory of a VM belongs to the agent, and to the VM's group: its QEMU goes through it, and
makes nothing there. So what the agent opens in it by name is what the agent has put there. QEMU
makes its sockets in a directory below, where it can take away nothing that it has not made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

_READ, _EXECUTE = 4, 1


def group_of(directory: Path) -> int | None:
    """The group of the VM whose run directory that is; None where the VM has none of its own."""
    try:
        found = directory.stat()
    except OSError:
        return None
    others = found.st_gid not in (0, os.getegid())
    return found.st_gid if others and os.geteuid() == 0 and found.st_mode & stat.S_IXGRP else None


def make_passage(directory: Path, group: int) -> None:
    """Makes a directory, if it is not there, that the group may go through and look into. Raises
    OSError.
    """
    _make(directory, group, 0o750)


def make_workplace(directory: Path, group: int) -> None:
    """Makes a directory in which the group may make files, and remove its own. Raises OSError."""
    _make(directory, group, 0o1770)


def _make(directory: Path, group: int, mode: int) -> None:
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(found, 0, group)
        os.fchmod(found, mode)
    finally:
        os.close(found)


def open_way(directory: Path, top: Path) -> None:
    """Makes `directory`, and lets everybody go through it and those above it up to `top`; none of
    them can be looked into. Raises OSError.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in (directory, *directory.parents):
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o011)
        if path == top:
            return


def lend(path: Path, group: int | None, *, make: bool = False) -> None:
    """Lets the group read and write what is at `path`; with `make` that is a new, empty file. What
    is a symbolic link, or has another name or owner as well, stays as it is: where QEMU makes files
    it could have put something there that is not its own. With no group nothing is done. Raises
    OSError.
    """
    if group is None:
        return
    if make:
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))
    found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        there = os.fstat(found)
        if stat.S_ISLNK(there.st_mode) or there.st_nlink != 1 or there.st_uid not in (0, group):
            raise PermissionError(errno.EPERM, "it is not of the VM alone", str(path))
        opened = f"/proc/self/fd/{found}"
        os.chown(opened, 0, group)
        os.chmod(opened, 0o660)  # noqa: PTH101 - a descriptor, which may be of a socket
    finally:
        os.close(found)


def all_may_read(path: Path) -> bool:
    """Whether every user may read the file, by its mode and those of the directories above."""
    return _all_may(path, _READ)


def all_may_execute(path: Path) -> bool:
    """Whether every user may execute the file, or go through the directory."""
    return _all_may(path, _EXECUTE)


def _all_may(path: Path, bit: int) -> bool:
    try:
        found = path.resolve(strict=True)
        ways = all(one.stat().st_mode & _EXECUTE for one in found.parents)
        return ways and bool(found.stat().st_mode & bit)
    except OSError:
        return False
