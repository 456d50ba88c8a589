"""An evacuation, exhaustively: the real driver, and everything that can fail around it.

The world holds where each VM really is, the moves that really go on, the work that the driver has
begun, and what stands on record. Whatever can happen is tried in every world that can be reached:
any port may fail or answer late, a destination may refuse, a VM may crash or be lost, a record may
not be written, the agent may die and begin anew from its record, an operator may give up, time may
pass. The invariants must hold everywhere, and each mistake, in the machine as in the driver, must
break one.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from sempervirt.core.errors import NotFound
from sempervirt.evacuation import decide as machine
from sempervirt.evacuation.driver import EvacuationDriver
from sempervirt.evacuation.placement import Need, Room
from sempervirt.evacuation.plan import Survey
from sempervirt.evacuation.ports import Ports
from sempervirt.evacuation.state import (
    Checked,
    CheckVm,
    Decision,
    Effect,
    Evacuation,
    Event,
    Failed,
    Fall,
    FollowVm,
    GiveUpAsked,
    LookAround,
    Mark,
    MoveOver,
    MoveVm,
    StandbyRuns,
    Step,
    Surveyed,
    Tick,
    Way,
    Word,
)
from sempervirt.evacuation.values import Cause, EvacuationOrder, Fate, Reason
from tests.unit.driver_mistakes import Mutation, drops, pretends, repeats, tells_twice
from tests.unit.exploration import ERRORS, Outcome, Pending, Script, Stopped, run_until_it_waits

DEADLINE_S = 1000.0
# The clock of each world: before the deadline, and after each of the bounds.
TIMES = (0.0, *(DEADLINE_S + bound for bound in machine.BOUNDS))
SOON = 1.0
HERE, LOST, CRASHED, ENDED = "here", "lost", "crashed", "ended"
ERRORS.setdefault("none", NotFound)
# `make worlds` tries more.
FAULTS = int(os.environ.get("SEMPERVIRT_WORLD_FAULTS", "1"))
NEEDS = (Need("web", 2, priority=90), Need("db", 1, against={"c": ("no image",)}))
ROOMS = (Room("b", 3), Room("c", 2))
WITH_STANDBY = ("web",)


@dataclass(frozen=True)
class World:
    """`places` says where each VM really is, `moving` which moves really go on. `hung`: neither a
    destination nor the store answers any more.
    """

    state: Evacuation
    record: Evacuation
    work: frozenset[Pending] = frozenset()
    places: tuple[tuple[str, str], ...] = tuple((need.vm, HERE) for need in NEEDS)
    moving: frozenset[tuple[str, str]] = frozenset()
    hung: bool = False

    def place(self, vm: str) -> str:
        return dict(self.places)[vm]

    def put(self, vm: str, place: str) -> World:
        places = tuple((name, place if name == vm else was) for name, was in self.places)
        return replace(self, places=places)

    def ended(self, vm: str, host: str) -> World:
        return replace(self, moving=self.moving - {(vm, host)})


@dataclass(frozen=True)
class Edge:
    event: object
    world: World
    fault: bool = False


class AllPorts:
    """Every port: the next outcome comes from the script."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.script = Script()
        self.writable = True

    def __getattr__(self, name: str) -> Any:
        async def call(*_arguments: object, **_named: object) -> Any:
            return self.script.answer(name)

        return call

    def write(self, state: Evacuation) -> bool:
        if self.writable:
            self.explorer.change(record=normal(state))
        return self.writable


def correct(_driver: Any) -> None:
    """No mistake."""


class Driver(EvacuationDriver):
    """The real driver; work is kept in the world instead of a task."""

    explorer: Explorer

    def begin(self, effect: Effect) -> None:
        self.explorer.take_up(self, effect)


