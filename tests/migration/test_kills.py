"""Whoever dies while a VM moves, and whatever is cut: one writer, one guest, one truth."""

from __future__ import annotations

import pytest

from tests.migration.kills import Outcome, campaign, chosen

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]
STRIKES = 20
# Of those that are aimed, some find nobody: a wire that has not begun yet, or has ended.
FALLEN = 14


@pytest.mark.parametrize("seed", [4, 5], ids=["first", "second"])
async def test_whoever_dies_the_vm_is_on_one_host(seed: int) -> None:
    outcomes = await campaign(chosen(STRIKES, seed), seed, report)
    problems = [(str(o.strike), o.problems) for o in outcomes if o.problems]
    assert problems == []
    assert sum(bool(outcome.hit) for outcome in outcomes) >= FALLEN


def report(outcome: Outcome) -> None:
    """For whoever reads the output of a failed test."""
    print(outcome)  # noqa: T201
