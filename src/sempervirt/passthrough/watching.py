"""Whether a mediator works, by its silence and its threads. Pure.

One thread of a mediator does the guest's requests and answers questions: a mediator that answers
works, whatever its requests wait for. One that is silent hangs, or waits for a medium, or for a
processor:

| its threads | so | what follows |
|---|---|---|
| one is stopped (`T`, `t`) | it does not come back by itself | it is killed |
| one sleeps in a call on the image, or for a page of it | the medium hangs | nothing: its spare would hang as well |
| one wants a processor | the host is busy, or it goes round in circles | it is killed when that lasts |
| anything else | it hangs | it is killed |

To be wrong costs the guest a take-over. Without a spare nobody is killed.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from sempervirt.host.thread_states import ThreadState

# As for disks (`disk.liveness`): ten times the longest request that a disk which works has taken.
STALL_S = 5.0
STOPPED_S = 0.5
BUSY_S = 30.0
# The longest that one question counts: an agent that is late was perhaps late in asking, too.
INTERVAL_S = 3.0


class Verdict(Enum):
    """What a mediator is."""

    WORKS = "works"
    HANGS = "hangs"
    MEDIUM_HANGS = "medium hangs"


def judge(silent_s: float, threads: Sequence[ThreadState]) -> Verdict:
    """Of a mediator that has not answered for so long."""
    if silent_s >= STOPPED_S and any(thread.stopped for thread in threads):
        return Verdict.HANGS
    if silent_s < STALL_S:
        return Verdict.WORKS
    if any(thread.waits_for_medium for thread in threads):
        return Verdict.MEDIUM_HANGS
    busy = any(thread.wants_processor for thread in threads)
    return Verdict.WORKS if busy and silent_s < BUSY_S else Verdict.HANGS
