"""The state machine of a migration, on the source: pure. The source owns the VM, and drives.

                                    (stalled, policy)
    PREPARE ──────► PRECOPY ───────────────────────────┐ postcopy
       │ Prepared     │ GuestStopped                   │
       │              ▼                                ▼
       │          SWITCHOVER: the guest stands still; Loaded, DisksReleased
       │              │                                │
       │              ▼                                │
       │           COMMIT: the store is asked once to hand the VM over
       │              │        │            │
       │      Committed        │ NotCommitted   AnswerLost
       │              │        │            │
       │              ▼        │            ▼
       │   DONE ◄─ POSTCOPY    │         UNKNOWN: the guest stands still on both sides
       │     ▲  Drained  │     │            │   │
       │     │           ▼     │            │   └─ Superseded, Resolved(destination) ─► as Committed
       │     │         LOST    │            │
       │     └─ precopy: at once            └─ Withdrawn, Resolved(source)
       ▼                       ▼                          ▼
    ABANDONED: the source goes on as if nothing had happened

The source alone hands over, and asks at most once. That decides every failure:

- **Before the store was asked** (PREPARE, PRECOPY, SWITCHOVER) nobody else can become the owner.
  Whatever fails, whoever is silent, whatever takes too long: the guest is resumed at once and
  without asking anybody. The destination hears it, or reads it in the store; it never runs.
- **NotCommitted** is known not to be done: the same.
- **AnswerLost**: the VM may be the destination's. UNKNOWN. The guest is not resumed. `WITHDRAW`
  changes the entry that a hand-over would have to find unchanged, so its answer is final either
  way: Withdrawn (a hand-over that is still on its way will fail) or Superseded. It is repeated
  until it is answered. If the store stays away, an operator with evidence settles it (`semper vm
  resolve`). Nothing else leads out of UNKNOWN; a destination that is silent proves nothing.
- **Committed**: the destination owns the VM, whatever becomes of it. The source never runs it
  again. It cannot be cancelled any more.

In precopy the destination has everything before the store is asked: the source's QEMU may die
in COMMIT and nothing is lost. In postcopy the guest runs before its memory is there, so the VM
is handed over first, with the guest standing still: until Drained each side can lose the VM by
dying (LOST); a broken stream is connected again. That is why a policy has to ask for postcopy.

An agent that begins anew goes on from the record of the state, which is written before a request
to the store is sent: one that finds itself in COMMIT has lost the answer.

The destination's side is `arrival`. `convergence` chooses when; here two bounds are held: the
deadline of the whole until the guest stands still, and the bound on the guest's blackout until
the store is asked. A commit that is slow is not given up (its outcome would be unknown).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sempervirt.migration.events import (
    Act,
    AnswerLost,
    CancelAsked,
    Committed,
    DestinationEnded,
    DestinationGone,
    DisksReleased,
    Drained,
    GuestStopped,
    Hopeless,
    Loaded,
    NotCommitted,
    PostcopyChosen,
    Prepared,
    Refused,
    Resolved,
    Side,
    SourceEnded,
    SourceEvent,
    StreamFailed,
    Superseded,
    Tick,
    Withdrawn,
)
from sempervirt.vm.phases import Mode, Phase

# How often a lost answer is asked for, and a broken postcopy stream connected, again.
AGAIN_S = 1.0


@dataclass(frozen=True)
class Bounds:
    """For how long, in seconds: the whole until the guest stands still, and its blackout."""

    deadline_s: float = 600.0
    blackout_s: float = 2.0


@dataclass(frozen=True)
class Migration:
    """Everything that a decision depends on. `until` bounds the phase, on the driver's clock."""

    bounds: Bounds
    until: float
    phase: Phase = Phase.PREPARE
    mode: Mode = Mode.PRECOPY
    why: str = ""
    guest_stopped: bool = False
    loaded: bool = False
    disks_released: bool = False
    source_ended: str = ""
    settled: bool = False
    evidence: str = ""

    @property
    def may_cancel(self) -> bool:
        """Whether the VM can still be kept here by deciding so."""
        return self.phase in (Phase.PREPARE, Phase.PRECOPY, Phase.SWITCHOVER)


Step = tuple[Migration, list[Act]]


def begin(bounds: Bounds, now: float) -> Step:
    """A migration that was asked for; the store knows it as MOVING."""
    return Migration(bounds, now + bounds.deadline_s), [Act.PREPARE]


def step(state: Migration, event: SourceEvent, now: float) -> Step:
    """The next state, and what has to be done. An event that does not fit changes nothing."""
    match state.phase:
        case Phase.PREPARE | Phase.PRECOPY | Phase.SWITCHOVER:
            return _before_commit(state, event, now)
        case Phase.COMMIT:
            return _commit(state, event, now)
        case Phase.UNKNOWN:
            return _unknown(state, event, now)
        case Phase.POSTCOPY:
            return _postcopy(state, event, now)
        case Phase.ABANDONED:
            return _abandoned(state, event, now)
        case _:
            return state, []


