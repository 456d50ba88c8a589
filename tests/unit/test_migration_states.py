"""A migration, exhaustively: both machines, the store between them, and everything that can fail.

The world holds the two QEMUs, the store with requests that may still be on their way to it, and
messages between the hosts. Whatever can happen is tried in every world that can be reached, in
every order: any message and any answer may be late or lost, any participant may die, time may
pass. The invariants must hold everywhere, and each of five mistakes must break one of them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest

from sempervirt.migration.destination import decide as arrival
from sempervirt.migration.destination.decide import Incoming
from sempervirt.migration.events import (
    Act,
    AnswerLost,
    CancelAsked,
    Committed,
    DestinationEnded,
    DestinationEvent,
    DestinationGone,
    DisksReleased,
    Drained,
    GuestStopped,
    Hopeless,
    Loaded,
    NotCommitted,
    OwnershipSeen,
    PostcopyChosen,
    Prepared,
    PromiseAsked,
    QemuEnded,
    Ready,
    Refused,
    Resolved,
    Side,
    SourceEnded,
    SourceEvent,
    SourceSilent,
    StreamFailed,
    Superseded,
    Tick,
    ToldToAbort,
    ToldToRun,
    Withdrawn,
)
from sempervirt.migration.source import decide as states
from sempervirt.migration.source.decide import Bounds, Migration
from sempervirt.vm.phases import Arrival, Mode, Phase

# A tick comes when its time has come: all times in a world are 0, and it ticks at 1.
NOW, LATER = 0.0, 1.0
UNKNOWN_EXITS = (Withdrawn, Superseded, Resolved)

SourceStep = Callable[[Migration, SourceEvent, float], states.Step]
MESSAGES: dict[str, SourceEvent] = {
    "prepared": Prepared(),
    "promised": Loaded(),
    "drained": Drained(),
}
ArrivalStep = Callable[[Incoming, DestinationEvent, float], arrival.Step]


@dataclass(frozen=True)
class World:
    """`revision` of the VM's entry matters only against that of a hand-over on its way."""

    source: Migration
    destination: Incoming = field(default_factory=Incoming)
    source_runs: bool = True
    source_alive: bool = True
    destination_runs: bool = False
    destination_alive: bool = True
    owner: Side = Side.SOURCE
    moving: bool = True
    hand_over: str = ""  # "sent": may still succeed; "doomed": the entry has changed since
    answer: str = ""  # of the hand-over, on its way back
    withdrawing: bool = False
    withdrawn: str = ""  # the answer, on its way back
    streaming: bool = False  # what is left is being sent
    releasing: bool = False
    to_source: frozenset[str] = frozenset()
    to_destination: frozenset[str] = frozenset()

    @property
    def at_rest(self) -> bool:
        ended = (Arrival.RUNNING, Arrival.ABORTED, Arrival.LOST)
        return self.source.phase.is_end and self.destination.phase in ended


@dataclass
class Rules:
    """The machines and the store; a test of the tests puts a mistake into one."""

    source: SourceStep = states.step
    destination: ArrivalStep = arrival.step
    withdraw_changes_the_entry: bool = True


@dataclass(frozen=True)
class Edge:
    """What happened. A fault is what no rest may depend on."""

    event: object
    world: World
    fault: bool = False


def first() -> World:
    source, acts = states.begin(Bounds(0, 0), NOW)
    assert acts == [Act.PREPARE]
    return send(World(source), destination="prepare")


