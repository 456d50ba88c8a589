"""What a restart of QEMU does next: a pure decision.

    HOLD ──► START ──► TRANSFER ──► SWITCH ──► PART ──► RUN ──► MOVE_IN ──► LINK ──► OVER
              │           │           │ refused                            it is restarted, or
              │           │           │                                    what is left of it
              └───────────┴───────────┴──► DISCARD ──► GO_BACK ──► LEAVE ──► OVER
                                                           why not, and whether it is as it was

- START: the new QEMU is started beside the old one, maps the same memory, and waits. TRANSFER: the
  guest is stopped, its disks are at rest, its devices' state goes from the old QEMU to the new one.
- SWITCH is on record before it is done. It is the point of no return: the old QEMU is killed. It
  is refused when the VM has ended meanwhile, is being killed, or its monitor fell silent.
- PART: the old QEMU is seen to have ended, the stand-ins of disks and taps are taken away: all
  three at once. Only then the new QEMU is led to disks and taps, and the guest runs (RUN).
- Before the switch every failure leads back: the new QEMU is ended (DISCARD), and only then the old
  one goes on (GO_BACK). After the switch everything leads forward, if need be with a guest that
  stays paused.
- A process that was killed and does not end may do so later. The caller is told at once; the
  restart is over when it has ended.
- An agent that begins anew goes on by `recover`. The new QEMU never runs the guest before the old
  one was seen to have ended: as long as the new one is there, the way is the one on record, and
  without it the old one goes on, if that is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.core.errors import (
    OutcomeUnknown,
    RollbackFailed,
    StateConflict,
    Unavailable,
)
from sempervirt.core.failure import Failure
from sempervirt.renewal.restart.state import (
    Decision,
    Discard,
    Discarded,
    Effect,
    EndOld,
    EndStandIns,
    Entry,
    Event,
    Failed,
    FreeTaps,
    GiveUp,
    GoBack,
    Gone,
    GuestRuns,
    Held,
    Hold,
    Leave,
    Left,
    Link,
    Linked,
    MovedIn,
    MoveIn,
    Parted,
    Parting,
    Restart,
    Restarted,
    Run,
    Start,
    Started,
    Step,
    Switch,
    Switched,
    Tick,
    TookOver,
    Transfer,
    Transferred,
    Unrecorded,
    WentBack,
)
from sempervirt.vm.work import Restarting

AGAIN_S = 1.0
_PARTING: frozenset[Parting] = frozenset({EndOld(), EndStandIns(), FreeTaps()})
_MAY_GIVE_UP = (Step.HOLD, Step.START, Step.TRANSFER)
UNRECORDED = Failure.named(
    Unavailable, "the VM's record cannot be written", "make room in the state directory"
)


def begin(vm: str, number: int, now: float) -> Decision:
    """A restart to the VM's QEMU of that number."""
    return Restart(vm, number, started=now), [Hold()]


def recover(vm: str, work: Restarting, now: float, *, new_lives: bool) -> Decision:
    """A restart that another agent has left; `new_lives`: its new QEMU has not ended."""
    state = Restart(
        vm,
        work.number,
        Step.TRANSFER,
        running=work.resume,
        qemu=work.qemu,
        started=now,
        stopped=now,
    )
    if work.switched and work.qemu is not None and new_lives:
        return _part(state)
    why = Failure.named(Unavailable, "the agent ended during a restart of QEMU")
    return _discard(state, why)


def entry(state: Restart) -> Entry:
    """What has to be on record in that state."""
    match state.step:
        case Step.HOLD | Step.LEAVE | Step.OVER:
            return None
        case Step.LINK:
            assert state.qemu is not None
            return TookOver(state.qemu, state.number)
        case _:
            switched = state.step.is_switched
            return Restarting(state.number, state.running, switched, state.qemu)


def decide(state: Restart, event: Event, now: float) -> Decision:  # noqa: C901 one case an event
    """The next state, and what has to be done."""
    match event:
        case Held(running):
            return _started(replace(state, step=Step.START, running=running), [Start()])
        case Started(qemu, machine):
            state = replace(state, step=Step.TRANSFER, qemu=qemu, machine=machine, stopped=now)
            return _started(state, [Transfer(pause=state.running)])
        case Transferred():
            return _started(replace(state, step=Step.SWITCH), [Switch()])
        case Switched():
            return _part(state)
        case Parted(effect):
            return _parted(replace(state, waits=state.waits - {effect}))
        case GuestRuns():
            return _move_in(replace(state, went=now))
        case MovedIn():
            return _link(state)
        case Linked(ended):
            return _forward_over(state, ended, now)
        case Discarded():
            return _go_back(state)
        case WentBack():
            return _leave(state, running=state.running)
        case Gone(why):
            return _leave(replace(state, failure=_ended(state, why)), running=False)
        case Left():
            return _over(state, state.failure)
        case Failed(effect, failure):
            return _failed(state, effect, failure, now)
        case GiveUp(why):
            may = state.step in _MAY_GIVE_UP
            return (replace(state, given_up=why) if may else state), []
        case Unrecorded():
            return _discard(state, UNRECORDED)
        case Tick():
            return _tick(state, now)
        case _:
            assert_never(event)


def _started(state: Restart, effects: list[Effect]) -> Decision:
    """The next step before the switch, unless the agent closes."""
    if state.given_up:
        return _discard(state, Failure.named(Unavailable, state.given_up))
    return state, effects


