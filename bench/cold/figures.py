"""What a series of completions says of the first second, and what is asked for: pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench.kept import Kept
from bench.ratios import paired
from bench.verdicts import Verdict, compare

INTERVAL_MS = 10
"""Length of the intervals in which completions are counted."""
BACK_SHARE, BACK_WINDOW_MS = 0.9, 50
"""The throughput is back when so long a window has this share of what was there before."""

Window = Literal["start_100", "start_half", "start_second", "steady", "over_100", "over_half",
                 "over_second"]  # fmt: skip
WINDOWS: tuple[Window, ...] = (
    "start_100", "start_half", "start_second", "steady", "over_100", "over_half", "over_second",
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """IOPS in the first 100 ms after a start, from 500 to 600 ms, in the first second, before the
    kill; the same after the first completion of the successor. The rest in ms from the kill:
    that first completion, and the return of nine tenths of the throughput (None: not seen).
    """

    start_100: float
    start_half: float
    start_second: float
    steady: float
    over_100: float
    over_half: float
    over_second: float
    stall_ms: float
    back_ms: float | None


@dataclass(frozen=True)
class Effort:
    """µs of a processor for a request: of the threads that serve, among the first and when all is
    warm; and of the thread that searches, for each of the first.
    """

    first_us: float
    warm_us: float
    beside_us: float


def rate(completed: Sequence[int], from_ms: float, to_ms: float) -> float:
    """Completions in a second, over the whole intervals from one time to another."""
    first, last = round(from_ms / INTERVAL_MS), round(to_ms / INTERVAL_MS)
    return sum(completed[first:last]) / ((last - first) * INTERVAL_MS) * 1000


def figures(completed: Sequence[int], killed_ms: float, resumed_ms: float) -> Figures:
    """Of one load; both times count from its beginning, as the intervals do."""
    steady = rate(completed, killed_ms - 600, killed_ms - INTERVAL_MS)
    # The interval in which the successor began is not whole.
    over = (resumed_ms // INTERVAL_MS + 1) * INTERVAL_MS
    return Figures(
        start_100=rate(completed, 0, 100),
        start_half=rate(completed, 500, 600),
        start_second=rate(completed, 0, 1000),
        steady=steady,
        over_100=rate(completed, over, over + 100),
        over_half=rate(completed, over + 500, over + 600),
        over_second=rate(completed, over, over + 1000),
        stall_ms=resumed_ms - killed_ms,
        back_ms=_back_ms(completed, over, steady, killed_ms),
    )


def _back_ms(
    completed: Sequence[int], over_ms: float, steady: float, killed_ms: float
) -> float | None:
    first = round(over_ms / INTERVAL_MS)
    width = BACK_WINDOW_MS // INTERVAL_MS
    for place in range(first, len(completed) - width + 1):
        at = place * INTERVAL_MS
        if rate(completed, at, at + BACK_WINDOW_MS) >= BACK_SHARE * steady:
            return at - killed_ms
    return None


@dataclass(frozen=True)
class Sample:
    """One load, or why there are no figures of it."""

    round: int
    storage: str
    mode: str
    engine: str
    load_average: float
    figures: Figures | None
    effort: Effort | None
    error: str | None = None


@dataclass
class Results(Kept):
    """All measurements of a run; `labels` names the storages."""

    labels: dict[str, str]
    samples: list[Sample] = field(default_factory=list)

    @property
    def failures(self) -> list[Sample]:
        """Measurements that gave no figures."""
        return [one for one in self.samples if one.error is not None]

    def cases(self) -> list[tuple[str, str]]:
        """Storages and modes, in the order of the labels."""
        seen = {(one.storage, one.mode) for one in self.samples}
        return sorted(seen, key=lambda case: (list(self.labels).index(case[0]), case[1]))

    def engines(self) -> list[str]:
        """All engines, `auto` first."""
        return sorted({one.engine for one in self.samples}, key=lambda name: (name != "auto", name))

    def values(self, storage: str, mode: str, engine: str, name: str) -> dict[int, float]:
        """One figure of one engine by round: of `Figures`, or of `Effort`."""
        rounds: dict[int, float] = {}
        for one in self.samples:
            if (one.storage, one.mode, one.engine) == (storage, mode, engine):
                source = one.effort if name.endswith("_us") else one.figures
                value = getattr(source, name, None)
                if value is not None:
                    rounds[one.round] = float(value)
        return rounds

    def speed(self, storage: str, mode: str, name: str) -> list[float]:
        """How quick `auto` is beside `sync`, by the processor time of a request."""
        plain = self.values(storage, mode, "sync", name)
        return paired(plain, self.values(storage, mode, "auto", name))

    def best(self, storage: str, mode: str, window: Window, *, but: str = "") -> dict[int, float]:
        """The best engine's figure by round, `but` left out."""
        rounds: dict[int, float] = {}
        for engine in self.engines():
            if engine != but:
                for number, value in self.values(storage, mode, engine, window).items():
                    rounds[number] = max(rounds.get(number, 0.0), value)
        return rounds

    def shares(self, storage: str, mode: str, engine: str, window: Window) -> list[float]:
        """An engine's figure as a share of the best steady one of the same round."""
        return paired(
            self.values(storage, mode, engine, window), self.best(storage, mode, "steady")
        )

    def against_others(self, storage: str, mode: str, window: Window) -> list[float]:
        """`auto` as a share of the best other engine in the same window of the same round."""
        return paired(
            self.values(storage, mode, "auto", window),
            self.best(storage, mode, window, but="auto"),
        )


FILLED: tuple[tuple[Window, float], ...] = (
    ("start_100", 0.5), ("start_half", 0.9), ("over_100", 0.5), ("over_half", 0.9),
)  # fmt: skip
"""What `auto` must reach of the best steady IOPS of a filled image."""
SPARSE_SHARE = 0.9
"""What `auto` must reach of the best other engine in any window of a sparse image."""
SPEED = (("first_us", 0.9), ("warm_us", 1.0))
"""What `auto` must reach of the speed of `sync`, by processor time; 0.9 where there is nothing to
map."""


def objections(results: Results) -> Iterator[str]:
    """What is beneath what is asked for, beyond the noise."""
    for one in results.failures:
        yield f"{one.storage} {one.mode}: {one.engine} failed in round {one.round}: {one.error}"
    for storage, mode in results.cases():
        for what, ratios, bound in asked(results, storage, mode):
            if compare(ratios, "iops", bound) is Verdict.WORSE:
                seen = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                yield f"{storage} {mode}: {what} is {seen}; {bound} is asked for"


def asked(results: Results, storage: str, mode: str) -> Iterator[tuple[str, list[float], float]]:
    """What is asked for in a case and was measured: what it is, each round, and the least."""
    sparse = storage.endswith("sparse")
    rows: list[tuple[str, list[float], float]] = []
    if sparse:
        rows += [
            (window, results.against_others(storage, mode, window), SPARSE_SHARE)
            for window in WINDOWS
        ]
    else:
        rows += [
            (window, results.shares(storage, mode, "auto", window), bound)
            for window, bound in FILLED
        ]
        plain = results.values(storage, mode, "sync", "steady")
        ratios = paired(results.values(storage, mode, "auto", "steady"), plain)
        rows.append(("steady, to sync", ratios, 1.0))
    rows += [
        (
            f"speed to sync, {name}",
            results.speed(storage, mode, name),
            min(bound, 0.9) if sparse else bound,
        )
        for name, bound in SPEED
    ]
    yield from (row for row in rows if row[1])
