"""Run in QEMU's place (`test_vm_users.py`), with what QEMU has: tries to reach what is not its own.

Prints "TRIED " and, as JSON, what came of each attempt: "" when it succeeded, else why not. It runs
as a user that reads no package of ours, so by the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
PTRACE_SEIZE, PTRACE_DETACH, CLONE_NEWUTS, MS_BIND = 0x4206, 17, 0x04000000, 4096
FINIT_MODULE = {"x86_64": 313}.get(os.uname().machine, 273)


def call(status: int) -> None:
    """What a function of the C library says."""
    if status < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def read(path: str) -> None:
    """The first byte."""
    with Path(path).open("rb") as file:
        file.read(1)


def write(path: str) -> None:
    """Opens it, and writes nothing."""
    os.close(os.open(path, os.O_WRONLY))


def create(path: str) -> None:
    """A new file."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    Path(path).unlink()


def remove(path: str) -> None:
    """Takes it away, and puts it back."""
    away = Path(path).rename(path + ".away")
    away.rename(path)


def connect(path: str) -> None:
    """One that does not let it in at once is within reach as well."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0.3)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            client.connect(path)


def abstract(name: str) -> None:
    """A socket without a path."""
    connect("\0" + name)


def trace(pid: str) -> None:
    """As a debugger."""
    call(libc.ptrace(PTRACE_SEIZE, int(pid), 0, 0))
    libc.ptrace(PTRACE_DETACH, int(pid), 0, 0)


def memory(pid: str) -> None:
    """Of another process."""
    os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR))


def root(pid: str) -> None:
    """The files that another process sees."""
    os.listdir(f"/proc/{pid}/root/etc")  # noqa: PTH208 - as short as what it tries


def signal(pid: str) -> None:
    """Asks whether it might."""
    os.kill(int(pid), 0)


def owner(_: str) -> None:
    """To be root again."""
    os.setresuid(0, 0, 0)
    read("/etc/shadow")


def device(path: str) -> None:
    """Of memory."""
    os.mknod(path, 0o20600, os.makedev(1, 1))
    Path(path).unlink()


def raw(_: str) -> None:
    """Any packet."""
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def mount(path: str) -> None:
    """A directory on itself."""
    call(libc.mount(path.encode(), path.encode(), None, MS_BIND, None))


def namespace(_: str) -> None:
    """Of its own."""
    call(libc.unshare(CLONE_NEWUTS))


def module(_: str) -> None:
    """Garbage: whoever may load modules is told that this is none."""
    garbage = os.memfd_create("garbage")
    status = libc.syscall(FINIT_MODULE, garbage, b"", 0)
    if status < 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOEXEC):
        raise OSError(ctypes.get_errno(), "module")


def tcp(port: str) -> None:
    """A service of the host."""
    with socket.socket() as client:
        client.connect(("127.0.0.1", int(port)))


def listen(_: str) -> None:
    """To be a service of the host."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))


TRIES: tuple[Callable[[str], None], ...] = (
    *(read, write, create, remove, connect, abstract, trace, memory, root, signal, owner, device),
    *(raw, mount, namespace, module, tcp, listen),
)


def main() -> None:
    """What the file says that is named: [["read", "/etc/shadow"], …]."""
    ways = {one.__name__: one for one in TRIES}
    tried = {}
    for what, at in json.loads(Path(sys.argv[1]).read_text()):
        try:
            ways[what](at)
            tried[f"{what} {at}"] = ""
        except OSError as error:
            tried[f"{what} {at}"] = str(error)
    sys.stdout.write(f"TRIED {json.dumps(tried)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
