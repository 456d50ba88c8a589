"""What was seen of layers, and what is asked of them: pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.kept import Kept
from bench.ratios import paired, spread


@dataclass(frozen=True)
class Seen:
    """Figures of one measurement, or why there are none. `part`, `where` and `what` say which it
    is; `by` is what was measured, of those that are compared.
    """

    part: str
    where: str
    what: str
    by: str
    round: int
    figures: dict[str, float]
    error: str | None = None


@dataclass(frozen=True)
class Asked:
    """A bound on a figure of `by`: of its ratio to that of `to`, or of the figure itself.

    `places`: where; all if it is empty. Of what is `more` the better, the bound is the least.
    """

    part: str
    whats: tuple[str, ...]
    figure: str
    by: str
    to: str | None
    bound: float
    more: bool = False
    places: tuple[str, ...] = ()

    def is_about(self, part: str, where: str, what: str) -> bool:
        """Whether it bounds that."""
        here = not self.places or where.split(maxsplit=1)[0] in self.places
        return self.part == part and what in self.whats and here


PLAIN = ("read d1", "write d1", "read d32", "write d32", "read 4×d32", "write 4×d32")
SETTLED = ("read d1", "read d32", "rewrite d1", "rewrite d32")
FIRST = ("first d1", "first d32")
ON_DISK = ("cached", "direct")

ASKED = (
    Asked("plain", PLAIN, "p50_us", "no layer", "bare", 1.02),
    Asked("plain", PLAIN, "cpu_us", "no layer", "bare", 1.02),
    Asked("plain", PLAIN, "iops", "no layer", "bare", 1 / 1.02, more=True),
    Asked("chain", SETTLED, "p50_us", "four layers", "no layer", 1.10),
    Asked("chain", SETTLED, "cpu_us", "four layers", "no layer", 1.15),
    Asked("chain", FIRST, "p50_us", "four layers", "no layer", 1.3, places=ON_DISK),
    Asked("chain", FIRST, "p50_us", "four layers", "no layer", 2.2, places=("tmpfs",)),
    Asked("chain", ("flush, new",), "flush_us", "four layers", "no layer", 2.0, places=ON_DISK),
    Asked("chain", ("flush",), "flush_us", "four layers", "no layer", 1.1, places=ON_DISK),
    Asked("chain", ("64k read, alternating",), "p50_us", "one layer", "no layer", 2.0),
    Asked("chain", ("read d32", "rewrite d32", "first d32"), "iops", "four layers", "qcow2", 3.0,
          more=True),
    Asked("pause", ("snapshots",), "beyond_ms", "blkd", None, 5.0),
    Asked("pause", ("growth",), "memory", "blkd", None, 1.1),
    Asked("pause", ("growth",), "files", "blkd", None, 1.0),
    Asked("pause", ("growth",), "descriptors", "blkd", None, 1.1),
    Asked("pause", ("growth",), "pause", "blkd", None, 1.5),
    Asked("pause", ("map",), "mib_per_tib", "blkd", None, 64.0),
    Asked("merge", ("write 2k/s", "write d32"), "p99_us", "merging", "at rest", 1.5),
    Asked("merge", ("layers left",), "count", "blkd", None, 1.0),
)  # fmt: skip


@dataclass
class Results(Kept):
    """All measurements of a run."""

    seen: list[Seen] = field(default_factory=list)

    @property
    def failures(self) -> list[Seen]:
        """Measurements that gave no figures."""
        return [one for one in self.seen if one.error is not None]

    def cases(self) -> list[tuple[str, str, str]]:
        """Parts, places and loads, in the order in which they were seen first."""
        return list(dict.fromkeys((one.part, one.where, one.what) for one in self.seen))

    def values(self, case: tuple[str, str, str], by: str, figure: str) -> dict[int, float]:
        """One figure by round."""
        return {
            one.round: one.figures[figure]
            for one in self.seen
            if (one.part, one.where, one.what) == case and one.by == by and figure in one.figures
        }

    def ratios(self, case: tuple[str, str, str], asked: Asked) -> list[float]:
        """What the bound is held against, round by round."""
        mine = self.values(case, asked.by, asked.figure)
        if asked.to is None:
            return list(mine.values())
        return paired(mine, self.values(case, asked.to, asked.figure))


@dataclass(frozen=True)
class Answer:
    """A bound and what was seen."""

    case: tuple[str, str, str]
    asked: Asked
    ratios: list[float]

    @property
    def kept(self) -> bool:
        """By the median."""
        median = spread(self.ratios).median
        return median >= self.asked.bound if self.asked.more else median <= self.asked.bound


def answers(results: Results) -> Iterator[Answer]:
    """Each bound that something was measured for."""
    for case in results.cases():
        for asked in ASKED:
            if asked.is_about(*case) and (ratios := results.ratios(case, asked)):
                yield Answer(case, asked, ratios)
