"""A mediator that dies outside of a move: its spare goes on, and the guest notices nothing."""

from __future__ import annotations

import pytest

from tests.passthrough.deaths import STOPS, campaign

pytestmark = [pytest.mark.guest, pytest.mark.slow]
# One of them by a process that is stopped; `make mediator-kills` makes 1,000.
DEATHS = STOPS


async def test_every_death_under_load_is_survived_and_one_without_a_spare_is_told() -> None:
    report = await campaign(DEATHS, 7, lambda report: None)
    assert report.problems == []
    assert (report.deaths, report.stopped) == (DEATHS, 1)
    assert report.completions > 0
