"""The VM's runstates, exhaustively: every order of events up to a depth keeps its promises."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.host.procfs import ProcessId, boot_id
from sempervirt.qemu.decide import QUIT_DEADLINE_S, decide
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.link import Patience
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import (
    Accept,
    Asked,
    DeviceGone,
    Done,
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
    VmEvent,
    VmState,
)

GRACE_S = 5.0
TICKET = 7
RUNNING = VmState(run=Runstate.RUNNING)

EVENTS: list[VmEvent] = [
    *(Asked(request, GRACE_S, ticket=TICKET) for request in Request),
    Done(),
    NotDone("refused"),
    Silent("no answer"),
    StatusTold("running"),
    StatusTold("paused"),
    StatusTold("internal-error"),
    QemuEvent("STOP"),
    QemuEvent("RESUME"),
    QemuEvent("RESET", "guest-reset"),
    QemuEvent("GUEST_PANICKED"),
    QemuEvent("SHUTDOWN", "guest-shutdown"),
    QemuEvent("SHUTDOWN", "host-qmp-quit"),
    Ended(0, None),
    Ended(1, None),
    Ended(None, 9),
    Ended(None, None),
    Ended(None, None, with_host=True),
    Released("running"),
    Released("paused"),
    Tick(),
]


def test_every_order_of_events_up_to_depth_six() -> None:
    start = VmState()
    seen = {start}
    queue = deque([(start, 0)])
    while queue:
        state, depth = queue.popleft()
        for event in EVENTS:
            now = state.deadline if isinstance(event, Tick) and state.deadline else 0.0
            following = checked(state, event, now)
            # Times and counts do not change what can happen.
            if following.deadline is not None:
                following = replace(following, deadline=1.0)
            following = replace(following, resets=0, qemu=1)
            if depth < 6 and following not in seen:
                seen.add(following)
                queue.append((following, depth + 1))
    assert {state.run for state in seen} == set(Runstate)


def checked(state: VmState, event: VmEvent, now: float) -> VmState:
    """One step, and what it has promised."""
    after, effects = decide(state, event, now)
    answers = [effect for effect in effects if isinstance(effect, Accept | Refuse)]
    if isinstance(event, Asked):
        begun = after.pending is event and state.pending is None
        assert len(answers) == (0 if begun else 1), "each request is answered once, or begun"
        if event.request is Request.KILL and not state.run.is_end:
            assert KillProcess() in effects, "kill works in every state"
    else:
        freed = state.pending is not None and after.pending is None
        assert len(answers) == (1 if freed else 0)
    if state.run.is_end:
        assert after == state, "an end is final"
    assert (after.end is not None) == after.run.is_end
    if after.run.is_end and not state.run.is_end:
        assert isinstance(event, Ended), "only the end of the process is an end"
    if state.run is Runstate.UNKNOWN and after.run in (Runstate.RUNNING, Runstate.PAUSED):
        told = isinstance(event, StatusTold | QemuEvent)
        assert told, "only QEMU itself leads out of unknown"
    assert all(answer.ticket == TICKET for answer in answers)
    if SwitchProcess(TICKET) in effects:
        assert after.qemu == state.qemu + 1
        assert state.held is Request.RESTART, "who switches has prepared it"
        assert not state.killed_because, "who is to end has no successor"
    if state.held is not None and isinstance(event, Asked) and event.request is not Request.KILL:
        assert replace(after, qemu=state.qemu) == state, "a held VM is changed by nobody else"
    if state.run is Runstate.UNKNOWN:
        assert not any(isinstance(effect, Execute) for effect in effects), "nothing blind"
    if after.run is Runstate.STOPPING:
        assert after.deadline is not None or after.killed_because, "stopping comes to an end"
    return after


def test_a_device_that_was_unplugged_is_gone_until_another_qemu_has_it() -> None:
    gone, _ = decide(RUNNING, DeviceGone("disk-root"), 0)
    assert gone == replace(RUNNING, gone=frozenset({"disk-root"}))
    held = replace(gone, held=Request.RESTART)
    switched, _ = decide(held, Asked(Request.SWITCH), 0)
    assert switched.gone == frozenset()
    assert decide(switched, DeviceGone("disk-root", qemu=1), 0)[0] == switched  # the former one
    assert decide(switched, DeviceGone("disk-root", qemu=2), 0)[0].gone


def run(*events: tuple[VmEvent, float], state: VmState = RUNNING) -> VmState:
    for event, now in events:
        state, _ = decide(state, event, now)
    return state


def test_one_that_ended_with_its_host_is_told_apart() -> None:
    state, _ = decide(RUNNING, Ended(None, None, with_host=True), 100)
    assert (state.run, state.end and state.end.with_host) == (Runstate.CRASHED, True)
    # The controls: an agent of the same boot; and one that was about to end it.
    state, _ = decide(RUNNING, Ended(None, None), 100)
    assert (state.run, state.end and state.end.with_host) == (Runstate.CRASHED, False)
    leaving = replace(RUNNING, killed_because="it has gone to host b")
    state, _ = decide(leaving, Ended(None, None, with_host=True), 100)
    assert (state.run, state.end and state.end.with_host) == (Runstate.STOPPED, False)


@pytest.mark.parametrize(("boot", "with_host"), [("another boot", True), (boot_id(), False)])
async def test_an_agent_after_a_boot_knows_with_what_its_qemus_have_ended(
    tmp_path: Path, boot: str, *, with_host: bool
) -> None:
    files = VmFiles(tmp_path)
    machine = Machine.adopt(VmSpec(name="web"), files, ProcessId(4711, 1, boot), Patience())
    await machine.wait_ended(5.0)
    end = machine.state.end
    assert end is not None
    assert (machine.run, end.with_host) == (Runstate.CRASHED, with_host)
    await machine.detach()


def test_stop_presses_the_button_then_quits_then_kills() -> None:
    state, effects = decide(RUNNING, Asked(Request.STOP, GRACE_S), 100)
    assert effects == [Execute("system_powerdown"), Accept(0)]
    assert state.deadline == 100 + GRACE_S
    state, effects = decide(state, Tick(), 100 + GRACE_S)
    assert effects == [Execute("quit")]
    assert state.deadline == 100 + GRACE_S + QUIT_DEADLINE_S
    state, effects = decide(state, Tick(), 100 + GRACE_S + QUIT_DEADLINE_S)
    assert effects == [KillProcess()]
    state, _ = decide(state, Ended(None, 9), 200)
    assert state.run is Runstate.STOPPED
    assert state.why == "neither the guest nor QEMU ended in time: killed"


@pytest.mark.parametrize(
    ("events", "run_state", "reason"),
    [
        ([QemuEvent("SHUTDOWN", "guest-shutdown"), Ended(0, None)],
         Runstate.STOPPED, "the guest powered off"),
        ([QemuEvent("SHUTDOWN", "guest-panic"), Ended(0, None)],
         Runstate.CRASHED, "the guest panicked"),
        ([QemuEvent("SHUTDOWN", "host-signal"), Ended(0, None)],
         Runstate.STOPPED, "QEMU was told to quit (host-signal)"),
        ([Asked(Request.STOP, 0), Tick(), QemuEvent("SHUTDOWN", "host-qmp-quit"), Ended(0, None)],
         Runstate.STOPPED, "the guest did not power off in time and was cut off"),
        ([Asked(Request.STOP, 9), QemuEvent("SHUTDOWN", "guest-shutdown"), Ended(0, None)],
         Runstate.STOPPED, "the guest powered off"),
        ([Asked(Request.KILL), Ended(None, 9)], Runstate.STOPPED, "killed on request"),
        ([Ended(None, 9)], Runstate.CRASHED, "QEMU was killed by signal 9"),
        ([Ended(None, 11)], Runstate.CRASHED, "QEMU was killed by signal 11"),
        ([Ended(1, None)], Runstate.CRASHED, "QEMU ended by itself with exit code 1"),
        ([Ended(0, None)], Runstate.CRASHED, "QEMU ended by itself with exit code 0"),
        ([Ended(None, None)], Runstate.CRASHED,
         "QEMU ended while no agent ran; how is not known"),
        # It was going to stop, and died of something else on the way.
        ([QemuEvent("SHUTDOWN", "guest-shutdown"), Ended(None, 11)],
         Runstate.CRASHED, "QEMU was killed by signal 11"),
    ],
)  # fmt: skip
def test_the_end_is_told_truthfully(
    events: list[VmEvent], run_state: Runstate, reason: str
) -> None:
    state = run(*((event, 0.0) for event in events))
    assert (state.run, state.why) == (run_state, reason)
    assert state.end is not None
    assert state.end.reason == reason


def test_a_command_without_an_answer_leaves_the_state_unknown() -> None:
    state, _ = decide(RUNNING, Asked(Request.PAUSE), 0)
    state, effects = decide(state, Silent("no answer"), 0)
    assert effects == [Refuse(0, Request.PAUSE, Refusal.UNKNOWN, "no answer")]
    assert state.run is Runstate.UNKNOWN
    _, effects = decide(state, Asked(Request.RESUME), 0)
    assert isinstance(effects[0], Refuse)
    assert effects[0].kind is Refusal.CONFLICT
    assert decide(state, StatusTold("paused"), 0)[0].run is Runstate.PAUSED


def test_a_refused_command_leaves_the_state_as_it_was() -> None:
    state, _ = decide(RUNNING, Asked(Request.PAUSE), 0)
    state, effects = decide(state, NotDone("QEMU refused"), 0)
    assert state == RUNNING
    assert effects == [Refuse(0, Request.PAUSE, Refusal.NOT_DONE, "QEMU refused")]


def test_a_status_from_before_a_request_does_not_undo_it() -> None:
    state, _ = decide(RUNNING, Asked(Request.PAUSE), 0)
    state, _ = decide(state, StatusTold("running"), 0)
    assert decide(state, Done(), 0)[0].run is Runstate.PAUSED


def test_what_a_held_vm_tells_of_pauses_is_not_passed_on() -> None:
    held = run((Asked(Request.RESTART), 0), (QemuEvent("STOP"), 0), (StatusTold("postmigrate"), 0))
    assert (held.run, held.held) == (Runstate.RUNNING, Request.RESTART)
    _, effects = decide(held, Asked(Request.STOP, GRACE_S), 0)
    assert effects == [
        Refuse(0, Request.STOP, Refusal.CONFLICT, "the VM is busy with a restart of QEMU")
    ]
    assert run((Released("paused"), 0), state=held) == replace(RUNNING, run=Runstate.PAUSED)
    assert run((Released("running"), 0), state=held) == RUNNING


def test_only_a_vm_that_lives_is_switched() -> None:
    held, _ = decide(RUNNING, Asked(Request.RESTART), 0)
    switch = Asked(Request.SWITCH, ticket=TICKET)
    assert decide(held, switch, 0) == (
        replace(held, qemu=2),
        [SwitchProcess(TICKET), Accept(TICKET)],
    )
    killed, _ = decide(held, Asked(Request.KILL), 0)
    refused = decide(killed, Asked(Request.SWITCH), 0)[1]
    assert refused == [Refuse(0, Request.SWITCH, Refusal.CONFLICT, "killed on request")]
    lost, _ = decide(held, Silent("no answer"), 0)
    assert isinstance(decide(lost, Asked(Request.SWITCH), 0)[1][0], Refuse)
    saving, _ = decide(RUNNING, Asked(Request.SAVE), 0)
    assert isinstance(decide(saving, Asked(Request.SWITCH), 0)[1][0], Refuse)


def test_what_a_killed_qemu_still_tells_changes_nothing() -> None:
    switched = run((Asked(Request.RESTART), 0), (Asked(Request.SWITCH), 0))
    for event in EVENTS:
        if isinstance(event, FromQemu):
            assert decide(switched, event, 0) == (switched, [])
    ended, _ = decide(switched, Ended(None, 9, qemu=2), 0)
    assert ended.run is Runstate.CRASHED
