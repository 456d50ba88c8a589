"""How far a VM is on its way between two hosts. The values stand in records and in messages.

`migration.source.decide` and `migration.destination.decide` draw the machines that go through them.
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    """Of a migration, on its source."""

    PREPARE = "prepare"
    PRECOPY = "precopy"
    SWITCHOVER = "switchover"
    COMMIT = "commit"
    POSTCOPY = "postcopy"
    DONE = "done"
    ABANDONED = "abandoned"
    UNKNOWN = "unknown"
    LOST = "lost"

    @property
    def is_end(self) -> bool:
        """Whether it is decided what becomes of the VM."""
        return self in (Phase.DONE, Phase.ABANDONED, Phase.LOST)


class Arrival(Enum):
    """Of a migration, on its destination."""

    PREPARING = "preparing"
    INCOMING = "incoming"
    PROMISED = "promised"
    RUNNING = "running"
    ABORTED = "aborted"
    LOST = "lost"


class Mode(Enum):
    """Whether the memory is at the destination before the guest runs there, or follows it."""

    PRECOPY = "precopy"
    POSTCOPY = "postcopy"
