"""The judges of the campaigns: what they have to see, they see."""

from __future__ import annotations

import pytest

from sempervirt.core.errors import Unavailable
from sempervirt.standby.values import Tier
from tests.standby.randomness import repeated
from tests.standby.refresh import Turn, table


def test_bytes_that_are_drawn_twice_are_seen() -> None:
    one, other = "0f" * 32, "f0" * 32
    assert repeated([one, other]) == 0
    assert repeated([one, other, one, one]) == 2


@pytest.mark.parametrize("said", ["", "0f", "sh: hexdump: not found", "0F" * 32])
def test_what_is_no_32_bytes_is_no_result(said: str) -> None:
    with pytest.raises(Unavailable, match="no 32 bytes"):
        repeated(["0f" * 32, said])


@pytest.mark.parametrize(
    ("worst_ms", "processor_s", "reached"),
    [(4.0, 10.0, True), (50.0, 10.0, False), (4.0, 12.0, False)],
)
def test_a_refresh_that_costs_too_much_is_told(
    worst_ms: float, processor_s: float, *, reached: bool
) -> None:
    plain = Turn([2.0] * 100, seconds=10.0, processor_s=10.0)
    busy = Turn([2.0] * 95 + [worst_ms] * 5, seconds=10.0, processor_s=processor_s)
    counting = Turn([2.0] * 100, seconds=10.0, processor_s=13.0)
    busy.note("booting", 8.0, 4.0)
    said, well = table(Tier.READY, plain, busy, counting, [1.0, 2.0, 3.0])
    assert well is reached
    assert f"added to p99: {worst_ms - 2.0:.1f} ms" in said
    assert "beside a program that counts +30%" in said
    assert "booting: 1 rows in 8.0 s, 50% of a processor" in said
