"""Who drops out early, who wins, and why.

The objective: the most requests for each second of processor time *among the candidates that
hold the bounds*: at every load a p99 of at most `latency` times the best candidate's, and at
least the share `throughput` of the best candidate's requests per second. Without bounds, one
thread that never polls would always win, and the guest would pay.

A bound is missed when the median of the rounds misses it *and* the rounds are sure that there is a
difference at all: on a busy machine somebody always has the luckiest p99.

Who cannot be told from the best within the noise of the rounds is as good as the best; of all
those the simplest is taken (`Candidate.simplicity`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from sempervirt.disk.tuning.bounds import Bounds
from sempervirt.disk.tuning.candidates import Candidate
from sempervirt.disk.tuning.figures import (
    Figures,
    Interval,
    Measured,
    Series,
    Value,
    interval,
    ratios,
    typical,
)

Best = Mapping[str, Candidate]

# A first look is coarse: who misses a bound by less than this, in the round that was the kindest,
# may still hold it. One disturbed round must not throw out the best.
SLACK = 1.25


@dataclass(frozen=True)
class Weakness:
    """How a candidate compares with the best of one kind, at the load where it is weakest.

    `ratio` is how many times worse it is; `excess` above 1: it misses the bound by that factor.
    """

    ratio: float
    excess: float
    load: str


@dataclass(frozen=True)
class Standing:
    """How a candidate stands. `efficiency`: requests for each second of processor time."""

    candidate: Candidate
    efficiency: float
    latency: Weakness
    throughput: Weakness

    @property
    def excess(self) -> float:
        """Above 1: a bound is missed, by that factor."""
        return max(self.latency.excess, self.throughput.excess)

    def objection(self) -> str:
        """Which bound is missed, in words; empty if none is."""
        if self.latency.excess > 1:
            return f"p99 {self.latency.ratio:.1f} × best at {self.latency.load}"
        if self.throughput.excess > 1:
            return f"throughput {1 / self.throughput.ratio:.2f} × best at {self.throughput.load}"
        return ""


@dataclass(frozen=True)
class Decision:
    """The winner, why, and what became of the others.

    `as_good` cannot be told from the most efficient one. `holds` is false when no candidate holds
    every bound, and the one that comes nearest was taken.
    """

    winner: Candidate
    why: str
    holds: bool
    as_good: tuple[Candidate, ...]
    standings: tuple[Standing, ...]
    reasons: dict[Candidate, str]


def _p99(figures: Figures) -> float:
    return figures.p99_us


def _time_each(figures: Figures) -> float:
    """The reverse of throughput, so that less is better, as for latencies."""
    return 1 / figures.iops


def _per_cpu_second(figures: Figures) -> float:
    return figures.per_cpu_second


def loads_of(series: Series) -> list[str]:
    """The names of the loads."""
    return list(next(iter(series.values())))


def standings(measured: Measured, bounds: Bounds, *, kindly: bool = False) -> list[Standing]:
    """All candidates, the best first: those that hold the bounds, by efficiency.

    Compared with the best is the median round, or `kindly` the best end of what is plausible.
    """
    loads = loads_of(next(iter(measured.values())))
    quickest = {load: _best(measured, load, _p99) for load in loads}
    widest = {load: _best(measured, load, _time_each) for load in loads}
    slack = SLACK if kindly else 1.0

    def weakness(series: Series, best: Best, value: Value, bound: float) -> Weakness:
        seen = {load: _versus(series, measured[best[load]], load, value) for load in loads}
        return max(
            (_weakness(seen[load], load, bound * slack, kindly=kindly) for load in loads),
            key=lambda found: (found.excess, found.ratio),
        )

    found = [
        Standing(
            candidate,
            geometric_mean(typical(series, load, _per_cpu_second) for load in loads),
            weakness(series, quickest, _p99, bounds.latency),
            weakness(series, widest, _time_each, 1 / bounds.throughput),
        )
        for candidate, series in measured.items()
    ]
    return sorted(found, key=_rank)


def _weakness(seen: Interval, load: str, bound: float, *, kindly: bool) -> Weakness:
    ratio = seen.low if kindly else seen.median
    sure = seen.low > 1
    return Weakness(ratio, ratio / bound if sure else min(1.0, ratio / bound), load)


def eliminate(
    measured: Measured, bounds: Bounds, keep: int
) -> tuple[list[Candidate], dict[Candidate, str]]:
    """Who stays in the race, and why each of the others does not.

    The first `keep` stay, and with them those that the bounds are measured by: the best p99 and
    the best throughput at each load. Otherwise what is left would be compared with nobody.
    """
    found = standings(measured, bounds, kindly=True)
    leader = found[0]
    guards = _guards(measured)
    stay, reasons = [], {}
    for place, standing in enumerate(found):
        if place < keep or standing.candidate in guards:
            stay.append(standing.candidate)
            continue
        share = standing.efficiency / leader.efficiency
        reasons[standing.candidate] = standing.objection() or f"{share:.2f} × leader's efficiency"
    return stay, reasons


def decide(measured: Measured, bounds: Bounds) -> Decision:
    """The winner among candidates that have all rounds in common."""
    found = standings(measured, bounds)
    holding = [standing for standing in found if standing.excess <= 1]
    if not holding:
        return _nearest(found)
    best = holding[0]
    against = {
        other.candidate: _advantage(measured, best.candidate, other.candidate)
        for other in holding[1:]
    }
    as_good = [candidate for candidate, seen in against.items() if not _is_worse(seen)]
    winner = min([best.candidate, *as_good], key=lambda candidate: candidate.simplicity)
    reasons = {}
    for standing in found:
        candidate = standing.candidate
        if candidate == winner:
            continue
        reasons[candidate] = standing.objection() or _loss(candidate, best, against)
    return Decision(
        winner=winner,
        why=_why(winner, best.candidate, against, len(holding), len(found)),
        holds=True,
        as_good=tuple(as_good),
        standings=tuple(found),
        reasons=reasons,
    )


def _why(
    winner: Candidate,
    best: Candidate,
    against: dict[Candidate, Interval],
    holding: int,
    total: int,
) -> str:
    if winner != best:
        return (
            f"within the noise of the most efficient ({best}: {against[winner]} times its "
            "requests per processor-second), and simpler"
        )
    if not against:
        return f"the only one of {total} that holds the bounds"
    rival, seen = next(iter(against.items()))
    if not _is_worse(seen):
        return f"within the noise of the next ({rival}: {seen}), and simpler"
    return (
        f"the most requests per processor-second of the {holding} that hold the bounds: "
        f"{seen} times the next ({rival})"
    )


def _loss(candidate: Candidate, best: Standing, against: dict[Candidate, Interval]) -> str:
    if candidate == best.candidate:
        return "most efficient, within the noise"
    if not _is_worse(against[candidate]):
        return "as good, not as simple"
    return f"{1 / against[candidate].median:.2f} × best's efficiency"


def _nearest(found: Sequence[Standing]) -> Decision:
    winner = min(found, key=lambda s: (s.excess, s.candidate.simplicity))
    return Decision(
        winner=winner.candidate,
        why=f"no candidate holds every bound; this one comes nearest ({winner.objection()})",
        holds=False,
        as_good=(),
        standings=tuple(found),
        reasons={s.candidate: s.objection() for s in found if s is not winner},
    )


def _rank(standing: Standing) -> tuple[float, float, tuple[int, int, int]]:
    """Candidates that hold the bounds come first, by efficiency; the others by what they miss."""
    excess = standing.excess if standing.excess > 1 else 0.0
    return excess, -standing.efficiency, standing.candidate.simplicity


def _best(measured: Measured, load: str, value: Value) -> Candidate:
    return min(measured, key=lambda c: (typical(measured[c], load, value), c.simplicity))


def _guards(measured: Measured) -> set[Candidate]:
    loads: Iterable[str] = loads_of(next(iter(measured.values())))
    return {_best(measured, load, value) for load in loads for value in (_p99, _time_each)}


def _versus(series: Series, best: Series, load: str, value: Value) -> Interval:
    return interval(ratios(series, best, value, [load]))


def _is_worse(best_to_it: Interval) -> bool:
    """Whether the rounds show that a candidate is less efficient than the best."""
    return best_to_it.is_a_difference and best_to_it.median > 1


def _advantage(measured: Measured, one: Candidate, other: Candidate) -> Interval:
    loads = loads_of(measured[one])
    return interval(ratios(measured[one], measured[other], _per_cpu_second, loads))
