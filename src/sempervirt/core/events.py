"""What happened to a VM or a disk, kept for whoever asks later."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

JOURNAL_LENGTH = 256


@dataclass(frozen=True)
class Event:
    """One thing that happened. `time` is seconds since the epoch; `kind` a short noun."""

    time: float
    kind: str
    message: str


@dataclass
class Journal:
    """The last events of one VM or disk, oldest first."""

    events: deque[Event] = field(default_factory=lambda: deque(maxlen=JOURNAL_LENGTH))

    def note(self, time: float, kind: str, message: str) -> Event:
        """Appends an event; the oldest one goes when the journal is full."""
        event = Event(time, kind, message)
        self.events.append(event)
        return event

    def last(self, kind: str) -> Event | None:
        """The newest event of that kind."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)
