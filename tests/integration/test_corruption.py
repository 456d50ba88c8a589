"""A guest that moves through the wire is not damaged, whatever is done to its blocks meanwhile.

In short what `make corruption` does 200 times: the guest writes in every second run, so four runs
have each kind twice.
"""

from __future__ import annotations

import pytest

from tests import corruption

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module", autouse=True)
def program() -> None:
    """The program that can be told to verify nothing."""
    corruption.build()


async def test_every_page_arrives_although_its_block_was_overwritten() -> None:
    totals = await corruption.run(4, 5, verify=True, say=lambda _totals: None)
    assert not totals.problems
    assert totals.damaged_pages == 0
    assert totals.least_mismatches > 0, "nothing was struck"


async def test_without_verification_pages_are_damaged() -> None:
    """The control of the test above."""
    totals = await corruption.run(2, 6, verify=False, say=lambda _totals: None)
    assert totals.damaged_runs == 2
