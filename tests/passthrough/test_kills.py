"""Whoever dies while a VM with a passed-through device moves: one owner, and one truth.

The mediators at several phases, and one of each other kind. `make passthrough-kills` strikes 100
times: a strike takes six seconds of a processor.
"""

from __future__ import annotations

import pytest

from tests.migration.kills import Outcome, Strike, campaign

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
STRIKES = (
    Strike("precopy", "source mediator"),
    Strike("precopy", "destination mediator"),
    Strike("switchover", "source mediator"),
    Strike("commit", "destination agent"),
    Strike("done", "destination mediator"),
)
# One that is aimed at may be gone already.
FALLEN = 4


async def test_whoever_dies_the_device_has_one_owner_or_is_told_to_be_gone() -> None:
    outcomes = await campaign(STRIKES, 15, report, passthrough=True)
    problems = [(str(outcome.strike), outcome.problems) for outcome in outcomes if outcome.problems]
    assert problems == []
    assert sum(bool(outcome.hit) for outcome in outcomes) >= FALLEN


def report(outcome: Outcome) -> None:
    """For whoever reads the output of a failed test."""
    print(outcome)  # noqa: T201
