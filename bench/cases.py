"""What is asked of a backend in one measurement."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["randread", "randwrite"]


@dataclass(frozen=True, order=True)
class Case:
    """One load on one queue layout. Sizes in bytes, `depth` for each queue.

    With a `rate` requests arrive so often in a second, at random instants and over all queues,
    and at most `depth` are in flight; otherwise `depth` are in flight all the time.
    """

    block_size: int
    mode: Mode
    depth: int
    queues: int = 1
    polling: bool = False
    rate: int | None = None

    @property
    def name(self) -> str:
        """A short name, unique: `4k-read-d32`, `4k-write-d32-q2`, `4k-read-d1-poll`,
        `4k-read-20k`."""
        how_many = f"d{self.depth}" if self.rate is None else f"{self.rate // 1000}k"
        parts = [f"{self.block_size >> 10}k", self.mode.removeprefix("rand"), how_many]
        if self.queues > 1:
            parts.append(f"q{self.queues}")
        if self.polling:
            parts.append("poll")
        return "-".join(parts)


def _both(block_size: int, depth: int, queues: int = 1) -> tuple[Case, Case]:
    return (
        Case(block_size, "randread", depth, queues),
        Case(block_size, "randwrite", depth, queues),
    )


K4, K128 = 4 << 10, 128 << 10

PARITY = (*_both(K4, 1), *_both(K4, 32))
"""What `--check` decides upon, on tmpfs and with O_DIRECT."""

FULL = (
    *PARITY,
    *_both(K4, 128),
    *_both(K128, 32),
    *_both(K4, 32, queues=2),
    Case(K4, "randread", 1, polling=True),
)
"""Everything, as docs/reference/measurements/disks.md shows it."""

RATES = tuple(Case(K4, "randread", 64, rate=rate) for rate in (2_000, 20_000, 100_000))
"""Requests at a given rate, to see what waiting for them costs; only when asked for."""

BY_NAME = {case.name: case for case in (*FULL, *RATES)}
