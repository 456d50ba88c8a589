"""What a bench can be asked to compare: with the peers, or with itself less of its features."""

from dataclasses import dataclass

from bench.backends import CONTRIB
from bench.cases import FULL
from bench.sections import BENCH, COST, LOOK, Section
from bench.verdicts import COST_GOALS, PEER_GOALS, Goal


@dataclass(frozen=True)
class Suite:
    """Backends and cases that belong together; ratios are to `reference`.

    `rounds` multiplies the rounds asked for: small differences need more of them.
    """

    name: str
    title: str
    subject: str
    reference: str
    backends: tuple[str, ...]
    storages: tuple[str, ...]
    cases: tuple[str, ...]
    goals: tuple[Goal, ...]
    section: Section
    rounds: int = 1


PEERS = Suite(
    "peers",
    "semper-blkd and its peers",
    subject="blkd",
    reference="qsd-uring",
    backends=("blkd", "qsd-uring", "qsd-threads", "qsd-native", CONTRIB),
    storages=("tmpfs", "cached", "direct", "null"),
    cases=tuple(case.name for case in FULL),
    goals=PEER_GOALS,
    section=BENCH,
)

COSTS = Suite(
    "cost",
    "what tracking and the map cost",
    subject="tracking+map",
    reference="bare",
    backends=("bare", "tracking", "map", "tracking+map"),
    storages=("null",),
    cases=("4k-read-d32", "4k-write-d32"),
    goals=COST_GOALS,
    section=COST,
    rounds=3,
)

LOOKS = Suite(
    "look",
    "what looking for requests before a sleep (--poll-us) buys with O_DIRECT",
    subject="look-50",
    reference="look-0",
    backends=("look-0", "look-50", "look-1000"),
    storages=("direct",),
    cases=("4k-read-d1", "4k-write-d1", "4k-read-d32", "4k-write-d32"),
    goals=(),
    section=LOOK,
)

SUITES = {suite.name: suite for suite in (PEERS, COSTS, LOOKS)}
