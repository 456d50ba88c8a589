"""Who wrote to the image, in which order: the kernel's own word (fanotify), not any program's.

A reader in a thread of its own takes each event as it happens, and looks in which network
namespace its process is: that is the host. Writes through a mapping are not told.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FAN_CLOEXEC = 0x1
FAN_NONBLOCK = 0x2
FAN_UNLIMITED_QUEUE = 0x10
FAN_MARK_ADD = 0x1
FAN_MODIFY = 0x2
AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")
_libc = ctypes.CDLL(None, use_errno=True)
NOBODY = "?"


@dataclass(frozen=True)
class Stretch:
    """One host wrote from `first` to `last` (monotonic seconds), and nobody else between."""

    host: str
    pid: int
    first: float
    last: float


class Journal:
    """Made by `kept`."""

    def __init__(self, image: Path, networks: Mapping[int, str]) -> None:
        self._networks = networks
        self._stretches: list[Stretch] = []
        # Who has written, and a file that is readable once that process has ended: another one
        # may have its number then.
        self._writers: dict[int, tuple[str, int]] = {}
        self._lock = threading.Lock()
        flags = FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE
        self._events = _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC))
        mark = (FAN_MARK_ADD, ctypes.c_uint64(FAN_MODIFY), AT_FDCWD, os.fsencode(image))
        _checked(_libc.fanotify_mark(self._events, *mark))
        self._wake, self._woken = os.pipe()

    @classmethod
    @contextmanager
    def kept(cls, image: Path, namespaces: Mapping[str, str]) -> Iterator[Journal]:
        """A journal of an image for as long as the block lasts; `namespaces` by host."""
        networks = {
            Path(f"/run/netns/{namespace}").stat().st_ino: host
            for host, namespace in namespaces.items()
        }
        journal = cls(image, networks)
        thread = threading.Thread(target=journal._follow, name="journal")
        thread.start()
        try:
            yield journal
        finally:
            os.close(journal._woken)
            thread.join()
            os.close(journal._wake)
            os.close(journal._events)
            for _, ended in journal._writers.values():
                os.close(ended)

    def _follow(self) -> None:
        while True:
            ready, _, _ = select.select([self._events, self._wake], [], [])
            if self._wake in ready:
                return
            with self._lock:
                self._read()

    def _read(self) -> None:
        """What the kernel has told until now."""
        with suppress(BlockingIOError):
            while True:
                self._take(os.read(self._events, 1 << 16))

    def _take(self, data: bytes) -> None:
        now = time.monotonic()
        while data:
            length, _, _, _, _, descriptor, pid = _EVENT.unpack_from(data)
            data = data[length:]
            os.close(descriptor)
            self._note(pid, now)

    def _note(self, pid: int, now: float) -> None:
        last = self._stretches[-1] if self._stretches else None
        if last is not None and last.pid == pid:
            self._stretches[-1] = Stretch(last.host, pid, last.first, now)
        else:
            self._stretches.append(Stretch(self._host_of(pid), pid, now, now))

    def _host_of(self, pid: int) -> str:
        if pid in self._writers:
            host, ended = self._writers[pid]
            if not select.select([ended], [], [], 0)[0]:
                return host
            del self._writers[pid]
            os.close(ended)
        try:
            ended = os.pidfd_open(pid)
        except OSError:
            return NOBODY  # it has ended already
        try:
            host = self._networks.get(Path(f"/proc/{pid}/ns/net").stat().st_ino, NOBODY)
        except OSError:
            os.close(ended)
            return NOBODY
        self._writers[pid] = host, ended
        return host

    def order(self, since: float) -> list[str]:
        """The hosts that wrote since an instant, in order; two neighbours are never equal.

        What has ended before it could be looked at is left out.
        """
        with self._lock:
            self._read()
            stretches = [s for s in self._stretches if s.last > since and s.host != NOBODY]
        hosts = [stretch.host for stretch in stretches]
        return [host for index, host in enumerate(hosts) if index == 0 or hosts[index - 1] != host]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
