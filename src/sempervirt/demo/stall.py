"""How long a guest waited for a disk whose backend died: pure.

The guest's probe records every interval of more than 2 ms in which no writer got an answer. The
stall of a kill is the time from SIGKILL to the end of the interval in which the next process
gave its first answers. It counts everything: the death, the lock, QEMU's reconnection, the
handshake, the replay, the interrupt, the guest's own scheduling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from sempervirt.disk.answers import Timeline

STEPS = ("lock_acquired", "accepted", "started", "replayed", "first_completion")
# Throughput is back when so many bins in a row have this share of it: one of 10 ms varies too much.
WINDOW = 5
BACK = 0.9
# How far the clocks of guest and host may be apart after a comparison over virtio-serial.
CLOCK_SLACK_NS = 500_000


class Cause(Enum):
    """Why one backend followed another."""

    KILL = "kill"
    DOUBLE_KILL = "double kill"
    UPGRADE = "upgrade"
    TERMINATE = "terminate"
    HANG = "hang"


@dataclass(frozen=True)
class Stall:
    """One take-over. `ms` from the kill to the guest's next completion, `back_ms` until nine tenths
    of the throughput before are back; None if unknown. `kept`: QEMU's connection went on.
    """

    at_ns: int
    ms: float | None
    steps_ms: Mapping[str, float]
    replayed: int
    cause: Cause
    kept: bool = False
    back_ms: float | None = None


def stall_ms(kill_ns: int, first_completion_ns: int, gaps_ns: Iterable[tuple[int, int]]) -> float:
    """Milliseconds from the kill to the guest's next completion. All times on the host's clock.

    No interval around the new process's first answer means that the guest went without answers
    for less than the probe records; then it is the time to that first answer.
    """
    for start, end in sorted(gaps_ns):
        if end >= first_completion_ns - CLOCK_SLACK_NS and start <= first_completion_ns:
            return (end - kill_ns) / 1e6
    return (first_completion_ns - kill_ns) / 1e6


def back_ms(kill_ns: int, bins: Sequence[tuple[int, int]], bin_ns: int) -> float | None:
    """Milliseconds from the kill until the guest gets nine tenths of what it got before.

    `bins` are the completions in each `bin_ns` (its start on the host's clock, how many), without a
    gap. Looked for is the first `WINDOW` bins behind the kill that together have nine tenths of the
    mean before; None where there are none, or too few bins before the kill to tell. Zero when the
    first ones have: then the kill is not seen at this resolution.
    """
    before = [count for start, count in bins if start + bin_ns <= kill_ns]
    after = [(start, count) for start, count in bins if start >= kill_ns - bin_ns]
    if len(before) < WINDOW:
        return None
    enough = BACK * WINDOW * sum(before) / len(before)
    for first in range(len(after) - WINDOW + 1):
        if sum(count for _, count in after[first : first + WINDOW]) >= enough:
            return max(0.0, (after[first][0] - kill_ns) / 1e6)
    return None


def steps_ms(kill_ns: int, timeline_ns: Timeline) -> dict[str, float]:
    """Milliseconds from the kill to each step of the take-over that was reached."""
    reached = ((step, getattr(timeline_ns, step)) for step in STEPS)
    return {step: (when - kill_ns) / 1e6 for step, when in reached if when is not None}


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; NaN of nothing. `share` is 0.5 for the median."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Spread:
    """Median, 99th percentile and maximum, and of how many."""

    count: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            len(values),
            percentile(values, 0.5),
            percentile(values, 0.99),
            max(values, default=math.nan),
        )


def step_spreads(stalls: Sequence[Stall]) -> dict[str, Spread]:
    """Where the time went: for each step, milliseconds from the kill."""
    return {
        step: Spread.of([stall.steps_ms[step] for stall in stalls if step in stall.steps_ms])
        for step in STEPS
    }
