"""What a save does next: a pure decision.

    HOLD ──► PACK ──► END ──► FREE ──► OVER     the VM is in the file, and has ended
              │ any failure
              └──► GO_BACK ──► LEAVE ──► OVER   why, and whether the VM is as it was

- PACK: the guest is stopped, its disks are at rest, its devices and its memory go to the file,
  which is complete and durable then. That is the point of no return: the guest must not run on, or
  the disks would not be as the file says.
- Before it every failure leads back, and the guest runs on. After it QEMU is killed (END), again
  and again, until it was seen to have ended; then the disks are free (FREE).
- An agent that begins anew goes on by `recover`: back, unless the file was on record as durable.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed, StateConflict, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.renewal.save.state import (
    Decision,
    Effect,
    End,
    Ended,
    Event,
    Failed,
    Free,
    Freed,
    GiveUp,
    GoBack,
    Gone,
    Held,
    Hold,
    Leave,
    Left,
    Pack,
    Packed,
    Save,
    Saved,
    Step,
    StopPacking,
    Tick,
    Unrecorded,
    WentBack,
)
from sempervirt.vm.work import Saving

AGAIN_S = 1.0
UNRECORDED = Failure.named(
    Unavailable, "the VM's record cannot be written", "make room in the state directory"
)


def begin(vm: str) -> Decision:
    """A save of the VM of that name."""
    return Save(vm), [Hold()]


def recover(vm: str, work: Saving) -> Decision:
    """A save that another agent has left."""
    state = Save(vm, running=work.resume)
    if work.saved:
        return replace(state, step=Step.END), [End()]
    return _back(state, Failure.named(Unavailable, "the agent ended during a save"))


def entry(state: Save) -> Saving | None:
    """What has to be on record in that state."""
    match state.step:
        case Step.HOLD | Step.LEAVE | Step.OVER:
            return None
        case Step.PACK | Step.GO_BACK:
            return Saving(state.running)
        case Step.END | Step.FREE:
            return Saving(state.running, saved=True)
        case _:
            assert_never(state.step)


def decide(state: Save, event: Event, now: float) -> Decision:  # noqa: C901 one case an event
    """The next state, and what has to be done."""
    match event:
        case Held(running):
            if state.given_up:
                return _nothing(state, Failure.named(Unavailable, state.given_up))
            packing = replace(state, step=Step.PACK, running=running, stopped=now)
            return packing, [Pack(pause=running)]
        case Packed(figures):
            return replace(state, step=Step.END, figures=figures, packed=now), [End()]
        case Ended():
            return replace(state, step=Step.FREE), [Free()]
        case Freed():
            return _over(state, _saved(state))
        case WentBack():
            return replace(state, step=Step.LEAVE), [Leave(state.running)]
        case Gone(why):
            message = f"VM {state.vm} has ended meanwhile: {why}"
            gone = replace(state, failure=Failure.named(StateConflict, message))
            return replace(gone, step=Step.LEAVE), [Leave(running=False)]
        case Left():
            return _over(state, state.failure)
        case Failed(effect, failure):
            return _failed(state, effect, failure, now)
        case GiveUp(why):
            return _given_up(state, why)
        case Unrecorded():
            return _nothing(state, UNRECORDED)
        case Tick():
            due = state.again_at is not None and now >= state.again_at
            return (replace(state, again_at=None), [End()]) if due else (state, [])
        case _:
            assert_never(event)


def _given_up(state: Save, why: str) -> Decision:
    if state.step is Step.HOLD:
        return replace(state, given_up=why), []
    return state, [StopPacking()] if state.step is Step.PACK else []


def _failed(state: Save, effect: Effect, failure: Failure, now: float) -> Decision:
    match effect:
        case Hold():
            return _over(state, failure)
        case Pack():
            return _back(state, failure)
        case StopPacking():
            return state, []
        case End():
            return _told(replace(state, again_at=now + AGAIN_S), _lives(state, failure)), []
        case Free():
            return _over(state, failure)
        case GoBack():
            left = replace(state, step=Step.LEAVE, failure=_not_back(state, failure))
            return left, [Leave(running=False)]
        case Leave():
            return _over(state, state.failure)
        case _:
            assert_never(effect)


def _nothing(state: Save, failure: Failure) -> Decision:
    """Nothing was done yet."""
    return replace(state, step=Step.LEAVE, failure=failure), [Leave(state.running)]


def _back(state: Save, failure: Failure) -> Decision:
    return replace(state, step=Step.GO_BACK, failure=failure), [GoBack(cont=state.running)]


# What the caller is told


def _told(state: Save, answer: Saved | Failure | None) -> Save:
    """The first answer counts."""
    return state if state.answer is not None else replace(state, answer=answer)


def _over(state: Save, answer: Saved | Failure | None) -> Decision:
    backwards = state.step is Step.LEAVE
    if backwards and isinstance(answer, Failure) and answer.unknown:
        # Whatever it was that did not answer: the guest runs on.
        answer = Failure.named(Unavailable, answer.message, answer.remedy)
    return replace(_told(state, answer), step=Step.OVER), []


def _saved(state: Save) -> Saved | Failure:
    if state.figures is None:  # recovered: there is no caller
        return Failure.named(Unavailable, f"VM {state.vm} was saved for an agent that has ended")
    return Saved(state.figures, round((state.packed - state.stopped) * 1e3, 1))


def _cause(state: Save) -> str:
    return state.failure.message if state.failure is not None else "it was given up"


def _lives(state: Save, failure: Failure) -> Failure:
    message = f"VM {state.vm} is saved, and its QEMU does not end: {failure.message}"
    remedy = "restore it when that process has ended; look at /proc/PID/stack"
    return Failure.named(OutcomeUnknown, message, remedy)


def _not_back(state: Save, failure: Failure) -> Failure:
    what = "the guest does not run on" if state.running else "QEMU is not as it was"
    message = f"VM {state.vm} was not saved ({_cause(state)}), and {what}: {failure.message}"
    remedy = f"see what it does: semper vm show {state.vm}; then resume or kill it"
    return Failure.named(RollbackFailed, message, remedy)
