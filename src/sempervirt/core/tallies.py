"""What this process has counted, for `api.metrics`: events by label, and times by powers of two.

There is one kind of histogram, that of crates/histogram: how many times lie in each power of two of
nanoseconds, and their sum. Those of any processes can be added up, and cut into any buckets whose
edges are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

OCTAVES = 40


class Octaves:
    """Times. `counts[k]` lie from 2^k up to 2^(k+1) ns; those below 2 ns in the first."""

    def __init__(self, counts: Sequence[int] = (), sum_ns: int = 0) -> None:
        self.counts = [*counts, *[0] * (OCTAVES - len(counts))]
        self.sum_ns = sum_ns

    def record(self, seconds: float) -> None:
        """Counts one time; a negative one as none."""
        ns = max(0, round(seconds * 1e9))
        self.counts[min(max(ns, 1).bit_length(), OCTAVES) - 1] += 1
        self.sum_ns += ns

    def __add__(self, other: Octaves) -> Octaves:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Octaves(counts, self.sum_ns + other.sum_ns)

    def below(self, exponent: int) -> int:
        """How many are shorter than 2^`exponent` ns."""
        return sum(self.counts[:exponent])

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts how long the block takes, however it ends."""
        began = monotonic()
        try:
            yield
        finally:
            self.record(monotonic() - began)


class Tally:
    """Events, counted for each value of one label; the values that are known are there from the
    beginning, so that the first event is a change.
    """

    def __init__(self, *values: str) -> None:
        self.counts: dict[str, float] = dict.fromkeys(values, 0)

    def know(self, *values: str) -> None:
        """From now on these are there, too."""
        self.counts = {**dict.fromkeys(values, 0), **self.counts}

    def add(self, value: str, count: float = 1) -> None:
        """`count` more."""
        self.counts[value] = self.counts.get(value, 0) + count


# Of the whole process. The labels are documented in docs/reference/metrics.md.
MIGRATIONS = Tally("moved", "stayed", "lost")
MIGRATION_BYTES = Tally("stream", "wire")
MIGRATION_PAGES = Tally("content", "zero", "reference")
MIGRATION_BLACKOUTS = Octaves()
GUARD_DECISIONS = Tally()
STORE_REQUESTS = Octaves()
STORE_FAILURES = Tally("answer", "unknown")
