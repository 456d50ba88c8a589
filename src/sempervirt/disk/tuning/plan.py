"""How many rounds there are, who takes part in them, and how long each measurement may take.

Successive halving: all candidates take part in the first rounds, the better half of them in the
next, and so on; the finalists are measured often enough to tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STAGE_ROUNDS = 2
FINALISTS = 4
# Five rounds are the least that can show a difference (figures.interval), if not one of them is
# disturbed; of fifteen, three may be.
TOTAL_ROUNDS = 15
SHORTEST_S = 0.02
# A further round tells more than a longer look.
LONGEST_S = 0.35
# Besides those that are kept for their efficiency, some stay because bounds are measured by them.
_GUARDS = 2


@dataclass(frozen=True)
class Stage:
    """Rounds in which the same candidates take part: those that `keep` leaves in the race."""

    keep: int
    rounds: int


def stages(candidates: int) -> list[Stage]:
    """All stages of a race. The last decides."""
    found = []
    keep, done = candidates, 0
    while keep > FINALISTS:
        found.append(Stage(keep, STAGE_ROUNDS))
        done += STAGE_ROUNDS
        keep = max(FINALISTS, -(-keep // 2))
    return [*found, Stage(keep, max(STAGE_ROUNDS, TOTAL_ROUNDS - done))]


def turns(present: int, to_come: Sequence[Stage]) -> int:
    """About how many turns (a candidate, all loads once) are still to come."""
    total = 0
    for stage in to_come:
        total += present * stage.rounds
        present = min(present, max(FINALISTS, -(-present // 2)) + _GUARDS)
    return total


def slice_s(remaining_s: float, turns_to_come: int, loads: int, overhead_s: float) -> float:
    """How long one measurement may take, so that all turns fit into the time that remains."""
    each = (remaining_s / max(turns_to_come, 1) - overhead_s) / loads
    return min(LONGEST_S, max(SHORTEST_S, each))
