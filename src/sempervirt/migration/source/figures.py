"""What is told about a migration beside its state."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sempervirt.migration.events import Committed, DisksReleased, Loaded, SourceEvent
from sempervirt.migration.stream import Told

MILESTONES: dict[type[SourceEvent], str] = {
    DisksReleased: "disks released",
    Loaded: "memory there",
    Committed: "handed over",
}


@dataclass
class Figures:
    """Of one departure. `started` and `ended` in seconds since the epoch, `memory` in bytes."""

    started: float
    memory: int = 0
    told: Told | None = None
    ended: float | None = None
    blackout_ms: float | None = None
    # What the guest waited for, in milliseconds after its stop.
    timeline_ms: dict[str, float] = field(default_factory=dict)
    _stopped_at: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Since it began, or until it ended."""
        return (self.ended or time.time()) - self.started

    def guest_stopped(self) -> None:
        """The blackout begins."""
        self._stopped_at = time.monotonic()

    def guest_runs(self) -> None:
        """The blackout is over, here or there."""
        self.blackout_ms = self._since_stop_ms()

    def mark(self, event: SourceEvent) -> None:
        """Notes a milestone of the blackout; other events are none."""
        name, after_ms = MILESTONES.get(type(event)), self._since_stop_ms()
        if name is not None and after_ms is not None:
            self.timeline_ms.setdefault(name, after_ms)

    def _since_stop_ms(self) -> float | None:
        if self._stopped_at is None:
            return None
        return round((time.monotonic() - self._stopped_at) * 1e3, 1)
