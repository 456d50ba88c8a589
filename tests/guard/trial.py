"""One way to die, tried: the event that comes of it, and how the host is afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sempervirt.demo.guard.emulated import POLL_S, NoAnswerError
from tests.guard.health import faults
from tests.guard.kinds import Kind
from tests.guard.machine import Image, Machine

GUARDED = {"deadline_s": 0, "max_events": 1000}


@dataclass(frozen=True)
class Result:
    """How it went: what is wrong is empty where all is as it must be."""

    name: str
    wrong: str
    seconds: float


@contextmanager
def guarded(image: Image, folder: Path, policy: str, **parameters: object) -> Iterator[Machine]:
    """A machine with the guard and the crasher."""
    with Machine(image, folder) as machine:
        machine.do("insmod /lib/semper_crash.ko")
        machine.load_guard(**{"policy": policy, **GUARDED, **parameters})
        yield machine


def _expected(event: dict[str, object], kind: Kind) -> bool:
    return (event["kind"], event["context"], event["verdict"], event["reason"]) == (
        kind.kind, kind.context, kind.verdict, kind.reason,
    )  # fmt: skip


def _wait_expected(machine: Machine, kind: Kind, seen: int) -> str:
    """Waits for the event; what came instead, or nothing."""
    give_up = time.monotonic() + kind.deadline_s
    events: list[dict[str, object]] = []
    while time.monotonic() < give_up:
        events = machine.events()[seen:]
        if any(_expected(event, kind) for event in events):
            return ""
        time.sleep(POLL_S)  # poll interval
    return f"expected {kind.verdict} ({kind.reason}), seen {events}; {machine.tail()}"


def survive(machine: Machine, kind: Kind, *, checked: bool = True) -> Result:
    """Tries a way that must be survived, and, if `checked`, looks at the host's health."""
    begin = time.monotonic()
    try:
        if kind.before:
            machine.do(kind.before)
        seen = len(machine.events())
        machine.start(kind.command)
        wrong = _wait_expected(machine, kind, seen)
        if kind.after and not wrong:
            machine.do(kind.after)
        ill = [] if wrong or not checked else faults(machine)
        wrong = wrong or "; ".join(ill)
    except NoAnswerError as error:
        wrong = str(error)
    return Result(kind.name, wrong, time.monotonic() - begin)


def die(machine: Machine, kind: Kind) -> Result:
    """Tries a way that must be the end of the machine, and reads the reason from the log."""
    begin = time.monotonic()
    wrong = ""
    machine.start(kind.command)
    if not machine.dies():
        wrong = f"the host lives; {machine.tail()}"
    elif f"{kind.verdict}, {kind.reason}" not in machine.log.read_text(errors="replace"):
        wrong = f"no such reason in the log: {kind.reason}; {machine.tail()}"
    return Result(kind.name, wrong, time.monotonic() - begin)


def die_unguarded(image: Image, folder: Path, kind: Kind) -> Result:
    """The control: the same way, without the guard, is the end of the machine."""
    begin = time.monotonic()
    with Machine(image, folder) as machine:
        machine.do("insmod /lib/semper_crash.ko")
        if kind.before:
            machine.do(kind.before)
        machine.start(kind.command)
        dead = machine.dies(kind.deadline_s)
    return Result(kind.name, "" if dead else "lives without the guard", time.monotonic() - begin)
