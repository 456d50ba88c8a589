"""A restart of QEMU, exhaustively: the real driver, two QEMUs, and everything that can fail.

See `renewal_explorer`. Each of the mistakes, in the machine as in the driver, must break something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.host.procfs import ProcessId
from sempervirt.renewal.restart import decide
from sempervirt.renewal.restart.driver import RestartDriver
from sempervirt.renewal.restart.ports import Ports
from sempervirt.renewal.restart.state import (
    Decision,
    Discard,
    Discarded,
    EndOld,
    Event,
    Failed,
    GiveUp,
    GoBack,
    GuestRuns,
    Parted,
    Restart,
    Restarted,
    Run,
    Start,
    Step,
    Switched,
    Tick,
    Transfer,
    Transferred,
    WentBack,
)
from sempervirt.vm.work import Restarting
from tests.unit import renewal_explorer
from tests.unit.driver_mistakes import (
    Mutation,
    drops,
    forgets_record,
    ignores_a_full_disk,
    pretends,
    repeats,
    swallows,
    tells_twice,
)
from tests.unit.exploration import Outcome, Stopped
from tests.unit.renewal_explorer import FAILED, LATER, OK, UNKNOWN, Edge, Explorer, Room

NEW = ProcessId(2, 2, "boot")


@dataclass(frozen=True)
class World(renewal_explorer.World):
    """Two QEMUs, each "absent", "alive", "killed" (and not yet seen to have ended) or "dead"; the
    new one is "loaded" when it has a state, which is `stale` when the guest ran on without it.
    """

    ran: bool = True
    old: str = "alive"
    old_runs: bool = True
    new: str = "absent"
    new_runs: bool = False
    stale: bool = False
    given: str = ""
    vm: str = "old"
    held: bool = False
    stand_ins: bool = False
    led: bool = False
    moved: bool = False
    died: bool = False
    recovered: bool = False
    unsaid: bool = False  # the caller was told nothing any more: the agent has died
    record: Restarting | None = None

    @property
    def new_lives(self) -> bool:
        return self.new in ("alive", "loaded")


class RestartRoom(Room):
    """What the ports of a restart do."""

    def first(self) -> Iterator[tuple[World, list[Any]]]:
        for ran in (True, False):
            state, effects = decide.begin("web", 2, 0.0)
            yield World(state, ran=ran, old_runs=ran), effects

    def driver(self, world: World, ports: Any, clock: Stopped) -> RestartDriver:
        attempt = None if world.recovered else ports
        return RestartDriver("web", world.state, Ports(ports, ports, ports, attempt), clock=clock)

    def over(self, world: World) -> bool:
        return world.state is None or world.state.step is Step.OVER

    def events(self, world: World) -> Iterator[tuple[Any, float]]:
        if world.state.again:
            yield Tick(), LATER
        if not world.state.given_up:
            yield GiveUp("the agent closes"), 0.0

    def happens(self, world: World) -> Iterator[Edge]:
        if world.old == "alive":
            yield Edge("the old QEMU dies", replace(world, old="dead", old_runs=False, died=True))
        if world.new_lives:
            yield Edge("the new QEMU dies", replace(world, new="dead", new_runs=False, died=True))

    def crashed(self, world: World) -> tuple[World, list[Any]]:
        world = replace(world, held=False, recovered=True, unsaid=True)
        work = world.record
        if work is None:
            return replace(world, state=None), []
        state, effects = decide.recover("web", work, 0.0, new_lives=world.new_lives)
        return replace(world, state=state, vm="old"), effects

    def told(self, world: World, call: str, *arguments: Any, **_named: Any) -> tuple[World, Any]:
        match call:
            case "release":
                return replace(world, held=False), None
            case "tidy":
                return world, None
            case "begin" | "advance" if not world.writable:
                return world, Unavailable("disk full") if call == "begin" else False
            case "begin" | "advance":
                return replace(world, record=arguments[0]), True
            case "end_work":
                return replace(world, record=None) if world.writable else world, world.writable
            case "took_over":
                moved = replace(world, vm="new")
                return replace(moved, record=None) if world.writable else moved, world.writable
            case _:
                raise AssertionError(call)

    def options(  # noqa: C901 one case a call
        self, world: World, call: str
    ) -> Iterator[tuple[Outcome, World, bool]]:
        old, new = world.old == "alive", world.new_lives
        match call:
            case "hold":
                if old:
                    yield Outcome(world.old_runs), replace(world, held=True), False
                yield FAILED, world, old
            case "start":
                if old:
                    self.require(not new, "two new QEMUs")
                    begun = replace(world, new="alive", stand_ins=True)
                    yield Outcome((NEW, "pc-q35-10.0")), begun, False
                    yield FAILED, begun, True
                yield FAILED, world, old
            case "keep_packets" | "free_taps" | "move_in" | "link":
                moved = replace(world, moved=True) if call == "move_in" else world
                yield OK, moved, False
                yield FAILED, world, True
            case "stop":
                stopped = replace(world, old_runs=False)
                if old:
                    yield OK, stopped, False
                    yield UNKNOWN, stopped, True
                    yield FAILED, stopped, True  # the backend has just changed
                yield FAILED, world, old
            case "give":
                if old:
                    self.require(not world.old_runs, "a state is given of a guest that runs")
                    yield OK, replace(world, given="fresh"), False
                    yield UNKNOWN, replace(world, given="fresh"), True
                yield FAILED, world, old
            case "take":
                if new:
                    self.require(world.given == "fresh", "a state is loaded that was not given")
                    loaded = replace(world, new="loaded", stale=False)
                    yield OK, loaded, False
                    yield UNKNOWN, loaded, True
                yield FAILED, world, new
            case "switch":
                yield from self.switch(world, old=old)
            case "end_old":
                self.require(world.recovered or world.old != "alive", "waits for one not killed")
                yield OK, replace(world, old="dead", old_runs=False), False
                if world.old != "dead":
                    yield UNKNOWN, replace(world, old="killed", old_runs=False), True
            case "end_stand_ins":
                yield OK, replace(world, stand_ins=False), False
                yield UNKNOWN, world, True
            case "connect":
                self.require(world.old == "dead", "the new QEMU is led to disks of the old one")
                self.require(not world.stand_ins, "the new QEMU is led to stand-ins")
                yield OK, replace(world, led=True), False
                yield FAILED, world, True
            case "cont_new":
                yield from self.cont_new(world, new=new)
            case "discard":
                gone = replace(world, new="dead", new_runs=False)
                yield OK, replace(gone, stand_ins=False), False
                if new:
                    yield UNKNOWN, world, True
            case "ended":
                alive = old if world.vm == "old" else new
                yield Outcome("" if alive else "killed"), world, False
            case "reset":
                if old:
                    yield OK, world, False
                    yield UNKNOWN, world, True
                yield FAILED, world, old
            case "cont":
                yield from self.cont(world, old=old)
            case _:
                raise AssertionError(call)

    def switch(self, world: World, *, old: bool) -> Iterator[tuple[Outcome, World, bool]]:
        if old:
            on_record = world.record is not None and world.record.switched
            self.require(on_record, "a switch that is not on record")
            self.require(world.new != "alive", "a switch to a QEMU without a state")
            yield OK, replace(world, old="killed", old_runs=False, vm="new"), False
        yield FAILED, world, old

    def cont_new(self, world: World, *, new: bool) -> Iterator[tuple[Outcome, World, bool]]:
        runs = replace(world, new_runs=True)
        if not new:
            yield UNKNOWN, world, False
            return
        self.require(world.new == "loaded", "a guest runs without its state")
        self.require(world.led, "a guest runs without its disks")
        self.require(world.recovered or not world.new_runs, "the guest is let run twice")
        yield OK, runs, False
        yield FAILED, world, True
        yield UNKNOWN, runs, True
        yield UNKNOWN, world, True

    def cont(self, world: World, *, old: bool) -> Iterator[tuple[Outcome, World, bool]]:
        if not old:
            yield FAILED, world, False
            return
        self.require(world.ran, "a guest runs that was paused")
        runs = replace(world, old_runs=True, stale=True)
        yield OK, runs, False
        yield FAILED, world, True
        yield UNKNOWN, runs, True
        yield UNKNOWN, world, True

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def __init__(self) -> None:
        self.broken: list[str] = []

    def wrong(self, world: World) -> Iterator[str]:
        while self.broken:
            yield self.broken.pop()
        if world.old_runs and world.new_runs:
            yield "both QEMUs run the guest"
        if world.new_runs and world.old != "dead":
            yield "the new QEMU runs before the old one has ended"
        if world.new_runs and world.stale:
            yield "the new QEMU runs with a state that is old"
        if world.old_runs and world.new == "loaded":
            yield "the old QEMU runs while the new one has its state"

    def wrong_at_rest(self, world: World) -> Iterator[str]:
        if world.works:
            yield "work goes on at the end"
        if world.held:
            yield "the VM is held for ever"
        if world.record is not None and world.writable:
            yield "work is on record for ever"
        if world.stand_ins:
            yield "stand-ins are left behind"
        if world.vm == "old" and world.new_lives:
            yield "the new QEMU is left behind"
        if world.vm == "new" and world.old != "dead":
            yield "the old QEMU is left behind"
        alive = world.old == "alive" if world.vm == "old" else world.new_lives
        if not alive and not world.died:
            yield "the guest is lost"
        if alive and world.state is not None:
            yield from self.wrong_answer(world)

    def wrong_answer(self, world: World) -> Iterator[str]:
        answer = world.state.answer
        runs = world.old_runs if world.vm == "old" else world.new_runs
        match answer:
            case Restarted():
                if world.vm != "new" or runs is not world.ran:
                    yield "told as restarted"
            case Failure():
                untold = not issubclass(answer.kind.error, RollbackFailed | OutcomeUnknown)
                if untold and (world.vm != "old" or runs is not world.ran):
                    yield "told that all is as it was"
            case _:
                yield "nothing is told"


def explored(mutate: Mutation = lambda _driver: None, until: str = "") -> Explorer:
    return Explorer(RestartRoom(), mutate).run(until)


def test_whatever_fails_one_qemu_has_the_guest_and_the_caller_is_told() -> None:
    explorer = explored()
    for wrong in explorer.wrong:
        print(wrong, explorer.way_to(wrong), explorer.wrong[wrong])  # noqa: T201
    assert not explorer.wrong
    reached = {world.state.step for world in explorer.edges if world.state is not None}
    assert reached == set(Step) - {Step.LEAVE}, "LEAVE waits for nothing"
    assert len(explorer.edges) > 3000


def goes_back_at_once(driver: RestartDriver) -> None:
    real = driver.decide

    def decide_wrongly(state: Restart, event: Event, now: float) -> Decision:
        after, effects = real(state, event, now)
        if after.step is Step.DISCARD and state.step is Step.TRANSFER:
            return replace(after, step=Step.GO_BACK), [GoBack(reset=True, cont=after.running)]
        return after, effects

    driver.decide = decide_wrongly  # type: ignore[method-assign]


MISTAKES: dict[str, tuple[Mutation, str]] = {
    "the guest is not let run on": (drops(GoBack), "stuck"),
    "the new QEMU is not ended": (pretends(Discard, Discarded()), "has its state"),
    "two are started": (repeats(Start), "two new QEMUs"),
    "the switch is told twice": (tells_twice(Switched), "let run twice"),
    "the switch is not on record": (forgets_record(Step.SWITCH), "not on record"),
    "a full disk is ignored": (ignores_a_full_disk, "not on record"),
    "the end of the old QEMU is not awaited": (
        pretends(EndOld, Parted(EndOld())),
        "of the old one",
    ),
    "a failed transfer is taken for done": (swallows(Transfer, Transferred()), "without a state"),
    "the new QEMU is not put on record": (forgets_record(Step.LINK), "the guest is lost"),
    "the old QEMU goes on beside the new one": (goes_back_at_once, "has its state"),
    "a refused guest is told as running": (swallows(Run, GuestRuns()), "told as restarted"),
    "a failed way back is not told": (swallows(GoBack, WentBack()), "all is as it was"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_driver_is_found(mistake: str) -> None:
    mutation, wrong = MISTAKES[mistake]
    explorer = explored(mutation, "" if wrong == "stuck" else wrong)
    assert any(wrong in found for found in explorer.wrong), explorer.wrong.keys()


def test_without_the_new_qemu_the_old_one_goes_on_also_after_the_switch_was_recorded() -> None:
    work = Restarting(2, resume=True, switched=True, qemu=NEW)
    state, effects = decide.recover("web", work, 0.0, new_lives=False)
    assert (state.step, effects) == (Step.DISCARD, [Discard()])
    state, effects = decide.decide(state, Discarded(), 0.0)
    assert effects == [GoBack(reset=True, cont=True)]


def test_what_does_not_end_is_told_at_once_and_waited_for() -> None:
    work = Restarting(2, resume=True, switched=True, qemu=NEW)
    state, _ = decide.recover("web", work, 0.0, new_lives=True)
    stuck = Failure.named(OutcomeUnknown, "pid 7 was killed and does not end")
    state, effects = decide.decide(state, Failed(EndOld(), stuck), 5.0)
    assert isinstance(state.answer, Failure)
    assert state.answer.unknown
    assert not effects
    assert state.again_at is not None
    assert decide.decide(state, Tick(), state.again_at - 0.1) == (state, [])
    _, effects = decide.decide(state, Tick(), state.again_at)
    assert effects == [EndOld()]
