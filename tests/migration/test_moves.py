"""A live guest moves there and back, on every link, and nobody notices."""

from __future__ import annotations

import pytest

from lab.network import UNLIMITED, Link
from tests.migration.moves import LINKS, there_and_back

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]
# There and back; `make moves` goes 50 times.
MOVES = 2
# Generous: two busy processors emulate two machines. The figures are in the campaign's table.
STILL_MS = 5000.0


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
async def test_a_live_guest_moves_there_and_back(link: Link) -> None:
    """On one link with a UEFI firmware, whose variables move along."""
    report = await there_and_back(link, MOVES, lambda: None, uefi=link is UNLIMITED)
    print(report.moves)  # noqa: T201
    assert report.problems == []
    assert len(report.moves) == MOVES
    assert report.writes > 0
    assert max(move.inside_ms for move in report.moves) < STILL_MS
    assert max(move.outside_ms for move in report.moves) < STILL_MS
