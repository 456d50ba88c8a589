"""A live guest moves there and back, on every link, and nobody notices."""

from __future__ import annotations

import pytest

from lab.network import FAR, GIGABIT, UNLIMITED, Link
from tests.migration.moves import LINKS, there_and_back

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
# There and back; `make moves` goes 50 times.
MOVES = 2
# Generous: two busy processors emulate two machines. The figures are in the campaign's table. One
# of the moves is as short; none is longer than whatever else this machine does explains.
STILL_MS, LONGEST_MS = 5000.0, 30_000.0


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
async def test_a_live_guest_moves_there_and_back(link: Link) -> None:
    """On one link with a UEFI firmware, whose variables move along; on another with a store where
    neither host can change what is the other's; on the third with a snapshot. No secret is told
    meanwhile.
    """
    report = await there_and_back(
        link,
        MOVES,
        lambda: None,
        uefi=link is UNLIMITED,
        guarded=link is GIGABIT,
        snapshot=link is FAR,
    )
    print(report.moves)  # noqa: T201
    assert report.problems == []
    assert len(report.moves) == MOVES
    assert report.writes > 0
    for still in (
        [move.inside_ms for move in report.moves],
        [move.outside_ms for move in report.moves],
    ):
        assert min(still) < STILL_MS
        assert max(still) < LONGEST_MS
