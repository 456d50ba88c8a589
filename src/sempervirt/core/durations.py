"""Time values: durations as people read them, and back-off. Nobody here reads a clock."""

from __future__ import annotations

from dataclasses import dataclass

NS_PER_MS = 1_000_000


def elapsed_ms(start_ns: int | None, end_ns: int | None) -> float | None:
    """Milliseconds from one reading of a clock to another; None when either is missing."""
    if start_ns is None or end_ns is None:
        return None
    return (end_ns - start_ns) / NS_PER_MS


def format_duration(seconds: float) -> str:
    """Two units at most: "850 ms", "12 s", "3 min 20 s", "5 h 2 min", "3 d 4 h"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = int(seconds)
    for size, unit, rest, rest_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            small = whole % size // rest
            return f"{whole // size} {unit}" + (f" {small} {rest_unit}" if small else "")
    return f"{whole} s"


@dataclass(frozen=True)
class Backoff:
    """Delays that double: none for the first `free` failures, then `first_s` … `ceiling_s`."""

    free: int
    first_s: float
    ceiling_s: float

    def delay_s(self, failures: int) -> float:
        """How long to wait after that many failures in a row (1 = the first)."""
        doublings = failures - self.free - 1
        if doublings < 0:
            return 0.0
        return min(self.ceiling_s, self.first_s * 2.0 ** min(doublings, 63))

    def at_ceiling(self, failures: int) -> bool:
        """Whether the delay after that many failures no longer grows."""
        return self.delay_s(failures) >= self.ceiling_s
