"""Whether VMs may come to this host, and start on it.

    STATE_DIR/service.json   {"version": 1, "since": 1795384877.9, "why": "its fan is loud"}

While the file is there this host is out of service: it takes no VM from another host, and starts
none. What runs on it runs on. The other hosts read the same in the host's entry below alive/ in the
store (`store.records.Presence`): a host without that entry is silent, and gets no VM either.

A record that cannot be read is taken for one that says "out of service".
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.host.records import RecordDamaged, read_record, remove_record, write_record
from sempervirt.host.storage_call import call_storage

log = logging.getLogger(__name__)

VERSION = 1
FILE = "service.json"
WRITE_S = 2.0


@dataclass(frozen=True)
class Absence:
    """Why and since when a host is out of service. `since` is in seconds since the epoch."""

    why: str
    since: float


class Service:
    """Of this host. Made by `read`; `absence` is None while the host is in service."""

    def __init__(self, path: Path, absence: Absence | None = None) -> None:
        self.absence = absence
        self._path = path
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    def read(cls, state_dir: Path) -> Service:
        """As the last agent has left it."""
        path = state_dir / FILE
        try:
            return cls(path, _read(path))
        except RecordDamaged as error:
            log.error("service %s; out of service until then", error)  # noqa: TRY400
            return cls(path, Absence(f"what it last was cannot be read: {error.message}", 0.0))

    @property
    def why_not(self) -> str:
        """Why no VM may come here; "" while VMs may."""
        return "" if self.absence is None else self.absence.why or "an operator said so"

    def require(self, what: str) -> None:
        """Raises StateConflict while this host is out of service. `what` is the VM's doing."""
        if self.absence is not None:
            raise StateConflict(
                f"this host is out of service ({self.why_not}): {what}",
                remedy="put it into service again: semper host return",
            )

    def listen(self, changed: Callable[[], None]) -> None:
        """`changed` is called after each change."""
        self._listeners.append(changed)

    async def take_out(self, why: str, *, without_records: bool = False) -> None:
        """From now on no VM comes here. Raises Unavailable when that cannot be written down, and
        nothing has changed then; with `without_records` it is kept in memory alone.
        """
        absence = self.absence or Absence(why, time.time())
        content = {"since": absence.since, "why": absence.why}
        try:
            write = partial(write_record, self._path, VERSION, content, durable=True)
            await call_storage(self._path, write, WRITE_S)
        except (OSError, Unavailable) as error:
            if not without_records:
                await self._take_back()
                raise Unavailable(
                    f"that this host is out of service cannot be written to {self._path}: {error}",
                    remedy="make room there",
                ) from error
            log.error("service out of service, in memory alone: %s", error)  # noqa: TRY400
        self._change(absence)

    async def put_in(self) -> None:
        """VMs may come here again. Raises Unavailable when the record cannot be removed."""
        gone = await call_storage(self._path, partial(remove_record, self._path), WRITE_S)
        if not gone:
            raise Unavailable(
                f"{self._path} cannot be removed: this host stays out of service",
                remedy="remove the file, then try again",
            )
        self._change(None)

    async def _take_back(self) -> None:
        """What waits in memory is not written when the storage answers again."""
        if self.absence is None:
            with contextlib.suppress(Unavailable):
                await call_storage(self._path, partial(remove_record, self._path), WRITE_S)

    def _change(self, absence: Absence | None) -> None:
        if absence != self.absence:
            log.info("service %s", "in service" if absence is None else f"out: {absence.why}")
        self.absence = absence
        for changed in self._listeners:
            changed()


def _read(path: Path) -> Absence | None:
    content = read_record(path, VERSION)
    if content is None:
        return None
    why, since = content.get("why"), content.get("since")
    if not isinstance(why, str) or not isinstance(since, int | float):
        raise RecordDamaged(f"{path} does not say why", remedy="semper host return")
    return Absence(why[:500], float(since))
