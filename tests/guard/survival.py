"""After a survived panic the host holds, under load and with no further fault."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from sempervirt.demo.guard.emulated import NoAnswerError
from tests.guard.health import faults
from tests.guard.kinds import SURVIVED
from tests.guard.machine import Image, Machine
from tests.guard.trial import Result, guarded, survive

CRASHES = ("panic", "null", "worker")
LOOK_S = 15.0
QUIET = "/tmp/quiet"
# Processors, memory, files, processes and the network, all at once.
LOADS = (
    "head -c 4m /dev/urandom | md5sum",
    "head -c 40m /dev/zero | tail -c 40m | md5sum",
    "dd if=/dev/zero of=/tmp/load bs=64k count=200; sync; rm -f /tmp/load",
    "for i in $(seq 20); do /bin/busybox true & done; wait; usleep 100000",
    "ping -c 5 -i 0.2 127.0.0.1",
)
FAULTS = ("WARNING:", "BUG:", "Oops", "Call Trace", "blocked for more than", "rcu: INFO")


def _hold(machine: Machine, seconds: float) -> tuple[int, str]:
    """How often all was well, and what was wrong first."""
    known, logged = len(machine.events()), machine.log.stat().st_size
    for load in LOADS:
        machine.do(f"(while [ ! -e {QUIET} ]; do {load}; done) >/dev/null 2>&1 &")
    looks, give_up = 0, time.monotonic() + seconds
    while time.monotonic() < give_up:
        if ill := faults(machine):
            return looks, "; ".join(ill)
        looks += 1
        time.sleep(min(LOOK_S, max(0.0, give_up - time.monotonic())))  # poll interval
    machine.do(f"touch {QUIET}")
    further = machine.events()[known:]
    said = machine.log.read_text(errors="replace")[logged:]
    found = [line for line in said.splitlines() if any(word in line for word in FAULTS)]
    return looks, "; ".join([*(str(event) for event in further), *found[:5], *faults(machine)])


def survival(image: Image, folder: Path, seconds: float) -> Iterator[Result]:
    """Three deaths that are put off, and then so long under load."""
    begin, looks = time.monotonic(), 0
    with guarded(image, folder / "survival", "strict") as machine:
        try:
            kinds = [kind for kind in SURVIVED if kind.name in CRASHES]
            wrong = "; ".join(one.wrong for kind in kinds if (one := survive(machine, kind)).wrong)
            if not wrong:
                looks, wrong = _hold(machine, seconds)
        except NoAnswerError as error:
            wrong = str(error)
    name = f"{len(CRASHES)} deaths, then {seconds:g} s of load, well {looks}x"
    yield Result(name, wrong, time.monotonic() - begin)
