"""Descriptors: those of other processes, taken with pidfd_getfd(2), and how many there may be.

An agent that has none left cannot start the next spare, nor watch the process that dies next. So it
keeps a reserve for what runs already, and starts nothing new from it.
"""

from __future__ import annotations

import ctypes
import os
import resource

from sempervirt.core.errors import Unavailable
from sempervirt.host.procfs import PROC

# The same number on every architecture (include/uapi/asm-generic/unistd.h).
_SYS_PIDFD_GETFD = 438

# For supervision: all backends of a host that die at once take some each for a moment.
RESERVE = 128
# Thousands of VMs. Some programs that inherit the limit go through every number below it.
ENOUGH = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def take(pid: int, number: int) -> int:
    """A descriptor of the open file that process `pid` has as `number`; to be closed.

    Both descriptors are of one open file, with one position and the same locks. Raises OSError when
    there is none, or the kernel does not allow it.
    """
    pidfd = os.pidfd_open(pid)
    try:
        descriptor = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0))
        if descriptor < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return descriptor
    finally:
        os.close(pidfd)


def raise_limit() -> int:
    """Takes as many descriptors as this process may have, and can use; gives how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(hard, ENOUGH))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def require(wanted: int, what: str) -> None:
    """Raises Unavailable when `what`, which takes `wanted` descriptors, would touch the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = sum(1 for _ in (PROC / "self/fd").iterdir())
    except OSError:  # not even this one was left
        used = limit
    if limit - used < wanted + RESERVE:
        raise Unavailable(
            f"{what} takes {wanted} file descriptors, and {max(0, limit - used)} of {limit} are "
            f"left, of which {RESERVE} are kept for the VMs that run",
            remedy="raise LimitNOFILE= of the unit of semperd (or ulimit -n) and restart semperd; "
            "the VMs run on meanwhile",
        )
