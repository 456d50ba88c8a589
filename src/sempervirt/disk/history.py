"""What happened to a disk, for people: take-overs with their timelines, I/O errors, the journal.

Nothing is decided by it.
"""

from __future__ import annotations

import logging
import time
from collections import deque

from sempervirt.core.events import EventKind, Journal
from sempervirt.core.queue_map import Binding, format_map
from sempervirt.disk.accounts import Accounts
from sempervirt.disk.answers import LastError, Resized, Status
from sempervirt.disk.image import Finding, ImageState
from sempervirt.disk.state import TookOver
from sempervirt.disk.takeover import Restart, milestones

log = logging.getLogger(__name__)

RESTARTS_KEPT = 64


class History:
    """Of the disk `name`, since this agent looks after it; `restarts` has the oldest first."""

    def __init__(self, name: str) -> None:
        self.journal = Journal(name)
        self.restarts: deque[Restart] = deque(maxlen=RESTARTS_KEPT)
        self.upgrade_count = 0
        self.last_error: LastError | None = None
        self.accounts = Accounts()
        self._name = name

    def took_over(self, event: TookOver, successor_pid: int | None) -> None:
        """The active process is another one now, or there is none."""
        self.accounts.takeovers.add(event.cause)
        self.restarts.append(
            Restart(
                time=time.time(),
                generation=event.predecessor,
                reason="upgrade" if event.planned else event.reason,
                planned=event.planned,
                successor=event.successor,
                successor_pid=successor_pid,
                seen_ns=time.monotonic_ns(),
            )
        )
        text = f"backend {event.predecessor} ended ({event.reason}); " + (
            f"backend {event.successor} takes over" if event.successor else "backing off"
        )
        evidence = {
            "backend": str(event.predecessor),
            "reason": event.reason,
            "successor": str(event.successor or ""),
            "successor_pid": str(successor_pid or ""),
        }
        kind: EventKind = "upgrade" if event.planned else "restart"
        self.journal.note(time.time(), kind, text, evidence)
        level = logging.INFO if event.planned else logging.WARNING
        log.log(level, "takeover disk=%s %s", self._name, text)

    def noted(self, generation: int, text: str) -> None:
        """A process is stalled, or goes on."""
        text = f"backend {generation}: {text}"
        self.journal.note(time.time(), "stall", text)
        log.warning("stall disk=%s %s", self._name, text)

    def upgrade_ended(self, text: str, *, failed: bool) -> None:
        """An upgrade is over, or was not successful."""
        self.upgrade_count += not failed
        self.journal.note(time.time(), "upgrade", text)
        log.log(logging.ERROR if failed else logging.INFO, "upgrade disk=%s %s", self._name, text)

    def rebound(self, binding: Binding) -> None:
        """The queues are on other threads."""
        text = f"{format_map(binding.map)} ({binding.source})"
        self.journal.note(time.time(), "threads", text)
        log.info("threads disk=%s %s", self._name, text)

    def sockets(self, text: str) -> None:
        """A socket was removed, and is made again."""
        self.journal.note(time.time(), "restart", text)
        log.warning("sockets disk=%s %s", self._name, text)

    def image(self, finding: Finding) -> None:
        """Something has become of the image, or it is as it was."""
        sound = finding.state is ImageState.IN_PLACE
        text = "the image is in its place" if sound else str(finding)
        self.journal.note(time.time(), "image", text)
        log.log(logging.INFO if sound else logging.WARNING, "image disk=%s %s", self._name, text)

    def rescued(self, text: str, level: int) -> None:
        """The image was copied, or was not."""
        self.journal.note(time.time(), "image", text)
        log.log(level, "image disk=%s %s", self._name, text)

    def resized(self, done: Resized) -> None:
        """The disk is larger, and QEMU has been told or will read it."""
        told = "the guest is told" if done.told else "QEMU reads it when it connects again"
        text = f"resized to {done.size_bytes} bytes; {told}"
        self.journal.note(time.time(), "image", text)
        log.info("image disk=%s %s", self._name, text)

    def seen(self, generation: int, status: Status) -> None:
        """The active process, of that generation, told its status."""
        self.accounts.seen(generation, status)
        error = status.last_error
        if error is not None and error != self.last_error:
            self.last_error = error
            text = f"{error.op} at {error.offset}: {error.message}"
            self.journal.note(time.time(), "io-error", text)
            log.warning("io-error disk=%s backend=%d %s", self._name, generation, text)
        if self.restarts and self.restarts[-1].successor == generation:
            restart = self.restarts[-1]
            restart.milestones_ms = milestones(status.timeline_ns, restart.seen_ns)
            restart.replayed = status.counters.replayed
            restart.kept_connection = status.resumed
            if (replayed_ms := restart.milestones_ms["replayed"]) is not None:
                self.accounts.stalled(generation, replayed_ms / 1e3)
