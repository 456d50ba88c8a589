"""The state machine of a migration, on the destination: pure. It never runs before it owns.

    PREPARING ──► INCOMING ──► PROMISED ──────────► RUNNING
        │            │            │  told to run, or the store says so
        └────────────┴── ABORTED ◄┘  told to abort, or the store says that the move is over

- Until it has **promised** (it said Loaded, or was asked to in postcopy), the source cannot hand
  over: it may abort on its own, and does so when the source or the stream is gone.
- Once it has promised, the VM may become its own at any moment and by nobody's message. A silent
  source, a broken stream, the passing of time prove nothing: it waits and asks the store. Only
  the store, or the source itself, ends that. Its guest does not run meanwhile.
- It runs when the VM is its own: told so by the source, or read in the store. The images check
  the epoch once more before its backends write.
- If its QEMU dies after the promise, it says so by aborting only if the VM is not its own; if it
  is, the VM has ended by a crash (LOST), and may be started again from its disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sempervirt.migration.events import (
    Act,
    DestinationEvent,
    Loaded,
    OwnershipSeen,
    PromiseAsked,
    QemuEnded,
    Ready,
    Side,
    SourceSilent,
    StreamFailed,
    Tick,
    ToldToAbort,
    ToldToRun,
)
from sempervirt.vm.phases import Arrival

ASK_AGAIN_S = 1.0
OVER = "the move is over, says the store"


@dataclass(frozen=True)
class Incoming:
    """Everything that a decision depends on."""

    phase: Arrival = Arrival.PREPARING
    why: str = ""
    ask_at: float = 0.0
    qemu_ended: str = ""


Step = tuple[Incoming, list[Act]]


def step(state: Incoming, event: DestinationEvent, now: float) -> Step:
    """The next state, and what has to be done. An event that does not fit changes nothing."""
    match state.phase:
        case Arrival.PREPARING | Arrival.INCOMING:
            return _free(state, event, now)
        case Arrival.PROMISED:
            return _promised(state, event, now)
        case Arrival.RUNNING if isinstance(event, QemuEnded):
            return replace(state, phase=Arrival.LOST, why=event.reason), []
        case _:
            return state, []


def _free(state: Incoming, event: DestinationEvent, now: float) -> Step:
    match event:
        case Ready() if state.phase is Arrival.PREPARING:
            return replace(state, phase=Arrival.INCOMING), [Act.SAY_READY]
        case Loaded() | PromiseAsked() if state.phase is Arrival.INCOMING:
            return replace(state, phase=Arrival.PROMISED), [Act.SAY_PROMISED]
        case StreamFailed(reason) | QemuEnded(reason):
            return _abort(state, reason)
        case SourceSilent():
            return _abort(state, "the source is silent")
        case ToldToAbort():
            return _abort(state, "the source keeps the VM")
        case OwnershipSeen(Side.SOURCE, moving=False):
            return _abort(state, OVER)
        case Tick() if now >= state.ask_at:
            return replace(state, ask_at=now + ASK_AGAIN_S), [Act.ASK_STORE]
    return state, []


def _promised(state: Incoming, event: DestinationEvent, now: float) -> Step:
    match event:
        case ToldToRun() | OwnershipSeen(Side.DESTINATION):
            if state.qemu_ended:
                return replace(state, phase=Arrival.LOST, why=state.qemu_ended), []
            return replace(state, phase=Arrival.RUNNING, why=""), [Act.TAKE_AND_RUN]
        case ToldToAbort():
            return _abort(state, "the source keeps the VM")
        case OwnershipSeen(Side.SOURCE, moving=False):
            return _abort(state, OVER)
        case QemuEnded(reason):
            return replace(state, qemu_ended=reason, why=reason), [Act.ASK_STORE]
        case StreamFailed(reason):
            return replace(state, why=reason), [Act.ASK_STORE]
        case SourceSilent():
            return replace(state, why="the source is silent"), [Act.ASK_STORE]
        case Tick() if now >= state.ask_at:
            return replace(state, ask_at=now + ASK_AGAIN_S), [Act.ASK_STORE]
    return state, []


def _abort(state: Incoming, why: str) -> Step:
    return replace(state, phase=Arrival.ABORTED, why=why), [Act.END_QEMU]
