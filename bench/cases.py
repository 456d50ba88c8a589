"""What is asked of a backend in one measurement."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["randread", "randwrite"]


@dataclass(frozen=True, order=True)
class Case:
    """One load on one queue layout. Sizes in bytes, `depth` for each queue."""

    block_size: int
    mode: Mode
    depth: int
    queues: int = 1
    polling: bool = False

    @property
    def name(self) -> str:
        """A short name, unique among cases: `4k-read-d32`, `4k-write-d32-q2`, `4k-read-d1-poll`."""
        parts = [f"{self.block_size >> 10}k", self.mode.removeprefix("rand"), f"d{self.depth}"]
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
"""Everything, as SPECIFICATION.md shows it."""

BY_NAME = {case.name: case for case in FULL}