class Explorer:
    """Every world that can be reached."""

    def __init__(
        self, order: EvacuationOrder, driver: type[Driver] = Driver, mutate: Mutation = correct
    ) -> None:
        self.edges: dict[World, list[Edge]] = {}
        self.broken: set[str] = set()
        self.stuck: list[World] = []
        self.ports = AllPorts(self)
        self.clock = Stopped(0.0)
        clock: Any = self.clock
        p: Any = self.ports
        state, effects = machine.begin(order, 0.0, 0.0)
        state = normal(state)
        self.world = World(state, state)
        self.driver = driver(state, Ports(p, p, p, p, p), clock)
        self.driver.explorer = self
        self.stepping = False
        mutate(self.driver)
        for effect in effects:
            self.driver.carry_out(effect)
        self.first = self.world

    def run(self, faults: int, until_broken: str = "") -> None:
        queue = deque([(self.first, 0)])
        needed = {self.first: 0}
        while queue and not (until_broken and until_broken in self.broken):
            world, had = queue.popleft()
            if world in self.edges:
                continue
            self.edges[world] = []
            for edge in self.moves(world):
                count = had + edge.fault
                if count > faults:
                    continue
                self.edges[world].append(edge)
                self.check(edge.world)
                if count < needed.get(edge.world, faults + 1):
                    needed[edge.world] = count
                    (queue.append if edge.fault else queue.appendleft)((edge.world, count))
        if until_broken not in self.broken:
            self.check_rest()

    def change(self, **changes: Any) -> None:
        self.world = replace(self.world, **changes)

    def take_up(self, driver: Driver, effect: Effect) -> None:
        self.ports.script = Script()
        waits = run_until_it_waits(driver.work(effect))
        if not waits:  # by mistake: what came of it is told at once
            self.told()
            waits = "nothing"
        self.check_record(driver.state)
        if isinstance(effect, MoveVm):
            effect = replace(effect, deadline_s=1.0)
            if self.world.place(effect.vm) != HERE:
                self.broken.add("a move began of a VM that is not here")
            if any(vm == effect.vm for vm, _ in self.world.moving):
                self.broken.add("two moves of one VM")
            self.change(moving=self.world.moving | {(effect.vm, effect.host)})
        if Pending(effect, waits) in self.world.work:
            self.broken.add("begun twice")
        self.change(work=self.world.work | {Pending(effect, waits)})

    def told(self) -> list[Event]:
        """What the driver has posted."""
        queue = self.driver._queue
        return [queue.get_nowait() for _ in range(queue.qsize())]

    def check_record(self, after: Evacuation) -> None:
        """An effect begins: the step that it belongs to is on record, if that could be written."""
        before, state = self.world.state, normal(after)
        changed = (before.step, before.passages) != (state.step, state.passages)
        if self.stepping and self.ports.writable and changed and self.world.record != state:
            self.broken.add("begun before it was on record")

    def step(self, world: World, event: Event, now: float, *, writable: bool = True) -> World:
        self.world, self.clock.time = world, now
        self.ports.writable = writable
        self.driver._state = world.state
        self.stepping = True
        self.driver.step(event)
        self.stepping = False
        self.change(state=normal(self.driver.state))
        return self.world

    def tell(self, world: World, event: Event, *, fault: bool = False) -> Iterator[Edge]:
        now = TIMES[world.state.bounds]
        yield Edge(event, self.step(world, event, now), fault)
        yield Edge(event, self.step(world, event, now, writable=False), fault=True)

    def finish(
        self, world: World, item: Pending, outcome: Outcome, *, fault: bool
    ) -> Iterator[Edge]:
        """A port answers, and the driver hears what came of it."""
        world = replace(world, work=world.work - {item})
        self.ports.script = Script([outcome])
        assert not run_until_it_waits(self.driver.work(item.effect))
        told = self.told()
        if len(told) > 1:
            self.broken.add("told twice")
        if not told:
            yield Edge((item.waits, outcome), world, fault)
            return
        yield from self.tell(world, told[0], fault=fault)

    # What can happen

    def moves(self, world: World) -> Iterator[Edge]:
        if not world.state.over:
            for item in world.work:
                for outcome, after, fault in self.outcomes(world, item):
                    yield from self.finish(after, item, outcome, fault=fault)
            when = machine.wake_at(world.state)
            if when is not None:
                yield Edge("time", self.step(world, Tick(), when))
            yield from self.tell(world, GiveUpAsked(), fault=True)
            yield Edge("the agent begins anew", self.recovered(world), fault=True)
            if not world.hung and world.moving:
                yield Edge("nobody answers", replace(world, hung=True), fault=True)
        followed = {
            item.effect.vm for item in world.work if isinstance(item.effect, MoveVm | FollowVm)
        }
        for vm, host in world.moving:
            if vm in followed:
                continue
            yield Edge("arrives", world.put(vm, host).ended(vm, host))
            yield Edge("stays", world.ended(vm, host), fault=True)

    def recovered(self, world: World) -> World:
        self.world = replace(world, work=frozenset())
        state, effects = machine.recover(world.record)
        self.driver._state = state
        for effect in effects:
            self.driver.carry_out(effect)
        self.change(state=normal(state))
        return self.world

    def outcomes(self, world: World, item: Pending) -> Iterator[tuple[Outcome, World, bool]]:
        effect, failed = item.effect, Outcome(error="failed")
        if world.hung and item.waits in ("move", "follow", "check"):
            return
        match item.waits:
            case "nothing":
                yield Outcome(), world, False
            case "mark" | "unmark" | "cancel":
                yield Outcome(), world, False
                yield failed, world, True
            case "look":
                yield Outcome(seen(world)), world, False
                yield failed, world, True
            case "move":
                yield from self.move_outcomes(world, effect.vm, effect.host)
                yield failed, world.ended(effect.vm, effect.host), True
            case "follow":
                vm, place = effect.vm, world.place(effect.vm)
                if (host := dict(world.moving).get(vm)) is not None:
                    yield from self.move_outcomes(world, vm, host)
                elif place in (HERE, CRASHED, LOST, ENDED):
                    ways = {HERE: Way.STAYED, CRASHED: Way.CRASHED, LOST: Way.LOST}
                    yield Outcome(MoveOver(vm, ways.get(place, Way.ENDED))), world, False
                else:
                    yield Outcome(MoveOver(vm, Way.MOVED)), world, False
            case "check":
                yield Outcome(checked(world, effect.vm, effect.host)), world, False
                yield failed, world, True
            case "fall":
                yield from self.fall_outcomes(world, effect.vm)
            case call:
                raise AssertionError(call)

    def move_outcomes(
        self, world: World, vm: str, host: str
    ) -> Iterator[tuple[Outcome, World, bool]]:
        over = world.ended(vm, host)
        yield Outcome(MoveOver(vm, Way.MOVED, host=host)), over.put(vm, host), False
        cancelled = (one := world.state.passage(vm)) is not None and one.cancelled
        yield Outcome(MoveOver(vm, Way.STAYED, "refused", host)), over, not cancelled
        for way, place in ((Way.LOST, LOST), (Way.CRASHED, CRASHED), (Way.ENDED, ENDED)):
            yield Outcome(MoveOver(vm, way, "why", host)), over.put(vm, place), True

    def fall_outcomes(self, world: World, vm: str) -> Iterator[tuple[Outcome, World, bool]]:
        place = world.place(vm)
        if place not in (HERE, CRASHED) or any(name == vm for name, _ in world.moving):
            self.broken.add("a standby began beside the VM")
        if vm not in WITH_STANDBY:
            yield Outcome(error="none"), world, False
            return
        runs = StandbyRuns(vm, "a", here=True)
        yield Outcome(runs), world.put(vm, HERE), False
        yield Outcome(error="unknown"), world.put(vm, HERE), True
        yield Outcome(error="failed"), world, True

    # What must hold

    def check(self, world: World) -> None:
        state = world.state
        for one in state.passages:
            place = world.place(one.vm)
            held = {
                "said to have moved, and has not": one.fate is not Fate.MOVED or place == one.host,
                "said to stay, and does not": one.fate is not Fate.STAYS
                or place in (HERE, CRASHED),
                "nobody is told why it stays": one.fate is not Fate.STAYS or one.reason is not None,
                "said to be lost, and is not": one.fate is not Fate.LOST or place == LOST,
                "said to be its standby, and is not": one.fate is not Fate.STANDBY
                or place == one.host,
            }
            self.broken.update(what for what, holds in held.items() if not holds)
        self.check_whole(world)

    def check_whole(self, world: World) -> None:
        state = world.state
        names = [one.vm for one in state.passages]
        begun = [item.effect for item in world.work if isinstance(item.effect, MoveVm | FollowVm)]
        going = sum(one.fate is Fate.MOVES for one in state.passages)
        found = sum(isinstance(effect, FollowVm) for effect in begun)
        forgotten = {need.vm for need in NEEDS} - set(names)
        done = state.over and not state.failure
        held = {
            "more moves at once than asked for": going <= state.order.concurrency + found,
            "one VM is followed twice": len({effect.vm for effect in begun}) == len(begun),
            "one VM stands twice": len(set(names)) == len(names),
            "over, with VMs on their way": not done
            or all(one.fate.is_end for one in state.passages),
            "something waits for nothing": all(self.awaited(world)),
            "a VM was forgotten": not done or not any(world.place(vm) == HERE for vm in forgotten),
        }
        self.broken.update(what for what, holds in held.items() if not holds)

    def awaited(self, world: World) -> Iterator[bool]:
        """Of all that goes on: whether there is work, or a time, that it waits for."""
        state = world.state
        if state.over:
            return
        begun = [item.effect for item in world.work]
        if state.step is Step.MARK:
            yield any(isinstance(effect, Mark) for effect in begun)
        if state.step is Step.SURVEY:
            yield state.again_at is not None or LookAround((), state.looks) in begun
        kinds: dict[Fate, tuple[type[MoveVm | FollowVm | CheckVm | Fall], ...]] = {
            Fate.MOVES: (MoveVm, FollowVm),
            Fate.CHECKS: (CheckVm,),
            Fate.FALLS: (Fall,),
        }
        for one in state.passages:
            if (kind := kinds.get(one.fate)) is not None:
                working = any(isinstance(work, kind) and work.vm == one.vm for work in begun)
                yield working or one.not_before > 0

    def check_rest(self) -> None:
        """From every world the evacuation comes to its end without another fault."""
        before = defaultdict(list)
        for world, edges in self.edges.items():
            for edge in edges:
                if not edge.fault:
                    before[edge.world].append(world)
        settled = {world for world in self.edges if world.state.over}
        queue = deque(settled)
        while queue:
            for earlier in before[queue.popleft()]:
                if earlier not in settled:
                    settled.add(earlier)
                    queue.append(earlier)
        self.stuck = [world for world in self.edges if world not in settled]
        if self.stuck:
            self.broken.add("no way to the end")


