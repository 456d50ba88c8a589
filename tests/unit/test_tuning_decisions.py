"""What calibration decides: candidates, elimination, the objective, and what is noise."""

from __future__ import annotations

import math
import random
from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.disk.storage import StorageKey
from sempervirt.disk.tuning import plan
from sempervirt.disk.tuning.bounds import Bounds
from sempervirt.disk.tuning.candidates import Candidate, blkd_candidates, qemu_candidates
from sempervirt.disk.tuning.figures import CONFIDENCE, RELEVANT, Figures, interval, ratios
from sempervirt.disk.tuning.judgement import SLACK, decide, eliminate, standings
from sempervirt.disk.tuning.load import Latency, LoadReport, ProcessorTime, figures, loads

TMPFS = StorageKey(kind="tmpfs")
CACHED = StorageKey(kind="ext4", device="d")
DIRECT = StorageKey(kind="ext4", device="d", direct=True)
BLOCK = StorageKey(kind="block", device="d", direct=True)
STORAGES = (TMPFS, TMPFS.model_copy(update={"direct": True}), CACHED, DIRECT, BLOCK)
LOADS = ("d1", "d32")
BOUNDS = Bounds()


Series = dict[int, dict[str, Figures]]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("queues", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("cpus", [1, 2, 6, 128])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_candidates_are_what_can_serve_a_storage(
    storage: StorageKey, queues: int, cpus: int, machine: str
) -> None:
    found = blkd_candidates(storage, queues, cpus, machine)
    engines = {candidate.engine for candidate in found}
    assert found
    assert len(set(found)) == len(found)
    assert found == sorted(found, key=lambda candidate: candidate.simplicity)
    if storage.in_memory:
        assert "uring" not in engines, "io_uring hands each request on tmpfs to another thread"
    if machine != "x86_64" or storage.direct:
        assert "mmap" not in engines
    if storage.direct:
        assert engines <= {"sync", "uring"}
    for candidate in found:
        assert 1 <= candidate.threads_for(queues) <= max(1, min(queues, cpus))
        assert candidate.poll_us == 0 or cpus > 1
    assert {candidate.threads_for(queues) for candidate in found} >= {1}


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_candidates_of_qemu(storage: StorageKey) -> None:
    found = qemu_candidates(storage, 4)
    engines = {candidate.engine for candidate in found}
    assert ("native" in engines) == (storage.direct and not storage.in_memory)
    assert ("io_uring" in engines) == (not storage.in_memory)
    assert {candidate.queues_per_thread for candidate in found} == {4}


def test_which_candidates_there_are() -> None:
    spreads = {(c.engine, c.queues_per_thread) for c in blkd_candidates(CACHED, 4, 4, "x86_64")}
    assert spreads == set(product(("sync", "nowait", "mmap", "uring"), (4, 2, 1)))
    assert str(Candidate("uring", 1, 20)) == "uring, 1 queue a thread, polling 20 µs"
    assert str(Candidate("mmap", 4, 0)) == "mmap, 4 queues a thread, no polling"


def test_what_is_simpler() -> None:
    order = [
        Candidate("sync", 4, 0),
        Candidate("sync", 1, 0),
        Candidate("mmap", 4, 0),
        Candidate("uring", 4, 0),
        Candidate("sync", 4, 20),
        Candidate("sync", 4, 50),
    ]
    for _ in range(5):
        shuffled = random.sample(order, len(order))
        assert sorted(shuffled, key=lambda candidate: candidate.simplicity) == order


@pytest.mark.parametrize("count", range(1, 40))
def test_the_interval_holds_the_median_with_confidence(count: int) -> None:
    """Coverage of order statistics: the median lies outside with the tails of a fair coin."""
    seen = interval(range(count))
    cut = round(seen.low)
    assert (seen.low, seen.high) == (cut, count - 1 - cut)
    assert seen.median == median(range(count))
    outside = 2 * sum(math.comb(count, k) for k in range(cut + 1)) / 2**count
    narrower = outside + 2 * math.comb(count, cut + 1) / 2**count
    assert seen.sure == (count >= 5)
    if seen.sure:
        assert 1 - outside >= CONFIDENCE
        assert 1 - narrower < CONFIDENCE or cut + 1 >= count // 2


@pytest.mark.parametrize(
    ("values", "difference"),
    [
        ([1.5] * 5, True),
        ([1.5] * 4, False),
        ([1.01] * 9, False),
        ([1 / 1.01] * 9, False),
        ([0.5] * 7, True),
        ([1.5, 1.5, 1.5, 1.5, 0.9], False),
        ([1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 0.1], True),
        ([1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 0.2, 0.1], False),
    ],
)
def test_what_is_a_difference(values: list[float], difference: bool) -> None:
    assert interval(values).is_a_difference == difference


def series(cpu: float, p99: float, iops: float, rounds: int = 7) -> Series:
    """The same figures at each load and in each round."""
    return {r: {load: Figures(iops, p99, cpu) for load in LOADS} for r in range(rounds)}


A, B, C = Candidate("sync", 2, 0), Candidate("mmap", 2, 0), Candidate("uring", 1, 20)


def test_the_most_efficient_that_holds_the_bounds_wins() -> None:
    decision = decide(
        {A: series(1.0, 90, 100), B: series(2.0, 40, 100), C: series(3.0, 40, 100)}, BOUNDS
    )
    assert decision.winner == B
    assert decision.holds
    assert "p99 2.2 × best" in decision.reasons[A]
    assert "0.67 × best's efficiency" in decision.reasons[C]
    assert "the most requests per processor-second of the 2" in decision.why


def test_the_throughput_bound() -> None:
    measured = {A: series(1.0, 40, 79), B: series(2.0, 40, 100)}
    decision = decide(measured, BOUNDS)
    assert (decision.winner, decision.why) == (B, "the only one of 2 that holds the bounds")
    assert "throughput 0.79 × best" in decision.reasons[A]
    assert decide(measured, Bounds(throughput=0.75)).winner == A


def test_at_one_load_is_enough_to_miss_a_bound() -> None:
    fine, slow = Figures(100, 10, 1), Figures(100, 30, 1)
    measured = {
        A: {r: {"d1": fine, "d32": slow} for r in range(7)},
        B: {r: {"d1": Figures(100, 10, 2), "d32": Figures(100, 10, 2)} for r in range(7)},
    }
    decision = decide(measured, BOUNDS)
    assert decision.winner == B
    assert decision.reasons[A] == "p99 3.0 × best at d32"


def test_within_the_noise_the_simpler_wins_and_it_is_said() -> None:
    noisy = [0.9, 1.1, 0.95, 1.2, 1.0, 0.92, 1.3]
    better = {r: {load: Figures(100, 10, 1.0 / n) for load in LOADS} for r, n in enumerate(noisy)}
    for simple, other in ((A, B), (A, C), (B, C)):
        decision = decide({other: better, simple: series(1.01, 10, 100)}, BOUNDS)
        assert decision.winner == simple
        assert "within the noise" in decision.why
    reason = decide({B: better, A: series(1.01, 10, 100)}, BOUNDS).reasons[B]
    assert reason == "most efficient, within the noise"


def test_too_few_rounds_tell_nothing() -> None:
    assert decide({A: series(2, 10, 100, 4), B: series(1, 10, 100, 4)}, BOUNDS).winner == A
    assert decide({A: series(2, 10, 100, 5), B: series(1, 10, 100, 5)}, BOUNDS).winner == B


def test_a_sure_but_useless_difference_is_none() -> None:
    assert decide({A: series(1.02, 10, 100), B: series(1.0, 10, 100)}, BOUNDS).winner == A
    assert decide({A: series(1.05, 10, 100), B: series(1.0, 10, 100)}, BOUNDS).winner == B


def test_when_nobody_holds_every_bound_the_nearest_is_taken() -> None:
    quick = {r: {"d1": Figures(10, 1, 1), "d32": Figures(10, 1, 1)} for r in range(7)}
    wide = {r: {"d1": Figures(100, 3, 1), "d32": Figures(100, 3, 1)} for r in range(7)}
    decision = decide({A: quick, B: wide}, BOUNDS)
    assert (decision.winner, decision.holds) == (B, False)
    assert "no candidate holds every bound" in decision.why
    assert "throughput 0.10" in decision.reasons[A]


def test_a_single_candidate_wins() -> None:
    decision = decide({A: series(1, 1, 1)}, BOUNDS)
    assert (decision.winner, decision.reasons, decision.as_good) == (A, {}, ())


figure = st.builds(
    Figures,
    iops=st.floats(10, 1000),
    p99_us=st.floats(1, 100),
    cpu_us=st.floats(0.5, 20),
)
everybody = blkd_candidates(CACHED, 4, 4, "x86_64")
fields = st.dictionaries(
    st.sampled_from(everybody),
    st.fixed_dictionaries(dict.fromkeys(LOADS, figure)),
    min_size=1,
    max_size=16,
)
Field = dict[Candidate, dict[str, Figures]]


def repeat(field: Field, rounds: int = 7) -> dict[Candidate, Series]:
    return {candidate: dict.fromkeys(range(rounds), loads) for candidate, loads in field.items()}


def holds(field: Field, candidate: Candidate, slack: float = 1.0) -> bool:
    """The bounds by their definition."""
    return all(
        field[candidate][load].p99_us
        <= BOUNDS.latency * slack * min(each[load].p99_us for each in field.values())
        and field[candidate][load].iops
        >= BOUNDS.throughput / slack * max(each[load].iops for each in field.values())
        for load in LOADS
    )


def cost(field: Field, candidate: Candidate) -> float:
    return math.prod(field[candidate][load].cpu_us for load in LOADS) ** (1 / len(LOADS))


@given(field=fields)
def test_without_noise_the_objective_is_met_exactly(field: Field) -> None:
    nearly = [c for c in field if holds(field, c, 1 + 1e-9)]
    decision = decide(repeat(field), BOUNDS)
    if not nearly:
        assert not decision.holds
        return
    if not decision.holds:  # at the very edge of a bound
        return
    assert decision.winner in nearly
    surely = [c for c in field if holds(field, c, 1 - 1e-9)]
    least = min((cost(field, c) for c in surely), default=math.inf)
    assert cost(field, decision.winner) <= least * RELEVANT * (1 + 1e-9)
    simpler = [c for c in surely if c.simplicity < decision.winner.simplicity]
    best = min(cost(field, c) for c in nearly)
    assert all(cost(field, c) >= best * RELEVANT * (1 - 1e-9) for c in simpler)


@given(field=fields)
def test_halving_loses_nothing_without_noise(field: Field) -> None:
    """The winner of the race is as good as the winner among all."""
    present = list(field)
    for stage in plan.stages(len(field))[1:]:
        present, reasons = eliminate(repeat({c: field[c] for c in present}), BOUNDS, stage.keep)
        assert len(present) >= min(stage.keep, len(present) + len(reasons))
        assert not set(present) & set(reasons)
        assert all(reasons.values())
    whole, last = decide(repeat(field), BOUNDS), decide(
        repeat({c: field[c] for c in present}), BOUNDS
    )  # fmt: skip
    if not whole.holds or not last.holds:
        return
    assert holds(field, last.winner, 1 + 1e-9)
    assert cost(field, last.winner) <= cost(field, whole.winner) * RELEVANT**2 * (1 + 1e-9)


@given(field=fields, keep=st.integers(1, 16))
def test_those_that_bounds_are_measured_by_stay(field: Field, keep: int) -> None:
    present, reasons = eliminate(repeat(field, 2), BOUNDS, keep)
    assert set(present) | set(reasons) == set(field)
    for load in LOADS:
        least = min(each[load].p99_us for each in field.values())
        most = max(each[load].iops for each in field.values())
        # Figures that differ in their last bit are the same to whoever compares ratios.
        assert least == pytest.approx(min(field[c][load].p99_us for c in present), rel=1e-9)
        assert most == pytest.approx(max(field[c][load].iops for c in present), rel=1e-9)


@given(field=fields, drift=st.lists(st.floats(0.2, 5), min_size=7, max_size=7), seed=st.integers())
def test_a_machine_that_changes_its_speed_changes_no_decision(
    field: Field, drift: list[float], seed: int
) -> None:
    steady = decide(repeat(field), BOUNDS)
    order = random.Random(seed).sample(list(field), len(field))
    drifting = {
        candidate: {
            r: {
                load: Figures(f.iops / speed, f.p99_us * speed, f.cpu_us * speed)
                for load, f in field[candidate].items()
            }
            for r, speed in enumerate(drift)
        }
        for candidate in order
    }
    edges = [standing.excess for standing in standings(drifting, BOUNDS)]
    costs = [cost(field, a) / cost(field, b) for a in field for b in field if a != b]
    edges += [ratio / threshold for ratio in costs for threshold in (1, RELEVANT)]
    values = [f.p99_us for loads in field.values() for f in loads.values()]
    values += [f.iops for loads in field.values() for f in loads.values()]
    # Equal values are told apart by rounding.
    distinct = len(set(values)) == len(values)
    if distinct and all(abs(edge - 1) > 1e-6 for edge in edges):
        assert decide(drifting, BOUNDS).winner == steady.winner


def test_the_luckiest_p99_of_a_busy_machine_binds_nobody() -> None:
    """The median misses the bound, but the rounds are not sure of any difference."""
    lucky = [1, 9, 9, 1, 1, 1, 9, 1, 1]
    unlucky = [9, 1, 1, 9, 9, 9, 1, 9, 9]
    both = [
        {r: {load: Figures(100, p99, cpu) for load in LOADS} for r, p99 in enumerate(p99s)}
        for p99s, cpu in ((lucky, 2.0), (unlucky, 1.0))
    ]
    assert median(a / b for a, b in zip(unlucky, lucky, strict=True)) > BOUNDS.latency
    assert decide({A: both[0], B: both[1]}, BOUNDS).winner == B


def test_one_disturbed_round_throws_nobody_out() -> None:
    field = {c: series(2.0, 10, 100, 2) for c in everybody[:12]}
    best = everybody[11]
    field[best] = series(1.0, 10, 100, 2)
    field[best][1] = {load: Figures(10, 5000, 4.0) for load in LOADS}
    stay, _ = eliminate(field, BOUNDS, 6)
    standing = next(s for s in standings(field, BOUNDS, kindly=True) if s.candidate == best)
    assert standing.excess <= SLACK
    assert len(stay) >= 6


def noisy(generator: random.Random, cpu: float, p99: float, iops: float) -> Figures:
    """As a busy machine shows it: 10% noise, and one measurement in ten disturbed."""
    disturbed = 3.0 if generator.random() < 0.1 else 1.0
    wobble = math.exp(generator.gauss(0, 0.1))
    return Figures(iops / wobble / disturbed, p99 * wobble * disturbed**2, cpu * wobble * disturbed)


def race(generator: random.Random, truth: dict[Candidate, tuple[float, float, float]]) -> Candidate:
    present, done = list(truth), 0
    measured: dict[Candidate, Series] = {candidate: {} for candidate in truth}
    stages = plan.stages(len(truth))
    for number, stage in enumerate(stages):
        for _ in range(stage.rounds):
            for candidate in present:
                measured[candidate][done] = {
                    load: noisy(generator, *truth[candidate]) for load in LOADS
                }
            done += 1
        if number + 1 < len(stages):
            shown = {candidate: measured[candidate] for candidate in present}
            present, _ = eliminate(shown, BOUNDS, stages[number + 1].keep)
    return decide({candidate: measured[candidate] for candidate in present}, BOUNDS).winner


def test_on_a_busy_machine_the_right_one_wins_nearly_always() -> None:
    candidates = blkd_candidates(TMPFS, 2, 2, "x86_64")
    truth = {c: (2.0 if c.engine == "sync" else 1.2, 50.0, 100.0) for c in candidates}
    best = Candidate("mmap", 1, 20)
    truth[best] = (0.7, 50.0, 100.0)
    right = sum(race(random.Random(seed), truth) == best for seed in range(100))
    assert right >= 85


def test_on_a_busy_machine_equals_are_seldom_told_apart() -> None:
    candidates = blkd_candidates(DIRECT, 2, 2)
    truth = {c: (2.0 if c.engine == "sync" else 1.0, 50.0, 100.0) for c in candidates}
    winners = [race(random.Random(seed), truth) for seed in range(100)]
    assert {winner.engine for winner in winners} == {"uring"}
    assert sum(winner.poll_us == 0 for winner in winners) >= 50


@given(count=st.integers(1, 200))
def test_stages(count: int) -> None:
    stages = plan.stages(count)
    keeps = [stage.keep for stage in stages]
    assert keeps[0] == count
    assert keeps == sorted(keeps, reverse=True)
    assert keeps[-1] <= max(plan.FINALISTS, 1)
    assert sum(stage.rounds for stage in stages) >= 5
    turns = plan.turns(count, stages)
    assert turns >= sum(stage.keep * stage.rounds for stage in stages)
    assert turns <= plan.TOTAL_ROUNDS * count


@given(
    remaining=st.floats(-5, 1000),
    turns=st.integers(0, 500),
    loads=st.integers(1, 3),
    overhead=st.floats(0, 1),
)
def test_a_slice_fits_into_the_time_that_remains(
    remaining: float, turns: int, loads: int, overhead: float
) -> None:
    slice_s = plan.slice_s(remaining, turns, loads, overhead)
    assert plan.SHORTEST_S <= slice_s <= plan.LONGEST_S
    if slice_s > plan.SHORTEST_S and turns:
        assert turns * (slice_s * loads + overhead) <= remaining * (1 + 1e-9)


def test_ratios_are_of_common_rounds_only() -> None:
    one, other = series(1, 1, 10, 3), series(1, 1, 5, 5)
    assert ratios(one, other, lambda f: f.iops, LOADS) == [2.0] * 3
    assert ratios(other, one, lambda f: f.iops, LOADS) == [0.5] * 3


def report(ios: int) -> Figures:
    """The figures of a report of so many requests in half a second."""
    backend = ProcessorTime(cpu_s=0.001, cpu_us_per_io=1000 / max(ios, 1))
    report = LoadReport(
        version=1,
        ios=ios,
        iops=ios / 0.5,
        seconds=0.5,
        latency_us=Latency(p99=70.0 if ios else 0.0),
        backend=backend,
    )
    return figures(report, backend)


def test_what_a_report_says() -> None:
    assert report(100) == Figures(iops=200, p99_us=70, cpu_us=10)
    assert report(0) == Figures(iops=2, p99_us=500_000, cpu_us=1000)


def test_the_cold_load_is_the_first() -> None:
    """The kernel does not forget pages that a process has mapped."""
    assert [load.cold for load in loads(cached_on_disk=True)] == [True, False, False]
    assert not any(load.cold for load in loads(cached_on_disk=False))
    assert {load.read_percent for load in loads(cached_on_disk=True, read_only=True)} == {100}
