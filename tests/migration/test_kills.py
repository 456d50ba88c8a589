"""Whoever dies while a VM moves, and whatever is cut: one writer, one guest, one truth.

Each victim at one of the five phases, so that every phase comes twice or more. `make
migration-kills` strikes 300 times, each victim at each phase: what is found only now and then is
its affair, for each strike takes six seconds of a processor.
"""

from __future__ import annotations

import pytest

from tests.migration.kills import Outcome, campaign, each_victim

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(900)]
# Of the twelve that are aimed, some find nobody: a wire that has not begun yet, or has ended.
FALLEN = 8
TURN = 3


async def test_whoever_dies_the_vm_is_on_one_host() -> None:
    outcomes = await campaign(each_victim(TURN), TURN, report)
    problems = [(str(o.strike), o.problems) for o in outcomes if o.problems]
    assert problems == []
    assert sum(bool(outcome.hit) for outcome in outcomes) >= FALLEN


def report(outcome: Outcome) -> None:
    """For whoever reads the output of a failed test."""
    print(outcome)  # noqa: T201
