"""Convergence: properties of every decision, and guests of all kinds, simulated to the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.migration.source.convergence import (
    HOPE,
    HOPE_PASSES,
    ConvergencePolicy,
    Decision,
    GiveUp,
    GoPostcopy,
    RaiseLimit,
    Sample,
    Throttle,
    Track,
    begin,
    decide,
    expected_blackout_s,
)

MB = 1e6
policies = st.builds(
    ConvergencePolicy,
    blackout_s=st.floats(0.01, 1),
    blackout_max_s=st.floats(0.01, 10),
    deadline_s=st.floats(0, 1000),
    stall_passes=st.integers(1, 5),
    throttle_max=st.integers(0, 99),
    throttle_first=st.integers(1, 99),
    throttle_step=st.integers(1, 99),
    postcopy=st.booleans(),
)
samples = st.builds(
    Sample,
    elapsed_s=st.floats(0, 2000),
    passes=st.integers(1, 50),
    remaining_bytes=st.integers(0, 1 << 40),
    bandwidth=st.floats(0, 1e10),
    dirtied=st.floats(0, 1e10),
)


@given(policies, st.lists(samples, max_size=30))
def test_whatever_is_reported_no_bound_is_exceeded(
    policy: ConvergencePolicy, reports: list[Sample]
) -> None:
    track = begin(policy)
    for sample in reports:
        before = track
        track, decision = decide(track, sample, policy)
        match decision:
            case RaiseLimit(blackout_s):
                assert before.limit_s < blackout_s <= policy.blackout_max_s
                if blackout_s != min(policy.blackout_s, policy.blackout_max_s):
                    assert blackout_s >= expected_blackout_s(sample)
            case Throttle(percent):
                assert before.throttle < percent <= policy.throttle_max
            case GoPostcopy():
                assert policy.postcopy
            case GiveUp():
                assert sample.elapsed_s >= policy.deadline_s
            case None:
                pass
        assert track.limit_s <= policy.blackout_max_s


@given(policies, samples)
def test_at_the_deadline_something_is_decided(policy: ConvergencePolicy, sample: Sample) -> None:
    late = replace(sample, elapsed_s=policy.deadline_s)
    track, decision = decide(begin(policy), late, policy)
    assert decision is not None or expected_blackout_s(late) <= track.limit_s
    assert not isinstance(decision, Throttle)  # there is no time left for it


@dataclass
class Outcome:
    """How a simulated migration went."""

    end: str
    blackout_s: float
    decisions: Sequence[Decision]
    elapsed_s: float

    def kinds(self) -> list[type]:
        return [type(decision) for decision in self.decisions]


def simulate(
    policy: ConvergencePolicy,
    *,
    memory: float,
    dirtied: float,
    bandwidth: float,
    working_set: float,
) -> Outcome:
    """A guest that dirties its working set at a rate, less what it is throttled by."""
    track = begin(policy)
    decisions: list[Decision] = []
    elapsed_s, remaining = 0.0, memory
    for passes in range(1, 100000):
        took_s = remaining / bandwidth
        elapsed_s += took_s
        rate = dirtied * (1 - track.throttle / 100)
        remaining = min(working_set, rate * took_s)
        sample = Sample(elapsed_s, passes, int(remaining), bandwidth, rate)
        track, decision = decide(track, sample, policy)
        if decision is not None:
            decisions.append(decision)
        if isinstance(decision, GoPostcopy):
            return Outcome("postcopy", 0, decisions, elapsed_s)
        if isinstance(decision, GiveUp):
            return Outcome("stays", 0, decisions, elapsed_s)
        if expected_blackout_s(sample) <= track.limit_s:
            return Outcome("moved", expected_blackout_s(sample), decisions, elapsed_s)
    raise AssertionError("never ended")


POLICY = ConvergencePolicy()
WHOLE = RaiseLimit(POLICY.blackout_s)


def test_a_guest_that_converges_is_left_alone() -> None:
    for share in (0.0, 0.1, 0.5, 0.85):
        done = simulate(POLICY, memory=4e9, dirtied=share * 1e9, bandwidth=1e9, working_set=4e9)
        assert (done.end, done.decisions) == ("moved", [])
        assert done.blackout_s <= POLICY.blackout_s * HOPE


def test_what_is_allowed_is_used_when_less_is_not_reached() -> None:
    done = simulate(POLICY, memory=4e9, dirtied=5e9, bandwidth=1e9, working_set=2e8)
    assert (done.end, done.decisions) == ("moved", [WHOLE])
    assert POLICY.blackout_s * HOPE < done.blackout_s <= POLICY.blackout_s
    assert done.elapsed_s == pytest.approx(4.0 + HOPE_PASSES * 0.2)


def test_a_guest_that_is_a_little_too_fast_is_stopped_for_a_little_longer() -> None:
    done = simulate(POLICY, memory=4e9, dirtied=5e9, bandwidth=1e9, working_set=1.2e9)
    assert (done.end, done.kinds()) == ("moved", [RaiseLimit, RaiseLimit])
    assert POLICY.blackout_s < done.blackout_s <= POLICY.blackout_max_s


def test_a_busy_guest_is_slowed_down_until_it_converges() -> None:
    done = simulate(POLICY, memory=4e9, dirtied=1.5e9, bandwidth=1e9, working_set=4e9)
    assert done.end == "moved"
    percents = [decision.percent for decision in done.decisions if isinstance(decision, Throttle)]
    assert percents[0] == POLICY.throttle_first
    assert percents == sorted(set(percents))
    assert percents[-1] < POLICY.throttle_max  # no more than needed


def test_a_guest_that_nothing_slows_down_stays_or_goes_by_postcopy() -> None:
    storm = {"memory": 4e9, "dirtied": 1e11, "bandwidth": 1e8, "working_set": 4e9}
    patient = replace(POLICY, deadline_s=1000)
    stays = simulate(patient, **storm)
    assert stays.end == "stays"
    assert stays.elapsed_s >= patient.deadline_s
    assert Throttle(POLICY.throttle_max) in stays.decisions
    assert isinstance(stays.decisions[-1], GiveUp)
    assert "100 MB/s are sent" in stays.decisions[-1].reason
    moved = simulate(replace(POLICY, postcopy=True), **storm)
    assert moved.end == "postcopy"
    at_once = simulate(replace(POLICY, postcopy=True, throttle_max=0), **storm)
    assert at_once.kinds() == [RaiseLimit, GoPostcopy]
    assert at_once.elapsed_s < moved.elapsed_s


@pytest.mark.parametrize("postcopy", [False, True])
@pytest.mark.parametrize("bandwidth", [1e7, 1e8, 1e9])
@pytest.mark.parametrize("dirtied", [0, 1e7, 1e8, 1e9, 1e10])
@pytest.mark.parametrize("working_set", [1e7, 1e9, 4e9])
def test_every_migration_ends_soon_after_its_deadline(
    postcopy: bool, bandwidth: float, dirtied: float, working_set: float
) -> None:
    policy = replace(POLICY, postcopy=postcopy)
    done = simulate(
        policy, memory=4e9, dirtied=dirtied, bandwidth=bandwidth, working_set=working_set
    )
    # One pass may begin before the deadline and end after it.
    assert done.elapsed_s <= policy.deadline_s + 4e9 / bandwidth
    assert done.blackout_s <= policy.blackout_max_s
    if postcopy:
        assert done.end != "stays"


def test_progress_that_is_too_small_is_a_stall() -> None:
    track, decision = replace(begin(POLICY), limit_s=POLICY.blackout_s), None
    for number in range(1, 6):
        sample = Sample(number, number, int((100 - number) * 1e8), 1e8, 1e8)
        track, decision = decide(track, sample, POLICY)
        if decision is not None:
            break
    assert (decision, number) == (Throttle(POLICY.throttle_first), 1 + POLICY.stall_passes)
    assert track == Track(POLICY.blackout_s, track.best_s, number, POLICY.throttle_first)
