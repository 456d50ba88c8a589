"""The lock of an image, as semper-blkd takes it (crates/block/src/lock.rs), tried by the agent.

A backend that writes holds one byte, the *gate*, for itself, and marks QEMU's bytes as a QEMU would
that has the disk. Who has the gate while nobody's marks stand knows that nobody else writes: locks
of open files are let go of only when the last request of the dead has ended.

    try_lock(image) ──► ImageLock   ours until it is closed
                    └─► Holder      somebody else has it; who, if that can be seen
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from sempervirt.host.procfs import PROC, command_name

# The same structure on every 64-bit Linux: type, whence, padding, start, length, pid.
_FLOCK = struct.Struct("hhxxxxqqixxxx")
_OFD_GETLK, _OFD_SETLK = 36, 37
GATE = 0x5356
# QEMU's bytes 100 + p for a permission that it uses, 200 + p for one that it does not share.
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3
_AGAINST_US = (200 + _CONSISTENT_READ, 200 + _WRITE, 100 + _WRITE, 100 + _RESIZE)


@dataclass(frozen=True)
class Holder:
    """Who has the lock; `pid` is None for one that cannot be seen from here."""

    pid: int | None = None
    program: str = ""

    def __str__(self) -> str:
        if self.pid is None:
            return "a process that cannot be seen from here"
        return f"{self.program} (pid {self.pid})"


@dataclass(frozen=True)
class ImageLock:
    """Ours, until it is closed."""

    descriptor: int

    def close(self) -> None:
        """Lets go of it."""
        os.close(self.descriptor)


def try_lock(image: Path, patience_s: float = 0.0) -> ImageLock | Holder:
    """Takes the lock of an image, or tells who has it. May wait for the storage. Raises OSError.

    A process that was killed has its locks until the kernel has ended its last request, some
    milliseconds after the process is gone: so a lock that nobody alive seems to have is given
    `patience_s`.
    """
    deadline, pause_s = time.monotonic() + patience_s, 0.001
    while True:
        taken = _try_once(image)
        if isinstance(taken, ImageLock) or taken.pid is not None or time.monotonic() >= deadline:
            return taken
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _try_once(image: Path) -> ImageLock | Holder:
    descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        if _take_gate(descriptor):
            if not any(_held(descriptor, at) for at in _AGAINST_US):
                return ImageLock(descriptor)
            _leave_gate(descriptor)  # so that the holder who is looked for is not ourselves
        holder = _holder(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return holder


def _take_gate(descriptor: int) -> bool:
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, GATE, 1, 0)
    try:
        fcntl.fcntl(descriptor, _OFD_SETLK, lock)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _leave_gate(descriptor: int) -> None:
    lock = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, GATE, 1, 0)
    fcntl.fcntl(descriptor, _OFD_SETLK, lock)


def _held(descriptor: int, byte: int) -> bool:
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    found = fcntl.fcntl(descriptor, _OFD_GETLK, lock)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _holder(descriptor: int) -> Holder:
    """The process whose open file has a lock on that inode, by /proc/PID/fdinfo:

    lock:   1: OFDLCK  ADVISORY  WRITE -1 08:01:1234 100 100
    """
    status = os.fstat(descriptor)
    number = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    for process in PROC.iterdir():
        if not process.name.isdigit():
            continue
        try:
            for entry in (process / "fdinfo").iterdir():
                lines = entry.read_text().splitlines()
                if any(line.startswith("lock:") and number in line for line in lines):
                    pid = int(process.name)
                    return Holder(pid, command_name(pid))
        except OSError:  # it is gone, or another user's
            continue
    return Holder()
