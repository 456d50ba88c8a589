"""Whether a backend works: what is concluded from its answers, its counters and its threads. Pure.

    Sample ─► observe ─► Pulse ─► judge ─► Verdict
                           │
                           └ how long it has been silent, or had requests and completed none

A process that exists is not one that works. Two things show that it does not:

- **It is silent**: its control socket, which no request and no medium can hold up, does not answer.
- **It completes nothing**: requests are available in a ring or in flight, and not one is given back.

Neither alone says whose fault that is, so the kernel is asked what the threads do:

| the threads | so | what follows |
|---|---|---|
| one is stopped (`T`, `t`) | the backend does not come back by itself | it is killed |
| one sleeps in a call on the image, or for a page of it, or (`D`) in the kernel | the medium hangs | nothing is killed: the next backend would hang as well, and a request in the kernel keeps the image's lock |
| io_uring has requests in flight | the kernel has them: the medium hangs | the same |
| they want a processor and get none | the host is starved | that time does not count |
| anything else: they sleep on each other, or go round in circles | the backend hangs | it is killed |
| what they do cannot be read | nobody knows | told, and not killed |

**How long is too long**: `Policy.stall_s`, and never shorter than twice the longest time without a
completion from which the same medium has lately come back by itself (`Pulse.slowest_s`, forgotten
after `LATELY_S`). Five seconds are ten times the longest request that a disk which works has taken
here, and a sixth of the 30 s after which Linux gives up on a SCSI command; and to be wrong costs the
guest one take-over, some milliseconds, because what is in flight is done again. Time counts only as
far as this agent was awake to see it: an interval between two samples counts at most `INTERVAL_S`.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum

from sempervirt.disk.answers import BackendState, GuestMemory, Status
from sempervirt.disk.state import STALL_S
from sempervirt.host.thread_states import IO_URING_ENTER, ThreadState

LATELY_S = 600.0
# The longest that one interval counts: an agent that is late was perhaps late in asking, too.
INTERVAL_S = 3.0
LOOK_AFTER_S = 0.5
# A thread that ran for this part of an interval had a processor.
HAD_PROCESSOR = 0.1
# What a data thread is called (crates/blkd/src/threads.rs).
DATA_THREAD = "queues-"


class Verdict(Enum):
    """What a backend is."""

    WORKS = "works"
    HANGS = "hangs"
    MEDIUM_HANGS = "medium hangs"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Sample:
    """What was seen at the time `at`. Without a `status` it did not answer; with one that could not
    be understood it did, and `status` is None as well. `threads` are only looked at in need.
    """

    at: float
    answered: bool
    status: Status | None = None
    threads: Collection[ThreadState] = ()

    @property
    def pending(self) -> int:
        """Requests that are available or in flight."""
        if self.status is None or not _serves(self.status):
            return 0
        return sum(queue.in_flight + (queue.waiting or 0) for queue in self.status.queues)

    @property
    def completed(self) -> int | None:
        """Requests that were given back; None where that is not known."""
        if self.status is None or any(queue.completed is None for queue in self.status.queues):
            return None
        return sum(queue.completed or 0 for queue in self.status.queues)


def _serves(status: Status) -> bool:
    """Whether requests are to be done now: not while the guest's memory arrives, or at the end."""
    return status.state is BackendState.RUNNING and status.memory is GuestMemory.COMPLETE


@dataclass(frozen=True)
class Pulse:
    """What is known of a backend. `silent_s` and `idle_s` are the time that counts: without an
    answer, and with requests of which none is completed.

    `slowest_s` is the longest `idle_s` that ended by itself, at `slowest_at`.
    """

    last: Sample | None = None
    silent_s: float = 0.0
    idle_s: float = 0.0
    slowest_s: float = 0.0
    slowest_at: float = 0.0
    heard: bool = False

    @property
    def troubled(self) -> bool:
        """Whether there is a doubt."""
        return self.silent_s > 0 or self.idle_s > 0

    def needs_threads(self, sample: Sample) -> bool:
        """Whether the threads are worth a look: that costs some reads of /proc."""
        if max(self.silent_s, self.idle_s) > LOOK_AFTER_S or (self.heard and not sample.answered):
            return True
        still = self.last is not None and self.last.completed == sample.completed
        return still and sample.pending > 0


