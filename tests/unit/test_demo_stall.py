"""How long a guest waited for its disk, and for its throughput."""

from __future__ import annotations

from collections.abc import Sequence

from sempervirt.demo.stall import back_ms

BIN = 10
KILL = 1_000


def bins(counts: Sequence[int]) -> list[tuple[int, int]]:
    """With 20 bins before the kill, if there are so many; times in ms."""
    start = KILL - 20 * BIN
    return [((start + n * BIN) * 10**6, count) for n, count in enumerate(counts)]


def back(counts: Sequence[int]) -> float | None:
    return back_ms(KILL * 10**6, bins(counts), BIN * 10**6)


def test_throughput_is_back_with_the_first_bins_that_have_nine_tenths_of_it() -> None:
    before = [90, 110] * 10
    assert back([*before, 0, 0, 10, *[95] * 10]) == 30
    assert back([*before, 0, 0, *[89] * 10]) is None
    # One good bin is chance.
    assert back([*before, 0, 200, *[40] * 8, *[100] * 5]) == 100


def test_a_stall_that_is_short_beside_a_window_is_not_seen() -> None:
    assert back([*[100] * 20, 80, *[100] * 10]) == 0


def test_with_nothing_to_compare_nothing_is_said() -> None:
    assert back_ms(KILL * 10**6, bins([100] * 30)[18:], BIN * 10**6) is None
    assert back([100] * 22) is None
    assert back([]) is None