class Explorer:
    """Every world that can be reached."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.edges: dict[World, list[Edge]] = {}
        self.broken: set[str] = set()
        self.stuck: list[World] = []

    def run(self, until_broken: str = "") -> None:
        queue = deque([first()])
        self.edges[queue[0]] = []
        while queue and until_broken not in self.broken:
            world = queue.popleft()
            for edge in self.moves(world):
                self.edges[world].append(edge)
                self.check(world, edge)
                if edge.world not in self.edges:
                    self.edges[edge.world] = []
                    queue.append(edge.world)
        if not until_broken:
            self.check_rest()

    # What can happen

    def moves(self, world: World) -> Iterator[Edge]:
        yield from self.source_moves(world)
        yield from self.destination_moves(world)
        yield from self.store_moves(world)

    def source_moves(self, world: World) -> Iterator[Edge]:
        source = world.source
        for message in world.to_source:
            yield self.tell_source(drop(world, source=message), MESSAGES[message])
        if source.phase is Phase.PRECOPY and world.source_alive:
            yield self.tell_source(replace(world, source_runs=False), GuestStopped())
            if source.mode is Mode.PRECOPY:
                yield self.tell_source(world, PostcopyChosen())
                yield self.tell_source(world, Hopeless("stalled"))
        if world.releasing:
            yield self.tell_source(replace(world, releasing=False), DisksReleased())
        if world.answer:
            told = replace(world, answer="")
            yield self.tell_source(told, Committed() if world.answer == "yes" else NotCommitted(""))
        if (world.hand_over or world.answer) and source.phase is Phase.COMMIT:
            # The request or its answer is lost; the request may also arrive later.
            yield self.tell_source(replace(world, answer=""), AnswerLost("lost"), fault=True)
        if world.withdrawn:
            told = replace(world, withdrawn="")
            yield self.tell_source(told, Withdrawn() if world.withdrawn == "yes" else Superseded())
            yield Edge("answer lost", told, fault=True)
        if source.phase is Phase.UNKNOWN:
            # The operator's word stands in the store: what is on its way finds it changed.
            settled = replace(world, moving=False, hand_over=doomed(world), withdrawing=False)
            settled = replace(settled, withdrawn="", answer="")
            yield self.tell_source(settled, Resolved(world.owner, "seen"), fault=True)
        yield self.tell_source(world, Tick(), now=LATER)
        yield from self.source_faults(world)

    def source_faults(self, world: World) -> Iterator[Edge]:
        yield self.tell_source(world, CancelAsked(), fault=True)
        yield self.tell_source(world, DestinationGone("silent"), fault=True)
        if world.destination.phase is Arrival.LOST or world.destination.qemu_ended:
            yield self.tell_source(world, DestinationEnded("killed"))
        if world.source.phase is Phase.PREPARE:
            yield self.tell_source(world, Refused("no"), fault=True)
        if world.source_alive:
            yield self.tell_source(world, StreamFailed("cut"), fault=True)
            dead = replace(world, source_alive=False, source_runs=False, streaming=False)
            yield self.tell_source(dead, SourceEnded("killed"), fault=True)

    def destination_moves(self, world: World) -> Iterator[Edge]:
        destination = world.destination
        if "prepare" in world.to_destination:
            yield self.tell_destination(drop(world, destination="prepare"), Ready())
        if "promise?" in world.to_destination:
            yield self.tell_destination(drop(world, destination="promise?"), PromiseAsked())
        if "abort" in world.to_destination:
            yield self.tell_destination(drop(world, destination="abort"), ToldToAbort())
        if "run" in world.to_destination:
            yield self.tell_destination(drop(world, destination="run"), ToldToRun())
        for message in world.to_destination:
            yield Edge("message lost", drop(world, destination=message), fault=True)
        if world.streaming and world.source.mode is Mode.PRECOPY:
            yield self.tell_destination(replace(world, streaming=False), Loaded())
        if world.streaming and world.destination_runs:
            arrived = replace(world, streaming=False)
            yield Edge(Drained(), send(arrived, source="drained"))
        if destination.phase in (Arrival.PREPARING, Arrival.INCOMING, Arrival.PROMISED):
            seen = OwnershipSeen(world.owner, moving=world.moving)
            yield self.tell_destination(world, seen)
        yield self.tell_destination(world, Tick(), now=LATER)
        yield self.tell_destination(world, SourceSilent(), fault=True)
        if world.destination_alive:
            yield self.tell_destination(world, StreamFailed("cut"), fault=True)
            dead = replace(world, destination_alive=False, destination_runs=False, streaming=False)
            yield self.tell_destination(dead, QemuEnded("killed"), fault=True)

    def store_moves(self, world: World) -> Iterator[Edge]:
        heard = world.source.phase is Phase.COMMIT
        if world.hand_over == "sent":
            done = replace(world, hand_over="", owner=Side.DESTINATION, moving=False)
            yield Edge("handed over", replace(done, answer="yes" if heard else ""))
            refused = replace(world, hand_over="", answer="no" if heard else "")
            yield Edge("store refuses", refused, fault=True)
        if world.hand_over == "doomed":
            yield Edge("too late", replace(world, hand_over=""))
        if world.withdrawing:
            if world.owner is Side.SOURCE:
                changed = (
                    doomed(world) if self.rules.withdraw_changes_the_entry else world.hand_over
                )
                done = replace(world, moving=False, hand_over=changed)
                yield Edge("withdrawn", replace(done, withdrawing=False, withdrawn="yes"))
            else:
                yield Edge("superseded", replace(world, withdrawing=False, withdrawn="no"))
            yield Edge("withdrawal lost", replace(world, withdrawing=False), fault=True)

    # What the machines do about it

    def tell_source(
        self, world: World, event: SourceEvent, now: float = NOW, *, fault: bool = False
    ) -> Edge:
        source, acts = self.rules.source(world.source, event, now)
        world = replace(world, source=replace(source, until=NOW, why=bool(source.why) * "why"))
        for act in acts:
            world = self.carry_out(world, act)
        return Edge(event, world, fault)

    def tell_destination(
        self, world: World, event: DestinationEvent, now: float = NOW, *, fault: bool = False
    ) -> Edge:
        destination, acts = self.rules.destination(world.destination, event, now)
        why = bool(destination.why) * "why"
        world = replace(world, destination=replace(destination, ask_at=NOW, why=why))
        for act in acts:
            world = self.carry_out(world, act)
        return Edge(event, world, fault)

    def carry_out(self, world: World, act: Act) -> World:  # noqa: C901
        match act:
            case Act.PREPARE:
                return send(world, destination="prepare")
            case Act.FINISH_STREAM | Act.RECOVER_STREAM:
                return replace(world, streaming=world.source_alive and world.destination_alive)
            case Act.ASK_PROMISE:
                return send(world, destination="promise?")
            case Act.RELEASE_DISKS:
                return replace(world, releasing=True)
            case Act.HAND_OVER:
                if world.hand_over or world.owner is not Side.SOURCE:
                    self.broken.add("handed over twice")
                return replace(world, hand_over="sent")
            case Act.WITHDRAW:
                return replace(world, withdrawing=True)
            case Act.RESUME_GUEST:
                return replace(world, source_runs=world.source_alive, releasing=False)
            case Act.ABORT_DESTINATION:
                return send(replace(world, streaming=False), destination="abort")
            case Act.LET_RUN:
                return send(world, destination="run")
            case Act.END_SOURCE:
                return replace(world, source_alive=False, source_runs=False)
            case Act.SAY_READY:
                return send(world, source="prepared")
            case Act.SAY_PROMISED:
                return send(world, source="promised")
            case Act.TAKE_AND_RUN:
                return replace(world, destination_runs=True)
            case Act.END_QEMU:
                return replace(world, destination_alive=False, streaming=False)
        return world

    # What must hold

    def check(self, before: World, edge: Edge) -> None:
        world = edge.world
        held = {
            "two guests run": not (world.source_runs and world.destination_runs),
            "the source runs what it does not own": not world.source_runs
            or world.owner is Side.SOURCE,
            "the destination runs what it does not own": not world.destination_runs
            or world.owner is Side.DESTINATION,
            "the guest stands still for nothing": world.source_runs
            or not world.source_alive
            or world.source.phase
            in (Phase.SWITCHOVER, Phase.COMMIT, Phase.UNKNOWN, Phase.POSTCOPY),
            "an abandoned migration lost the VM": world.source.phase is not Phase.ABANDONED
            or (world.owner is Side.SOURCE and (world.source_runs or not world.source_alive)),
            "the owner gave up": world.owner is Side.SOURCE
            or world.destination.phase is not Arrival.ABORTED,
            "the source ended what was still its own": world.source.phase is not Phase.DONE
            or world.owner is Side.DESTINATION,
            "an end was left": not before.source.phase.is_end
            or world.source.phase is before.source.phase,
            "unknown was left without evidence": before.source.phase is not Phase.UNKNOWN
            or world.source.phase is Phase.UNKNOWN
            or isinstance(edge.event, UNKNOWN_EXITS),
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


def drop(world: World, *, source: str = "", destination: str = "") -> World:
    return replace(
        world,
        to_source=world.to_source - {source},
        to_destination=world.to_destination - {destination},
    )


def send(world: World, *, source: str = "", destination: str = "") -> World:
    return replace(
        world,
        to_source=world.to_source | ({source} if source else frozenset()),
        to_destination=world.to_destination | ({destination} if destination else frozenset()),
    )


def doomed(world: World) -> str:
    return "doomed" if world.hand_over else ""


@pytest.mark.timeout(120)
def test_every_order_of_everything() -> None:
    explorer = Explorer(Rules())
    explorer.run()
    assert not explorer.broken, (explorer.broken, explorer.stuck[:3])
    worlds = explorer.edges
    assert len(worlds) > 1000
    # The interesting ends are all reached, so the invariants were not held by idleness.
    ends = {(world.source.phase, world.destination.phase) for world in worlds if world.at_rest}
    assert {
        (Phase.DONE, Arrival.RUNNING),
        (Phase.DONE, Arrival.LOST),
        (Phase.ABANDONED, Arrival.ABORTED),
        (Phase.LOST, Arrival.RUNNING),
    } <= ends
    assert any(world.source.phase is Phase.UNKNOWN and world.destination_runs for world in worlds)
    assert any(world.source.phase is Phase.POSTCOPY for world in worlds)


def resumes_on_a_lost_answer(state: Migration, event: SourceEvent, now: float) -> states.Step:
    if state.phase is Phase.COMMIT and isinstance(event, AnswerLost):
        event = NotCommitted(event.reason)
    return states.step(state, event, now)


def hands_over_before_the_promise(state: Migration, event: SourceEvent, now: float) -> states.Step:
    after, acts = states.step(state, event, now)
    if after.phase is Phase.SWITCHOVER and after.disks_released:
        return replace(after, phase=Phase.COMMIT), [*acts, Act.HAND_OVER]
    return after, acts


def runs_when_loaded(state: Incoming, event: DestinationEvent, now: float) -> arrival.Step:
    after, acts = arrival.step(state, event, now)
    if after.phase is Arrival.PROMISED and state.phase is Arrival.INCOMING:
        return replace(after, phase=Arrival.RUNNING), [*acts, Act.TAKE_AND_RUN]
    return after, acts


def gives_up_on_silence(state: Incoming, event: DestinationEvent, now: float) -> arrival.Step:
    if state.phase is Arrival.PROMISED and isinstance(event, SourceSilent):
        event = ToldToAbort()
    return arrival.step(state, event, now)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("mistake", "consequence"),
    [
        (Rules(source=resumes_on_a_lost_answer), "two guests run"),
        (Rules(source=hands_over_before_the_promise), "the owner gave up"),
        (Rules(destination=runs_when_loaded), "two guests run"),
        (Rules(destination=gives_up_on_silence), "the owner gave up"),
        (Rules(withdraw_changes_the_entry=False), "two guests run"),
    ],
    ids=["resume", "early", "eager", "impatient", "withdraw"],
)
def test_each_mistake_is_found(mistake: Rules, consequence: str) -> None:
    explorer = Explorer(mistake)
    explorer.run(until_broken=consequence)
    assert consequence in explorer.broken


SOURCE_EVENTS: tuple[SourceEvent, ...] = (
    Prepared(),
    Refused("r"),
    PostcopyChosen(),
    Hopeless("r"),
    GuestStopped(),
    Loaded(),
    DisksReleased(),
    Committed(),
    NotCommitted("r"),
    AnswerLost("r"),
    Withdrawn(),
    Superseded(),
    StreamFailed("r"),
    DestinationGone("r"),
    DestinationEnded("r"),
    SourceEnded("r"),
    Drained(),
    CancelAsked(),
    Resolved(Side.SOURCE, "e"),
    Resolved(Side.DESTINATION, "e"),
    Tick(),
)


def test_the_source_alone_survives_any_sequence_of_events() -> None:
    """Also those that no world produces: a driver with a mistake must not cost a VM its owner."""
    start, _ = states.begin(Bounds(0, 0), NOW)
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        for event in SOURCE_EVENTS:
            after, acts = states.step(state, event, LATER if event == Tick() else NOW)
            after = replace(after, until=NOW)
            if state.phase.is_end:
                assert after.phase is state.phase
                assert set(acts) <= {Act.ABORT_DESTINATION, Act.WITHDRAW}
            if state.phase in (Phase.POSTCOPY, Phase.DONE, Phase.LOST):
                assert Act.RESUME_GUEST not in acts
            if state.phase is Phase.UNKNOWN and not isinstance(event, UNKNOWN_EXITS):
                assert after.phase is Phase.UNKNOWN
                assert Act.RESUME_GUEST not in acts
                assert Act.LET_RUN not in acts
            assert not {Act.RESUME_GUEST, Act.LET_RUN} <= set(acts)
            assert not {Act.RESUME_GUEST, Act.END_SOURCE} <= set(acts)
            if Act.HAND_OVER in acts:
                assert state.phase is Phase.SWITCHOVER
                assert after.loaded
                assert after.disks_released
            if after not in seen:
                seen.add(after)
                queue.append(after)
    assert {state.phase for state in seen} == set(Phase)


def told(state: Migration, *events: SourceEvent, now: float = NOW) -> states.Step:
    acts: list[Act] = []
    for event in events:
        state, acts = states.step(state, event, now)
    return state, acts


def test_the_way_of_a_migration() -> None:
    state, _ = states.begin(Bounds(deadline_s=600, blackout_s=2), now=100)
    assert state.until == 700
    state, acts = told(state, Prepared())
    assert acts == [Act.START_STREAM]
    state, acts = states.step(state, GuestStopped(), now=300)
    assert (acts, state.until) == ([Act.FINISH_STREAM, Act.RELEASE_DISKS], 302)
    state, acts = told(state, DisksReleased(), Loaded())
    assert (state.phase, acts) == (Phase.COMMIT, [Act.HAND_OVER])
    assert not state.may_cancel
    state, acts = told(state, CancelAsked(), DestinationGone("silent"), Tick(), Committed())
    assert (state.phase, acts) == (Phase.DONE, [Act.LET_RUN, Act.END_SOURCE])


def test_a_blackout_that_lasts_too_long_ends_with_the_guest_where_it_was() -> None:
    state, _ = states.begin(Bounds(deadline_s=600, blackout_s=2), now=0)
    state, _ = told(state, Prepared(), GuestStopped(), Loaded())
    state, acts = states.step(state, Tick(), now=1.9)
    assert acts == []
    state, acts = states.step(state, Tick(), now=2)
    assert (state.phase, state.why) == (Phase.ABANDONED, "the guest's blackout took too long")
    assert acts == [Act.RESUME_GUEST, Act.ABORT_DESTINATION, Act.WITHDRAW]
