"""Whether a backend works, concluded from what was seen of it: pure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from sempervirt.disk.answers import Status
from sempervirt.disk.liveness import (
    INTERVAL_S,
    LATELY_S,
    Pulse,
    Sample,
    Verdict,
    judge,
    observe,
    patience_s,
)
from sempervirt.disk.state import STALL_S
from sempervirt.host.thread_states import IO_URING_ENTER, STORAGE_CALLS, ThreadState, threads_of

GOLDEN = Path(__file__).parents[2] / "crates/control/golden"
PREAD, FUTEX = 17, 202


def status(*, completed: int = 0, waiting: int = 0, in_flight: int = 0, **keys: Any) -> Status:
    content = json.loads((GOLDEN / "blkd-status-active.json").read_text())["ok"]
    idle = {"completed": 0, "waiting": 0, "in_flight": 0}
    content["queues"] = [{**queue, **idle} for queue in content["queues"]]
    content["queues"][0] |= {"completed": completed, "waiting": waiting, "in_flight": in_flight}
    return Status.model_validate_json(json.dumps({**content, "state": "running", **keys}))


def thread(
    state: str = "S",
    call: int | None = FUTEX,
    waits_in: str = "futex_wait",
    name: str = "queues-0",
    ran_ns: int = 0,
) -> ThreadState:
    return ThreadState(7, name, state, ran_ns, call, waits_in)


def seen(*samples: Sample) -> Pulse:
    pulse = Pulse()
    for sample in samples:
        pulse = observe(pulse, sample)
    return pulse


def stuck(*threads: ThreadState, until_s: float = 12, told: Status | None = None) -> Pulse:
    """Once a second the same: requests, and none is completed."""
    told = told or status(completed=5, waiting=2)
    seconds = range(int(until_s) + 1)
    return seen(*(Sample(float(second), True, told, threads) for second in seconds))


def silent(*threads: ThreadState, until_s: float = 12) -> Pulse:
    """It answered once, and then not any more."""
    later = range(1, int(until_s) + 1)
    return seen(
        Sample(0.0, True, status()), *(Sample(float(s), False, None, threads) for s in later)
    )


def test_who_completes_requests_works_and_who_has_none_as_well() -> None:
    busy = [Sample(float(s), True, status(completed=s, waiting=9)) for s in range(60)]
    assert judge(seen(*busy)) == (Verdict.WORKS, "")
    idle = [Sample(float(s), True, status(completed=5)) for s in range(60)]
    assert judge(seen(*idle)) == (Verdict.WORKS, "")


@pytest.mark.parametrize("asleep", [thread(), thread("R", -1, "", ran_ns=0)])
def test_requests_that_nobody_completes_are_a_hang_in_time_and_not_before(
    asleep: ThreadState,
) -> None:
    if asleep.wants_processor:
        told = status(completed=5, waiting=2)
        spinning = (
            Sample(float(s), True, told, (thread("R", -1, "", ran_ns=s * 10**9),))
            for s in range(13)
        )
        assert judge(seen(*spinning))[0] is Verdict.HANGS, "it goes round in circles"
        return
    assert judge(stuck(asleep, until_s=STALL_S - 1))[0] is Verdict.WORKS
    verdict, evidence = judge(stuck(asleep))
    assert verdict is Verdict.HANGS
    assert evidence == (
        "2 requests wait or are in flight, and none was completed for 12 s; "
        "queues-0 (7): S in futex_wait, system call 202"
    )


@pytest.mark.parametrize("make", [stuck, silent])
@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        (thread("T", 0, "do_signal_stop"), Verdict.HANGS),
        (thread("t", 0, "ptrace_stop"), Verdict.HANGS),
        (thread(), Verdict.HANGS),
        (thread(call=None), Verdict.HANGS),
        (thread("D", -1, "io_schedule"), Verdict.MEDIUM_HANGS),
        (thread("D", None, ""), Verdict.MEDIUM_HANGS),
        (thread("S", min(STORAGE_CALLS), "anything"), Verdict.MEDIUM_HANGS),
        (thread("S", None, "request_wait_answer"), Verdict.MEDIUM_HANGS),
        (thread("S", -1, "folio_wait_bit_common"), Verdict.MEDIUM_HANGS),
        (thread("S", None, ""), Verdict.UNCLEAR),
    ],
    ids=str,
)
def test_the_threads_say_whose_fault_it_is(make: Any, what: ThreadState, verdict: Verdict) -> None:
    assert judge(make(what))[0] is verdict


def test_what_the_kernel_has_in_flight_is_the_mediums_and_a_kick_that_was_lost_is_not() -> None:
    ring = thread(call=IO_URING_ENTER, waits_in="io_cqring_wait")
    in_flight = status(completed=5, in_flight=3)
    assert judge(stuck(ring, told=in_flight))[0] is Verdict.MEDIUM_HANGS
    assert judge(stuck(ring, told=status(completed=5, waiting=3)))[0] is Verdict.HANGS


def test_another_thread_that_reads_the_image_does_not_excuse_the_one_with_the_queues() -> None:
    export = thread(call=PREAD, waits_in="request_wait_answer", name="control")
    assert judge(stuck(thread(), export))[0] is Verdict.HANGS


def test_time_without_a_processor_does_not_count() -> None:
    starved = thread("R", -1, "", ran_ns=123)
    assert judge(stuck(starved, until_s=100))[0] is Verdict.WORKS
    assert judge(silent(starved, until_s=100))[0] is Verdict.WORKS


def test_an_agent_that_was_late_does_not_blame_the_backend() -> None:
    told = status(completed=5, waiting=2)
    late = seen(Sample(0.0, True, told), Sample(60.0, True, told, (thread(),)))
    assert late.idle_s == INTERVAL_S
    assert judge(late)[0] is Verdict.WORKS


def test_a_guest_whose_memory_arrives_and_one_that_is_paused_wait_for_other_things() -> None:
    for key, value in (("memory", "listening"), ("state", "connected"), ("state", "draining")):
        told = status(completed=5, waiting=2, **{key: value})  # type: ignore[arg-type]
        assert judge(stuck(thread(), told=told, until_s=60))[0] is Verdict.WORKS


def test_a_medium_that_was_slow_lately_is_given_twice_that() -> None:
    pulse = stuck(thread(), until_s=9)
    pulse = observe(pulse, Sample(10.0, True, status(completed=6)))
    assert pulse.slowest_s == 9
    assert patience_s(pulse) == 18
    told = status(completed=6, waiting=1)
    for second in range(11, 26):
        pulse = observe(pulse, Sample(float(second), True, told, (thread(),)))
    assert judge(pulse)[0] is Verdict.WORKS
    for second in range(26, 40):
        pulse = observe(pulse, Sample(float(second), True, told, (thread(),)))
    assert judge(pulse)[0] is Verdict.HANGS
    forgotten = observe(pulse, Sample(11 + LATELY_S, True, told))
    assert forgotten.slowest_s == 0
    # Who was stopped is not slow.
    pulse = observe(pulse, Sample(40.0, True, told, (thread("T", 0, ""),)))
    assert judge(pulse)[0] is Verdict.HANGS


def test_who_has_never_answered_may_still_be_starting_but_a_medium_is_told() -> None:
    asleep, waits = thread(), thread("D", -1, "")
    starting = seen(*(Sample(float(s), False, None, (asleep,)) for s in range(12)))
    assert judge(starting)[0] is Verdict.UNCLEAR
    opening = seen(*(Sample(float(s), False, None, (waits,)) for s in range(12)))
    assert judge(opening)[0] is Verdict.MEDIUM_HANGS


def test_a_backend_of_an_earlier_release_is_judged_by_its_silence_alone() -> None:
    content = status(completed=5, waiting=2).model_dump(mode="json")
    for queue in content["queues"]:
        del queue["completed"], queue["waiting"]
        queue["in_flight"] = 4
    told = Status.model_validate_json(json.dumps(content))
    assert judge(stuck(thread(), told=told, until_s=60))[0] is Verdict.WORKS
    assert judge(silent(thread()))[0] is Verdict.HANGS


def test_an_answer_ends_the_silence() -> None:
    pulse = observe(silent(thread()), Sample(13.0, True, status()))
    assert judge(pulse)[0] is Verdict.WORKS
    assert not pulse.troubled


def test_the_kernel_tells_what_a_process_does() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            os.kill(child.pid, signal.SIGSTOP)
            os.waitpid(child.pid, os.WUNTRACED)
            (stopped,) = threads_of(child.pid)
            assert stopped.stopped
            assert stopped.name == "sleep"
            assert not stopped.waits_for_medium
        finally:
            child.kill()
    assert threads_of(child.pid) == ()
    me = threading.get_native_id()
    (mine,) = (thread for thread in threads_of(os.getpid()) if thread.tid == me)
    assert mine.wants_processor
    assert mine.ran_ns > 0
