"""What /proc says about processes, so that one can be recognised after an agent restart."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")
# The kernel's PID_MAX_LIMIT on 64-bit machines.
PID_MAX = 1 << 22


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid.

    `start_ticks` is field 22 of /proc/PID/stat (clock ticks since boot); `boot_id` tells one
    boot of the host from another, after which both pid and ticks may repeat.
    """

    pid: int
    start_ticks: int
    boot_id: str

    def __post_init__(self) -> None:
        if not 1 <= self.pid <= PID_MAX or self.start_ticks < 0:
            raise ValueError(f"{self.pid} with start {self.start_ticks} is no process")

    def is_alive(self) -> bool:
        """Whether that very process still runs (a zombie does not)."""
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.start_ticks


@cache
def boot_id() -> str:
    """The kernel's random name for this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


# What semper-blkd calls the process that shares its memory, and with it its arguments.
MEMORY_REAPER = "blkd-reaper"


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in ticks since boot; None when it does not run."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses, and may itself hold spaces and ")".
    fields = stat.rpartition(")")[2].split()
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else int(ticks)


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process; None when it is gone."""
    ticks = start_ticks(pid)
    return None if ticks is None else ProcessId(pid, ticks, boot_id())


def find_by_argument(pattern: re.Pattern[str]) -> list[int]:
    """Pids of processes with an argument that `pattern` matches whole, recorded by anybody or not.
    See `find_processes`.
    """
    return sorted(found.identity.pid for found in find_processes(pattern))


@dataclass(frozen=True)
class Found:
    """A living process, its arguments, and the match of the one that was looked for."""

    identity: ProcessId
    arguments: tuple[str, ...]
    match: re.Match[str]


def find_processes(pattern: re.Pattern[str]) -> list[Found]:
    """Living processes with an argument that `pattern` matches whole.

    Only those of this user and of this pid namespace: others may write what they like into their
    arguments, and the agent of a container has paths of its own. Without the helper by which a
    backend has its memory taken apart at its end: that process shares the backend's arguments, and
    ends with the backend.
    """
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        identity = identify(int(entry.name))
        arguments = arguments_of(int(entry.name))
        match = next((m for a in arguments if (m := pattern.fullmatch(a))), None)
        if identity is None or match is None or not _is_ours(entry):
            continue
        if command_name(identity.pid) != MEMORY_REAPER and identity.is_alive():
            found.append(Found(identity, arguments, match))
    return found


def arguments_of(pid: int) -> tuple[str, ...]:
    """The arguments of a process, its name first; none when it is gone."""
    try:
        content = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(content.decode(errors="surrogateescape").rstrip("\0").split("\0"))


def _is_ours(entry: Path) -> bool:
    try:
        if entry.stat().st_uid != os.geteuid():
            return False
        return (entry / "ns/pid").readlink() == (PROC / "self/ns/pid").readlink()
    except FileNotFoundError:
        return False  # it is gone
    except OSError:
        return True  # what cannot be told apart is counted


def command_name(pid: int) -> str:
    """The program's short name, or "?" when the process is gone."""
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "?"
