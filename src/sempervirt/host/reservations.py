"""Persistent reservations of a block device, SCSI or NVMe, by the kernel's one interface to both.

    register(key)              this host has a key at the device; without one it reserves nothing
    reserve(key)               only this host writes (write exclusive); others get an I/O error
    preempt_abort(old, key)    the host with the key `old` loses registration and reservation to
                               this one, and its requests that are on the way are ended

include/uapi/linux/pr.h; SPC-4 5.13 (PERSISTENT RESERVE OUT), NVMe Base 8.22. The kernel gives the
status of the device as a positive number, and an error of its own as errno. Needs CAP_SYS_ADMIN, or
the device open for writing; a partition has none. A key is 64 bits and not zero.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from enum import Enum
from pathlib import Path
from typing import Self

_REGISTRATION = struct.Struct("=QQII")  # old key, new key, flags, padding
_RESERVATION = struct.Struct("=QII")  # key, type, flags
_PREEMPTION = struct.Struct("=QQII")  # old key, new key, type, flags
_IGNORE_KEY = 1


def _write_request(number: int, size: int) -> int:
    """_IOW('p', number, size)"""
    return 1 << 30 | size << 16 | ord("p") << 8 | number


REGISTER = _write_request(200, _REGISTRATION.size)
RESERVE = _write_request(201, _RESERVATION.size)
RELEASE = _write_request(202, _RESERVATION.size)
PREEMPT_ABORT = _write_request(204, _PREEMPTION.size)
WRITE_EXCLUSIVE = 1

# PR_STS_RESERVATION_CONFLICT
_CONFLICT = 0x18
_NO_RESERVATIONS = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM)


class Status(Enum):
    """What the device said."""

    DONE = "done"
    CONFLICT = "conflict"  # the key that was named, or the host, has no right to that
    FAILED = "failed"  # an I/O error or a path that is down: the outcome is unknown


class Reservations:
    """Of a block device that is open. Raises OSError for what the kernel refuses by itself."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, device: Path) -> Self:
        """Raises OSError."""
        return cls(os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))

    def supported(self) -> bool:
        """Whether the device has reservations; nothing is changed by the question.

        It takes the key 0 away from a host that has none. A host that has one is refused that, for
        it did not name its key: both answers come from a device that knows reservations.
        """
        try:
            status = self._ask(REGISTER, _REGISTRATION.pack(0, 0, 0, 0))
        except OSError as error:
            if error.errno in _NO_RESERVATIONS:
                return False
            raise
        return status in (Status.DONE, Status.CONFLICT)

    def register(self, key: int) -> Status:
        """This host has `key` from now on, whatever its key was."""
        return self._ask(REGISTER, _REGISTRATION.pack(0, _checked(key), _IGNORE_KEY, 0))

    def reserve(self, key: int) -> Status:
        """Only this host writes. DONE also for a host that has the reservation already."""
        return self._ask(RESERVE, _RESERVATION.pack(_checked(key), WRITE_EXCLUSIVE, 0))

    def release(self, key: int) -> Status:
        """Others may write as well."""
        return self._ask(RELEASE, _RESERVATION.pack(_checked(key), WRITE_EXCLUSIVE, 0))

    def preempt_abort(self, old: int, key: int) -> Status:
        """Takes registration and reservation from the host with the key `old`, and ends its
        requests. CONFLICT: no host has that key.
        """
        request = _PREEMPTION.pack(_checked(old), _checked(key), WRITE_EXCLUSIVE, 0)
        return self._ask(PREEMPT_ABORT, request)

    def close(self) -> None:
        """The reservation stays: it is the host's, not the descriptor's."""
        os.close(self._descriptor)

    def _ask(self, request: int, argument: bytes) -> Status:
        answer = fcntl.ioctl(self._descriptor, request, bytearray(argument))
        match answer:
            case 0:
                return Status.DONE
            case _ if answer == _CONFLICT:
                return Status.CONFLICT
            case _:
                return Status.FAILED


def _checked(key: int) -> int:
    if not 0 < key < 1 << 64:
        raise ValueError(f"{key} is no key of a reservation")
    return key
