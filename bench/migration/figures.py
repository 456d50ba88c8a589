"""What a migration bench keeps, and what follows from it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.kept import Kept
from bench.ratios import Spread, paired, spread

OURS = "wired"
# Stands for whichever of the other ways was the best, for each metric and round.
BEST = "best"
Metric = Literal["wire_mb", "total_s", "migrate_s", "blackout_ms", "stopped_ms", "echo_ms", "cpu_s"]


@dataclass(frozen=True)
class Figures:
    """One move. `total_s` counts from the way's first preparation, `migrate_s` from the command.

    `wire_mb` is what the link's interfaces counted in both directions, headers included (10^6
    bytes). `blackout_ms`: between the heartbeats before and after; `stopped_ms`: what the guest's
    clock lost; `echo_ms`: the longest silence of its TCP echo, as a client outside heard it.
    `cpu_s` is of all processes of both hosts, the guest's own work included.
    """

    wire_mb: float
    total_s: float
    migrate_s: float
    blackout_ms: float
    stopped_ms: float
    echo_ms: float
    cpu_s: float


@dataclass(frozen=True)
class Sample:
    """One measurement, or why there is none. `told`: what QEMU and semper-wired say of it."""

    round: int
    link: str
    guest: str
    way: str
    load_average: float
    figures: Figures | None
    told: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Results(Kept):
    """All measurements of a run."""

    labels: dict[str, str]
    samples: list[Sample] = field(default_factory=list)

    @property
    def failures(self) -> list[Sample]:
        """Measurements that gave no figures."""
        return [sample for sample in self.samples if sample.figures is None]

    def present(self, name: Literal["link", "guest", "way"]) -> list[str]:
        """The links, guests or ways that were measured, in the order of the settings."""
        seen = {getattr(sample, name) for sample in self.samples}
        return [known for known in self.settings[f"{name}s"] if known in seen]

    def values(self, link: str, guest: str, way: str, metric: Metric) -> dict[int, float]:
        """A metric by round; with BEST as the way the least of all ways but ours."""
        if way == BEST:
            return self._best(link, guest, metric)
        return {
            sample.round: float(getattr(sample.figures, metric))
            for sample in self.samples
            if (sample.link, sample.guest, sample.way) == (link, guest, way)
            and sample.figures is not None
        }

    def _best(self, link: str, guest: str, metric: Metric) -> dict[int, float]:
        best: dict[int, float] = {}
        for way in self.present("way"):
            if way != OURS:
                for number, value in self.values(link, guest, way, metric).items():
                    best[number] = min(value, best.get(number, value))
        return best

    def absolute(self, link: str, guest: str, way: str, metric: Metric) -> Spread | None:
        """The metric over the rounds; None without a measurement."""
        values = self.values(link, guest, way, metric)
        return spread(list(values.values())) if values else None

    def ratios(
        self, link: str, guest: str, way: str, metric: Metric, reference: str
    ) -> list[float]:
        """The ratio to another way, round by round."""
        return paired(
            self.values(link, guest, way, metric), self.values(link, guest, reference, metric)
        )


@dataclass(frozen=True)
class Goal:
    """A bound on the median ratio of `wired` to another way; without a `guest` for every one."""

    label: str
    metric: Metric
    reference: str
    bound: float
    guest: str | None = None


GOALS = (
    Goal("a fifth of the bytes of the best other way", "wire_mb", BEST, 0.2, "cached"),
    Goal("never 3 % more bytes than the best other way", "wire_mb", BEST, 1.03),
    Goal("no longer blackout than stock", "blackout_ms", "stock", 1.0),
    Goal("no longer blackout than the best other way", "blackout_ms", BEST, 1.0),
    Goal("no longer in all than the best other way", "total_s", BEST, 1.0),
)


@dataclass(frozen=True)
class Judgement:
    """What became of a goal, for one guest on one link."""

    goal: Goal
    link: str
    guest: str
    ratios: list[float]

    @property
    def reached(self) -> bool:
        """Whether the median keeps the bound."""
        return spread(self.ratios).median <= self.goal.bound


def judgements(results: Results) -> Iterator[Judgement]:
    """Every goal that was measured, for each guest and link."""
    for goal in GOALS:
        for link in results.present("link"):
            for guest in results.present("guest"):
                if goal.guest in {None, guest}:
                    ratios = results.ratios(link, guest, OURS, goal.metric, goal.reference)
                    if ratios:
                        yield Judgement(goal, link, guest, ratios)
