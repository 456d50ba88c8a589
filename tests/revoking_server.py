"""A file server of several clients that takes the locks of a silent client away, as an NFSv4 server
does, and refuses what that client writes late. Served over FUSE: each client is a mount of its own.

    with revoking_server(place, ("a", "b")) as server:
        server.mount("a") / "disk.raw"   a file that both see; locks reach from one to the other
        server.cut("a")                  nothing of client a gets through any more
        server.restore("a")              … and all that it has sent gets through now

A client that was cut off for `lease_s` has lost its lease: its locks are free for others, and every
file that it had open is stale for ever: reads, writes and flushes by it fail with EIO. A file that
it opens anew, once it is back, is good; so is a lock that it takes anew.

`refuses=False` is the negative control, a server that takes the locks and lets late writes through.

One process serves all mounts, one request after the other, from a directory (`backing`) that can be
looked at meanwhile. Locks are the kernel's requests SETLK, SETLKW and GETLK: those of open files
(OFD) come with an owner of their own and end with RELEASE. The protocol is
include/uapi/linux/fuse.h. Only root can mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = 1
HEADER = struct.Struct("<IIQQIIIHH")
LARGEST = 1 << 20
MNT_DETACH = 2
FUSE_TYPE = "fuse.revoking"
READLCK, WRITELCK, UNLOCKED = 0, 1, 2
# ASYNC_READ, POSIX_LOCKS, ATOMIC_O_TRUNC, BIG_WRITES, MAX_PAGES, ASYNC_DIO.
FLAGS = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 22 | 1 << 15
LEASE_S = 0.3
_LOCK = struct.Struct("<QQQQIII4x")  # file handle, owner, start, end, type, pid, flags


@dataclass
class RevokingServer:
    """Made by `revoking_server`."""

    place: Path
    backing: Path
    process: subprocess.Popen[bytes]

    def mount(self, client: str) -> Path:
        """Where a client sees the files."""
        return self.place / f"mount-{client}"

    def cut(self, client: str) -> None:
        """From now on no request of the client is served; its lease runs out in `lease_s`."""
        self._tell("cut", client)

    def restore(self, client: str) -> None:
        """The client is served again, first what it has asked meanwhile."""
        self._tell("restore", client)

    def _tell(self, word: str, client: str) -> None:
        told, answers = self.process.stdin, self.process.stdout
        assert told is not None
        assert answers is not None
        told.write(f"{word} {client}\n".encode())
        told.flush()
        assert answers.readline() == b"done\n", "the file server has ended"


@contextlib.contextmanager
def revoking_server(
    place: Path, clients: tuple[str, ...], *, refuses: bool = True, lease_s: float = LEASE_S
) -> Iterator[RevokingServer]:
    """Mounts at `place`/mount-CLIENT, gone at the end. Processes that still wait get an error."""
    backing = place / "backing"
    backing.mkdir()
    mounts = [place / f"mount-{client}" for client in clients]
    for mount in mounts:
        mount.mkdir()
    argv = [sys.executable, __file__, str(backing), str(lease_s), str(int(refuses)), *clients]
    process = subprocess.Popen(argv, cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mounted\n", "FUSE is needed: /dev/fuse, and root"
        yield RevokingServer(place, backing, process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        for mount in mounts:
            _libc.umount2(os.fsencode(mount), MNT_DETACH)


# The server


@dataclass
class _Open:
    """A file that a client has open. `stale`: the client's lease has ended since."""

    client: str
    node: int
    descriptor: int
    stale: bool = False


@dataclass(frozen=True)
class _Lock:
    client: str
    handle: int
    owner: int
    node: int
    start: int
    end: int
    kind: int

    def against(self, other: _Lock) -> bool:
        """Whether the two cannot be there at one time."""
        if (self.client, self.owner) == (other.client, other.owner) or self.node != other.node:
            return False
        meets = self.start <= other.end and other.start <= self.end
        return meets and WRITELCK in (self.kind, other.kind)

    def without(self, start: int, end: int) -> list[_Lock]:
        """What is left of it outside of a range."""
        left = []
        if self.start < start:
            left.append(_Lock(**{**vars(self), "end": min(self.end, start - 1)}))
        if self.end > end:
            left.append(_Lock(**{**vars(self), "start": max(self.start, end + 1)}))
        return left


@dataclass
class _Client:
    name: str
    device: int
    cut_at: float | None = None
    expired: bool = False
    orphans: list[int] = field(default_factory=list)


