"""A migration, exhaustively: both real drivers, the store, and everything that can fail.

The world holds the two QEMUs, the store with a request that may still be on its way to it, messages
between the hosts, the records of both agents, and the work that both drivers have begun. Whatever
can happen is tried in every world that can be reached, in every order: any port may fail, any
message and any answer may be late or lost, any QEMU may die, any agent may die and begin anew from
its record, time may pass. The invariants must hold everywhere, and each of the mistakes, in a
machine as in a driver, must break one of them.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.migration.destination import decide as arrives
from sempervirt.migration.destination import ports as destination_ports
from sempervirt.migration.destination.driver import DestinationDriver
from sempervirt.migration.destination.state import (
    DestinationEffect,
    DestinationEvent,
    Incoming,
    OwnershipSeen,
    PromiseAsked,
    QemuEnded,
    Ready,
    SourceSilent,
    TakeAndRun,
    ToldToAbort,
    ToldToRun,
)
from sempervirt.migration.destination.state import Step as DestinationStep
from sempervirt.migration.events import Loaded, Side, StreamFailed, Tick
from sempervirt.migration.messages import ArrivalAnswer
from sempervirt.migration.source import decide as leaves
from sempervirt.migration.source import ports as source_ports
from sempervirt.migration.source.driver import SourceDriver, failure_of
from sempervirt.migration.source.state import (
    AbortDestination,
    AnswerLost,
    Bounds,
    CancelAsked,
    Certain,
    Committed,
    DestinationEnded,
    DestinationGone,
    EndSource,
    Failed,
    Finish,
    FinishStream,
    GoBack,
    GuestStopped,
    HandOver,
    Hopeless,
    Migration,
    MoveDevices,
    NotCommitted,
    PostcopyChosen,
    Prepared,
    Resolved,
    SourceEffect,
    SourceEnded,
    SourceEvent,
    StartStream,
    Superseded,
    WentBack,
    Withdraw,
    Withdrawn,
)
from sempervirt.migration.source.state import Step as SourceStep
from sempervirt.migration.source.watch import answered
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Arrival, Mode, Phase
from tests.unit.exploration import (
    Outcome,
    Pending,
    Script,
    Stopped,
    run_until_it_waits,
)

# A tick comes when its time has come: all times in a world are 0, and it ticks at 1.
NOW, LATER = 0.0, 1.0
CLAIM = Claim("web", "b", 8, "c" * 32)
UNKNOWN_EXITS = (Withdrawn, Superseded, Resolved)
# Ports that neither fail nor wait for anybody in a way that matters.
# `make worlds` tries more.
FAULTS = int(os.environ.get("SEMPERVIRT_WORLD_FAULTS", "1"))
UNRECORDED_PROMISE = "a promise was made that is not on record"
BEFORE_THE_RECORD = "the store was asked before that was on record"
AT_ONCE = ("arm", "capture", "abort", "end_wire", "forget", "give_back")
WITHOUT_DEVICES = "the destination runs without the state of its devices"
REST_TOO_EARLY = "the rest was sent before the devices stood still"
DEVICES_WAIT = "the devices stand still for nothing"


@dataclass(frozen=True)
class World:
    """`hand_over` "sent": it may still succeed; "doomed": the entry has changed since. `answer` is
    that of the hand-over, on its way back. `streaming`: what is left is being sent; `arrived`: the
    destination's QEMU has all of it. `devices_still`: the passed-through devices do nothing at the
    source; `devices_there`: the destination's mediators have their state.
    """

    source: Migration
    destination: Incoming = field(default_factory=Incoming)
    source_record: tuple[Phase, Mode] = (Phase.PREPARE, Mode.PRECOPY)
    destination_record: Arrival = Arrival.PREPARING
    source_work: frozenset[Pending] = frozenset()
    destination_work: frozenset[Pending] = frozenset()
    source_runs: bool = True
    source_alive: bool = True
    suspended: bool = False
    destination_runs: bool = False
    destination_alive: bool = True
    owner: Side = Side.SOURCE
    moving: bool = True
    hand_over: str = ""
    answer: str = ""
    streaming: bool = False
    arrived: bool = False
    devices_still: bool = False
    devices_there: bool = False
    to_destination: frozenset[str] = frozenset()

    @property
    def hears(self) -> bool:
        """Whether the source still waits for the answer to its hand-over."""
        return any(item.waits == "hand_over" for item in self.source_work)

    @property
    def at_rest(self) -> bool:
        """A VM that is lost is left at the destination, for somebody to look at and end."""
        left = self.source.phase is Phase.LOST and self.destination.phase is Arrival.RUNNING
        return self.source.finished and (self.destination.finished or left)


@dataclass(frozen=True)
class Edge:
    """What happened. A fault is what no rest may depend on."""

    event: object
    world: World
    fault: bool = False


class Ports:
    """Every port of both ends: the next outcome comes from the script, the rest from the world."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.script = Script()
        self.writable = True
        self.owed = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*_args: object, **_named: object) -> Any:
            if name in AT_ONCE:
                self.explorer.called(name)
                return None
            return self.script.answer(name)

        return call

    def suspend(self) -> None:
        self.explorer.change(suspended=True)

    def end(self, *arguments: Any) -> Any:
        """Of a record without an argument, of a guest with the reason."""
        if arguments:
            return self._end()
        return None

    async def _end(self) -> Any:
        return self.script.answer("end")

    def write(self, *state: Any) -> bool:
        self.owed |= state[0] in (Phase.COMMIT, Arrival.PROMISED)
        if self.writable:
            if isinstance(state[0], Phase):
                phase, mode = state
                past = phase.is_end or mode is Mode.PRECOPY
                self.explorer.change(source_record=(phase, Mode.PRECOPY if past else mode))
            else:
                self.explorer.change(destination_record=state[0])
        return self.writable