def seen(world: World) -> Surveyed:
    """What hosts and VMs say."""
    away = {vm for vm, _ in world.moving}
    needs = tuple(need for need in NEEDS if world.place(need.vm) == HERE and need.vm not in away)
    return Surveyed(Survey(ROOMS, needs), tuple(sorted(world.moving)))


def checked(world: World, vm: str, host: str) -> Checked:
    """What store and destination say."""
    place = world.place(vm)
    if place == host:
        return Checked(vm, Word.THERE)
    return Checked(vm, Word.HERE if place == HERE else Word.ELSEWHERE, "why")


def normal(state: Evacuation) -> Evacuation:
    """The same state without what no decision depends on."""
    now = TIMES[min(state.bounds, len(TIMES) - 1)]
    passages = tuple(
        replace(
            one,
            why="",
            not_before=now + SOON if one.not_before else 0.0,
            rounds=min(one.rounds, machine.ROUNDS),
            began_s=None,
            ended_s=None,
        )
        for one in state.passages
    )
    again = None if state.again_at is None else now + SOON
    failure = "why" if state.failure else ""
    return replace(state, passages=passages, again_at=again, failure=failure, ended=None)


def order(cause: Cause, concurrency: int = 1) -> EvacuationOrder:
    return EvacuationOrder(cause, "why", (), DEADLINE_S, concurrency)


