"""What is concluded from a mediator's silence."""

from __future__ import annotations

import pytest

from sempervirt.host.thread_states import ThreadState
from sempervirt.passthrough.mediator import spare_argv
from sempervirt.passthrough.watching import BUSY_S, STALL_S, STOPPED_S, Verdict, judge


def thread(state: str, call: int | None = 7, waits_in: str = "") -> ThreadState:
    return ThreadState(1, "main", state, 0, call, waits_in)


@pytest.mark.parametrize(
    ("silent_s", "state", "waits_in", "verdict"),
    [
        (STOPPED_S / 2, "T", "", Verdict.WORKS),
        (STOPPED_S, "T", "", Verdict.HANGS),
        (STALL_S / 2, "S", "", Verdict.WORKS),
        (STALL_S, "S", "futex_wait", Verdict.HANGS),
        (STALL_S, "D", "", Verdict.MEDIUM_HANGS),
        (STALL_S, "S", "io_schedule", Verdict.MEDIUM_HANGS),
        (STALL_S, "R", "", Verdict.WORKS),
        (BUSY_S, "R", "", Verdict.HANGS),
    ],
)
def test_a_silent_mediator_is_judged_by_its_threads(
    silent_s: float, state: str, waits_in: str, verdict: Verdict
) -> None:
    assert judge(silent_s, [thread("S"), thread(state, waits_in=waits_in)]) is verdict


def test_a_spare_has_the_options_of_who_serves_and_listens_nowhere() -> None:
    serving = ("semper-vfiod", "--fd=7", "--shim-fd=8", "--control-socket=c", "--session-socket=s")
    argv = spare_argv(serving)
    assert argv is not None
    assert argv[1:] == ["--spare", "--control-socket=c", "--session-socket=s"]
    assert spare_argv(argv) == argv
    assert spare_argv(("semper-vfiod", "--control-socket=c")) is None
    assert spare_argv(()) is None
