"""What measurements show, and how two candidates are compared: in pairs.

The machine's speed changes from second to second, so a figure by itself says little. All
candidates of a round are measured one right after the other; what counts is the ratio of two of
them *in the same round*, and the median of that ratio over the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

from sempervirt.disk.tuning.candidates import Candidate

# Differences below this are of no use to anybody, however sure.
RELEVANT = 1.03
CONFIDENCE = 0.9
# Processor time is counted in nanoseconds, but a very short run may have seen none.
_LEAST_CPU_US = 0.001


@dataclass(frozen=True)
class Figures:
    """One measurement. `cpu_us` is the backend's processor time for each request."""

    iops: float
    p99_us: float
    cpu_us: float

    @property
    def per_cpu_second(self) -> float:
        """Requests for each second of processor time."""
        return 1e6 / max(self.cpu_us, _LEAST_CPU_US)


Value = Callable[[Figures], float]
# By round and load. All candidates that are compared have the same rounds.
Series = Mapping[int, Mapping[str, Figures]]
Measured = Mapping[Candidate, Series]


def typical(series: Series, load: str, value: Value) -> float:
    """The median of a value over the rounds."""
    return median(value(figures[load]) for figures in series.values())


def ratios(one: Series, other: Series, value: Value, loads: Iterable[str]) -> list[float]:
    """`value` of one to that of the other in each round that both have; loads count alike."""
    names = list(loads)
    return [
        geometric_mean(value(one[r][load]) / value(other[r][load]) for load in names)
        for r in one
        if r in other
    ]


@dataclass(frozen=True)
class Interval:
    """Where the median of a ratio lies, by the values of the rounds themselves."""

    median: float
    low: float
    high: float
    sure: bool

    @property
    def is_a_difference(self) -> bool:
        """Whether the two differ at all, as far as these rounds can tell."""
        outside = self.low > 1 or self.high < 1
        relevant = self.median >= RELEVANT or self.median <= 1 / RELEVANT
        return self.sure and outside and relevant

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def interval(values: Sequence[float]) -> Interval:
    """The interval of order statistics that holds the true median with CONFIDENCE.

    No distribution is assumed. Fewer than five values cannot give that confidence: the interval
    is then all that was seen, and not `sure`.
    """
    ordered = sorted(values)
    count = len(ordered)
    cut, sure = 0, False
    # The true median lies below the k-th smallest with the probability of fewer than k heads.
    tail = 0.0
    for k in range(count // 2):
        tail += math.comb(count, k) / 2**count
        if 1 - 2 * tail < CONFIDENCE:
            break
        cut, sure = k, True
    return Interval(median(ordered), ordered[cut], ordered[count - 1 - cut], sure)
