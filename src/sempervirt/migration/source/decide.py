"""The state machine of a migration, on the source: pure. The source owns the VM, and drives.

                                    (stalled, policy)
    PREPARE ──────► PRECOPY ───────────────────────────┐ postcopy
       │ Prepared     │ GuestStopped                   │
       │              ▼                                ▼
       │          SWITCHOVER: the guest stands still; DevicesMoved, Loaded, DisksReleased
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

A VM with passed-through devices moves by the same way. Its devices stand still after the guest
does, and their state has to be with the destination before QEMU sends the rest: what they write
last is marked as written then, and whoever promises has everything. Postcopy is not for such a VM:
a device would write to pages that are not there yet.

In precopy the destination has everything before the store is asked: the source's QEMU may die
in COMMIT and nothing is lost. In postcopy the guest runs before its memory is there, so the VM
is handed over first, with the guest standing still: until Drained each side can lose the VM by
dying (LOST); a broken stream is connected again. That is why a policy has to ask for postcopy.

What has to be done is tried again until it is done (`Again`): to withdraw, to go back, to end this
host's QEMU. The destination is told for a while, and reads in the store what it was not told.

An agent that begins anew goes on from the record of phase and mode (`recover`). The record of
COMMIT has to be written before the store is asked, so an agent that finds COMMIT has lost the
answer; every other record may be missing, for an earlier phase leads to the same end.

`destination.decide` is the other side. `convergence` chooses when; here two bounds are held: the
deadline of the whole until the guest stands still, and the bound on the guest's blackout until
the store is asked. A commit that is slow is not given up (its outcome would be unknown).
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.migration.events import Loaded, NotRecorded, Side, StreamFailed, Tick
from sempervirt.migration.source.state import (
    AbortDestination,
    Again,
    AnswerLost,
    AskPromise,
    Bounds,
    CancelAsked,
    Certain,
    Committed,
    DestinationEnded,
    DestinationGone,
    DevicesMoved,
    DisksReleased,
    Drained,
    EndSource,
    Failed,
    Finish,
    FinishStream,
    GoBack,
    GuestStopped,
    HandOver,
    Hopeless,
    LetRun,
    MakeCertain,
    Migration,
    MoveDevices,
    NotCommitted,
    PostcopyChosen,
    Prepare,
    Prepared,
    Recovered,
    RecoverStream,
    Refused,
    ReleaseDisks,
    Resolved,
    SourceEffect,
    SourceEnded,
    SourceEvent,
    StartStream,
    Step,
    Superseded,
    SwitchToPostcopy,
    Told,
    WentBack,
    Withdraw,
    Withdrawn,
)
from sempervirt.store.registry import Claim
from sempervirt.vm.phases import Mode, Phase

# How soon, in seconds, what failed is tried again: where the store or a process has to answer, and
# where a guest stands still meanwhile.
AGAIN_S = 1.0
SOON_S = 0.2
TELL_FOR_S = 5.0
ANEW = "the agent here began anew"


def begin(bounds: Bounds, now: float, *, devices: bool = False) -> Step:
    """A migration that was asked for; the store knows it as MOVING. `devices`: the VM has some that
    are passed through.
    """
    return Migration(bounds, now + bounds.deadline_s, devices=devices), [Prepare()]


def recover(phase: Phase, mode: Mode, now: float, *, devices: bool = False) -> Step:
    """How an agent that begins anew goes on from the record of an earlier one."""
    state = Migration(Bounds(), now, phase, mode, devices=devices, guest_stopped=True)
    match phase:
        case Phase.PREPARE | Phase.PRECOPY | Phase.SWITCHOVER:
            return _abandon(state, ANEW)
        case Phase.COMMIT:
            return _commit(state, AnswerLost("the agent here ended while it asked the store"), now)
        case Phase.UNKNOWN:
            return replace(state, why=ANEW), [Withdraw()]
        case Phase.POSTCOPY:
            # Whether QEMU was told to send the rest is not on record.
            return replace(state, told=True), [FinishStream()]
        case Phase.ABANDONED:
            return _abandon(state, ANEW)
        case Phase.DONE:
            state = replace(state, tell_until=now + TELL_FOR_S)
            return state, [MakeCertain(), EndSource("")]
        case Phase.LOST:
            return replace(state, why=ANEW), [EndSource(ANEW)]
        case _:
            assert_never(phase)


def step(state: Migration, event: SourceEvent, now: float) -> Step:
    """The next state, and what has to be done. An event that does not fit changes nothing."""
    if state.finished:
        return state, []
    state, effects = _step(state, event, now)
    if _is_over(state):
        stays = state.phase is Phase.ABANDONED
        return replace(state, finished=True, again=frozenset()), [*effects, Finish(stays)]
    return state, effects


def owes_record(before: Migration, after: Migration) -> bool:
    """Whether `after` has to be on record before anything is done for it."""
    return after.phase is Phase.COMMIT and before.phase is not Phase.COMMIT


def wake_at(state: Migration) -> float | None:
    """When time alone changes the state."""
    times = [again.at for again in state.again]
    if state.may_cancel or _waits_to_recover(state):
        times.append(state.until)
    return min(times, default=None)


def _step(state: Migration, event: SourceEvent, now: float) -> Step:
    if isinstance(event, Failed):
        return _failed(state, event, now)
    if isinstance(event, Tick) and any(again.at <= now for again in state.again):
        return _try_again(state, now)
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
            return _abandoned(state, event)
        case Phase.DONE:
            return _done(state, event)
        case Phase.LOST:
            return _ended(state, event), []
        case _:
            assert_never(state.phase)


def _is_over(state: Migration) -> bool:
    """Whether nothing can follow."""
    match state.phase:
        case Phase.ABANDONED:
            return state.settled and (state.back or state.source_ended != "")
        case Phase.DONE:
            return state.told and state.source_ended != ""
        case Phase.LOST:
            return state.source_ended != ""
        case (
            Phase.PREPARE
            | Phase.PRECOPY
            | Phase.SWITCHOVER
            | Phase.COMMIT
            | Phase.UNKNOWN
            | Phase.POSTCOPY
        ):
            return False
        case _:
            assert_never(state.phase)


def _waits_to_recover(state: Migration) -> bool:
    return state.phase is Phase.POSTCOPY and state.why != "" and not state.recovering


def _before_commit(state: Migration, event: SourceEvent, now: float) -> Step:
    """The source is the owner, and only it can change that: every failure leads back."""
    match event:
        case Refused(reason) | Hopeless(reason) | StreamFailed(reason):
            return _abandon(state, reason)
        case DestinationGone(reason) | DestinationEnded(reason):
            return _abandon(state, reason)
        case NotRecorded():
            return _abandon(state, "the record cannot be written")
        case CancelAsked():
            return _abandon(state, "cancelled")
        case SourceEnded(reason) if not state.loaded or state.mode is Mode.POSTCOPY:
            return _abandon(replace(state, source_ended=reason), reason)
        case SourceEnded(reason):
            # Everything is at the destination: handing over is the one way to keep the VM.
            return replace(state, source_ended=reason), []
        case Tick() if now >= state.until:
            what = "the guest's blackout" if state.guest_stopped else "the migration"
            return _abandon(state, f"{what} took too long")
    if state.phase is Phase.SWITCHOVER:
        return _switchover(state, event)
    return _on_the_way(state, event, now)


def _on_the_way(state: Migration, event: SourceEvent, now: float) -> Step:
    match state.phase, event:
        case Phase.PREPARE, Prepared(address):
            return replace(state, phase=Phase.PRECOPY), [StartStream(address)]
        case Phase.PRECOPY, PostcopyChosen() if state.mode is Mode.PRECOPY and not state.devices:
            return replace(state, mode=Mode.POSTCOPY), [SwitchToPostcopy()]
        case Phase.PRECOPY, GuestStopped():
            stopped = replace(
                state,
                phase=Phase.SWITCHOVER,
                guest_stopped=True,
                until=now + state.bounds.blackout_s,
            )
            return stopped, [_rest(state), ReleaseDisks()]
        case _:
            return state, []


def _rest(state: Migration) -> SourceEffect:
    """What has to be done first when the guest stands still."""
    if state.mode is Mode.POSTCOPY:
        return AskPromise()
    return MoveDevices() if state.devices else FinishStream()


def _switchover(state: Migration, event: SourceEvent) -> Step:
    match event:
        case DevicesMoved() if state.devices and not state.devices_moved:
            return replace(state, devices_moved=True), [FinishStream()]
        case Loaded():
            state = replace(state, loaded=True)
        case DisksReleased():
            state = replace(state, disks_released=True)
        case _:
            return state, []
    devices_there = state.devices_moved or not state.devices
    if state.loaded and state.disks_released and devices_there:
        return replace(state, phase=Phase.COMMIT), [HandOver(state.mode)]
    return state, []


def _commit(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Committed(claim):
            return _handed_over(state, claim, now)
        case Superseded():
            return _handed_over(state, None, now)
        case NotCommitted(reason):
            return _abandon(state, reason)
        case AnswerLost(reason):
            return replace(state, phase=Phase.UNKNOWN, why=reason), [Withdraw()]
        case _:
            return _ended(state, event), []


def _unknown(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Withdrawn():
            return _abandon(state, state.why)
        case Superseded():
            return _handed_over(state, None, now)
        case Resolved(Side.SOURCE, evidence):
            return _abandon(replace(state, evidence=evidence), state.why)
        case Resolved(Side.DESTINATION, evidence):
            return _handed_over(replace(state, evidence=evidence), None, now)
        case _:
            return _ended(state, event), []


def _handed_over(state: Migration, claim: Claim | None, now: float) -> Step:
    """The destination owns the VM; what is here must never run again."""
    told: SourceEffect = LetRun(claim) if claim is not None else MakeCertain()
    handed = replace(
        state, why="", claim=claim, until=now, tell_until=now + TELL_FOR_S, again=frozenset()
    )
    if state.mode is Mode.PRECOPY:
        return replace(handed, phase=Phase.DONE), [told, EndSource("")]
    if state.source_ended:
        return _lost(handed, state.source_ended)
    return replace(handed, phase=Phase.POSTCOPY, until=now + AGAIN_S), [FinishStream(), told]


def _postcopy(state: Migration, event: SourceEvent, now: float) -> Step:
    match event:
        case Drained():
            # A destination that was not told reads in the store that the VM is its own.
            done = replace(state, phase=Phase.DONE, why="", told=True, again=frozenset())
            return done, [EndSource("")]
        case SourceEnded(reason):
            return _lost(replace(state, source_ended=reason), reason)
        case DestinationEnded(reason):
            return _lost(state, reason)
        case StreamFailed(reason) | DestinationGone(reason) if not state.recovering:
            return replace(state, why=reason), []
        case Recovered():
            return replace(state, recovering=False, until=now + AGAIN_S), []
        case Tick() if _waits_to_recover(state) and now >= state.until:
            return replace(state, why="", recovering=True), [RecoverStream()]
    return _told(state, event)


def _done(state: Migration, event: SourceEvent) -> Step:
    return _told(_ended(state, event), event)


def _told(state: Migration, event: SourceEvent) -> Step:
    """What is known of the word to the destination that the VM is its own."""
    match event:
        case Certain(None) | Told():
            return replace(state, told=True), []
        case Certain(Claim() as claim) if not state.told:
            return replace(state, claim=claim), [LetRun(claim)]
    return state, []


def _abandon(state: Migration, why: str) -> Step:
    """The source goes on. Only called where the VM is known to be its own."""
    effects: list[SourceEffect] = []
    if not state.source_ended:
        effects.append(GoBack(state.guest_stopped))
    effects += [AbortDestination(why), Withdraw()]
    return replace(state, phase=Phase.ABANDONED, why=why, again=frozenset()), effects


def _abandoned(state: Migration, event: SourceEvent) -> Step:
    """What is left is that the guest runs, and that the store and the destination learn of it."""
    match event:
        case Withdrawn() | Superseded():
            return replace(state, settled=True), []
        case WentBack():
            return replace(state, back=True), []
        case _:
            return _ended(state, event), []


def _lost(state: Migration, why: str) -> Step:
    lost = replace(state, phase=Phase.LOST, why=f"postcopy: {why}", again=frozenset())
    return lost, [EndSource(lost.why)]


def _ended(state: Migration, event: SourceEvent) -> Migration:
    return replace(state, source_ended=event.reason) if isinstance(event, SourceEnded) else state


def _failed(state: Migration, event: Failed, now: float) -> Step:
    """What has to be done is tried again, as long as the phase still asks for it."""
    match event.effect, state.phase:
        case Withdraw(), Phase.UNKNOWN:
            return _later(state, now + AGAIN_S, Withdraw()), []
        case Withdraw(), Phase.ABANDONED if not state.settled:
            return _later(state, now + AGAIN_S, Withdraw(), AbortDestination(state.why)), []
        case GoBack(), Phase.ABANDONED if not (state.back or state.source_ended):
            return _later(state, now + SOON_S, event.effect), []
        case MakeCertain(), Phase.POSTCOPY | Phase.DONE:
            return _later(state, now + AGAIN_S, event.effect), []
        case LetRun(), Phase.DONE if now >= state.tell_until:
            return replace(state, told=True), []
        case LetRun(), Phase.POSTCOPY | Phase.DONE if not state.told:
            return _later(state, now + SOON_S, event.effect), []
        case EndSource(), Phase.DONE | Phase.LOST if not state.source_ended:
            return _later(state, now + AGAIN_S, event.effect), []
        case RecoverStream(), Phase.POSTCOPY:
            failed = replace(state, recovering=False, why=event.reason, until=now + AGAIN_S)
            return failed, []
        case _:
            return state, []


def _later(state: Migration, at: float, *effects: SourceEffect) -> Migration:
    return replace(state, again=state.again | {Again(at, effect) for effect in effects})


def _try_again(state: Migration, now: float) -> Step:
    due = {again for again in state.again if again.at <= now}
    effects = [again.effect for again in sorted(due, key=lambda again: repr(again.effect))]
    return replace(state, again=state.again - due), effects