@pytest.mark.parametrize("cause", [Cause.OPERATOR, Cause.GUARD])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_every_order_of_everything(cause: Cause, concurrency: int) -> None:
    explorer = Explorer(order(cause, concurrency))
    explorer.run(FAULTS)
    assert not explorer.broken, (explorer.broken, explorer.stuck[:2])
    worlds = explorer.edges
    assert len(worlds) > 1000
    ends = {one.fate for world in worlds if world.state.over for one in world.state.passages}
    wanted = {Fate.MOVED, Fate.STAYS, Fate.LOST, Fate.ENDED, Fate.UNKNOWN}
    assert wanted | ({Fate.STANDBY} if cause.ends_host else set()) == ends
    reasons = {one.reason for world in worlds for one in world.state.passages}
    assert {Reason.TOO_LATE, Reason.GIVEN_UP} <= reasons
    assert {world.state.step for world in worlds} == set(Step)


# Mistakes in the machine, each of which an invariant has to find; those in the driver follow


class BelievesTheSource(Driver):
    """No move is checked, and one of a VM that stayed is taken for one that ended well."""

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        if isinstance(event, MoveOver) and event.way is Way.STAYED:
            event = replace(event, way=Way.MOVED)
        after, effects = super().decide(state, event, now)
        passages = tuple(
            replace(one, fate=Fate.MOVED) if one.fate is Fate.CHECKS else one
            for one in after.passages
        )
        return replace(after, passages=passages), effects


