"""A guest with a passed-through NVMe controller moves there and back under verified load."""

from __future__ import annotations

import pytest

from lab.guest import NVME
from tests.passthrough.moves import there_and_back

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.slow]
# There and back; `make passthrough-moves` goes 50 times.
MOVES = 2
# Generous: two busy processors emulate two machines. The figures are in the campaign's table. One
# of the moves is as short; none is longer than whatever else this machine does explains.
STILL_MS, LONGEST_MS = 5000.0, 30_000.0


async def test_a_guest_moves_there_and_back_with_its_device() -> None:
    report = await there_and_back(MOVES, lambda: None, passthrough=True)
    print(report.moves)  # noqa: T201
    assert report.problems == []
    assert len(report.moves) == MOVES
    assert report.writes[NVME] > 0
    assert report.writes["vda"] > 0
    assert min(one.silence_ms for one in report.moves) < STILL_MS
    assert max(one.silence_ms for one in report.moves) < LONGEST_MS
    assert all("devices moved" in one.timeline_ms for one in report.moves)
