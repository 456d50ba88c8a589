"""Which processes may connect to a backend: the agent's side of crates/blkd/src/peers.rs.

    PID START_TICKS
    …

Replaced as a whole, so a reader finds all of it or what was there before.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown
from sempervirt.host.procfs import ProcessId, command_name

# struct ucred: pid, uid, gid.
_UCRED = struct.Struct("=iII")


def write_peers(path: Path, processes: Iterable[ProcessId]) -> None:
    """From now on these processes are served, and no others. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    text = "".join(f"{one.pid} {one.start_ticks}\n" for one in processes)
    with scratch.open("x") as file:
        file.write(text)
    scratch.replace(path)


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end: who listens, or who has connected. 0 in another namespace."""
    pid, *_ = _UCRED.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    )
    return int(pid)


def require_peer(connection: socket.socket, expected: int, path: Path) -> None:
    """Raises OutcomeUnknown, naming who listens at `path`, unless that is `expected`."""
    pid = peer_pid(connection)
    if pid != expected:
        raise OutcomeUnknown(
            f"at {path} listens pid {pid} ({command_name(pid)}), and not pid {expected}",
            remedy="another process has taken its place; end that one",
        )
