"""What the ratios mean: is a backend slower than the reference, and is a goal reached?"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from bench.ratios import sign_test, spread

Metric = Literal["iops", "p50_us", "cpu_us"]

# A difference of two per cent is not one; nor is one that chance brings about in every tenth run.
TOLERANCE = 0.02
CHANCE = 0.1


class Verdict(Enum):
    """How a backend compares with a bound."""

    BETTER = "better"
    WITHIN_NOISE = "within the noise"
    WORSE = "worse"


def compare(ratios: Sequence[float], metric: Metric, bound: float = 1.0) -> Verdict:
    """Compare paired ratios with a bound on them; for IOPS more is better, otherwise less.

    Beyond the noise is what the median shows with a margin of 2 % *and* a one-sided sign test
    confirms at 10 %: of seven rounds at least six on the same side.
    """
    better = [ratio / bound if metric == "iops" else bound / ratio for ratio in ratios if ratio > 0]
    if not better:
        return Verdict.WITHIN_NOISE
    median = spread(better).median
    if median > 1 + TOLERANCE and sign_test(better) <= CHANCE:
        return Verdict.BETTER
    if median < 1 - TOLERANCE and sign_test([1 / value for value in better]) <= CHANCE:
        return Verdict.WORSE
    return Verdict.WITHIN_NOISE


@dataclass(frozen=True)
class Goal:
    """Bounds on the ratios to the reference; None: not bounded."""

    label: str
    storage: str
    cases: tuple[str, ...]
    p50: float | None
    cpu: float | None
    iops: float | None

    def bounds(self) -> list[tuple[Metric, float]]:
        """The bounds that there are."""
        pairs: list[tuple[Metric, float | None]] = [
            ("p50_us", self.p50),
            ("cpu_us", self.cpu),
            ("iops", self.iops),
        ]
        return [(metric, bound) for metric, bound in pairs if bound is not None]


PEER_GOALS = (
    Goal("tmpfs, depth 1", "tmpfs", ("4k-read-d1", "4k-write-d1"), 0.2, 0.25, 6),
    Goal("tmpfs, depth 32, reads", "tmpfs", ("4k-read-d32",), 0.11, 0.1, 8),
    Goal("tmpfs, depth 32, writes", "tmpfs", ("4k-write-d32",), 0.3, 0.22, 3.3),
    Goal("tmpfs, 2 queues", "tmpfs", ("4k-read-d32-q2", "4k-write-d32-q2"), 0.18, 0.2, 5.5),
    Goal("cached, depth 32", "cached", ("4k-read-d32", "4k-write-d32"), 0.42, 0.48, 3.2),
    Goal("O_DIRECT reads", "direct", ("4k-read-d32", "4k-read-d128"), 0.75, 0.8, 1.3),
    Goal("O_DIRECT reads, depth 1", "direct", ("4k-read-d1",), 0.9, 1.0, None),
    Goal("O_DIRECT writes, depth 32", "direct", ("4k-write-d32",), 0.85, 0.7, 1.2),
    Goal("both ends polling", "tmpfs", ("4k-read-d1-poll",), 0.13, 0.15, 9),
)
"""Where the data path shall stand, as ratios to qemu-storage-daemon with aio=io_uring."""

COST_GOALS = (
    Goal("tracking and the map", "null", ("4k-read-d32", "4k-write-d32"), None, None, 0.95),
)
"""What they may cost together at depth 32, as ratios to semper-blkd without either."""
