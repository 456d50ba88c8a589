"""What /proc says about processes, so that one can be recognised after an agent restart."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
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


def memory_available() -> int:
    """How much memory programs can still have without others losing theirs, in bytes."""
    for line in (PROC / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@cache
def boot_id() -> str:
    """The kernel's random name for this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


# Processes of our programs that have a program's arguments and are not that program: the one that
# shares a backend's memory, and the one that makes connections (crates/walls/src/connects.rs).
HELPERS = ("blkd-reaper", "semper-connects")


def stat_fields(pid: int) -> list[str] | None:
    """What /proc/PID/stat says from its third field on (state, parent, …); None when it is gone."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the command in parentheses, and may itself hold spaces and ")".
    return stat.rpartition(")")[2].split()


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in ticks since boot; None when it does not run."""
    fields = stat_fields(pid)
    if fields is None:
        return None
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else int(ticks)


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process; None when it is gone."""
    ticks = start_ticks(pid)
    return None if ticks is None else ProcessId(pid, ticks, boot_id())


def find_by_argument(pattern: re.Pattern[str], *, of_all: bool = False) -> list[int]:
    """Pids of processes with an argument that `pattern` matches whole, recorded by anybody or not.
    See `find_processes`.
    """
    return sorted(found.identity.pid for found in find_processes(pattern, of_all=of_all))


@dataclass(frozen=True)
class Found:
    """A living process, its user, its arguments, and the match of the one that was looked for."""

    identity: ProcessId
    user: int
    arguments: tuple[str, ...]
    match: re.Match[str]


def find_processes(pattern: re.Pattern[str], *, of_all: bool = False) -> list[Found]:
    """Living processes with an argument that `pattern` matches whole.

    Only those of this pid namespace (the agent of a container has paths of its own), and of this
    user, unless `of_all`: others may write what they like into their arguments. Without the helpers
    of our programs, which have a program's arguments and end with the program.
    """
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        identity = identify(int(entry.name))
        arguments = arguments_of(int(entry.name))
        match = next((m for a in arguments if (m := pattern.fullmatch(a))), None)
        if identity is None or match is None or (user := _user_of(entry)) is None:
            continue
        if user != os.geteuid() and not of_all:
            continue
        if command_name(identity.pid) not in HELPERS and identity.is_alive():
            found.append(Found(identity, user, arguments, match))
    return found


def find_helpers(pids: Collection[int]) -> list[tuple[int, int, str]]:
    """Pid, parent and name of the helpers of those processes of our programs."""
    found = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or (name := command_name(int(entry.name))) not in HELPERS:
            continue
        fields = stat_fields(int(entry.name))
        if fields is not None and (parent := int(fields[1])) in pids:
            found.append((int(entry.name), parent, name))
    return sorted(found)


def arguments_of(pid: int) -> tuple[str, ...]:
    """The arguments of a process, its name first; none when it is gone."""
    try:
        content = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(content.decode(errors="surrogateescape").rstrip("\0").split("\0"))


def unescape(text: str) -> str:
    """Of a table of mounts: the kernel writes blanks and backslashes there as octal numbers."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def _user_of(entry: Path) -> int | None:
    """The user of a process of this pid namespace; None when it is of another, or gone."""
    user = None
    try:
        user = entry.stat().st_uid
        here = (entry / "ns/pid").readlink() == (PROC / "self/ns/pid").readlink()
    except FileNotFoundError:
        return None
    except OSError:  # what cannot be told apart is counted
        return os.geteuid() if user is None else user
    return user if here else None


def command_name(pid: int) -> str:
    """The program's short name, or "?" when the process is gone."""
    try:
        return (PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "?"