class _Later(Exception):
    """The answer comes when the lock is free."""


@dataclass
class _Server:
    backing: str
    lease_s: float
    refuses: bool
    clients: dict[str, _Client] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=lambda: {ROOT: ""})
    nodes: dict[str, int] = field(default_factory=lambda: {"": ROOT})
    opened: dict[int, _Open] = field(default_factory=dict)
    locks: list[_Lock] = field(default_factory=list)
    waiting: list[tuple[_Client, int, _Lock]] = field(default_factory=list)
    last: int = ROOT

    # Leases

    def told(self, line: str) -> None:
        word, name = line.split()
        client = self.clients[name]
        if word == "cut":
            client.cut_at, client.expired = time.monotonic(), False
        else:
            self.expire()
            client.cut_at = None
            for unique in client.orphans:
                _send(client, unique, -errno.EIO, b"")
            client.orphans.clear()
        _say(b"done\n")

    def expire(self) -> None:
        """Takes what belongs to clients of which the lease has ended."""
        for client in self.clients.values():
            if client.cut_at is None or client.expired:
                continue
            if time.monotonic() - client.cut_at >= self.lease_s:
                client.expired = True
                self.locks = [lock for lock in self.locks if lock.client != client.name]
                # Who waits for a lock is told so as well, once the client is back.
                client.orphans = [unique for who, unique, _ in self.waiting if who is client]
                self.waiting = [one for one in self.waiting if one[0] is not client]
                for one in self.opened.values():
                    one.stale = one.stale or one.client == client.name
                self.grant()

    # Requests

    def serve(self) -> None:
        poll = select.poll()
        control = sys.stdin.fileno()
        while True:
            served = {c.device: c for c in self.clients.values() if c.cut_at is None}
            for client in self.clients.values():
                with contextlib.suppress(KeyError):
                    poll.unregister(client.device)
            poll.register(control, select.POLLIN)
            for device in served:
                poll.register(device, select.POLLIN)
            for descriptor, events in poll.poll(20):
                if descriptor == control:
                    line = os.read(control, 4096).decode()
                    if not line:
                        return
                    self.told(line)
                elif events & select.POLLIN:
                    client = served[descriptor]
                    if client.cut_at is None:
                        self.one(client)
                else:
                    return
            self.expire()

    def one(self, client: _Client) -> None:
        try:
            message = os.read(client.device, LARGEST + 4096)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                return
            raise SystemExit(0) from error  # unmounted
        _, opcode, unique, node, *_ = HEADER.unpack_from(message)
        body = message[HEADER.size :]
        if opcode in (2, 42):  # FORGET, BATCH_FORGET
            return
        if opcode == 36:  # INTERRUPT
            self.interrupt(client, struct.unpack_from("<Q", body)[0])
            return
        try:
            answer, number = self.answer(client, opcode, unique, node, body), 0
        except _Later:
            return
        except OSError as error:
            answer, number = b"", -(error.errno or errno.EIO)
        _send(client, unique, number, answer)

    def answer(  # noqa: C901 (one case for each request)
        self, client: _Client, opcode: int, unique: int, node: int, body: bytes
    ) -> bytes:
        match opcode:
            case 26:  # INIT
                return _introduction(body)
            case 1:  # LOOKUP
                return self.entry(self.child(node, body))
            case 3:  # GETATTR
                return self.attributes(node)
            case 4:  # SETATTR
                return self.change(client, node, body)
            case 9:  # MKDIR
                mode, _ = struct.unpack_from("<II", body)
                path = self.child(node, body[8:])
                os.mkdir(self.real(path), mode & 0o7777)  # noqa: PTH102
                return self.entry(path)
            case 10:  # UNLINK
                os.unlink(self.real(self.child(node, body)))  # noqa: PTH108
                return b""
            case 11:  # RMDIR
                os.rmdir(self.real(self.child(node, body)))  # noqa: PTH106
                return b""
            case 12 | 45:  # RENAME, RENAME2
                return self.rename(node, body, 8 if opcode == 12 else 16)
            case 14:  # OPEN
                return self.open(client, node, struct.unpack_from("<I", body)[0])
            case 35:  # CREATE
                flags, mode, *_ = struct.unpack_from("<IIII", body)
                path = self.child(node, body[16:])
                os.close(os.open(self.real(path), flags | os.O_CREAT, mode & 0o7777))
                entry = self.entry(path)
                return entry + self.open(client, self.nodes[path], flags & ~os.O_EXCL)
            case 27:  # OPENDIR
                return struct.pack("<QII", 0, 0, 0)
            case 28:  # READDIR
                return self.listing(node, struct.unpack_from("<QQ", body)[1])
            case 15:  # READ
                handle, offset, size = struct.unpack_from("<QQI", body)
                return os.pread(self.good(handle), size, offset)
            case 16:  # WRITE
                handle, offset, size = struct.unpack_from("<QQI", body)
                written = os.pwrite(self.good(handle), body[40 : 40 + size], offset)
                return struct.pack("<II", written, 0)
            case 20:  # FSYNC
                os.fdatasync(self.good(struct.unpack_from("<Q", body)[0]))
                return b""
            case 43:  # FALLOCATE
                handle, offset, size, mode = struct.unpack_from("<QQQI", body)
                if mode:  # holes and zeros, which whoever asks writes then
                    raise OSError(errno.EOPNOTSUPP, "")
                os.posix_fallocate(self.good(handle), offset, size)
                return b""
            case 18:  # RELEASE
                return self.release(struct.unpack_from("<Q", body)[0])
            case 25:  # FLUSH
                handle, _, _, owner = struct.unpack_from("<QIIQ", body)
                self.drop(lambda lock: (lock.client, lock.owner) == (client.name, owner))
                return b""
            case 31:  # GETLK
                return self.ask_lock(client, node, body)
            case 32 | 33:  # SETLK, SETLKW
                return self.lock(client, unique, node, body, wait=opcode == 33)
            case 17:  # STATFS
                return struct.pack(
                    "<QQQQQIIII24x", 1 << 20, 1 << 19, 1 << 19, 999, 999, 4096, 255, 4096, 0
                )
            case 29 | 30 | 34:  # RELEASEDIR, FSYNCDIR, ACCESS
                return b""
            case _:
                raise OSError(errno.ENOSYS, "")

    # Names and attributes

    def child(self, node: int, name: bytes) -> str:
        text = name.split(b"\0")[0].decode()
        return f"{self.paths[node]}/{text}"

    def real(self, path: str) -> str:
        return self.backing + path

    def entry(self, path: str) -> bytes:
        os.lstat(self.real(path))
        if path not in self.nodes:
            self.last += 1
            self.nodes[path], self.paths[self.last] = self.last, path
        node = self.nodes[path]
        return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self.attributes(node)[16:]

    def attributes(self, node: int) -> bytes:
        status = os.lstat(self.real(self.paths[node]))
        seconds = (int(status.st_atime), int(status.st_mtime), int(status.st_ctime))
        rest = (status.st_mode, max(status.st_nlink, 1), 0, 0, 0, 4096, 0)
        packed = struct.pack(
            "<QQQ3Q3I7I", node, status.st_size, status.st_blocks, *seconds, 0, 0, 0, *rest
        )
        return struct.pack("<QII", 0, 0, 0) + packed

    def change(self, client: _Client, node: int, body: bytes) -> bytes:
        valid, _, handle, size = struct.unpack_from("<IIQQ", body)
        path = self.real(self.paths[node])
        if valid & 8:  # SIZE
            if valid & 64:  # by an open file
                self.good(handle)
            os.truncate(path, size)
        if valid & 1:  # MODE
            os.chmod(path, stat.S_IMODE(struct.unpack_from("<I", body, 68)[0]))  # noqa: PTH101
        return self.attributes(node)

    def rename(self, node: int, body: bytes, names_at: int) -> bytes:
        target = struct.unpack_from("<Q", body)[0]
        old, new = body[names_at:].split(b"\0")[:2]
        before, after = self.child(node, old), self.child(target, new)
        os.rename(self.real(before), self.real(after))  # noqa: PTH104
        moved = self.nodes.pop(before, None)
        gone = self.nodes.pop(after, None)
        if gone is not None:
            self.paths.pop(gone, None)
        if moved is not None:
            self.nodes[after], self.paths[moved] = moved, after
        return b""

    def listing(self, node: int, offset: int) -> bytes:
        if offset:
            return b""
        listed = b""
        for number, name in enumerate(sorted(os.listdir(self.real(self.paths[node]))), 1):  # noqa: PTH208
            text = name.encode()
            pad = -len(text) % 8
            listed += struct.pack("<QQII", number + 1000, number, len(text), 0) + text + bytes(pad)
        return listed[:4096]

    # Open files

    def open(self, client: _Client, node: int, flags: int) -> bytes:
        kept = flags & (os.O_ACCMODE | os.O_TRUNC)
        descriptor = os.open(self.real(self.paths[node]), kept | os.O_CLOEXEC)
        self.last += 1
        self.opened[self.last] = _Open(client.name, node, descriptor)
        return struct.pack("<QII", self.last, 0, 0)

    def good(self, handle: int) -> int:
        """Its descriptor. A client that has lost its lease is told so by EIO, for ever."""
        opened = self.opened[handle]
        if opened.stale and self.refuses:
            raise OSError(errno.EIO, "")
        return opened.descriptor

    def release(self, handle: int) -> bytes:
        self.drop(lambda lock: lock.handle == handle)
        opened = self.opened.pop(handle, None)
        if opened is not None:
            os.close(opened.descriptor)
        return b""

    # Locks

    def described(self, client: _Client, node: int, body: bytes) -> _Lock:
        handle, owner, start, end, kind, *_ = _LOCK.unpack_from(body)
        return _Lock(client.name, handle, owner, node, start, end, kind)

    def ask_lock(self, client: _Client, node: int, body: bytes) -> bytes:
        wanted = self.described(client, node, body)
        held = next((lock for lock in self.locks if wanted.against(lock)), None)
        if held is None:
            return struct.pack("<QQII", wanted.start, wanted.end, UNLOCKED, 0)
        return struct.pack("<QQII", held.start, held.end, held.kind, 0)

    def lock(self, client: _Client, unique: int, node: int, body: bytes, *, wait: bool) -> bytes:
        wanted = self.described(client, node, body)
        if wanted.kind != UNLOCKED and self.opened[wanted.handle].stale:
            raise OSError(errno.EIO, "")
        if wanted.kind != UNLOCKED and any(wanted.against(lock) for lock in self.locks):
            if not wait:
                raise OSError(errno.EAGAIN, "")
            self.waiting.append((client, unique, wanted))
            raise _Later
        self.put(wanted)
        return b""

    def put(self, wanted: _Lock) -> None:
        mine = (wanted.client, wanted.owner, wanted.node)
        kept = []
        for lock in self.locks:
            same = (lock.client, lock.owner, lock.node) == mine
            kept += lock.without(wanted.start, wanted.end) if same else [lock]
        self.locks = kept if wanted.kind == UNLOCKED else [*kept, wanted]
        if wanted.kind == UNLOCKED:
            self.grant()

    def drop(self, which: object) -> None:
        assert callable(which)
        self.locks = [lock for lock in self.locks if not which(lock)]
        self.grant()

    def grant(self) -> None:
        """Gives locks that are free to those that wait, the first one first."""
        for one in list(self.waiting):
            client, unique, wanted = one
            if not any(wanted.against(lock) for lock in self.locks):
                self.waiting.remove(one)
                self.locks.append(wanted)
                _send(client, unique, 0, b"")

    def interrupt(self, client: _Client, unique: int) -> None:
        for one in list(self.waiting):
            if one[0] is client and one[1] == unique:
                self.waiting.remove(one)
                _send(client, unique, -errno.EINTR, b"")


def _introduction(body: bytes) -> bytes:
    _, minor, readahead, _ = struct.unpack_from("<IIII", body)
    limits = (64, 48, LARGEST, 1, LARGEST // 4096, 0, 0, 0)
    return struct.pack("<IIII", 7, min(minor, 31), readahead, FLAGS) + struct.pack(
        "<HHIIHHII24x", *limits
    )


def _send(client: _Client, unique: int, number: int, answer: bytes) -> None:
    head = struct.pack("<IiQ", 16 + len(answer), number, unique)
    with contextlib.suppress(FileNotFoundError):  # whoever asked was interrupted
        os.write(client.device, head + answer)


def _say(line: bytes) -> None:
    os.write(sys.stdout.fileno(), line)


_libc = ctypes.CDLL(None, use_errno=True)


def _main(backing: str, lease_s: str, refuses: str, *clients: str) -> None:
    server = _Server(backing, float(lease_s), refuses == "1")
    for name in clients:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={LARGEST}"
        where = os.fsencode(f"mount-{name}")
        if _libc.mount(b"revoking", where, FUSE_TYPE.encode(), 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        server.clients[name] = _Client(name, device)
    _say(b"mounted\n")
    server.serve()


if __name__ == "__main__":
    _main(*sys.argv[1:])