class Source(SourceDriver):
    """The real driver; work is kept in the world instead of a task."""

    explorer: Explorer

    def begin(self, effect: SourceEffect) -> None:
        world = self.explorer.world
        if isinstance(effect, HandOver):
            if world.hand_over or world.owner is not Side.SOURCE:
                self.explorer.broken.add("handed over twice")
            if world.source_record[0] is not Phase.COMMIT:
                self.explorer.broken.add(BEFORE_THE_RECORD)
        self.explorer.take_up(self, effect, (), "source_work")

    def cancel_work(self, *kinds: type) -> None:
        work = self.explorer.world.source_work
        kept = frozenset(item for item in work if not isinstance(item.effect, kinds))
        self.explorer.change(source_work=kept)


class Destination(DestinationDriver):
    """The real driver; work is kept in the world instead of a task."""

    explorer: Explorer

    def after_step(self, before: Incoming) -> None:
        on_record = (Arrival.PROMISED, Arrival.RUNNING)
        record = self.explorer.world.destination_record
        if self.state.phase is Arrival.PROMISED and record not in on_record:
            self.explorer.broken.add(UNRECORDED_PROMISE)

    def begin(self, effect: DestinationEffect) -> None:
        self.explorer.take_up(self, effect, (), "destination_work")


@dataclass
class Rules:
    """The drivers and the store; a test of the tests puts a mistake into one."""

    source: type[Source] = Source
    destination: type[Destination] = Destination
    withdraw_changes_the_entry: bool = True
    devices: bool = False


