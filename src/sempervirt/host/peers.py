"""Which processes may connect to a backend: the agent's side of crates/blkd/src/peers.rs.

    PID START_TICKS
    …

Replaced as a whole, so a reader finds all of it or what was there before.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown
from sempervirt.host.procfs import PROC, ProcessId, command_name
from sempervirt.host.records import replace_text

# struct ucred: pid, uid, gid.
_UCRED = struct.Struct("=iII")


def write_peers(path: Path, processes: Iterable[ProcessId]) -> None:
    """From now on these processes are served, and no others. Raises OSError."""
    replace_text(path, "".join(f"{one.pid} {one.start_ticks}\n" for one in processes))


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end: who listens, or who has connected. 0 in another namespace."""
    pid, _, _ = _credentials(connection)
    return pid


def peer_uid(connection: socket.socket) -> int:
    """The user of the process at the other end."""
    _, uid, _ = _credentials(connection)
    return uid


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(told)
    return pid, uid, gid


# Programs that work for one VM, and ask an agent for nothing.
_OF_VMS = ("semper-blkd", "semper-saved", "semper-vfiod", "semper-wired", "qemu-")


def works_for_a_vm(pid: int) -> bool:
    """Whether that process executes a program that a guest, another host or a saved state may have
    taken over. It cannot execute another one; so what it executes is true, unlike its arguments.
    A process that has ended may have been one.
    """
    if pid == 0:  # of another name space, where none of these is
        return False
    try:
        program = (PROC / str(pid) / "exe").readlink().name
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # of another user, as none of these is
        return False
    return program.startswith(_OF_VMS)


def require_peer(connection: socket.socket, expected: int, path: Path) -> None:
    """Raises OutcomeUnknown, naming who listens at `path`, unless that is `expected`."""
    pid = peer_pid(connection)
    if pid != expected:
        raise OutcomeUnknown(
            f"at {path} listens pid {pid} ({command_name(pid)}), and not pid {expected}",
            remedy="another process has taken its place; end that one",
        )
