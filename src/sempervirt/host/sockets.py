"""Unix sockets by path, and listening sockets that can be taken back from a process.

The agent owns a disk's listening socket and its backends inherit it. When the agent died, the
socket lives on in them: `borrow_listener` gets it back with pidfd_getfd(2), so that the
address need not be bound again and no backend is left listening on a socket that no path
leads to.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host import descriptors

# struct sockaddr_un holds 108 bytes, the last one a NUL.
PATH_MAX_BYTES = 107
# How the addresses of connections begin that stand for nobody, as in crates/blkd/src/door.rs.
PLUG = "\0semper-plug-"
TRIES = 8

log = logging.getLogger(__name__)


def check_socket_path(path: Path) -> Path:
    """`path`, if the kernel can take it as a unix socket's address."""
    length = len(os.fsencode(path))
    if length > PATH_MAX_BYTES:
        raise InvalidRequest(
            f"the socket path {path} has {length} bytes, more than the kernel's {PATH_MAX_BYTES}",
            remedy="use a shorter run directory (SEMPERVIRT_RUN_DIR) or shorter names",
        )
    return path


def listen_unix(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening socket at `path`; an earlier one there is unlinked.

    Raises InvalidRequest for a path that is too long, Unavailable when the socket cannot be bound.
    """
    check_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise Unavailable(f"cannot listen on {path}: {error.strerror}") from error
    return listener


def discard(path: Path) -> None:
    """Removes a file that may be absent; one that cannot be removed is left, and harms nobody."""
    with contextlib.suppress(OSError):
        path.unlink()


def turn_away(listener: socket.socket) -> None:
    """From now on whoever connects waits outside; whoever came in to nobody is sent away.

    For a disk that has no backend: QEMU must not be connected, for it would wait in the handshake
    with its main loop. crates/blkd/src/door.rs has the whole of it. Nobody else may accept.
    """
    listener.listen(0)
    for _ in range(TRIES):
        if _plug(listener):
            return
        if not select.select([listener], [], [], 0)[0]:
            continue
        listener.accept()[0].close()


def _plug(listener: socket.socket) -> bool:
    """Takes the room in the backlog; False when somebody has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plug:
        plug.setblocking(False)
        try:
            plug.bind(f"{PLUG}{os.getpid()}-{time.monotonic_ns()}")
            plug.connect(listener.getsockname())
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("the socket %s stays open: %s", listener.getsockname(), error)
    return True


def listen_tcp(address: str) -> socket.socket:
    """A listening socket at "HOST:PORT". Raises Unavailable when it cannot be bound."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=64)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {address}: {error.strerror or error}",
            remedy="is the address one of this host, and is no other program there?",
        ) from error


def borrow_listener(pid: int, fd: int, path: Path) -> socket.socket | None:
    """A duplicate of the listening socket that a process holds as `fd`.

    None when the kernel does not allow it, or `fd` is no socket that listens at `path`.
    """
    try:
        duplicate = descriptors.take(pid, fd)
    except OSError:
        return None
    try:
        listener = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        return None
    try:
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and listener.getsockname() == str(path) and path.is_socket():
            return listener
    except OSError:
        pass
    listener.close()
    return None
