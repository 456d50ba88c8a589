"""What the threads of a process are doing, as the kernel tells it in /proc.

For judging whether a process works, waits for a medium, waits for a processor, or does not come
back: each of these looks the same to whoever waits for its answer. Only files are read that the
kernel answers without the process's memory lock (`cmdline` would wait with a process that hangs).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from sempervirt.host.procfs import PROC

# Calls that wait for a medium, by the names and numbers of the kernel's tables.
# open pread64 pwrite64 readv writev fstat lseek fsync fdatasync ftruncate statfs fstatfs mincore
# madvise msync openat newfstatat sync_file_range fallocate preadv pwritev copy_file_range preadv2
# pwritev2 statx
_STORAGE_X86 = frozenset(
    {2, 5, 8, 17, 18, 19, 20, 26, 27, 28, 74, 75, 77, 137, 138, 257, 262, 277, 285, 295, 296, 326}
    | {327, 328, 332}
)
# The same calls, by the table that most other architectures share.
_STORAGE_GENERIC = frozenset(
    {43, 44, 46, 47, 56, 62, 65, 66, 67, 68, 69, 70, 79, 80, 82, 83, 84, 227, 232, 233, 285, 286}
    | {287, 291}
)
STORAGE_CALLS = _STORAGE_X86 if platform.machine() == "x86_64" else _STORAGE_GENERIC
# The same number everywhere.
IO_URING_ENTER = 426
# Parts of the names of kernel functions in which one waits for a medium; where the call cannot be
# read, and for page faults, which are no call.
_STORAGE_WAITS = (
    "fuse",
    "request_wait_answer",
    "folio",
    "page_bit",
    "io_schedule",
    "blk_",
    "bio_",
    "bdev",
    "rq_qos",
    "sync_",
    "writeback",
    "jbd2",
    "nfs",
    "rpc_",
    "xfs",
    "btrfs",
    "ceph",
    "loop_",
)


@dataclass(frozen=True)
class ThreadState:
    """One thread. `state` is the letter of ps(1); `ran_ns` its processor time.

    `call` is the system call in which it waits: -1 for none (a page fault, or it runs), None where
    the kernel does not tell us. `waits_in` is the kernel's function in which it sleeps, or "".
    """

    tid: int
    name: str
    state: str
    ran_ns: int
    call: int | None
    waits_in: str

    @property
    def stopped(self) -> bool:
        """By a signal or a debugger: it goes on when somebody says so, and not by itself."""
        return self.state in "Tt"

    @property
    def wants_processor(self) -> bool:
        """It runs, or would if it were given a processor."""
        return self.state == "R"

    @property
    def waits_for_medium(self) -> bool:
        """It sleeps in a call on a file or a device, or for a page of one."""
        if self.state == "D":
            return True
        known = any(part in self.waits_in for part in _STORAGE_WAITS)
        return self.state == "S" and (self.call in STORAGE_CALLS or known)

    def __str__(self) -> str:
        where = f" in {self.waits_in}" if self.waits_in else ""
        call = f", system call {self.call}" if self.call is not None and self.call >= 0 else ""
        return f"{self.name} ({self.tid}): {self.state}{where}{call}"


def threads_of(pid: int) -> tuple[ThreadState, ...]:
    """The threads of a process; none when it is gone."""
    try:
        tids = sorted(int(entry.name) for entry in (PROC / str(pid) / "task").iterdir())
    except OSError:
        return ()
    return tuple(thread for tid in tids if (thread := _thread(pid, tid)) is not None)


def _thread(pid: int, tid: int) -> ThreadState | None:
    folder = PROC / str(pid) / "task" / str(tid)
    try:
        stat = (folder / "stat").read_text()
    except OSError:
        return None
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat.rpartition(")")[2].split()
    waits_in = _read(folder, "wchan")
    return ThreadState(
        tid=tid,
        name=name,
        state=fields[0],
        ran_ns=_ran_ns(folder, fields),
        call=_call(_read(folder, "syscall")),
        waits_in="" if waits_in == "0" else waits_in,
    )


def _ran_ns(folder: Path, fields: list[str]) -> int:
    """By the scheduler's account; a kernel without one counts in ticks of 10 ms."""
    account = _read(folder, "schedstat").split()
    if account:
        return int(account[0])
    return (int(fields[11]) + int(fields[12])) * 10_000_000


def _call(text: str) -> int | None:
    number = text.split(" ", 1)[0]
    if number == "running":
        return -1
    try:
        return int(number)
    except ValueError:
        return None


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text().strip()
    except OSError:
        return ""
