"""The state machine of a migration, on the destination: pure. It never runs before it owns.

    PREPARING ──► INCOMING ──► PROMISED ──────────► RUNNING ──► LOST: QEMU ended
        │            │            │  told to run, or the store says so
        └────────────┴── ABORTED ◄┘  told to abort, or the store says that the move is over

- Until it has **promised** (everything is loaded, or the source asked for it in postcopy), the
  source cannot hand over: the destination may abort on its own, and does so when the source or the
  stream is gone. The promise has to be on record before the source can hear of it.
- Once it has promised, the VM may become its own at any moment and by nobody's message. A silent
  source, a broken stream, the passing of time prove nothing: it waits and asks the store. Only
  the store, or the source itself, ends that. Its guest does not run meanwhile.
- It runs when the VM is its own: told so by the source, or read in the store. The images check
  the epoch once more before its backends write. That is tried again until the guest runs, or until
  the images know of a newer claim.
- If its QEMU dies after the promise, it says so by aborting only if the VM is not its own; if it
  is, the VM has ended by a crash (LOST), and may be started again from its disk.

An agent that begins anew goes on from the record of the phase (`recover`). One that was about to
run asks the store first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.migration.destination.state import (
    Again,
    AskStore,
    DestinationEffect,
    DestinationEvent,
    EndQemu,
    Failed,
    Finish,
    GiveBack,
    GuestRuns,
    Incoming,
    OwnershipSeen,
    PromiseAsked,
    QemuEnded,
    Ready,
    SourceSilent,
    Stale,
    Step,
    TakeAndRun,
    ToldToAbort,
    ToldToRun,
)
from sempervirt.migration.events import Loaded, NotRecorded, Side, StreamFailed, Tick
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Arrival

# How soon, in seconds, the store is asked again; what failed is tried again while a guest waits.
AGAIN_S = 1.0
SOON_S = 0.2
OVER = "the move is over, says the store"
KEPT = "the source keeps the VM"
ANEW = "the agent here began anew"


def recover(phase: Arrival, now: float) -> Step:
    """How an agent that begins anew goes on from the record of an earlier one."""
    state = Incoming(phase, ask_at=now)
    match phase:
        case Arrival.PREPARING | Arrival.INCOMING | Arrival.ABORTED:
            return _abort(state, ANEW)
        case Arrival.PROMISED | Arrival.RUNNING:
            # Nothing of a run does harm twice, and the store knows by which claim.
            return replace(state, phase=Arrival.PROMISED), [AskStore()]
        case Arrival.LOST:
            return _lost(state, ANEW)
        case _:
            assert_never(phase)


def step(state: Incoming, event: DestinationEvent, now: float) -> Step:
    """The next state, and what has to be done. An event that does not fit changes nothing."""
    if state.finished:
        return state, []
    if isinstance(event, QemuEnded):
        state = replace(state, qemu_ended=event.reason)
    state, effects = _step(state, event, now)
    if _is_over(state):
        forget = state.phase is Arrival.ABORTED
        return replace(state, finished=True, again=frozenset()), [*effects, Finish(forget)]
    return state, effects


def owes_record(before: Incoming, after: Incoming) -> bool:
    """Whether `after` has to be on record before anybody can see it."""
    return after.phase is Arrival.PROMISED and before.phase is not Arrival.PROMISED


def wake_at(state: Incoming) -> float | None:
    """When time alone changes the state."""
    times = [again.at for again in state.again]
    if state.phase in (Arrival.PREPARING, Arrival.INCOMING, Arrival.PROMISED):
        times.append(state.ask_at)
    return min(times, default=None)


def _step(state: Incoming, event: DestinationEvent, now: float) -> Step:
    if isinstance(event, Failed):
        return _failed(state, event, now), []
    if isinstance(event, Tick) and any(again.at <= now for again in state.again):
        due = {again for again in state.again if again.at <= now}
        return replace(state, again=state.again - due), [again.effect for again in due]
    match state.phase:
        case Arrival.PREPARING | Arrival.INCOMING:
            return _free(state, event, now)
        case Arrival.PROMISED:
            return _promised(state, event, now)
        case Arrival.RUNNING:
            return _running(state, event)
        case Arrival.ABORTED | Arrival.LOST:
            return state, []
        case _:
            assert_never(state.phase)


def _is_over(state: Incoming) -> bool:
    """Whether nothing can follow."""
    match state.phase:
        case Arrival.RUNNING:
            return state.runs and state.drained
        case Arrival.ABORTED | Arrival.LOST:
            return state.qemu_ended != ""
        case Arrival.PREPARING | Arrival.INCOMING | Arrival.PROMISED:
            return False
        case _:
            assert_never(state.phase)


def _free(state: Incoming, event: DestinationEvent, now: float) -> Step:
    match event:
        case Ready() if state.phase is Arrival.PREPARING:
            return replace(state, phase=Arrival.INCOMING), []
        case Loaded() if state.phase is Arrival.INCOMING:
            return replace(state, phase=Arrival.PROMISED, drained=True), []
        case PromiseAsked() if state.phase is Arrival.INCOMING:
            return replace(state, phase=Arrival.PROMISED), []
        case StreamFailed(reason) | QemuEnded(reason):
            return _abort(state, reason)
        case NotRecorded():
            return _abort(state, "the record cannot be written")
        case SourceSilent():
            return _abort(state, "the source is silent")
        case ToldToAbort():
            return _abort(state, KEPT)
        case OwnershipSeen(Side.SOURCE, moving=False):
            return _abort(state, OVER)
        case Tick() if now >= state.ask_at:
            return _ask(state, now)
    return state, []


def _promised(state: Incoming, event: DestinationEvent, now: float) -> Step:
    match event:
        case ToldToRun(claim):
            return _own(state, claim)
        case OwnershipSeen(Side.DESTINATION, claim=Claim() as claim):
            return _own(state, claim)
        case ToldToAbort():
            return _abort(state, KEPT)
        case OwnershipSeen(Side.SOURCE, moving=False):
            return _abort(state, OVER)
        case Loaded():
            return replace(state, drained=True), []
        case QemuEnded(reason) | StreamFailed(reason):
            return replace(state, why=reason), [AskStore()]
        case SourceSilent():
            return replace(state, why="the source is silent"), [AskStore()]
        case Tick() if now >= state.ask_at:
            return _ask(state, now)
    return state, []


def _running(state: Incoming, event: DestinationEvent) -> Step:
    match event:
        case GuestRuns():
            return replace(state, runs=True, why=""), []
        case Loaded():
            return replace(state, drained=True), []
        case Stale(reason):
            return replace(state, why=reason), [EndQemu(reason)]
        case QemuEnded(reason):
            return _lost(state, reason)
        case _:
            return state, []


def _own(state: Incoming, claim: Claim) -> Step:
    """The VM is this host's."""
    state = replace(state, claim=claim)
    if state.qemu_ended:
        return _lost(state, state.qemu_ended)
    return replace(state, phase=Arrival.RUNNING, why=""), [TakeAndRun(claim)]


def _ask(state: Incoming, now: float) -> Step:
    return replace(state, ask_at=now + AGAIN_S), [AskStore()]


def _abort(state: Incoming, why: str) -> Step:
    aborted = replace(state, phase=Arrival.ABORTED, why=why, again=frozenset())
    return aborted, [] if state.qemu_ended else [EndQemu(why)]


def _lost(state: Incoming, why: str) -> Step:
    lost = replace(state, phase=Arrival.LOST, why=why, again=frozenset())
    effects: list[DestinationEffect] = [GiveBack(state.claim)]
    return lost, effects if state.qemu_ended else [EndQemu(why), *effects]


def _failed(state: Incoming, event: Failed, now: float) -> Incoming:
    """What has to be done is tried again, as long as the phase still asks for it."""
    match event.effect:
        case TakeAndRun() if state.phase is Arrival.RUNNING and not state.runs:
            again = Again(now + SOON_S, event.effect)
            return replace(state, why=event.reason, again=state.again | {again})
        case EndQemu() if not state.qemu_ended:
            return replace(state, again=state.again | {Again(now + AGAIN_S, event.effect)})
    return state
