"""What happened to a VM or a disk, kept for whoever asks later, and told to whoever follows.

Every event stands in the `Journal` of what it happened to, and in the one `STREAM` of the process
(as there is one log). The stream is a ring of bounded length; each reader has a position in it and
reads at its own pace, so a reader that is slow, or hangs, costs nothing. A reader whose position
has left the ring is told that there is a gap.

The id of an event is "EPOCH.NUMBER": the epoch is another one in each process, the numbers begin at
1. So an id of an earlier agent is known to be one, and what follows it cannot be told: a gap.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

JOURNAL_LENGTH = 256
# Some hours of a busy host; about a megabyte.
STREAM_LENGTH = 4096

_ID = re.compile(r"([0-9a-f]{1,20})\.([0-9]{1,18})")


EventKind = Literal[
    # of a VM
    "state", "claim", "migration", "restart", "save", "restore", "agent", "snapshot",
    "device", "standby",
    # of a disk; "restart" as well
    "upgrade", "threads", "io-error", "image", "stall",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One thing that happened. `time` is in seconds since the epoch."""

    time: float
    kind: EventKind
    message: str


@dataclass(frozen=True)
class Announced:
    """An event in the stream: `subject` is the VM, or VM/DISK; `evidence` what it was seen by."""

    number: int
    subject: str
    event: Event
    evidence: Mapping[str, str] = field(default_factory=dict)


class Part(NamedTuple):
    """What a reader gets: events, oldest first, where to go on, and whether some are missing
    before the first.
    """

    events: list[Announced]
    position: int
    gap: bool


class Stream:
    """The last events of a process. Written and read in one thread."""

    def __init__(self, epoch: str, length: int = STREAM_LENGTH) -> None:
        self.epoch = epoch
        self._ring: deque[Announced] = deque(maxlen=length)
        self._listeners: list[Callable[[Announced], None]] = []

    @property
    def position(self) -> int:
        """The number of the newest event; 0 when there was none."""
        return self._ring[-1].number if self._ring else 0

    def announce(self, subject: str, event: Event, evidence: Mapping[str, str]) -> None:
        """Appends an event; the oldest one goes when the ring is full."""
        announced = Announced(self.position + 1, subject, event, evidence)
        self._ring.append(announced)
        for listener in [*self._listeners]:
            listener(announced)

    def listen(self, listener: Callable[[Announced], None]) -> Callable[[], None]:
        """Calls `listener` at each event, which must not wait nor raise; the answer ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def after(self, position: int) -> Part:
        """What came after an event of this process."""
        oldest = self._ring[0].number if self._ring else 1
        # From the newest end: who follows has read nearly all.
        found: deque[Announced] = deque()
        for announced in reversed(self._ring):
            if announced.number <= position:
                break
            found.appendleft(announced)
        return Part([*found], self.position, gap=position < oldest - 1)

    def after_id(self, text: str) -> Part:
        """What came after the event with that id; "": all. Raises ValueError for no id at all."""
        if not text:
            part = self.after(0)
            return part._replace(gap=False)  # who has seen nothing misses nothing
        match = _ID.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is no id of an event")
        epoch, number = match[1], int(match[2])
        if epoch != self.epoch or number > self.position:
            return self.after(0)._replace(gap=True)
        return self.after(number)

    def id_of(self, announced: Announced) -> str:
        """The id by which a reader goes on after that event."""
        return f"{self.epoch}.{announced.number}"


STREAM = Stream(epoch=f"{time.time_ns():x}")


@dataclass
class Journal:
    """The last events of one VM or disk, oldest first. `subject` is its name in the stream; without
    one nothing is announced.
    """

    subject: str = ""
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=JOURNAL_LENGTH))

    def note(
        self, time: float, kind: EventKind, message: str, evidence: Mapping[str, str] | None = None
    ) -> Event:
        """Appends an event, and announces it; the oldest one goes when the journal is full."""
        event = Event(time, kind, message)
        self.events.append(event)
        if self.subject:
            STREAM.announce(self.subject, event, evidence or {})
        return event

    def last(self, kind: EventKind) -> Event | None:
        """The newest event of that kind."""
        return next((event for event in reversed(self.events) if event.kind == kind), None)
