"""Small values that the parts of this room share: how a standby is kept, and how it initialises."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

EVERY_MIN_S, EVERY_MAX_S = 10.0, 7 * 86400.0
KEEP_MAX = 8
TEST_MIN_S, TEST_MAX_S = 60.0, 400 * 86400.0


class Tier(Enum):
    """How a standby waits. The values stand in the API."""

    READY = "ready"  # its memory is in memory, and a QEMU waits to load its state
    FILE = "file"  # memory and state are in a file; nothing runs


@dataclass(frozen=True)
class Policy:
    """How the standbys of a VM are kept: a new one `every_s`, `keep` of them, in which tier. A
    take-over is rehearsed `test_every_s`; None: when somebody asks for it.
    """

    every_s: float = 600.0
    keep: int = 1
    tier: Tier = Tier.READY
    test_every_s: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, with the bounds."""
        if not EVERY_MIN_S <= self.every_s <= EVERY_MAX_S:
            raise ValueError(
                f"a standby is made anew every {EVERY_MIN_S:g} s to {EVERY_MAX_S:g} s, not every "
                f"{self.every_s:g} s"
            )
        if not 1 <= self.keep <= KEEP_MAX:
            raise ValueError(f"1 to {KEEP_MAX} standbys are kept, not {self.keep}")
        if self.test_every_s is not None and not TEST_MIN_S <= self.test_every_s <= TEST_MAX_S:
            raise ValueError(
                f"a take-over is rehearsed every {TEST_MIN_S:g} s to {TEST_MAX_S:g} s, not every "
                f"{self.test_every_s:g} s"
            )
