"""The order of measurements."""

import itertools
from collections import Counter

from bench.cases import BY_NAME, FULL, PARITY, RATES
from bench.schedule import interleaved

GROUPS = [("tmpfs", ["a", "b", "c"]), ("ext4", ["a", "b"])]


def test_each_member_runs_once_in_each_round() -> None:
    order = list(interleaved(GROUPS, rounds=4, seed=1))
    assert Counter(order).most_common(1)[0][1] == 1
    assert len(order) == 4 * 5
    assert [number for number, _, _ in order] == sorted(number for number, _, _ in order)


def test_what_is_compared_runs_together() -> None:
    order = list(interleaved(GROUPS, rounds=5, seed=1))
    changes = sum((one[0], one[1]) != (two[0], two[1]) for one, two in itertools.pairwise(order))
    assert changes == 5 * len(GROUPS) - 1


def test_the_seed_decides() -> None:
    first, again, other = (list(interleaved(GROUPS, 6, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_order_differs_between_rounds() -> None:
    firsts = {
        members[0]
        for number in range(20)
        for members in [
            [m for n, group, m in interleaved(GROUPS, 20, 3) if n == number and group == "tmpfs"]
        ]
    }
    assert firsts == {"a", "b", "c"}


def test_names_of_cases_are_unique() -> None:
    assert len(BY_NAME) == len((*FULL, *RATES))
    assert {case.name for case in PARITY} == {
        "4k-read-d1", "4k-write-d1", "4k-read-d32", "4k-write-d32",
    }  # fmt: skip