def _before_commit(state: Migration, event: SourceEvent, now: float) -> Step:
    """The source is the owner, and only it can change that: every failure leads back."""
    match event:
        case Refused(reason) | Hopeless(reason) | StreamFailed(reason):
            return _abandon(state, reason, now)
        case DestinationGone(reason) | DestinationEnded(reason):
            return _abandon(state, reason, now)
        case CancelAsked():
            return _abandon(state, "cancelled", now)
        case SourceEnded(reason) if not state.loaded or state.mode is Mode.POSTCOPY:
            return _abandon(replace(state, source_ended=reason), reason, now)
        case SourceEnded(reason):
            # Everything is at the destination: handing over is the one way to keep the VM.
            return replace(state, source_ended=reason), []
        case Tick() if now >= state.until:
            what = "the guest's blackout" if state.guest_stopped else "the migration"
            return _abandon(state, f"{what} took too long", now)
    if state.phase is Phase.SWITCHOVER:
        return _switchover(state, event, now)
    return _on_the_way(state, event, now)


def _on_the_way(state: Migration, event: SourceEvent, now: float) -> Step:
    match state.phase, event:
        case Phase.PREPARE, Prepared():
            return replace(state, phase=Phase.PRECOPY), [Act.START_STREAM]
        case Phase.PRECOPY, PostcopyChosen() if state.mode is Mode.PRECOPY:
            return replace(state, mode=Mode.POSTCOPY), [Act.SWITCH_TO_POSTCOPY]
        case Phase.PRECOPY, GuestStopped():
            stopped = replace(
                state,
                phase=Phase.SWITCHOVER,
                guest_stopped=True,
                until=now + state.bounds.blackout_s,
            )
            rest = Act.FINISH_STREAM if state.mode is Mode.PRECOPY else Act.ASK_PROMISE
            return stopped, [rest, Act.RELEASE_DISKS]
    return state, []


def _switchover(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Loaded():
            state = replace(state, loaded=True)
        case DisksReleased():
            state = replace(state, disks_released=True)
        case _:
            return state, []
    if state.loaded and state.disks_released:
        return replace(state, phase=Phase.COMMIT), [Act.HAND_OVER]
    return state, []


def _commit(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Committed() | Superseded():
            return _handed_over(state, now)
        case NotCommitted(reason):
            return _abandon(state, reason, now)
        case AnswerLost(reason):
            unknown = replace(state, phase=Phase.UNKNOWN, why=reason, until=now + AGAIN_S)
            return unknown, [Act.WITHDRAW]
        case SourceEnded(reason):
            return replace(state, source_ended=reason), []
    return state, []


def _unknown(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Withdrawn():
            return _abandon(state, state.why, now)
        case Superseded():
            return _handed_over(state, now)
        case Resolved(Side.SOURCE, evidence):
            return _abandon(replace(state, evidence=evidence), state.why, now)
        case Resolved(Side.DESTINATION, evidence):
            return _handed_over(replace(state, evidence=evidence), now)
        case Tick() if now >= state.until:
            return replace(state, until=now + AGAIN_S), [Act.WITHDRAW]
        case SourceEnded(reason):
            return replace(state, source_ended=reason), []
    return state, []


def _handed_over(state: Migration, now: float) -> Step:
    """The destination owns the VM; what is here must never run again."""
    if state.mode is Mode.PRECOPY:
        return replace(state, phase=Phase.DONE, why=""), [Act.LET_RUN, Act.END_SOURCE]
    if state.source_ended:
        return _lost(state, state.source_ended)
    handed = replace(state, phase=Phase.POSTCOPY, why="", until=now + AGAIN_S)
    return handed, [Act.FINISH_STREAM, Act.LET_RUN]


def _postcopy(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Drained():
            return replace(state, phase=Phase.DONE, why=""), [Act.END_SOURCE]
        case SourceEnded(reason):
            return _lost(replace(state, source_ended=reason), reason)
        case DestinationEnded(reason):
            return _lost(state, reason)
        case StreamFailed(reason) | DestinationGone(reason):
            return replace(state, why=reason), []
        case Tick() if state.why and now >= state.until:
            return replace(state, why="", until=now + AGAIN_S), [Act.RECOVER_STREAM, Act.LET_RUN]
    return state, []


def _abandon(state: Migration, why: str, now: float) -> Step:
    """The source goes on. Only called where the VM is known to be its own."""
    acts: list[Act] = []
    if state.guest_stopped and not state.source_ended:
        acts.append(Act.RESUME_GUEST)
    acts += [Act.ABORT_DESTINATION, Act.WITHDRAW]
    return replace(state, phase=Phase.ABANDONED, why=why, until=now + AGAIN_S), acts


def _abandoned(state: Migration, event: SourceEvent, now: float) -> Step:
    """The guest runs; what is left is that the store and the destination learn of it."""
    match event:
        case Withdrawn() | Superseded():
            return replace(state, settled=True), []
        case Tick() if not state.settled and now >= state.until:
            return replace(state, until=now + AGAIN_S), [Act.ABORT_DESTINATION, Act.WITHDRAW]
    return state, []


def _lost(state: Migration, why: str) -> Step:
    return replace(state, phase=Phase.LOST, why=f"postcopy: {why}"), [Act.END_SOURCE]


def runs_here(state: Migration, acts: Sequence[Act], before: bool) -> bool:
    """Whether the source's guest runs after a step, if it did `before`: for tests and views."""
    if Act.END_SOURCE in acts or state.source_ended or state.phase is Phase.DONE:
        return False
    if Act.RESUME_GUEST in acts:
        return True
    return before and not state.guest_stopped
