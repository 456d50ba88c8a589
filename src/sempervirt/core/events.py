"""What happened to a VM or a disk, kept for whoever asks later."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

JOURNAL_LENGTH = 256


EventKind = Literal[
    # of a VM
    "state", "claim", "migration", "restart", "save", "restore", "agent", "snapshot",
    "device",
    # of a disk; "restart" as well
    "upgrade", "threads", "io-error", "image", "stall",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One thing that happened. `time` is in seconds since the epoch."""

    time: float
    kind: EventKind
    message: str


@dataclass
class Journal:
    """The last events of one VM or disk, oldest first."""

    events: deque[Event] = field(default_factory=lambda: deque(maxlen=JOURNAL_LENGTH))

    def note(self, time: float, kind: EventKind, message: str) -> Event:
        """Appends an event; the oldest one goes when the journal is full."""
        event = Event(time, kind, message)
        self.events.append(event)
        return event

    def last(self, kind: EventKind) -> Event | None:
        """The newest event of that kind."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)