class ForgetsWhatMoves(Driver):
    """What another agent began to move is moved once more."""

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        if isinstance(event, Surveyed):
            needs = tuple(need for need in NEEDS if need.vm in dict(event.moving))
            survey = replace(event.survey, needs=(*event.survey.needs, *needs))
            event = Surveyed(survey, (), event.look)
        return super().decide(state, event, now)


class KnowsNoBound(Driver):
    """Everything begins at once."""

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        wide = replace(state, order=replace(state.order, concurrency=9))
        after, effects = super().decide(wide, event, now)
        return replace(after, order=state.order), effects


class WaitsForEver(Driver):
    """Time means nothing."""

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        return super().decide(state, event, min(now, DEADLINE_S - 1))


class FallsTooSoon(Driver):
    """The standby of a VM is asked for while the VM is on its way."""

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        after, effects = super().decide(state, event, now)
        if after.bounds == 1 and state.bounds == 0:
            passages = tuple(
                replace(one, fate=Fate.FALLS) if one.fate is Fate.MOVES else one
                for one in after.passages
            )
            falls = [Fall(one.vm) for one in after.passages if one.fate is Fate.MOVES]
            return replace(after, passages=passages), [*effects, *falls]
        return after, effects


class LeavesOthersBehind(Driver):
    """It is over when the first VM has left."""

    def decide(self, state: Evacuation, event: Event, now: float) -> Decision:
        after, effects = super().decide(state, event, now)
        if any(one.fate is Fate.MOVED for one in after.passages):
            return replace(after, step=Step.OVER), effects
        return after, effects


@pytest.mark.parametrize(
    ("mistake", "broken"),
    [
        (BelievesTheSource, "said to have moved, and has not"),
        (ForgetsWhatMoves, "two moves of one VM"),
        (KnowsNoBound, "more moves at once than asked for"),
        (WaitsForEver, "no way to the end"),
        (FallsTooSoon, "a standby began beside the VM"),
        (LeavesOthersBehind, "over, with VMs on their way"),
    ],
)
def test_a_mistake_is_found(mistake: type[Driver], broken: str) -> None:
    explorer = Explorer(order(Cause.GUARD), mistake)
    explorer.run(max(FAULTS, 2), broken)
    assert broken in explorer.broken


def writes_no_record(driver: Any) -> None:
    """Nothing is written."""
    driver.record = lambda _before, _after: True


def swallows_errors(driver: Any) -> None:
    """What fails is told to nobody."""
    post = driver.post
    driver.post = lambda event: None if isinstance(event, Failed) else post(event)


FOR_NOTHING = "something waits for nothing"
IN_THE_DRIVER: dict[str, tuple[Mutation, str]] = {
    "drops the mark": (drops(Mark), FOR_NOTHING),
    "does not look": (drops(LookAround), FOR_NOTHING),
    "drops a move": (drops(MoveVm), FOR_NOTHING),
    "does not check": (drops(CheckVm), FOR_NOTHING),
    "swallows errors": (swallows_errors, FOR_NOTHING),
    "moves twice": (repeats(MoveVm), "two moves of one VM"),
    "checks twice": (repeats(CheckVm), "begun twice"),
    "falls twice": (repeats(Fall), "begun twice"),
    "tells a look twice": (tells_twice(Surveyed), "told twice"),
    "tells an end twice": (tells_twice(MoveOver), "told twice"),
    "pretends a loss": (
        pretends(MoveVm, MoveOver("web", Way.LOST), "_outcome"),
        "said to be lost, and is not",
    ),
    "writes no record": (writes_no_record, "begun before it was on record"),
}


@pytest.mark.parametrize("name", IN_THE_DRIVER)
def test_a_mistake_in_the_driver_is_found(name: str) -> None:
    mutate, broken = IN_THE_DRIVER[name]
    explorer = Explorer(order(Cause.GUARD), mutate=mutate)
    explorer.run(FAULTS, broken)
    assert broken in explorer.broken, explorer.broken
