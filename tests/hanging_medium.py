"""A medium that can be told to hang: a file system of one file, served over FUSE by a process that
can be stopped.

    with hanging_medium(place, size_bytes) as medium:
        medium.image            a file like any other, 'disk.raw' on its own file system
        medium.hang()           from now on no call on that file system returns
        medium.go_on()          and now they all do
        medium.hold_a_read()    the next small read gets no answer, whatever else is asked does
        medium.wait_overtaken() so many later requests were answered that the order is another
        medium.let_go()         and now that read is answered as well

The kernel's side is a real file system: whoever waits for it waits where one waits for a dead NFS
server. No library is needed for a server that knows one file: the protocol is include/uapi/linux/
fuse.h of the kernel. The bytes are kept in a file beside the mount point, `backing`, which can be
looked at meanwhile. Only root can mount; without /dev/fuse the test is told so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = b"disk.raw"
ROOT, FILE = 1, 2
HEADER = struct.Struct("<IIQQIIIHH")
LARGEST = 1 << 20
MNT_DETACH = 2
READ, WRITE, FSYNC = 15, 16, 20
# MAX_PAGES; ASYNC_DIO, so that io_uring waits for no request of O_DIRECT while it submits others.
FLAGS = 1 << 22 | 1 << 15
# FORGET, INTERRUPT, BATCH_FORGET; UNLINK (it stays), RELEASE, FLUSH, READDIR, RELEASEDIR, ACCESS.
UNANSWERED = (2, 36, 42)
NOTHING_TO_SAY = (10, 18, 25, 28, 29, 34)
# Of one block, as the guest's writers ask for, and not of the one that looks at a whole image.
HELD_BYTES = 4096
# A queue has at most 128 requests in flight. Once two queues full were answered after one that is
# held, more were reported than came before it: the used index has passed the request's place.
OVERTAKEN_BY = 256
OVERTAKEN = b"overtaken\n"


@dataclass
class HangingMedium:
    """Made by `hanging_medium`."""

    image: Path
    backing: Path
    server: subprocess.Popen[bytes]
    hangs: bool = False

    def hang(self) -> None:
        """From now on no call on the file system returns."""
        self.hangs = True
        self.server.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """All calls return, also those that wait."""
        self.hangs = False
        self.server.send_signal(signal.SIGCONT)

    def hang_for(self, seconds: float) -> None:
        """`hang`, and `go_on` after so long, or before; returns at once."""
        self.hang()
        later = threading.Timer(seconds, self.go_on)
        later.daemon = True
        later.start()

    def hold_a_read(self) -> None:
        """The next read of one block gets no answer until `let_go`."""
        self.server.send_signal(signal.SIGUSR1)

    def wait_overtaken(self, deadline_s: float = 90.0) -> None:
        """Blocks until OVERTAKEN_BY requests were answered after the one that is held."""
        told = self.server.stdout
        assert told is not None
        assert select.select([told], [], [], deadline_s)[0], "no request was overtaken"
        assert told.readline() == OVERTAKEN

    def let_go(self) -> None:
        """The read that is held is answered."""
        self.server.send_signal(signal.SIGUSR2)


@contextlib.contextmanager
def hanging_medium(place: Path, size_bytes: int) -> Iterator[HangingMedium]:
    """A file system at `place`/medium, which answers at first; gone at the end."""
    mount, backing = place / "medium", place / "medium.bytes"
    mount.mkdir()
    with backing.open("wb") as file:
        file.truncate(size_bytes)
    argv = [sys.executable, __file__, str(mount), str(backing)]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"mounted\n", "FUSE is needed: /dev/fuse, and root"
    try:
        yield HangingMedium(mount / NAME.decode(), backing, server)
    finally:
        # Whoever still waits gets an error: the connection ends with its server.
        server.kill()
        server.wait()
        _libc.umount2(os.fsencode(mount), MNT_DETACH)


# The server


class _Server:
    def __init__(self, device: int, backing: int) -> None:
        self._device = device
        self._backing = backing
        self._hold_next = False
        self._held: tuple[int, bytes] | None = None
        self._since = 0
        signal.signal(signal.SIGUSR1, self._hold)
        signal.signal(signal.SIGUSR2, self._let_go)

    def _hold(self, *_: object) -> None:
        self._hold_next = True

    def _let_go(self, *_: object) -> None:
        """Python calls this between two steps of `serve`, also while that waits for a request."""
        if self._held is not None:
            (unique, body), self._held = self._held, None
            self._send(unique, 0, self._answer(READ, FILE, body))

    def _is_held(self, opcode: int, unique: int, body: bytes) -> bool:
        """Whether this request gets no answer; counts those that do beside one that is held."""
        if self._held is not None:
            self._since += opcode in (READ, WRITE, FSYNC)
            if self._since == OVERTAKEN_BY:
                _say(OVERTAKEN)
            return False
        is_block = opcode == READ and struct.unpack_from("<QQI", body)[2] == HELD_BYTES
        if not (self._hold_next and is_block):
            return False
        self._held, self._since, self._hold_next = (unique, body), 0, False
        return True

    def serve(self) -> None:
        while True:
            try:
                message = os.read(self._device, LARGEST + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # unmounted
            _, opcode, unique, node, *_ = HEADER.unpack_from(message)
            body = message[HEADER.size :]
            if opcode in UNANSWERED or self._is_held(opcode, unique, body):
                continue
            try:
                answer = self._answer(opcode, node, body)
                number = 0
            except OSError as error:
                answer, number = b"", -(error.errno or errno.EIO)
            self._send(unique, number, answer)

    def _send(self, unique: int, number: int, answer: bytes) -> None:
        head = struct.pack("<IiQ", 16 + len(answer), number, unique)
        with contextlib.suppress(FileNotFoundError):  # whoever asked was interrupted
            os.write(self._device, head + answer)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case 26:  # INIT
                return self._introduction(body)
            case 1:  # LOOKUP
                if body.rstrip(b"\0") != NAME:
                    raise OSError(errno.ENOENT, "")
                return struct.pack("<QQQQII", FILE, 0, 0, 0, 0, 0) + self._attributes(FILE)
            case 3 | 4:  # GETATTR, SETATTR
                if opcode == 4 and struct.unpack_from("<I", body)[0] & 8:
                    os.truncate(self._backing, struct.unpack_from("<Q", body, 16)[0])
                return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
            case 14 | 27:  # OPEN, OPENDIR
                return struct.pack("<QII", 0, 0, 0)
            case _ if opcode in (READ, WRITE):
                return self._data(opcode, body)
            case 17:  # STATFS
                return struct.pack(
                    "<QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 9, 9, 4096, 99, 4096, 0
                )
            case 43:  # FALLOCATE
                _, offset, size = struct.unpack_from("<QQQ", body)
                os.posix_fallocate(self._backing, offset, size)
                return b""
            case _ if opcode == FSYNC:
                os.fdatasync(self._backing)
                return b""
            case _ if opcode in NOTHING_TO_SAY:
                return b""
            case _:
                raise OSError(errno.ENOSYS, "")

    def _data(self, opcode: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        if opcode == READ:
            return os.pread(self._backing, size, offset)
        os.pwrite(self._backing, body[40 : 40 + size], offset)
        return struct.pack("<II", size, 0)

    def _introduction(self, body: bytes) -> bytes:
        _, minor, readahead, _ = struct.unpack_from("<IIII", body)
        # As many in the background as a queue has in flight: none waits for one that is held.
        limits = (256, 192, LARGEST, 1, LARGEST // 4096, 0, 0, 0)
        return struct.pack("<IIII", 7, min(minor, 31), readahead, FLAGS) + struct.pack(
            "<HHIIHHII24x", *limits
        )

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o600
        size = 0 if node == ROOT else os.fstat(self._backing).st_size
        times = (0,) * 6
        return struct.pack("<QQQ3Q3I7I", node, size, size // 512, *times, mode, 1, 0, 0, 0, 4096, 0)


def _say(line: bytes) -> None:
    os.write(sys.stdout.fileno(), line)


_libc = ctypes.CDLL(None, use_errno=True)


def _main(mount: str, backing: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={LARGEST}"
    where = os.fsencode(mount)
    if _libc.mount(b"hanging", where, b"fuse.hanging", 0, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    server = _Server(device, os.open(backing, os.O_RDWR | os.O_CLOEXEC))
    _say(b"mounted\n")
    server.serve()


if __name__ == "__main__":
    _main(*sys.argv[1:])