def observe(pulse: Pulse, sample: Sample) -> Pulse:
    """The pulse after one more sample."""
    before = pulse.last
    counted_s = 0.0 if before is None else _counted_s(before, sample)
    if pulse.slowest_s and sample.at - pulse.slowest_at > LATELY_S:
        pulse = replace(pulse, slowest_s=0.0)
    pulse = replace(pulse, last=sample, heard=pulse.heard or sample.answered)
    if not sample.answered:
        return replace(pulse, silent_s=pulse.silent_s + counted_s)
    pulse = replace(pulse, silent_s=0.0)
    if before is None or not before.answered:
        # Nobody knows what was completed meanwhile.
        return replace(pulse, idle_s=0.0)
    moved = sample.completed is None or sample.completed != before.completed
    if moved or not before.pending or not sample.pending:
        if moved and pulse.idle_s > pulse.slowest_s:
            pulse = replace(pulse, slowest_s=pulse.idle_s, slowest_at=sample.at)
        return replace(pulse, idle_s=0.0)
    return replace(pulse, idle_s=pulse.idle_s + counted_s)


def _counted_s(before: Sample, sample: Sample) -> float:
    """So much of the interval says something about the backend."""
    interval_s = sample.at - before.at
    ran = {thread.tid: thread.ran_ns for thread in before.threads}
    for thread in sample.threads:
        if thread.wants_processor and thread.tid in ran:
            share = (thread.ran_ns - ran[thread.tid]) / 1e9 / max(interval_s, 1e-3)
            if share < HAD_PROCESSOR:
                return 0.0
    return min(interval_s, INTERVAL_S)


def patience_s(pulse: Pulse, stall_s: float = STALL_S) -> float:
    """How long a backend may be silent, or complete nothing."""
    return max(stall_s, 2 * pulse.slowest_s)


def judge(pulse: Pulse, stall_s: float = STALL_S) -> tuple[Verdict, str]:
    """What the backend is, and the evidence in one line."""
    sample = pulse.last
    trouble_s = max(pulse.silent_s, pulse.idle_s)
    if sample is None or trouble_s < stall_s:
        return Verdict.WORKS, ""
    # Who was stopped is not slow.
    stopped = any(thread.stopped for thread in sample.threads)
    if not stopped and trouble_s < patience_s(pulse, stall_s):
        return Verdict.WORKS, ""
    if pulse.silent_s >= pulse.idle_s:
        what = f"its control socket has not answered for {pulse.silent_s:.0f} s"
        threads = list(sample.threads)
    else:
        pending = f"{sample.pending} requests wait or are in flight"
        what = f"{pending}, and none was completed for {pulse.idle_s:.0f} s"
        threads = [thread for thread in sample.threads if thread.name.startswith(DATA_THREAD)]
        threads += [thread for thread in sample.threads if thread.name.startswith("iou-")]
    verdict, shown = _blame(sample, threads)
    if verdict is Verdict.HANGS and not pulse.heard:
        verdict = Verdict.UNCLEAR  # it may still be starting
    seen = "; ".join(str(thread) for thread in shown[:4]) or "its threads cannot be seen"
    return verdict, f"{what}; {seen}"


def _blame(sample: Sample, threads: list[ThreadState]) -> tuple[Verdict, list[ThreadState]]:
    if stopped := [thread for thread in threads if thread.stopped]:
        return Verdict.HANGS, stopped
    if waiting := [thread for thread in threads if thread.waits_for_medium]:
        return Verdict.MEDIUM_HANGS, waiting
    status = sample.status
    if status is not None and any(queue.in_flight for queue in status.queues):
        kernel_has_it = [thread for thread in threads if thread.call == IO_URING_ENTER]
        if kernel_has_it:
            return Verdict.MEDIUM_HANGS, kernel_has_it
    asleep = (thread for thread in threads if thread.state == "S")
    unknown = [thread for thread in asleep if thread.call is None and not thread.waits_in]
    if not threads or unknown:
        return Verdict.UNCLEAR, unknown
    return Verdict.HANGS, threads
