"""What becomes of a VM's runstate: a pure decision.

                       monitor answers
       STARTING ─────────────────────────► RUNNING ◄──── resume ──── PAUSED
           │                                 │ │ └────── pause ───────► ▲
           │                guest panicked,  │ │                        │
           │                internal error   │ └── stop ──► STOPPING    │
           │                      HALTED ◄───┘             │  │         │
           │                                               │  └ quit, then SIGKILL,
           ▼       monitor silent or lost                  │    at their deadlines
        UNKNOWN ◄──── from any state above but STOPPING    │
           └─────── the monitor answers again ──► what it says
                                                           ▼
       any state ───────────── QEMU ends ─────────► STOPPED  or  CRASHED

- STOPPED: the end was wanted: the guest powered off, or somebody asked for it. CRASHED: it
  was not. `End` says more, with the exit code.
- `stop` presses the power button and gives the guest a grace period; then QEMU is told to
  quit; if that is not obeyed either, it is killed. A paused guest cannot react to a button:
  `stop` is refused.
- UNKNOWN: a command was sent and not answered, or the monitor ended while the process lives.
  QEMU may still write to the disks. Nothing but asking again (which goes on by itself) or
  `kill` leads out of it.
- RUNNING and PAUSED can be *held*, by a restart of QEMU, a save or a migration: work of many
  steps, each of which may pause the guest and let it go on. Meanwhile other requests are refused,
  and what QEMU tells of pauses is not passed on. `switch` is the one step of it that cannot be
  undone: this QEMU is killed, and another, which has taken over its state, is the VM from then on.
- `kill` works in every state. It is the fence: once the process is seen to have ended, the
  VM's disks are free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from sempervirt.qemu.state import (
    Accept,
    Asked,
    Decision,
    DeviceGone,
    Done,
    End,
    Ended,
    Execute,
    FromQemu,
    KillProcess,
    NotDone,
    QemuEvent,
    Refusal,
    Refuse,
    Released,
    Request,
    Runstate,
    Silent,
    StatusTold,
    SwitchProcess,
    Tick,
    VmEffect,
    VmEvent,
    VmState,
)

QUIT_DEADLINE_S = 10.0
ASKED = "asked to power off"

_BUSY = {
    Request.RESTART: "a restart of QEMU",
    Request.SAVE: "a save",
    Request.RESTORE: "its restoration",
    Request.RESCUE: "a copy of one of its disks",
    Request.DEPART: "its migration to another host",
    Request.ARRIVE: "its migration to this host",
}

# They go on when the monitor falls silent, and keep others from touching a VM that two hosts have.
_MOVES = (Request.DEPART, Request.ARRIVE)

# What QEMU's own runstates mean here; the others (migration, say) hold the guest still.
_FROM_QEMU = {
    "running": Runstate.RUNNING,
    "guest-panicked": Runstate.HALTED,
    "internal-error": Runstate.HALTED,
    "io-error": Runstate.HALTED,
    "watchdog": Runstate.HALTED,
    "shutdown": Runstate.HALTED,
}


def decide(state: VmState, event: VmEvent, now: float) -> Decision:
    """The next state, and what has to be done. `now` is in seconds, on any clock that grows."""
    if state.run.is_end:
        if isinstance(event, Asked):
            return state, [_conflict(event, f"the VM is {state.run.value}")]
        return state, []
    if isinstance(event, FromQemu) and event.qemu != state.qemu:
        return state, []
    return _live(state, event, now)


def _live(state: VmState, event: VmEvent, now: float) -> Decision:
    match event:
        case Asked():
            return _asked(state, event, now)
        case Done():
            return _done(state)
        case NotDone(reason):
            return _not_done(state, reason)
        case Silent(reason):
            return _silent(state, reason)
        case StatusTold(status):
            return _status_told(state, status), []
        case QemuEvent(name, cause):
            return _qemu_event(state, name, cause, now), []
        case DeviceGone(device):
            return replace(state, gone=state.gone | {device}), []
        case Released(status):
            return _released(state, status), []
        case Ended(exit_code, signal, with_host):
            return _ended(state, exit_code, signal, with_host=with_host)
        case Tick():
            return _tick(state, now)
        case _:
            assert_never(event)


def _conflict(asked: Asked, reason: str) -> Refuse:
    return _refuse(asked, Refusal.CONFLICT, reason)


def _refuse(asked: Asked, kind: Refusal, reason: str) -> Refuse:
    return Refuse(asked.ticket, asked.request, kind, reason)


def _asked(state: VmState, asked: Asked, now: float) -> Decision:
    request, accept = asked.request, Accept(asked.ticket)
    if request is Request.KILL:
        return replace(state, killed_because=asked.because), [KillProcess(), accept]
    if state.run is Runstate.UNKNOWN:
        return state, [_conflict(asked, f"the VM's state is unknown ({state.why})")]
    if request is Request.SWITCH:
        return _switch(state, asked)
    busy = state.pending.request if state.pending else state.held
    if busy is not None:
        return state, [_conflict(asked, f"the VM is busy with {_BUSY.get(busy, busy.value)}")]
    match request, state.run:
        case (_, (Runstate.RUNNING | Runstate.PAUSED)) if request in _BUSY:
            return replace(state, held=request), [accept]
        case (Request.PAUSE, Runstate.PAUSED) | (Request.RESUME, Runstate.RUNNING):
            return state, [accept]
        case Request.PAUSE, Runstate.RUNNING:
            return replace(state, pending=asked), [Execute("stop")]
        case Request.RESUME, Runstate.PAUSED:
            return replace(state, pending=asked), [Execute("cont")]
        case Request.STOP, Runstate.RUNNING:
            stopping = replace(
                state, run=Runstate.STOPPING, deadline=now + asked.grace_s, why=ASKED
            )
            return stopping, [Execute("system_powerdown"), accept]
        case Request.STOP, Runstate.STOPPING:
            return state, [accept]
        case _:
            return state, [_conflict(asked, f"the VM is {state.run.value}")]


def _switch(state: VmState, asked: Asked) -> Decision:
    live = state.run in (Runstate.RUNNING, Runstate.PAUSED)
    if state.held is not Request.RESTART or not live or state.killed_because:
        reason = state.killed_because or f"the VM is {state.run.value}"
        return state, [_conflict(asked, reason)]
    switched = replace(state, qemu=state.qemu + 1, gone=frozenset())
    return switched, [SwitchProcess(asked.ticket), Accept(asked.ticket)]


def _done(state: VmState) -> Decision:
    if state.pending is None:
        return state, []
    run = Runstate.PAUSED if state.pending.request is Request.PAUSE else Runstate.RUNNING
    accept: list[VmEffect] = [Accept(state.pending.ticket)]
    if state.run not in (Runstate.RUNNING, Runstate.PAUSED):
        return replace(state, pending=None), accept  # overtaken by an event
    return replace(state, run=run, why="", pending=None), accept


def _not_done(state: VmState, reason: str) -> Decision:
    if state.pending is None:
        return state, []
    return replace(state, pending=None), [_refuse(state.pending, Refusal.NOT_DONE, reason)]


def _released(state: VmState, status: str) -> VmState:
    if state.held is None:
        return state
    state = replace(state, held=None)
    # If it became unknown meanwhile, only asking leads out of that.
    return state if state.run is Runstate.UNKNOWN else _status_told(state, status)


def _silent(state: VmState, reason: str) -> Decision:
    effects: list[VmEffect] = []
    if state.pending is not None:
        effects.append(_refuse(state.pending, Refusal.UNKNOWN, reason))
    if state.run is Runstate.STOPPING:  # it may be on its way out; the deadline decides
        return replace(state, pending=None), effects
    held = state.held if state.held in _MOVES else None
    unknown = replace(state, run=Runstate.UNKNOWN, why=reason, pending=None, held=held)
    return unknown, effects


def _status_told(state: VmState, status: str) -> VmState:
    held = state.held is not None and state.run is not Runstate.UNKNOWN
    if state.run is Runstate.STOPPING or state.pending is not None or held:
        return state
    run = _FROM_QEMU.get(status, Runstate.PAUSED)
    if run is state.run:
        return state
    return replace(state, run=run, why=status if run is Runstate.HALTED else "")


def _qemu_event(state: VmState, name: str, cause: str, now: float) -> VmState:
    live = state.run in (Runstate.RUNNING, Runstate.PAUSED) and state.held is None
    match name:
        case "STOP" if live and state.pending is None:
            return replace(state, run=Runstate.PAUSED)
        case "RESUME" if live or state.run is Runstate.HALTED:
            return replace(state, run=Runstate.RUNNING, why="")
        case "GUEST_PANICKED" if state.run is not Runstate.STOPPING:
            return replace(state, run=Runstate.HALTED, why="the guest panicked")
        case "RESET":
            return replace(state, resets=state.resets + 1)
        case "SHUTDOWN":
            deadline = now + QUIT_DEADLINE_S
            return replace(
                state,
                run=Runstate.STOPPING,
                shutdown_cause=cause or "unknown",
                told_to_quit=True,
                deadline=deadline,
            )
        case _:
            return state


def _ended(
    state: VmState, exit_code: int | None, signal: int | None, *, with_host: bool
) -> Decision:
    run, reason = _judge_end(state, exit_code, signal)
    with_host = with_host and run is Runstate.CRASHED
    if with_host:
        reason = "QEMU ended with its host, which was started anew"
    effects: list[VmEffect] = []
    if state.pending is not None:
        effects.append(_refuse(state.pending, Refusal.NOT_DONE, f"the VM ended: {reason}"))
    end = End(reason, exit_code, signal, with_host)
    ended = replace(state, run=run, why=reason, pending=None, held=None, deadline=None, end=end)
    return ended, effects


def _judge_end(state: VmState, exit_code: int | None, signal: int | None) -> tuple[Runstate, str]:
    if state.killed_because:
        return Runstate.STOPPED, state.killed_because
    if state.shutdown_cause.startswith("guest") and not signal:
        if state.shutdown_cause == "guest-panic":
            return Runstate.CRASHED, "the guest panicked"
        return Runstate.STOPPED, "the guest powered off"
    if state.told_to_quit and exit_code in (0, None) and not signal:
        if state.why == ASKED:
            return Runstate.STOPPED, "the guest did not power off in time and was cut off"
        return Runstate.STOPPED, f"QEMU was told to quit ({state.shutdown_cause})"
    if signal is not None:
        return Runstate.CRASHED, f"QEMU was killed by signal {signal}"
    if exit_code is None:
        return Runstate.CRASHED, "QEMU ended while no agent ran; how is not known"
    return Runstate.CRASHED, f"QEMU ended by itself with exit code {exit_code}"


def _tick(state: VmState, now: float) -> Decision:
    if state.deadline is None or now < state.deadline:
        return state, []
    if not state.told_to_quit:
        later = replace(state, told_to_quit=True, deadline=now + QUIT_DEADLINE_S)
        return later, [Execute("quit")]
    because = "neither the guest nor QEMU ended in time: killed"
    return replace(state, killed_because=because, deadline=None), [KillProcess()]
