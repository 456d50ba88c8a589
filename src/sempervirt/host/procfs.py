"""What /proc says about processes, so that one can be recognised after an agent restart."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid.

    `start_ticks` is field 22 of /proc/PID/stat (clock ticks since boot); `boot_id` tells one
    boot of the host from another, after which both pid and ticks may repeat.
    """

    pid: int
    start_ticks: int
    boot_id: str

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

    Without the helper by which a backend has its memory taken apart at its end: that process shares
    the backend's arguments, and ends with the backend.
    """
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(pattern.fullmatch(argument) for argument in arguments):
            pid = int(entry.name)
            if command_name(pid) != MEMORY_REAPER:
                found.append(pid)
    return sorted(found)


def command_name(pid: int) -> str:
    """The program's short name, or "?" when the process is gone."""
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "?"
