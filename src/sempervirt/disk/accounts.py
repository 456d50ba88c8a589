"""What all backends of a disk have counted together: it never goes back when one of them dies.

A backend counts from its own beginning. What the one that serves has told last is added to what the
former ones had told last; what a backend counts between its last word and its death is not in. The
agent asks at least every ten seconds, and every second under load (`disk.observer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from sempervirt.core.tallies import Octaves, Tally
from sempervirt.disk.answers import Status


@dataclass
class Counts:
    """Counters; they only grow."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    discards: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    errors: int = 0
    replayed: int = 0
    latency: Octaves = field(default_factory=Octaves)

    def __add__(self, other: Counts) -> Counts:
        names = [one.name for one in fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def of(cls, status: Status) -> Counts:
        """Of one backend, all queues together."""
        total = cls()
        for queue in status.queues:
            latency = queue.latency
            total += cls(
                queue.reads,
                queue.writes,
                queue.flushes,
                queue.discards,
                queue.bytes_read,
                queue.bytes_written,
                queue.errors,
                queue.replayed,
                Octaves(latency.octaves, latency.sum_ns) if latency else Octaves(),
            )
        return total


class Accounts:
    """Of one disk, since this agent looks after it. `status` is what was told last."""

    def __init__(self) -> None:
        self.status: Status | None = None
        self.takeovers = Tally("ended", "hung", "upgrade")
        self.stalls = Octaves()
        self._former = Counts()
        self._present = Counts()
        self._generation = 0
        self._stall_of = 0

    @property
    def total(self) -> Counts:
        """Of all backends."""
        return self._former + self._present

    def seen(self, generation: int, status: Status) -> None:
        """The backend of that generation told its status; one that is late counts no more."""
        if generation < self._generation:
            return
        if generation > self._generation:
            self._former, self._generation = self.total, generation
        self._present, self.status = Counts.of(status), status

    def stalled(self, generation: int, seconds: float) -> None:
        """The guest's requests waited so long for the backend of that generation; once for each."""
        if generation > self._stall_of:
            self._stall_of = generation
            self.stalls.record(seconds)
