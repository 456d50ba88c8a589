"""Which comes first where a crash kernel is loaded: the rescue of the VMs, or the dump.

By default the rescue: the panic is put off, and once the VMs are out it goes ahead, with its dump.
With `crash_kernel_first` the dump comes at once. Without the guard, as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sempervirt.demo.guard.emulated import NoAnswerError
from tests.guard.kinds import named
from tests.guard.machine import CRASH_MEMORY, CRASH_UP, WITH_CRASH_KERNEL, Image, Machine
from tests.guard.trial import GUARDED, Result, survive

# The crash kernel boots, under emulation.
DUMP_S = 240.0


def _dumped(machine: Machine) -> str:
    """Waits for the end of the crash kernel; what is wrong with it."""
    if not machine.dies(DUMP_S):
        return f"the host lives; {machine.tail()}"
    if CRASH_UP not in machine.log.read_text(errors="replace"):
        return f"the crash kernel has not come up; {machine.tail()}"
    return ""


def unguarded(machine: Machine) -> str:
    """The control."""
    machine.start("echo panic >/proc/semper_crash")
    return _dumped(machine)


def dump_after(name: str) -> Callable[[Machine], str]:
    """The death is put off; after the evacuation comes the dump."""

    def dumped(machine: Machine) -> str:
        machine.load_guard(policy="strict", **GUARDED)
        if wrong := survive(machine, named(name)).wrong:
            return wrong
        machine.start("echo evacuated >/dev/semper_guard")
        return _dumped(machine)

    return dumped


def dump_first(machine: Machine) -> str:
    """The dump comes at once."""
    machine.load_guard(policy="strict", crash_kernel_first=1, **GUARDED)
    machine.start("echo panic >/proc/semper_crash")
    if wrong := _dumped(machine):
        return wrong
    said = "let-happen, crash-kernel" in machine.log.read_text(errors="replace")
    return "" if said else f"no such reason in the log; {machine.tail()}"


CASES: dict[str, Callable[[Machine], str]] = {
    "no guard: dump at once": unguarded,
    "panic: rescue, then dump": dump_after("panic"),
    "oops: rescue, then dump": dump_after("null"),
    "crash_kernel_first: dump": dump_first,
}


def tried(image: Image, folder: Path, name: str) -> Result:
    """One case, in a boot of its own of an image with a crash kernel."""
    begin = time.monotonic()
    place = folder / name.partition(":")[0].replace(" ", "-")
    try:
        with Machine(image, place, cmdline=WITH_CRASH_KERNEL, memory=CRASH_MEMORY) as machine:
            machine.do("insmod /lib/semper_crash.ko")
            machine.load_crash_kernel()
            wrong = CASES[name](machine)
    except NoAnswerError as error:
        wrong = str(error)
    return Result(name, wrong, time.monotonic() - begin)


def dumps(image: Image, folder: Path) -> Iterator[Result]:
    """All cases."""
    for name in CASES:
        yield tried(image, folder, name)
