"""Unix sockets by path, and listening sockets that can be taken back from a process.

The agent owns a disk's listening socket and its backends inherit it. When the agent died, the
socket lives on in them: `borrow_listener` gets it back with pidfd_getfd(2), so that the
address need not be bound again and no backend is left listening on a socket that no path
leads to.
"""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host import descriptors
from sempervirt.host.lending import lend

# struct sockaddr_un holds 108 bytes, the last one a NUL.
PATH_MAX_BYTES = 107
# Who may ask an agent of root, beside root (packaging/sempervirt.sysusers).
GROUP = "sempervirt"
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


@dataclass(frozen=True)
class Access:
    """Who may connect to a socket: by name, or as a number; None leaves it to this user."""

    owner: str | None = None
    group: str | None = None
    mode: int = 0o600

    def give(self, path: Path) -> None:
        """Gives a socket away. Raises InvalidRequest for one who is not there, Unavailable."""
        uid = _number(self.owner, lambda name: pwd.getpwnam(name).pw_uid, "user")
        gid = _number(self.group, lambda name: grp.getgrnam(name).gr_gid, "group")
        try:
            path.chmod(self.mode)  # first: what is another user's needs CAP_FOWNER for it
            if (uid, gid) != (-1, -1):
                os.chown(path, uid, gid)
        except OSError as error:
            raise Unavailable(
                f"{path} cannot be given to {self.owner or ''}:{self.group or ''}: "
                f"{error.strerror}",
                remedy="only root can give sockets away (CAP_CHOWN)",
            ) from error


def _number(name: str | None, find: Callable[[str], int], what: str) -> int:
    if name is None:
        return -1
    if name.isdecimal():
        return int(name)
    try:
        return find(name)
    except KeyError as error:
        raise InvalidRequest(
            f"there is no {what} {name} on this host", remedy=f"name another {what}, or a number"
        ) from error


def listen_unix(path: Path, group: int | None = None) -> socket.socket:
    """A listening socket at `path` for this user, and `group`; an earlier one there is unlinked.

    Raises InvalidRequest for a path that is too long, Unavailable when the socket cannot be bound.
    """
    check_socket_path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        lend(path, group)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise Unavailable(f"cannot listen on {path}: {error.strerror}") from error
    return listener


def share_with_group(path: Path, group: str = GROUP) -> bool:
    """Lets the members of a group connect to the socket of root's agent, if there is that group;
    whether they can. The directory can be entered, and not listed.
    """
    if os.geteuid() != 0:
        return False
    try:
        gid = grp.getgrnam(group).gr_gid
    except KeyError:
        return False
    try:
        for place, mode in ((path.parent, 0o711), (path, 0o660)):
            os.chown(place, -1, gid)
            place.chmod(mode)
    except OSError as error:
        log.warning("the group %s cannot connect to %s: %s", group, path, error.strerror)
        return False
    return True


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
    """A listening socket at "HOST:PORT". Raises Unavailable when it cannot be bound.

    What its connections write is sent at once: they have that from the listener, and asyncio sets
    it for sockets alone that were made with the number of the protocol. Else the second part of an
    answer waits 40 ms for the peer's acknowledgement of the first.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, int(port)), family=family, backlog=64)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {address}: {error.strerror or error}",
            remedy="is the address one of this host, and is no other program there?",
        ) from error
    return listener


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
