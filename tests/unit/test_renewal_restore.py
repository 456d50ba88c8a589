"""A restore, exhaustively: the real driver, QEMU, and everything that can fail.

See `renewal_explorer`. Each of the mistakes must break something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed
from sempervirt.core.failure import Failure
from sempervirt.renewal.restore import decide
from sempervirt.renewal.restore.driver import RestoreDriver
from sempervirt.renewal.restore.ports import Ports
from sempervirt.renewal.restore.state import (
    End,
    Ended,
    GiveUp,
    GuestRuns,
    Load,
    Loaded,
    Restored,
    Run,
    Step,
)
from sempervirt.vm.work import Restoring
from tests.unit import renewal_explorer
from tests.unit.driver_mistakes import (
    Mutation,
    drops,
    forgets_record,
    ignores_a_full_disk,
    pretends,
    swallows,
)
from tests.unit.exploration import Outcome, Stopped
from tests.unit.renewal_explorer import FAILED, OK, UNKNOWN, Edge, Explorer, Room

BEGUN = Restoring()


@dataclass(frozen=True)
class World(renewal_explorer.World):
    """QEMU, which waits for a state. `ran`: the guest has run since, and may have written."""

    running: bool = True
    qemu: bool = True
    unpacked: bool = False
    loaded: bool = False
    runs: bool = False
    ran: bool = False
    held: bool = False
    died: bool = False
    recovered: bool = False
    record: Restoring | None = BEGUN


class RestoreRoom(Room):
    """What the ports of a restore do."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def first(self) -> Iterator[tuple[World, list[Any]]]:
        for running in (True, False):
            state, effects = decide.begin("web", running=running)
            yield World(state, running=running), effects

    def driver(self, world: World, ports: Any, clock: Stopped) -> RestoreDriver:
        attempt = None if world.recovered else ports
        return RestoreDriver("web", world.state, Ports(ports, ports, attempt), clock=clock)

    def over(self, world: World) -> bool:
        return world.state is None or world.state.step is Step.OVER

    def events(self, world: World) -> Iterator[tuple[Any, float]]:
        if not world.state.given_up:
            yield GiveUp("the agent closes"), 0.0

    def happens(self, world: World) -> Iterator[Edge]:
        if world.qemu:
            yield Edge("QEMU dies", replace(world, qemu=False, runs=False, died=True))

    def crashed(self, world: World) -> tuple[World, list[Any]]:
        world = replace(world, held=False, recovered=True)
        if world.record is None:
            return replace(world, state=None), []
        state, effects = decide.recover("web", world.record)
        return replace(world, state=state), effects

    def told(self, world: World, call: str, *arguments: Any, **_named: Any) -> tuple[World, Any]:
        match call:
            case "release":
                return replace(world, held=False), None
            case "advance" if world.writable:
                return replace(world, record=arguments[0]), True
            case "end_work" if world.writable:
                return replace(world, record=None), True
            case "advance" | "end_work":
                return world, False
            case _:
                raise AssertionError(call)

    def options(self, world: World, call: str) -> Iterator[tuple[Outcome, World, bool]]:
        match call:
            case "hold" if world.qemu:
                yield Outcome(False), replace(world, held=True), False
            case "unpacked":
                yield OK, replace(world, unpacked=True), False
            case "take" if world.qemu:
                self.require(world.unpacked, "a state is loaded without its memory")
                yield OK, replace(world, loaded=True), False
                yield UNKNOWN, replace(world, loaded=True), True
            case "ended":
                yield Outcome("" if world.qemu else "killed"), world, False
                return
            case "cont" if world.qemu:
                self.require(world.loaded, "a guest runs without its state")
                self.require(world.running, "a guest runs that was paused")
                said = world.record is None or world.record.loaded
                self.require(said, "a guest runs, and is not on record as loaded")
                yield OK, replace(world, runs=True, ran=True), False
                yield UNKNOWN, replace(world, runs=True, ran=True), True
                yield UNKNOWN, world, True
            case "end":
                self.require(not world.ran or not world.qemu, "a guest that ran is thrown away")
                yield OK, replace(world, qemu=False, runs=False), False
                yield UNKNOWN, world, True
                return
            case "reset" if world.qemu:
                yield OK, world, False
        yield FAILED, world, world.qemu

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def wrong(self, world: World) -> Iterator[str]:
        while self.broken:
            yield self.broken.pop()

    def wrong_at_rest(self, world: World) -> Iterator[str]:
        if world.works:
            yield "work goes on at the end"
        if world.held and world.qemu and not isinstance(_answer(world), Failure):
            yield "the VM is held for ever"
        if world.record is not None and world.writable:
            yield "work is on record for ever"
        if world.state is None:
            return
        match world.state.answer:
            case Restored():
                if world.qemu and (world.runs is not world.running or not world.loaded):
                    yield "told as restored"
            case Failure() as answer:
                kind = answer.kind.error
                if not issubclass(kind, RollbackFailed | OutcomeUnknown) and world.qemu:
                    yield "told that nothing is left"
            case _:
                yield "nothing is told"


def _answer(world: World) -> Any:
    return world.state.answer if world.state is not None else None


def explored(mutate: Mutation = lambda _driver: None, until: str = "") -> Explorer:
    return Explorer(RestoreRoom(), mutate).run(until)


def test_whatever_fails_nothing_is_left_or_the_guest_goes_on() -> None:
    explorer = explored()
    for wrong in explorer.wrong:
        print(wrong, explorer.way_to(wrong), explorer.wrong[wrong])  # noqa: T201
    assert not explorer.wrong
    reached = {world.state.step for world in explorer.edges if world.state is not None}
    assert reached == set(Step)


MISTAKES: dict[str, tuple[Mutation, str]] = {
    "QEMU is not ended": (pretends(End, Ended()), "nothing is left"),
    "the end is not told": (drops(End), "stuck"),
    "a failed load is taken for done": (swallows(Load, Loaded()), "without its state"),
    "that it is loaded is not on record": (forgets_record(Step.RUN), "not on record"),
    "a full disk is ignored": (ignores_a_full_disk, "not on record"),
    "a refused guest is told as running": (swallows(Run, GuestRuns()), "told as restored"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_driver_is_found(mistake: str) -> None:
    mutation, wrong = MISTAKES[mistake]
    explorer = explored(mutation, "" if wrong == "stuck" else wrong)
    assert any(wrong in found for found in explorer.wrong), explorer.wrong.keys()