class Explorer:
    """Every world that can be reached."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.edges: dict[World, list[Edge]] = {}
        self.broken: set[str] = set()
        self.stuck: list[World] = []
        self.ports = Ports(self)
        clock: Any = Stopped(NOW)
        self.clock = clock
        state, effects = leaves.begin(Bounds(0, 0), NOW, devices=rules.devices)
        self.world = World(normal(state))
        p: Any = self.ports
        self.source = rules.source("web", state, source_ports.Ports(p, p, p, p, p, p), clock)
        self.destination = rules.destination(
            "web", Incoming(), destination_ports.Ports(p, p, p), clock
        )
        self.source.explorer = self.destination.explorer = self
        for effect in effects:
            self.source.carry_out(effect)
        self.first = self.world

    def run(self, faults: int, until_broken: str = "") -> None:
        """Explores what up to so many faults lead to; those with fewer faults first."""
        queue = deque([(self.first, 0)])
        needed = {self.first: 0}
        while queue and not (until_broken and until_broken in self.broken):
            world, had = queue.popleft()
            if world in self.edges:
                continue
            self.edges[world] = []
            for seen in self.moves(world):
                count = had + seen.fault
                if count > faults:
                    continue
                edge = replace(seen, world=tidy(seen.world))
                self.edges[world].append(edge)
                self.check(world, edge)
                if count < needed.get(edge.world, faults + 1):
                    needed[edge.world] = count
                    (queue.append if seen.fault else queue.appendleft)((edge.world, count))
        if not until_broken or until_broken not in self.broken:
            self.check_rest()

    # What the drivers and their ports do to the world

    def change(self, **changes: Any) -> None:
        self.world = replace(self.world, **changes)

    def called(self, call: str) -> None:
        """A port is called: what follows from the call alone."""
        message = {"prepare": "prepare", "promise": "promise?", "run": "run", "abort": "abort"}
        if call in message and self.stepping == "source_work":
            self.change(to_destination=self.world.to_destination | {message[call]})
        if call == "hand_over":
            self.change(hand_over="sent")
        if call == "move" and self.rules.devices:
            self.change(devices_still=True)
        if call == "abort":
            self.change(streaming=False)

    def take_up(self, driver: Any, effect: Any, had: tuple[Outcome, ...], work: str) -> None:
        """Runs the work of an effect until it waits for a port, or has ended."""
        self.stepping = work
        effect = wordless(effect)
        self.ports.script = Script(had)
        waits = run_until_it_waits(driver.work(effect))
        if waits:
            pending = getattr(self.world, work) | {Pending(effect, waits, had)}
            self.change(**{work: pending})
            self.called(waits)

    def step(
        self, world: World, which: str, event: Any, now: float = NOW, *, writable: bool
    ) -> World:
        """One step of a driver in a world, and what follows from it at once."""
        self.world = world
        self.ports.writable, self.ports.owed = writable, False
        self.clock.time = now
        driver: Any = self.source if which == "source" else self.destination
        driver._state = getattr(world, which)
        driver.step(event)
        while not driver._queue.empty():
            driver.step(driver._queue.get_nowait())
        self.change(**{which: normal(driver.state)})
        return self.world

    def tell(
        self, world: World, which: str, event: Any, now: float = NOW, *, fault: bool = False
    ) -> Iterator[Edge]:
        yield Edge(event, self.step(world, which, event, now, writable=True), fault)
        if self.ports.owed:
            told = self.step(world, which, event, now, writable=False)
            yield Edge(event, told, fault=True)

    def finish(
        self, world: World, work: str, item: Pending, outcome: Outcome, *, fault: bool
    ) -> Iterator[Edge]:
        """A port answers: the work goes on, and its driver hears what came of it."""
        which = work.removesuffix("_work")
        self.world = replace(world, **{work: getattr(world, work) - {item}})
        driver: Any = self.source if which == "source" else self.destination
        driver._state = getattr(world, which)
        self.take_up(driver, item.effect, (*item.had, outcome), work)
        world = self.world
        if driver._queue.empty():
            yield Edge((item.waits, outcome), world, fault)
            return
        event = driver._queue.get_nowait()
        assert driver._queue.empty()
        yield from self.tell(world, which, event, fault=fault)

    # What can happen

    def moves(self, world: World) -> Iterator[Edge]:
        yield from self.store_moves(world)
        if not world.source.finished:
            yield from self.source_moves(world)
        if not world.destination.finished:
            yield from self.destination_moves(world)
        for item in world.source_work:
            for outcome, after, fault in self.source_outcomes(world, item):
                yield from self.finish(after, "source_work", item, outcome, fault=fault)
        for item in world.destination_work:
            for outcome, after, fault in self.destination_outcomes(world, item):
                yield from self.finish(after, "destination_work", item, outcome, fault=fault)

    def source_outcomes(self, world: World, item: Pending) -> Iterator[tuple[Outcome, World, bool]]:  # noqa: C901
        call, there = item.waits, world.destination.phase
        failed = Outcome(error="failed")
        alive = world.source_alive
        match call:
            case "prepare":
                if there is Arrival.INCOMING:
                    yield Outcome("address"), world, False
            case "start" | "switch_to_postcopy" | "released" if alive:
                yield Outcome(), world, False
            case "finish_stream" if alive:
                yield Outcome(), replace(world, streaming=world.destination_alive), False
            case "move" if alive:
                if there is Arrival.INCOMING and world.destination_alive:
                    yield Outcome(), replace(world, devices_there=True), False
                    yield failed, replace(world, devices_there=True), True  # the answer is lost
            case "go_on" if alive:
                yield Outcome(), replace(world, devices_still=False), False
            case "promise":
                if there in (Arrival.PROMISED, Arrival.RUNNING):
                    yield Outcome(), world, False
            case "runs" if alive:
                yield Outcome(world.source_runs), world, False
                yield Outcome(error="unknown"), world, True
            case "hand_over":
                if world.answer:
                    told = replace(world, answer="")
                    yes = Outcome(CLAIM) if world.answer == "yes" else failed
                    yield yes, told, False
                yield Outcome(error="unknown"), replace(world, answer=""), True
                return
            case "withdraw":
                if world.owner is Side.DESTINATION:
                    yield Outcome(error="stale"), world, False
                else:
                    changed = self.doomed(world)
                    yield Outcome(), replace(world, moving=False, hand_over=changed), False
                    # Done, and the answer lost.
                    yield failed, replace(world, moving=False, hand_over=changed), True
            case "make_certain":
                given = replace(world, owner=Side.DESTINATION, moving=False)
                new = world.owner is Side.SOURCE
                yield Outcome(CLAIM if new else None), given, False
            case "take_back":
                yield Outcome(), world, False
            case "go_back" if alive:
                back = replace(world, source_runs=True, suspended=False, streaming=False)
                yield Outcome(True), back, False
            case "run":
                if world.destination_runs:
                    yield Outcome(), world, False
            case "recover" if item.had:
                both = world.source_alive and world.destination_alive
                yield Outcome(), replace(world, streaming=both), False
            case "recover":
                if world.destination_alive:
                    yield Outcome("address"), world, False
            case "end":
                dead = replace(
                    world, source_alive=False, source_runs=False, suspended=False, streaming=False
                )
                yield Outcome(), dead, False
            case _:
                pass
        yield failed, world, alive or call in ("end", "withdraw", "make_certain")

    def doomed(self, world: World) -> str:
        if not self.rules.withdraw_changes_the_entry:
            return world.hand_over
        return "doomed" if world.hand_over else ""

    def destination_outcomes(
        self, world: World, item: Pending
    ) -> Iterator[tuple[Outcome, World, bool]]:
        match item.waits:
            case "look":
                owns = world.owner is Side.DESTINATION
                seen = OwnershipSeen(
                    world.owner, moving=world.moving and not owns, claim=CLAIM if owns else None
                )
                yield Outcome(seen), world, False
            case "take_images":
                yield Outcome(), world, False
            case "run":
                if world.destination_alive:
                    yield Outcome(), replace(world, destination_runs=True), False
            case "end":
                dead = replace(
                    world, destination_alive=False, destination_runs=False, streaming=False
                )
                yield Outcome(), dead, False
            case _:
                pass
        yield Outcome(error="failed"), world, world.destination_alive

    def source_moves(self, world: World) -> Iterator[Edge]:
        source = world.source
        starts = any(isinstance(item.effect, StartStream) for item in world.source_work)
        if source.phase is Phase.PRECOPY and world.source_alive and not starts:
            still = replace(world, source_runs=False)
            yield from self.tell(still, "source", GuestStopped())
            if source.mode is Mode.PRECOPY:
                yield from self.tell(world, "source", PostcopyChosen())
                yield from self.tell(world, "source", Hopeless("stalled"))
        answer = ArrivalAnswer(
            id="0" * 32, phase=world.destination.phase, drained=world.destination.drained
        )
        for event in answered(answer, Arrival.INCOMING, "b"):
            if isinstance(event, DestinationEnded) and not event_matters(source):
                continue
            yield from self.tell(world, "source", event)
        if not world.source_alive and not source.source_ended:
            yield from self.tell(world, "source", SourceEnded("killed"))
        if source.phase is Phase.UNKNOWN:
            # The operator's word stands in the store: what is on its way finds it changed.
            settled = replace(world, moving=False, hand_over=self.doomed(world), answer="")
            yield from self.tell(settled, "source", Resolved(world.owner, "seen"), fault=True)
        if leaves.wake_at(source) is not None:
            yield from self.tell(world, "source", Tick(), LATER)
        yield from self.source_faults(world)

    def source_faults(self, world: World) -> Iterator[Edge]:
        yield from self.tell(world, "source", CancelAsked(), fault=True)
        yield from self.tell(world, "source", DestinationGone("silent"), fault=True)
        if world.source_alive:
            yield from self.tell(world, "source", StreamFailed("cut"), fault=True)
            dead = replace(
                world, source_alive=False, source_runs=False, suspended=False, streaming=False
            )
            yield Edge("the source's QEMU dies", dead, fault=True)
            if runs_on(world):
                ran = replace(world, source_runs=True, streaming=False)
                yield from self.tell(ran, "source", StreamFailed("it runs on"), fault=True)
        self.world = replace(world, source_work=frozenset(), answer="")
        state, effects = leaves.recover(*world.source_record, NOW, devices=self.rules.devices)
        self.source._state = state
        for effect in effects:
            self.source.carry_out(effect)
        self.change(source=normal(state))
        yield Edge("the source's agent begins anew", self.world, fault=True)

    def destination_moves(self, world: World) -> Iterator[Edge]:
        messages: dict[str, DestinationEvent] = {
            "prepare": Ready(),
            "promise?": PromiseAsked(),
            "abort": ToldToAbort(),
            "run": ToldToRun(CLAIM),
        }
        for message in world.to_destination:
            told = replace(world, to_destination=world.to_destination - {message})
            yield from self.tell(told, "destination", messages[message])
            yield Edge("message lost", told, fault=True)
        if world.streaming:
            sent = replace(world, streaming=False, arrived=True)
            yield from self.tell(sent, "destination", Loaded())
        elif world.arrived and world.destination_alive and not world.destination.drained:
            # An agent that begins anew asks QEMU, and finds it so.
            yield from self.tell(world, "destination", Loaded())
        if not world.destination_alive and not world.destination.qemu_ended:
            yield from self.tell(world, "destination", QemuEnded("killed"))
        if arrives.wake_at(world.destination) is not None:
            yield from self.tell(world, "destination", Tick(), LATER)
        yield from self.tell(world, "destination", SourceSilent(), fault=True)
        if world.destination_alive:
            yield from self.tell(world, "destination", StreamFailed("cut"), fault=True)
            dead = replace(world, destination_alive=False, destination_runs=False, streaming=False)
            yield Edge("the destination's QEMU dies", dead, fault=True)
        self.world = replace(world, destination_work=frozenset())
        state, effects = arrives.recover(world.destination_record, NOW)
        self.destination._state = state
        for effect in effects:
            self.destination.carry_out(effect)
        self.change(destination=normal(state))
        yield Edge("the destination's agent begins anew", self.world, fault=True)

    def store_moves(self, world: World) -> Iterator[Edge]:
        heard = world.hears
        if world.hand_over == "sent":
            done = replace(world, hand_over="", owner=Side.DESTINATION, moving=False)
            yield Edge("handed over", replace(done, answer="yes" if heard else ""))
            refused = replace(world, hand_over="", answer="no" if heard else "")
            yield Edge("the store refuses", refused, fault=True)
        if world.hand_over == "doomed":
            yield Edge("too late", replace(world, hand_over="", answer="no" if heard else ""))

    # What must hold

    def check(self, before: World, edge: Edge) -> None:
        world = edge.world
        phase = world.source.phase
        still = (Phase.SWITCHOVER, Phase.COMMIT, Phase.UNKNOWN, Phase.POSTCOPY)
        goes_back = any(isinstance(item.effect, GoBack) for item in world.source_work) or any(
            isinstance(again.effect, GoBack) for again in world.source.again
        )
        held = {
            "two guests run": not (world.source_runs and world.destination_runs),
            "the source runs what it does not own": not world.source_runs
            or world.owner is Side.SOURCE,
            "the destination runs what it does not own": not world.destination_runs
            or world.owner is Side.DESTINATION,
            "the guest stands still for nothing": world.source_runs
            or not world.source_alive
            or phase in still
            or goes_back
            or world.owner is Side.DESTINATION,
            "an abandoned migration lost the VM": phase is not Phase.ABANDONED
            or world.owner is Side.SOURCE,
            "the owner gave up": world.owner is Side.SOURCE
            or world.destination.phase is not Arrival.ABORTED,
            "the source ended what was still its own": phase is not Phase.DONE
            or world.owner is Side.DESTINATION,
            "an end was left": not before.source.phase.is_end
            or phase is before.source.phase
            or edge.event == "the source's agent begins anew",
            "unknown was left without evidence": before.source.phase is not Phase.UNKNOWN
            or phase is Phase.UNKNOWN
            or isinstance(edge.event, UNKNOWN_EXITS)
            or edge.event == "the source's agent begins anew",
            WITHOUT_DEVICES: not world.destination_runs
            or world.devices_there
            or not self.rules.devices,
            REST_TOO_EARLY: not world.streaming or world.devices_there or not self.rules.devices,
            DEVICES_WAIT: not world.devices_still
            or not world.source.finished
            or phase is not Phase.ABANDONED
            or not world.source_alive,
            "it was finished before the guest went on": not world.source.finished
            or phase is not Phase.ABANDONED
            or world.source_runs
            or not world.source_alive,
        }
        self.broken.update(what for what, holds in held.items() if not holds)

    def check_rest(self) -> None:
        """From every world both sides come to rest without another fault."""
        before = defaultdict(list)
        for world, edges in self.edges.items():
            for edge in edges:
                if not edge.fault:
                    before[edge.world].append(world)
        settled = {world for world in self.edges if world.at_rest}
        queue = deque(settled)
        while queue:
            for earlier in before[queue.popleft()]:
                if earlier not in settled:
                    settled.add(earlier)
                    queue.append(earlier)
        self.stuck = [world for world in self.edges if world not in settled]
        if self.stuck:
            self.broken.add("no way to rest")


def tidy(world: World) -> World:
    """The same world without what nothing depends on any more."""
    if world.destination.finished:
        none: frozenset[Any] = frozenset()
        world = replace(world, to_destination=none, destination_work=none)
        world = replace(world, streaming=False, arrived=False)
        if not world.destination_runs:
            world = replace(world, devices_there=False)
    phase, mode = world.source_record
    if leaves.recover(phase, mode, NOW)[0].phase is Phase.ABANDONED:
        world = replace(world, source_record=(Phase.PREPARE, Mode.PRECOPY))
    if arrives.recover(world.destination_record, NOW)[0].phase is Arrival.ABORTED:
        world = replace(world, destination_record=Arrival.PREPARING)
    if world.hand_over == "doomed" and not world.hears:
        world = replace(world, hand_over="")
    return world


def runs_on(world: World) -> bool:
    """Whether QEMU may let the guest run by itself, as it does when its migration fails."""
    source = world.source
    still = not world.source_runs and not world.suspended and source.mode is Mode.PRECOPY
    return still and source.phase in (Phase.SWITCHOVER, Phase.COMMIT) and not world.hand_over


def event_matters(source: Migration) -> bool:
    return source.phase not in (Phase.ABANDONED, Phase.DONE, Phase.LOST)


def normal(state: Any) -> Any:
    """The same state without what no decision depends on: times, and the words of reasons."""
    again = frozenset(replace(item, at=NOW, effect=wordless(item.effect)) for item in state.again)
    why = bool(state.why) * "why"
    if isinstance(state, Incoming):
        state = replace(state, ask_at=NOW, why=why, again=again)
        state = replace(state, qemu_ended=bool(state.qemu_ended) * "killed")
        if state.phase in (Arrival.ABORTED, Arrival.LOST):
            state = replace(state, why="why", claim=None, drained=False, runs=False)
        return state
    state = replace(state, until=NOW, tell_until=NOW, why=why, again=again, evidence="")
    state = replace(state, source_ended=bool(state.source_ended) * "killed")
    if state.phase.is_end:
        past = {"loaded": False, "disks_released": False, "guest_stopped": True}
        past["devices_moved"] = False
        state = replace(state, **past, mode=Mode.PRECOPY, why="", recovering=False, claim=None)
    return state


def wordless(effect: Any) -> Any:
    """The same effect, with all reasons alike."""
    if isinstance(effect, GoBack):
        return GoBack(stopped=True)
    for name in ("why", "because"):
        if getattr(effect, name, ""):
            return replace(effect, **{name: "why"})
    return effect


async def test_every_order_of_everything() -> None:
    explorer = Explorer(Rules())
    explorer.run(faults=FAULTS)
    assert not explorer.broken, (explorer.broken, explorer.stuck[:3])
    worlds = explorer.edges
    assert len(worlds) > 10_000
    # The interesting ends are all reached, so the invariants were not held by idleness.
    ends = {(world.source.phase, world.destination.phase) for world in worlds if world.at_rest}
    assert {
        (Phase.DONE, Arrival.RUNNING),
        (Phase.ABANDONED, Arrival.ABORTED),
        (Phase.LOST, Arrival.RUNNING),
    } <= ends
    assert any(world.source.phase is Phase.UNKNOWN and world.destination_runs for world in worlds)
    assert any(world.source.phase is Phase.POSTCOPY for world in worlds)
    assert {world.source.phase for world in worlds} == set(Phase)
    assert {world.destination.phase for world in worlds} == set(Arrival)


async def test_every_order_of_everything_with_passed_through_devices() -> None:
    explorer = Explorer(Rules(devices=True))
    explorer.run(faults=FAULTS)
    assert not explorer.broken, (explorer.broken, explorer.stuck[:3])
    worlds = explorer.edges
    assert len(worlds) > 4_000
    ends = {(world.source.phase, world.destination.phase) for world in worlds if world.at_rest}
    assert {(Phase.DONE, Arrival.RUNNING), (Phase.ABANDONED, Arrival.ABORTED)} <= ends
    assert any(world.devices_still and world.source.phase is Phase.ABANDONED for world in worlds)
    assert any(world.source.phase is Phase.UNKNOWN and world.destination_runs for world in worlds)
    # Postcopy is not for such a VM.
    assert {world.source.phase for world in worlds} == {*Phase} - {Phase.POSTCOPY, Phase.LOST}


# Mistakes in the machines


class ForgetsThatThereAreDevices(Source):
    def decide(self, state: Migration, event: SourceEvent, now: float) -> SourceStep:
        after, effects = super().decide(replace(state, devices=False), event, now)
        return replace(after, devices=True), effects


class ResumesOnALostAnswer(Source):
    def decide(self, state: Migration, event: SourceEvent, now: float) -> SourceStep:
        if state.phase is Phase.COMMIT and isinstance(event, AnswerLost):
            event = NotCommitted(event.reason)
        return super().decide(state, event, now)


class HandsOverBeforeThePromise(Source):
    def decide(self, state: Migration, event: SourceEvent, now: float) -> SourceStep:
        after, effects = super().decide(state, event, now)
        if after.phase is Phase.SWITCHOVER and after.disks_released:
            return replace(after, phase=Phase.COMMIT), [*effects, HandOver(after.mode)]
        return after, effects


class RunsWhenLoaded(Destination):
    def decide(self, state: Incoming, event: DestinationEvent, now: float) -> DestinationStep:
        after, effects = super().decide(state, event, now)
        if after.phase is Arrival.PROMISED and state.phase is Arrival.INCOMING:
            return replace(after, phase=Arrival.RUNNING), [*effects, TakeAndRun(CLAIM)]
        return after, effects


class GivesUpOnSilence(Destination):
    def decide(self, state: Incoming, event: DestinationEvent, now: float) -> DestinationStep:
        if state.phase is Arrival.PROMISED and isinstance(event, SourceSilent):
            event = ToldToAbort()
        return super().decide(state, event, now)


# Mistakes in the drivers


class SendsTheRestBesideTheDevices(Source):
    def carry_out(self, effect: SourceEffect) -> None:
        super().carry_out(effect)
        if isinstance(effect, MoveDevices):
            super().carry_out(FinishStream())


class LeavesTheDevicesStanding(Source):
    async def _outcome(self, effect: SourceEffect) -> SourceEvent | None:
        if isinstance(effect, GoBack):
            await self._ports.disks.take_back()
            return WentBack(await self._ports.guest.go_back(stopped=effect.stopped))
        return await super()._outcome(effect)


class DropsTheWayBack(Source):
    def carry_out(self, effect: SourceEffect) -> None:
        if not isinstance(effect, GoBack):
            super().carry_out(effect)


class AsksTheStoreTwice(Source):
    def carry_out(self, effect: SourceEffect) -> None:
        super().carry_out(effect)
        if isinstance(effect, HandOver):
            super().carry_out(effect)


class AsksTheStoreBeforeTheRecord(Source):
    def record(self, before: Migration, after: Migration) -> bool:
        if after.phase is Phase.COMMIT:
            return True
        return super().record(before, after)


class LetsQemuRunOn(Source):
    """The guest is not looked at, nor QEMU suspended, before the store is asked."""

    async def _hand_over(self, mode: Mode) -> SourceEvent:
        return Committed(await self._ports.ownership.hand_over())


class TellsNobody(Source):
    def carry_out(self, effect: SourceEffect) -> None:
        if not isinstance(effect, EndSource):
            super().carry_out(effect)


class TakesALostAnswerForANo(Source):
    async def work(self, effect: SourceEffect) -> None:
        try:
            event = await self._outcome(effect)
        except SempervirtError as error:
            event = failure_of(effect, Unavailable(str(error)))
        if event is not None:
            self.post(event)


class ForgetsWhatFailed(Destination):
    async def work(self, effect: DestinationEffect) -> None:
        with suppress(SempervirtError):
            event = await self._outcome(effect)
            if event is not None:
                self.post(event)


class PromisesWithoutARecord(Destination):
    def record(self, before: Incoming, after: Incoming) -> bool:
        super().record(before, after)
        return True


@pytest.mark.parametrize(
    ("mistake", "consequence"),
    [
        (Rules(source=ResumesOnALostAnswer), "two guests run"),
        (Rules(source=HandsOverBeforeThePromise), "the owner gave up"),
        (Rules(destination=RunsWhenLoaded), "two guests run"),
        (Rules(destination=GivesUpOnSilence), "the owner gave up"),
        (Rules(withdraw_changes_the_entry=False), "two guests run"),
        (Rules(source=ForgetsThatThereAreDevices, devices=True), WITHOUT_DEVICES),
        (Rules(source=SendsTheRestBesideTheDevices, devices=True), REST_TOO_EARLY),
        (Rules(source=LeavesTheDevicesStanding, devices=True), DEVICES_WAIT),
        (Rules(source=DropsTheWayBack), "the guest stands still for nothing"),
        (Rules(source=AsksTheStoreTwice), "handed over twice"),
        (Rules(source=AsksTheStoreBeforeTheRecord), BEFORE_THE_RECORD),
        (Rules(source=LetsQemuRunOn), "the source runs what it does not own"),
        (Rules(source=TellsNobody), "no way to rest"),
        (Rules(source=TakesALostAnswerForANo), "two guests run"),
        (Rules(destination=ForgetsWhatFailed), "no way to rest"),
        (Rules(destination=PromisesWithoutARecord), UNRECORDED_PROMISE),
    ],
    ids=lambda value: (
        "-".join(
            kind.__name__
            for kind in (value.source, value.destination)
            if kind.__name__ not in ("Source", "Destination")
        )
        if isinstance(value, Rules)
        else ""
    ),
)
async def test_each_mistake_is_found(mistake: Rules, consequence: str) -> None:
    explorer = Explorer(mistake)
    # What never comes to rest needs no fault for it, if it is found without one.
    explorer.run(faults=0, until_broken=consequence)
    if consequence not in explorer.broken:
        explorer = Explorer(mistake)
        explorer.run(faults=FAULTS, until_broken=consequence)
    assert consequence in explorer.broken


def test_a_blackout_that_lasts_too_long_ends_with_the_guest_where_it_was() -> None:
    state, _ = leaves.begin(Bounds(deadline_s=600, blackout_s=2), 0)
    assert leaves.wake_at(state) == 600
    for event in (Prepared("x"), GuestStopped(), Loaded()):
        state, effects = leaves.step(state, event, 0)
    assert leaves.wake_at(state) == 2
    state, effects = leaves.step(state, Tick(), 1.9)
    assert effects == []
    state, effects = leaves.step(state, Tick(), 2)
    assert (state.phase, state.why) == (Phase.ABANDONED, "the guest's blackout took too long")
    assert effects == [GoBack(stopped=True), AbortDestination(state.why), Withdraw()]


def test_what_has_to_be_done_is_tried_again_in_its_time() -> None:
    state, _ = leaves.recover(Phase.DONE, Mode.PRECOPY, 0)
    state, effects = leaves.step(state, Failed(EndSource(""), "stuck"), 10)
    assert (effects, leaves.wake_at(state)) == ([], 11)
    state, effects = leaves.step(state, Tick(), 11)
    assert (effects, leaves.wake_at(state)) == ([EndSource("")], None)
    state, effects = leaves.step(state, Certain(None), 12)
    state, effects = leaves.step(state, SourceEnded("killed"), 12)
    assert effects == [Finish(stays=False)]
    assert leaves.step(state, Tick(), 99) == (state, [])