def _failed(state: Restart, effect: Effect, failure: Failure, now: float) -> Decision:
    match effect:
        case Hold():
            return _over(state, failure)
        case Start() | Transfer() | Switch():
            return _discard(state, failure)
        case Discard():
            return _again(_told(state, _stays(state, failure)), effect, now)
        case GoBack():
            return _leave(replace(state, failure=_not_back(state, failure)), running=False)
        case EndOld() | EndStandIns():
            return _again(_told(state, _waits(state, failure)), effect, now)
        case FreeTaps():
            return _parted(replace(state, waits=state.waits - {effect}, failure=failure))
        case Run():
            return _move_in(replace(state, failure=failure))
        case MoveIn():
            return _link(state)
        case Link():
            return _forward_over(state, "", now)
        case Leave():
            return _over(state, state.failure)
        case _:
            assert_never(effect)


def _again(state: Restart, effect: Effect, now: float) -> Decision:
    return replace(state, again=state.again | {effect}, again_at=now + AGAIN_S), []


def _tick(state: Restart, now: float) -> Decision:
    if state.again_at is None or now < state.again_at:
        return state, []
    effects = sorted(state.again, key=repr)
    return replace(state, again=frozenset(), again_at=None), effects


# The way back


def _discard(state: Restart, failure: Failure) -> Decision:
    state = replace(state, failure=failure)
    if state.step is Step.HOLD:  # nothing was made, and nothing is on record
        return _leave(state, running=state.running)
    return replace(state, step=Step.DISCARD), [Discard()]


def _go_back(state: Restart) -> Decision:
    stopped = state.stopped is not None
    back = GoBack(reset=stopped, cont=stopped and state.running)
    return replace(state, step=Step.GO_BACK), [back]


def _leave(state: Restart, *, running: bool) -> Decision:
    return replace(state, step=Step.LEAVE), [Leave(running)]


# The way forward


def _part(state: Restart) -> Decision:
    state = replace(state, step=Step.PART, waits=_PARTING)
    return state, [EndOld(), EndStandIns(), FreeTaps()]


def _parted(state: Restart) -> Decision:
    if state.waits:
        return state, []
    if state.failure is not None:
        return _move_in(state)
    return replace(state, step=Step.RUN), [Run(cont=state.running)]


def _move_in(state: Restart) -> Decision:
    return replace(state, step=Step.MOVE_IN), [MoveIn()]


def _link(state: Restart) -> Decision:
    running = state.running and state.failure is None
    return replace(state, step=Step.LINK), [Link(running)]


# What the caller is told


def _told(state: Restart, answer: Restarted | Failure | None) -> Restart:
    """The first answer counts."""
    return state if state.answer is not None else replace(state, answer=answer)


def _over(state: Restart, answer: Failure | None) -> Decision:
    if answer is not None and answer.unknown:
        # Whatever the new QEMU may have done: it is dead, and the old one goes on.
        answer = Failure.named(Unavailable, answer.message, answer.remedy)
    return replace(_told(state, answer), step=Step.OVER), []


def _forward_over(state: Restart, ended: str, now: float) -> Decision:
    answer = _left_behind(state, ended) or _restarted(state, now)
    return replace(_told(state, answer), step=Step.OVER), []


def _restarted(state: Restart, now: float) -> Restarted:
    assert state.qemu is not None
    blackout_s = 0.0
    if state.running and state.went is not None and state.stopped is not None:
        blackout_s = state.went - state.stopped
    total_ms = round((now - state.started) * 1e3, 1)
    return Restarted(state.qemu, state.machine, round(blackout_s * 1e3, 1), total_ms)


def _left_behind(state: Restart, ended: str) -> Failure | None:
    """What to say of a VM that is in its new QEMU and does not go on there."""
    vm, failure = state.vm, state.failure
    if ended:
        message = f"VM {vm} has ended in its new QEMU: {ended}"
        return Failure.named(RollbackFailed, message, f"start it again: semper vm run, for {vm}")
    if failure is None:
        return None
    if failure.unknown:
        message = f"VM {vm} is in its new QEMU, which does not say whether the guest runs"
        remedy = f"look at it: semper vm show {vm}"
        return Failure.named(OutcomeUnknown, f"{message}: {failure.message}", remedy)
    message = f"VM {vm} is in its new QEMU, and the guest stays paused there"
    remedy = f"let it run on: semper vm resume {vm}"
    return Failure.named(RollbackFailed, f"{message}: {failure.message}", remedy)


def _cause(state: Restart) -> str:
    return state.failure.message if state.failure is not None else "it was given up"


def _ended(state: Restart, why: str) -> Failure:
    return Failure.named(StateConflict, f"VM {state.vm} has ended meanwhile: {why}")


def _not_back(state: Restart, failure: Failure) -> Failure:
    what = "the guest does not run on" if state.running else "the old QEMU is not as it was"
    message = (
        f"the QEMU of VM {state.vm} was not restarted ({_cause(state)}), and {what}: "
        f"{failure.message}"
    )
    remedy = f"see what it does: semper vm show {state.vm}; then resume or kill it"
    return Failure.named(RollbackFailed, message, remedy)


BY_ITSELF = "look at /proc/PID/stack; it goes on by itself when that process has ended"


def _stays(state: Restart, failure: Failure) -> Failure:
    guest = "runs on in the old one" if state.stopped is None else "stays paused until then"
    message = (
        f"the QEMU of VM {state.vm} was not restarted ({_cause(state)}), and the new QEMU does not "
        f"end; the guest {guest}: {failure.message}"
    )
    return Failure.named(RollbackFailed, message, BY_ITSELF)


def _waits(state: Restart, failure: Failure) -> Failure:
    message = f"VM {state.vm} is in its new QEMU, and stays paused there for now: {failure.message}"
    return Failure.named(OutcomeUnknown, message, BY_ITSELF)
