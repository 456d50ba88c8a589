"""Paired ratios, their spread, and the verdict on them."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.ratios import Spread, paired, sign_test, spread
from bench.verdicts import COST_GOALS, PEER_GOALS, Verdict, compare

POSITIVE = st.floats(min_value=1e-3, max_value=1e6)


def test_spread_of_seven() -> None:
    assert spread([7, 1, 3, 2, 6, 4, 5]) == Spread(7, median=4, q1=2.5, q3=5.5, low=1, high=7)


def test_spread_of_one() -> None:
    assert spread([3.0]) == Spread(1, 3.0, 3.0, 3.0, 3.0, 3.0)


def test_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        spread([])


@given(st.lists(POSITIVE, min_size=1, max_size=30))
def test_spread_is_ordered(values: list[float]) -> None:
    seen = spread(values)
    steps = [seen.low, seen.q1, seen.median, seen.q3, seen.high]
    assert all(left <= right * (1 + 1e-9) for left, right in itertools.pairwise(steps))


def test_only_rounds_that_both_have_are_paired() -> None:
    assert paired({0: 10.0, 1: 30.0, 3: 8.0}, {0: 5.0, 2: 1.0, 3: 4.0}) == [2.0, 2.0]


def test_a_reference_of_zero_has_no_ratio() -> None:
    assert paired({0: 10.0, 1: 30.0}, {0: 0.0, 1: 10.0}) == [3.0]


@given(st.dictionaries(st.integers(0, 20), POSITIVE, min_size=1))
def test_drift_of_the_machine_cancels(reference: dict[int, float]) -> None:
    """Whatever the machine does from round to round, twice as fast is twice as fast."""
    doubled = {number: value * 2 for number, value in reference.items()}
    assert paired(doubled, reference) == pytest.approx([2.0] * len(reference))


def test_sign_test_counts_both_sides() -> None:
    assert sign_test([2.0] * 7) == pytest.approx(1 / 128)
    assert sign_test([2.0] * 6 + [0.5]) == pytest.approx(8 / 128)
    assert sign_test([0.5] * 7) == pytest.approx(1.0)
    assert sign_test([]) == 1.0


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.8] * 7, Verdict.WORSE),
        ([0.8] * 6 + [1.2], Verdict.WORSE),
        ([0.8] * 5 + [1.2] * 2, Verdict.WITHIN_NOISE),
        ([0.99] * 7, Verdict.WITHIN_NOISE),
        ([1.01] * 7, Verdict.WITHIN_NOISE),
        ([1.2] * 6 + [0.8], Verdict.BETTER),
        ([0.5] * 3, Verdict.WITHIN_NOISE),
        ([], Verdict.WITHIN_NOISE),
    ],
)
def test_iops_need_a_margin_and_most_rounds(ratios: list[float], verdict: Verdict) -> None:
    assert compare(ratios, "iops") is verdict


def test_less_latency_is_better() -> None:
    assert compare([0.5] * 7, "p50_us") is Verdict.BETTER
    assert compare([2.0] * 7, "cpu_us") is Verdict.WORSE


def test_a_bound_other_than_one() -> None:
    assert compare([3.0] * 7, "iops", bound=6) is Verdict.WORSE
    assert compare([0.1] * 7, "p50_us", bound=0.2) is Verdict.BETTER


def test_equal_backends_are_rarely_called_worse() -> None:
    generator = random.Random(1)
    runs = [[generator.lognormvariate(0, 0.1) for _ in range(7)] for _ in range(1000)]
    worse = sum(compare(run, "iops") is Verdict.WORSE for run in runs)
    assert worse < 80


def test_goals_name_cases_that_are_measured() -> None:
    from bench.cases import BY_NAME
    from bench.storages import NAMES

    for goal in (*PEER_GOALS, *COST_GOALS):
        assert goal.storage in NAMES
        assert set(goal.cases) <= BY_NAME.keys()
        assert goal.bounds()
