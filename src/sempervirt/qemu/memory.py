"""A guest's memory: a file without a name, which outlives the QEMU that maps it.

QEMU gets it as a file (and not as a memfd of its own making), because only memory in a file can
be left out of the state that one QEMU gives another.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host.procfs import PROC

NAME = "sempervirt-memory"


def create(size_bytes: int) -> int:
    """The descriptor of new memory, whose size cannot change any more. Raises Unavailable."""
    try:
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size_bytes)
    except OSError as error:
        raise Unavailable(f"no memory for the guest: {error.strerror}") from error
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@contextmanager
def created(size_bytes: int) -> Iterator[int]:
    """As `create`, for as long as the block lasts; QEMU keeps the memory that it inherits."""
    descriptor = create(size_bytes)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_of(pid: int) -> int:
    """A descriptor of the memory of the guest that QEMU `pid` runs.

    Raises Unavailable when the memory cannot be opened, InvalidRequest when no file holds it.
    """
    try:
        for entry in (PROC / str(pid) / "fd").iterdir():
            if str(entry.readlink()).startswith(f"/memfd:{NAME}"):
                return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(
            f"the memory of QEMU (pid {pid}) cannot be opened: {error.strerror}"
        ) from error
    raise InvalidRequest(
        f"QEMU (pid {pid}) was started by an earlier release, and keeps its memory to itself",
        remedy="stop the VM and run it again once",
    )
