"""What a restore does next, once backends and QEMU were started: a pure decision.

    HOLD ──► LOAD ──► RUN ──► LEAVE ──► OVER      the VM goes on where it was saved
      │       │        │
      └───────┴────────┴──► END ──► OVER          nothing is left running

- LOAD: the memory is unpacked and verified, the devices are loaded; the guest stands still. That is
  on record before the guest runs (RUN): from then on it may write to its disks, the file fits them
  no more, and QEMU is the only one to have the guest.
- Before that every failure ends QEMU. So does a guest that QEMU refuses to let run. A guest stays
  of which nobody knows whether it runs, or whether it ran under a former agent.
- An agent that begins anew goes on by `recover`: it ends a QEMU whose memory nobody unpacks any
  more, and lets a guest run that was loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed, Unavailable
from sempervirt.core.failure import Failure
from sempervirt.renewal.restore.state import (
    Decision,
    Effect,
    End,
    Ended,
    Event,
    Failed,
    GiveUp,
    GuestRuns,
    Held,
    Hold,
    Leave,
    Left,
    Load,
    Loaded,
    Restore,
    Restored,
    Run,
    Step,
    Tick,
    Unrecorded,
)
from sempervirt.vm.work import Restoring

UNRECORDED = Failure.named(
    Unavailable, "the VM's record cannot be written", "make room in the state directory"
)


def begin(vm: str, *, running: bool) -> Decision:
    """A restore of the VM of that name, whose guest is to run or not."""
    return Restore(vm, running), [Hold()]


def recover(vm: str, work: Restoring) -> Decision:
    """A restore that another agent has left."""
    state = Restore(vm, work.resume)
    if work.loaded:
        return replace(state, step=Step.RUN, may_have_run=True), [Run(cont=work.resume)]
    return _end(state, Failure.named(Unavailable, "the agent ended during a restore"))


def entry(state: Restore) -> Restoring | None:
    """What has to be on record in that state; `Restoring` is there from the start of QEMU on."""
    match state.step:
        case Step.HOLD | Step.LOAD | Step.END:
            return Restoring()
        case Step.RUN:
            return Restoring(loaded=True, resume=state.running)
        case Step.LEAVE | Step.OVER:
            return None
        case _:
            assert_never(state.step)


def decide(state: Restore, event: Event, now: float) -> Decision:
    """The next state, and what has to be done."""
    del now  # nothing of it depends on time
    match event:
        case Held():
            return _unless_given_up(replace(state, step=Step.LOAD), [Load()])
        case Loaded():
            return _unless_given_up(replace(state, step=Step.RUN), [Run(cont=state.running)])
        case GuestRuns():
            return replace(state, step=Step.LEAVE), [Leave(state.running)]
        case Left(ended):
            return _over(state, _ended(state, ended) if ended else state.failure or Restored())
        case Ended():
            return _over(state, state.failure)
        case Failed(effect, failure):
            return _failed(state, effect, failure)
        case GiveUp(why):
            return replace(state, given_up=why), []
        case Unrecorded():
            return _end(state, UNRECORDED)
        case Tick():
            return state, []
        case _:
            assert_never(event)


def _unless_given_up(state: Restore, effects: list[Effect]) -> Decision:
    if state.given_up:
        return _end(state, Failure.named(Unavailable, state.given_up))
    return state, effects


def _failed(state: Restore, effect: Effect, failure: Failure) -> Decision:
    match effect:
        case Hold() | Load():
            return _end(state, failure)
        case Run() if failure.unknown or state.may_have_run:
            stays = _stays(state, failure)
            return replace(state, step=Step.LEAVE, failure=stays), [Leave(running=False)]
        case Run():
            return _end(state, failure)
        case Leave():
            return _over(state, state.failure or Restored())
        case End():
            message = f"VM {state.vm} was not restored ({_cause(state)}), and does not end"
            remedy = f"end it: semper vm kill {state.vm}"
            left = Failure.named(RollbackFailed, f"{message}: {failure.message}", remedy)
            return _over(state, left)
        case _:
            assert_never(effect)


def _end(state: Restore, failure: Failure) -> Decision:
    return replace(state, step=Step.END, failure=failure), [End()]


def _over(state: Restore, answer: Restored | Failure | None) -> Decision:
    return replace(state, step=Step.OVER, answer=answer), []


def _cause(state: Restore) -> str:
    return state.failure.message if state.failure is not None else "it was given up"


def _stays(state: Restore, failure: Failure) -> Failure:
    message = f"VM {state.vm} is restored, and"
    if failure.unknown:
        message = f"{message} does not say whether the guest runs: {failure.message}"
        return Failure.named(OutcomeUnknown, message, f"look at it: semper vm show {state.vm}")
    message = f"{message} the guest stays paused: {failure.message}"
    return Failure.named(RollbackFailed, message, f"let it run on: semper vm resume {state.vm}")


def _ended(state: Restore, ended: str) -> Failure:
    message = f"VM {state.vm} was restored, and has ended: {ended}"
    return Failure.named(Unavailable, message, f"see its log: semper vm logs {state.vm}")
