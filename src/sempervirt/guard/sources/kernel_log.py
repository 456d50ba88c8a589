"""/dev/kmsg: what the kernel says of itself.

A record is "PRIORITY,SEQUENCE,MICROSECONDS,FLAGS;TEXT" (Documentation/ABI/testing/dev-kmsg). Who
writes to /dev/kmsg cannot pass for the kernel: the facility of such a record is never 0. Of the
names that users choose one may begin a text, that of a thread (TASK_COMM_LEN: 15 characters):

    NAME[790]: segfault at 0 ip …   NAME invoked oom-killer: …   NAME: page allocation failure: …

So each pattern asks for more than 15 characters that no such name and what follows it can make.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sempervirt.guard.signs import Sign, SignId, one_line
from sempervirt.guard.sources.source import AbsentError

PATH = Path("/dev/kmsg")
RECORD_BYTES_MAX = 8192
# At one look: what comes faster is told in parts.
RECORDS_MAX = 256
KERNEL_FACILITY = 0

# The first that fits counts. From the kernel's sources, 6.1 to 6.12.
PATTERNS: tuple[tuple[SignId, re.Pattern[str]], ...] = tuple(
    (identifier, re.compile("|".join(beginnings)))
    for identifier, beginnings in (
        (SignId.LOG_SOFT_LOCKUP, [r"watchdog: BUG: soft lockup - CPU#\d+ stuck for"]),
        (SignId.LOG_HARD_LOCKUP, [r"(NMI )?watchdog: (CPU\d+: )?Watchdog detected hard LOCKUP"]),
        (SignId.LOG_OOPS, [
            r"BUG: (unable to handle|kernel NULL pointer|stack guard page)",
            r"BUG: (scheduling while atomic|Bad page (state|map)|Bad rss-counter)",
            r"kernel BUG at \S+:\d+!", r"(Oops: )?general protection fault[,:]",
            r"(Oops: )?(Oops|double fault|invalid opcode|divide error): [0-9a-f]{4} \[#\d+\] [A-Z]",
            r"Kernel panic - not syncing", r"Unable to handle kernel ",
            r"list_(add|del) corruption",
        ]),
        (SignId.LOG_HUNG_TASK, [r"INFO: task .{1,40} blocked for more than \d+ seconds"]),
        (SignId.LOG_RCU_STALL, [
            r"rcu: INFO: rcu_\w+ (self-)?detected",
            r"rcu: (INFO: )?rcu_\w+ kthread (starved|timer wakeup)",
        ]),
        (SignId.LOG_WARNING, [r"WARNING: CPU: \d+ PID: \d+ at "]),
        (SignId.LOG_MACHINE_CHECK, [
            r"mce: \[Hardware Error\]", r"\[Hardware Error\]: ", r"mce: CPU\d+: Machine Check",
            r"mce: Uncorrected hardware", r"Memory failure: 0x",
        ]),
        (SignId.LOG_NMI, [
            r"Uhhuh\. NMI received", r"NMI: (PCI system error|IOCK error|Not continuing)",
        ]),
        (SignId.LOG_PCI_ERROR, [
            r"[a-z0-9_]+ [0-9a-f]{4}:[0-9a-f:.]+: AER: (Multiple )?Uncorrected",
            r"[a-z0-9_]+ [0-9a-f]{4}:[0-9a-f:.]+: PCIe Bus Error: severity=Uncorrect",
        ]),
        (SignId.LOG_STORAGE_ERROR, [
            r"(blk_update_request: )?(I/O|critical \w+) error, dev [\w-]+, ",
            r"Buffer I/O error on dev",
            r"nvme nvme\d+: (controller is down|Device not ready|Removing after probe failure)",
        ]),
        (SignId.LOG_FILE_SYSTEM, [
            r"EXT4-fs error \(device ", r"EXT4-fs \(.{1,40}\): Remounting filesystem read-only",
            r"XFS \(.{1,40}\): (Corruption|Metadata corruption|log I/O error)",
            r"XFS \(.{1,40}\): Filesystem has been shut down", r"BTRFS (error|critical) \(device ",
        ]),
        (SignId.LOG_OUT_OF_MEMORY, [r"(Out of memory|Memory cgroup out of memory): Killed"]),
        (SignId.LOG_THERMAL, [
            r"(mce: )?CPU\d+: (Core|Package) temperature( is)? above threshold",
            r"thermal thermal_zone\d+: .*critical temperature",
        ]),
        (SignId.LOG_WATCHDOG, [r"watchdog: watchdog\d+: pretimeout event"]),
    )
)  # fmt: skip


def read_record(record: bytes) -> Sign | None:
    """The sign that a record of the log is, if it is one."""
    head, separator, rest = record.partition(b";")
    priority = head.split(b",", 1)[0]
    # At most four digits: the kernel's own numbers are below 8.
    if not separator or not priority.isdigit() or len(priority) > 4:
        return None
    if int(priority) >> 3 != KERNEL_FACILITY:
        return None
    text = rest.split(b"\n", 1)[0].decode(errors="replace")
    for identifier, pattern in PATTERNS:
        if pattern.match(text):
            return Sign(identifier, one_line(text))
    return None


class KernelLog:
    """The log as a source, from its end on."""

    name = "kernel log"
    interval_s = 0.0

    def __init__(self, path: Path = PATH) -> None:
        self._path = path
        self._file: int | None = None

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Waits for a record. Raises AbsentError, OSError."""
        file = self._open()
        waiting = select.poll()
        waiting.register(file, select.POLLIN)
        waiting.poll(patience_s * 1000)
        signs = []
        for _ in range(RECORDS_MAX):
            try:
                record = os.read(file, RECORD_BYTES_MAX)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # records were overwritten before we read them; the next one is there
            if not record:
                break
            if (sign := read_record(record)) is not None:
                signs.append(sign)
        return signs

    def _open(self) -> int:
        if self._file is None:
            try:
                file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                self._file = file
                os.lseek(file, 0, os.SEEK_END)
            except OSError as error:
                self.close()
                raise AbsentError(f"{self._path} cannot be read: {error.strerror}") from error
        return self._file

    def close(self) -> None:
        """Closes the log."""
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
            self._file = None


def said_by(prefix: str, path: Path = PATH) -> list[str]:
    """What is in the log now of the lines of the kernel that begin so. Blocks, but waits for
    nothing; none where the log cannot be read.
    """
    found = []
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        while True:
            try:
                record = os.read(file, RECORD_BYTES_MAX)
            except BrokenPipeError:
                continue
            except OSError:  # nothing more, or it cannot be read
                break
            if not record:
                break
            head, _, rest = record.partition(b";")
            priority = head.split(b",", 1)[0]
            text = rest.split(b"\n", 1)[0].decode(errors="replace")
            if priority.isdigit() and int(priority) >> 3 == KERNEL_FACILITY:
                found += [one_line(text)] if text.startswith(prefix) else []
    finally:
        os.close(file)
    return found
