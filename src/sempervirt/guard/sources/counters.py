"""Counters of the kernel that only grow, and the kernel's taint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.source import AbsentError, read_number, read_text

SYS = Path("/sys")
PROC = Path("/proc")
EVERY_S = 2.0
# How many memory controllers and counters are looked at; a large server has some dozens.
FILES_MAX = 1024
# Of /proc/interrupts, which has a column for each processor: 1,024 of them have some megabytes.
INTERRUPTS_BYTES_MAX = 32 << 20


class Counter:
    """A number that only grows. `read` gives it; what is added since the last look is a sign."""

    interval_s = EVERY_S

    def __init__(self, name: str, identifier: SignId, what: str, read: Callable[[], int]) -> None:
        self.name = name
        self._identifier = identifier
        self._what = what
        self._read = read
        self._last: int | None = None

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError where the kernel does not count that."""
        del patience_s
        try:
            number = self._read()
        except FileNotFoundError as error:
            raise AbsentError(f"this kernel does not count {self._what}") from error
        before, self._last = self._last, number
        if before is None or number <= before:
            return ()
        evidence = f"{number - before} more {self._what}, {number} in all"
        return (Sign(self._identifier, evidence, count=number - before),)

    def close(self) -> None:
        """Nothing is open."""


def kernel_counters(system: Path = SYS, proc: Path = PROC) -> list[Counter]:
    """The counters of faults that a kernel may have."""
    kernel, edac = system / "kernel", system / "devices/system/edac/mc"
    return [
        Counter("oops counter", SignId.COUNTER_OOPS, "oopses",
                lambda: read_number(kernel / "oops_count")),
        Counter("warning counter", SignId.COUNTER_WARNING, "kernel warnings",
                lambda: read_number(kernel / "warn_count")),
        Counter("machine checks", SignId.COUNTER_MACHINE_CHECK, "machine check exceptions",
                lambda: machine_checks(read_text(proc / "interrupts", INTERRUPTS_BYTES_MAX))),
        Counter("corrected memory", SignId.MEMORY_CORRECTED, "memory errors that were corrected",
                lambda: _sum_of(edac, "ce_count")),
        Counter("uncorrected memory", SignId.MEMORY_UNCORRECTED,
                "memory errors that could not be corrected", lambda: _sum_of(edac, "ue_count")),
    ]  # fmt: skip


def machine_checks(interrupts: str) -> int:
    """The machine check exceptions of all processors, from the text of /proc/interrupts.

    Raises FileNotFoundError where the kernel has no such line.
    """
    found = re.search(r"^ *MCE:((?: +\d+)+)", interrupts, re.MULTILINE)
    if found is None:
        raise FileNotFoundError("no line MCE")
    return sum(int(number) for number in found[1].split())


def _sum_of(folder: Path, name: str) -> int:
    paths = sorted(folder.glob(f"mc*/{name}"))[:FILES_MAX]
    if not paths:
        raise FileNotFoundError(f"no memory controller in {folder}")
    return sum(read_number(path) for path in paths)


# Bits of /proc/sys/kernel/tainted (Documentation/admin-guide/tainted-kernels.rst).
TAINTS: Mapping[int, tuple[SignId, str]] = {
    4: (SignId.TAINT_MACHINE_CHECK, "a processor has reported a machine check"),
    5: (SignId.TAINT_BAD_PAGE, "a page of memory was in a state that cannot be"),
    7: (SignId.TAINT_DIED, "the kernel has died once: oops or BUG"),
    14: (SignId.TAINT_SOFT_LOCKUP, "a soft lockup has occurred"),
}


class Taint:
    """The kernel's taint: a bit that was not set before is a sign."""

    name = "taint"
    interval_s = EVERY_S

    def __init__(self, proc: Path = PROC) -> None:
        self._path = proc / "sys/kernel/tainted"
        self._last: int | None = None

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError, OSError, ValueError."""
        del patience_s
        try:
            now = read_number(self._path)
        except FileNotFoundError as error:
            raise AbsentError(f"there is no {self._path}") from error
        before, self._last = self._last, now
        if before is None:
            return ()
        return [
            Sign(identifier, f"{what} (bit {bit} of {self._path.name} is {now})")
            for bit, (identifier, what) in TAINTS.items()
            if now & ~before & (1 << bit)
        ]

    def close(self) -> None:
        """Nothing is open."""
