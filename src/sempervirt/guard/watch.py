"""Threads that look at sources, and the inbox by which what they see reaches the event loop.

Each source has a thread of its own, which is there from the start: a host that is dying may refuse
to make one. A source that hangs holds up its own thread, and `health` says since when. One that
raises is asked again after a pause that grows. One that floods fills its own share of the inbox:
what is beyond that is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from sempervirt.guard.signs import Sign, one_line
from sempervirt.guard.sources.source import AbsentError, Source

log = logging.getLogger(__name__)

# How long a source may wait by itself in one look; so soon the end of the watch is noticed.
PATIENCE_S = 1.0
# A look that takes longer hangs.
HANGS_S = 10.0
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 60.0
ABSENT_PAUSE_S = 1.0
# Of one source, on the way to the event loop.
SIGNS_MAX = 256


class Standing(Enum):
    """What is known of a source."""

    LOOKING = "looking"
    ABSENT = "absent"
    FAILING = "failing"
    HANGING = "hanging"


@dataclass(frozen=True)
class Health:
    """A source, and how it does. `dropped`: signs that came too fast to be taken."""

    name: str
    standing: Standing
    why: str
    seen: int
    dropped: int


class Watch:
    """One source and its thread. `heard` is called in the event loop, with one or more signs, or
    with none when the standing of the source has changed.
    """

    def __init__(
        self,
        source: Source,
        heard: Callable[[Watch, Sequence[Sign]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = source
        self._heard = heard
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._guard = threading.Lock()
        self._inbox: list[Sign] = []
        self._woken = False
        self._standing = Standing.LOOKING
        self._why = ""
        self._seen = self._dropped = 0
        self._looking_since: float | None = None
        self._ended = threading.Event()
        # A daemon: a thread that hangs in the kernel must not keep the agent from ending.
        self._thread = threading.Thread(target=self._run, name=f"sign: {source.name}", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def end(self) -> None:
        """Asks the thread to end; it does within PATIENCE_S, unless it hangs."""
        self._ended.set()

    @property
    def health(self) -> Health:
        """How the source does."""
        with self._guard:
            since, standing, why = self._looking_since, self._standing, self._why
            if since is not None and (hangs_s := self._clock() - since) > HANGS_S:
                standing, why = Standing.HANGING, f"it has not answered for {hangs_s:.0f} s"
            return Health(self.source.name, standing, why, self._seen, self._dropped)

    def _run(self) -> None:
        pause_s = PAUSE_MIN_S
        while not self._ended.is_set():
            try:
                signs = self._look()
            except AbsentError as error:
                self._stands(Standing.ABSENT, str(error))
                self._ended.wait(max(ABSENT_PAUSE_S, self.source.interval_s))
            except Exception as error:  # noqa: BLE001 - whatever a source does wrong, the others go on
                self._stands(Standing.FAILING, f"{type(error).__name__}: {error}")
                self._ended.wait(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            else:
                pause_s = PAUSE_MIN_S
                self._stands(Standing.LOOKING, "")
                self._take(signs)
                self._ended.wait(self.source.interval_s)
        self.source.close()

    def _look(self) -> Sequence[Sign]:
        with self._guard:
            self._looking_since = self._clock()
        try:
            return self.source.look(PATIENCE_S)
        finally:
            with self._guard:
                self._looking_since = None

    def _stands(self, standing: Standing, why: str) -> None:
        with self._guard:
            changed = standing is not self._standing
            self._standing, self._why = standing, one_line(why)
            wake = changed and not self._woken
            self._woken |= changed
        if wake:
            self._wake()

    def _take(self, signs: Sequence[Sign]) -> None:
        if not signs:
            return
        with self._guard:
            room = SIGNS_MAX - len(self._inbox)
            self._inbox += signs[:room]
            self._seen += len(signs)
            self._dropped += max(0, len(signs) - room)
            wake, self._woken = not self._woken, True
        if wake:
            self._wake()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop has ended, and nobody listens any more
            self._ended.set()

    def _deliver(self) -> None:
        with self._guard:
            signs, self._inbox = self._inbox, []
            self._woken = False
        if not self._ended.is_set():
            self._heard(self, signs)
