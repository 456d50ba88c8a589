"""What a busy, healthy host shows, on a real kernel with the guard: warnings, hotplug, memory that
runs out, stress. The module puts off nothing, and the agent evacuates nothing.

What the module and the kernel's log have said is read by the agent's own readers, and decided by
the presets as shipped, each round an hour after the one before.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sempervirt.demo.guard.emulated import NoAnswerError
from sempervirt.guard.decide import decide
from sempervirt.guard.presets import shipped
from sempervirt.guard.signs import Sign
from sempervirt.guard.sources.kernel_log import read_record
from sempervirt.guard.sources.module import read_line
from sempervirt.guard.state import BeginEvacuation, GuardState, Seen
from tests.guard.health import faults
from tests.guard.kinds import PROC
from tests.guard.machine import Image, Machine
from tests.guard.trial import Result, guarded

HOUR_S = 3600.0
# Each is ordinary on a host that lives for years. None of them may end, or fail.
TROUBLES = {
    "a kernel warning": PROC.format("warning"),
    "a processor goes and comes": "cd /sys/devices/system/cpu/cpu1 && echo 0 >online && "
    "echo 1 >online",
    "memory runs out": "(tail /dev/zero; true) 2>/dev/null",
    "memory of a group runs out": "mkdir -p /tmp/cg && mount -t cgroup2 cg /tmp/cg && "
    "(echo +memory >/tmp/cg/cgroup.subtree_control; mkdir -p /tmp/cg/a; "
    "echo 8M >/tmp/cg/a/memory.max; sh -c 'echo $$ >/tmp/cg/a/cgroup.procs; exec tail /dev/zero'; "
    "rmdir /tmp/cg/a; umount /tmp/cg; true) 2>/dev/null",
    "a program faults": "(sh -c 'kill -SEGV $$'; true) 2>/dev/null",
    "a module comes and goes": "insmod /lib/dummy.ko && rmmod dummy",
    "an interface goes down": "ip link set lo down && ip link set lo up",
    "processors are busy": "for i in 1 2 3 4; do timeout 2 md5sum /dev/zero & done; wait; true",
    "many processes": "for i in $(seq 100); do /bin/busybox true & done; wait",
    "files come and go": "dd if=/dev/zero of=/tmp/f bs=64k count=200 2>/dev/null; sync; rm /tmp/f",
}
LOGGED = re.compile(r"<(\d+)>\[ *[\d.]+\] (.*)")


@dataclass(frozen=True)
class Hour:
    """What the module and the kernel's log have said in one round."""

    signs: tuple[Sign, ...]


def records(dmesg: str) -> Iterator[bytes]:
    """The records of `dmesg -r`, as /dev/kmsg has them."""
    for number, line in enumerate(dmesg.splitlines()):
        if (found := LOGGED.fullmatch(line)) is not None:
            yield f"{found[1]},{number},{number},-;{found[2]}".encode()


def round_of(machine: Machine) -> Hour:
    """All troubles, one after the other. Raises NoAnswerError."""
    seen = len(machine.events())
    machine.do("dmesg -c >/dev/null")
    for command in TROUBLES.values():
        machine.do(command, deadline_s=120.0)
    told = [read_line(json.dumps(event).encode()) for event in machine.events()[seen:]]
    said = machine.do("dmesg -r")
    logged = [sign for record in records(said) if (sign := read_record(record)) is not None]
    return Hour((*told, *logged))


def evacuates(hours: Sequence[Hour]) -> str:
    """By what sign the agent would evacuate the host; "" if by none."""
    presets, state = shipped(), GuardState(module=True)
    for number, hour in enumerate(hours):
        for sign in hour.signs:
            state, effects = decide(presets, state, Seen(sign), number * HOUR_S)
            if any(isinstance(effect, BeginEvacuation) for effect in effects):
                return f"hour {number}: {sign.id.value}: {sign.evidence}"
    return ""


def ordinary(image: Image, folder: Path, hours: int) -> Iterator[Result]:
    """So many rounds in one boot, then the control: one fatal error more."""
    begin = time.monotonic()
    seen: list[Hour] = []
    wrong = control = ""
    with guarded(image, folder / "ordinary", "strict") as machine:
        try:
            seen += [round_of(machine) for _ in range(hours)]
            events = machine.events()
            put_off = [one for one in events if one["kind"] != "warning"]
            if put_off or len(events) < hours:
                wrong = f"the module tells of {put_off or events}"
            wrong = wrong or evacuates(seen) or "; ".join(faults(machine))
            machine.start(PROC.format("null"))
            machine.wait_event(len(events))
            fault = read_line(json.dumps(machine.events()[-1]).encode())
            if not evacuates([*seen, Hour((fault,))]):
                control = "a fatal error evacuates nothing"
        except NoAnswerError as error:
            wrong = str(error)
    signs = sum(len(hour.signs) for hour in seen)
    yield Result(f"{hours} ordinary hours, {signs} signs", wrong, time.monotonic() - begin)
    yield Result("the control: one fault more", control, time.monotonic() - begin)
