"""Open files of other processes, taken with pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import os

# The same number on every architecture (include/uapi/asm-generic/unistd.h).
_SYS_PIDFD_GETFD = 438

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
