"""A save, exhaustively: the real driver, QEMU, the file, and everything that can fail.

See `renewal_explorer`. Each of the mistakes must break something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.qemu.saved import Figures
from sempervirt.renewal.save import decide
from sempervirt.renewal.save.driver import SaveDriver
from sempervirt.renewal.save.ports import Ports
from sempervirt.renewal.save.state import (
    End,
    Ended,
    GiveUp,
    GoBack,
    Leave,
    Pack,
    Packed,
    Saved,
    Step,
    StopPacking,
    Tick,
    WentBack,
)
from sempervirt.vm.work import Saving
from tests.unit import renewal_explorer
from tests.unit.driver_mistakes import (
    Mutation,
    drops,
    forgets_record,
    pretends,
    swallows,
)
from tests.unit.exploration import Outcome, Stopped
from tests.unit.renewal_explorer import FAILED, LATER, OK, UNKNOWN, Edge, Explorer, Room

FIGURES = Figures(memory=8, file=7, zero_pages=1, block_pages=2, data_pages=3)


@dataclass(frozen=True)
class World(renewal_explorer.World):
    """`file`: it is complete and durable, and the guest has not run since. `qemu`: it lives."""

    ran: bool = True
    runs: bool = True
    qemu: bool = True
    given: bool = False
    file: bool = False
    held: bool = False
    freed: bool = False
    stopping: bool = False
    died: bool = False
    recovered: bool = False
    record: Saving | None = None


class SaveRoom(Room):
    """What the ports of a save do."""

    def __init__(self) -> None:
        self.broken: list[str] = []

    def first(self) -> Iterator[tuple[World, list[Any]]]:
        for ran in (True, False):
            state, effects = decide.begin("web")
            yield World(state, ran=ran, runs=ran), effects

    def driver(self, world: World, ports: Any, clock: Stopped) -> SaveDriver:
        attempt = None if world.recovered else ports
        return SaveDriver("web", world.state, Ports(ports, ports, attempt), clock=clock)

    def over(self, world: World) -> bool:
        return world.state is None or world.state.step is Step.OVER

    def events(self, world: World) -> Iterator[tuple[Any, float]]:
        if world.state.again_at is not None:
            yield Tick(), LATER
        if not world.recovered:
            yield GiveUp("the agent closes"), 0.0

    def happens(self, world: World) -> Iterator[Edge]:
        if world.qemu:
            yield Edge("QEMU dies", replace(world, qemu=False, runs=False, died=True))

    def crashed(self, world: World) -> tuple[World, list[Any]]:
        world = replace(world, held=False, recovered=True, stopping=False)
        if world.record is None:
            return replace(world, state=None), []
        state, effects = decide.recover("web", world.record)
        return replace(world, state=state), effects

    def told(self, world: World, call: str, *arguments: Any, **_named: Any) -> tuple[World, Any]:
        match call:
            case "release":
                return replace(world, held=False), None
            case "stop_packing":
                return replace(world, stopping=True), None
            case "begin" | "advance" if not world.writable:
                return world, Unavailable("disk full") if call == "begin" else False
            case "begin" | "advance":
                return replace(world, record=arguments[0]), True
            case "end_work":
                return replace(world, record=None) if world.writable else world, world.writable
            case _:
                raise AssertionError(call)

    def options(self, world: World, call: str) -> Iterator[tuple[Outcome, World, bool]]:
        match call:
            case "hold" if world.qemu:
                yield Outcome(world.runs), replace(world, held=True), False
            case "stop" if world.qemu:
                yield OK, replace(world, runs=False), False
                yield UNKNOWN, replace(world, runs=False), True
            case "give" if world.qemu:
                self.require(not world.runs, "a state is given of a guest that runs")
                yield OK, replace(world, given=True), False
                yield UNKNOWN, replace(world, given=True), True
            case "pack":
                self.require(not world.runs, "a guest is packed that runs")
                self.require(world.record is not None, "a guest is packed, and not on record")
                if not world.stopping:
                    yield Outcome(FIGURES), replace(world, file=True), False
            case "ended":
                yield Outcome("" if world.qemu else "killed"), world, False
                return
            case "cont" if world.qemu:
                self.require(world.ran, "a guest runs that was paused")
                # A file stays behind if an agent died before it could say that it is durable.
                on_record = world.record is not None and world.record.saved
                self.require(not on_record, "a guest runs on that was saved")
                yield OK, replace(world, runs=True, file=False), False
                yield UNKNOWN, replace(world, runs=True, file=False), True
            case "end":
                lost = world.qemu and not world.file
                self.require(not lost, "QEMU is ended before the file is durable")
                yield OK, replace(world, qemu=False, runs=False), False
                yield UNKNOWN, world, True
                return
            case "free":
                yield OK, replace(world, freed=True), False
                yield UNKNOWN, world, True
                return
            case "reset" if world.qemu:
                yield OK, world, False
        yield FAILED, world, world.qemu and not world.stopping

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def wrong(self, world: World) -> Iterator[str]:
        while self.broken:
            yield self.broken.pop()

    def wrong_at_rest(self, world: World) -> Iterator[str]:
        if world.works:
            yield "work goes on at the end"
        if world.held and world.qemu:
            yield "the VM is held for ever"
        if world.record is not None and world.writable:
            yield "work is on record for ever"
        if not world.qemu and not world.died and not world.file:
            yield "the guest is lost"
        if world.state is None:
            return
        match world.state.answer:
            case Saved():
                if world.qemu or not world.file or not world.freed:
                    yield "told as saved"
            case Failure() as answer:
                kind = answer.kind.error
                untold = not issubclass(kind, RollbackFailed | OutcomeUnknown)
                if untold and world.qemu and world.runs is not world.ran:
                    yield "told that all is as it was"
            case _:
                yield "nothing is told"


def explored(mutate: Mutation = lambda _driver: None, until: str = "") -> Explorer:
    return Explorer(SaveRoom(), mutate).run(until)


def test_whatever_fails_the_guest_goes_on_or_is_in_the_file() -> None:
    explorer = explored()
    for wrong in explorer.wrong:
        print(wrong, explorer.way_to(wrong), explorer.wrong[wrong])  # noqa: T201
    assert not explorer.wrong
    reached = {world.state.step for world in explorer.edges if world.state is not None}
    assert reached == set(Step) - {Step.LEAVE}, "LEAVE waits for nothing"


MISTAKES: dict[str, tuple[Mutation, str]] = {
    "the guest is not let run on": (drops(GoBack), "stuck"),
    "the VM is not released": (drops(Leave), "stuck"),
    "the save is not on record": (forgets_record(Step.PACK), "not on record"),
    "a file that failed is taken for durable": (swallows(Pack, Packed(FIGURES)), "is durable"),
    "QEMU is not ended": (pretends(End, Ended()), "told as saved"),
    "a failed way back is not told": (swallows(GoBack, WentBack()), "all is as it was"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_driver_is_found(mistake: str) -> None:
    mutation, wrong = MISTAKES[mistake]
    explorer = explored(mutation, "" if wrong == "stuck" else wrong)
    assert any(wrong in found for found in explorer.wrong), explorer.wrong.keys()


def test_an_agent_that_closes_ends_the_packing_first() -> None:
    state, _ = decide.begin("web")
    packing = replace(state, step=Step.PACK, running=True)
    after, effects = decide.decide(packing, GiveUp("the agent closes"), 0.0)
    assert (after, effects) == (packing, [StopPacking()])
