"""What is told about a migration beside its state."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from sempervirt.migration.source.state import Migration
from sempervirt.migration.stream import Told
from sempervirt.vm.phases import Phase

log = logging.getLogger(__name__)


@dataclass
class Figures:
    """Of one migration. `started` and `ended` in seconds since the epoch, `memory` in bytes.

    `timeline_ms` is what the guest waited for, in milliseconds after its stop.
    """

    started: float
    memory: int = 0
    told: Told | None = None
    ended: float | None = None
    blackout_ms: float | None = None
    timeline_ms: dict[str, float] = field(default_factory=dict)
    _stopped_at: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Since the migration began, or until it ended."""
        return (self.ended or time.time()) - self.started

    def follow(self, before: Migration, after: Migration) -> None:
        """Notes the milestones of the blackout that a step has reached."""
        if after.phase is Phase.SWITCHOVER and before.phase is not Phase.SWITCHOVER:
            self._stopped_at = time.monotonic()
        for name, was, is_now in (
            ("devices moved", before.devices_moved, after.devices_moved),
            ("disks released", before.disks_released, after.disks_released),
            ("memory there", before.loaded, after.loaded),
            ("handed over", before.claim is not None, after.claim is not None),
        ):
            after_ms = self._since_stop_ms()
            if is_now and not was and after_ms is not None:
                self.timeline_ms.setdefault(name, after_ms)

    def guest_runs(self) -> None:
        """The blackout is over, here or there."""
        self.blackout_ms = self._since_stop_ms()

    def _since_stop_ms(self) -> float | None:
        if self._stopped_at is None:
            return None
        return round((time.monotonic() - self._stopped_at) * 1e3, 1)
