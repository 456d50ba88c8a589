"""Watches one backend process over its control socket and reports what it has reached.

Nothing waits for these reports while a guest stalls: the take-over itself is the kernel's and
the backends' own. So a backend is asked rarely at first after a take-over, when the processors are
needed elsewhere; and rarely when nothing happens: every question costs both processes some
processor time, and a host may have many idle disks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from sempervirt.core.errors import SempervirtError
from sempervirt.disk import takeover
from sempervirt.disk.answers import Status
from sempervirt.disk.running import Running
from sempervirt.disk.state import Progressed, Ready, Serving, SupervisionEvent
from sempervirt.host.answers import AnswerNotUnderstood

log = logging.getLogger(__name__)

# Seconds between two questions: while it starts (grows), just promoted, and when all is well; the
# last grows while nothing happens.
STARTING_S, STARTING_MAX_S = 0.005, 0.1
PROMOTED_S = 0.02
STEADY_S, STEADY_MAX_S = 1.0, 10.0
GROWTH = 1.5


class Listener(Protocol):
    """Whoever is told."""

    @property
    def connection_expected(self) -> bool:
        """Whether the process serves only once QEMU is connected to it."""

    def post(self, event: SupervisionEvent) -> None:
        """The process has reached something."""

    def seen(self, generation: int, status: Status) -> None:
        """The process is promoted, and told its status."""


async def observe(running: Running, listener: Listener) -> None:
    """Reports Ready, then, once `running.promoted` is set, Serving and Progressed.

    The listener sees every status of a promoted process. Runs until it is cancelled.
    """
    if not running.promoted.is_set():
        await _answers_when(running, takeover.is_prepared)
        listener.post(Ready(running.generation))
        await _wait_promoted(running)
        await asyncio.sleep(PROMOTED_S)
    told = False

    def serves(status: Status) -> bool:
        nonlocal told
        if not told and takeover.is_prepared(status):
            # Meant to serve, but it waits for the lock; another may have it.
            told = True
            listener.post(Ready(running.generation))
        return takeover.serves(status, connection_expected=listener.connection_expected)

    await _answers_when(running, serves, listener)
    listener.post(Serving(running.generation))
    before = await _answers_when(running, takeover.has_progressed, listener, STEADY_MAX_S)
    listener.post(Progressed(running.generation))
    interval_s = STEADY_S
    while True:
        await asyncio.sleep(interval_s)
        status = await _ask(running, listener)
        quiet = status is None or _activity(status) == _activity(before)
        interval_s = min(interval_s * GROWTH, STEADY_MAX_S) if quiet else STEADY_S
        before = status or before


async def _wait_promoted(running: Running) -> None:
    """Returns when the process is promoted, or has the image already.

    Two processes that wait for the lock at the same time get it in an order of the kernel's.
    """
    interval_s = STEADY_S
    while not running.promoted.is_set():
        try:
            async with asyncio.timeout(interval_s):
                await running.promoted.wait()
        except TimeoutError:
            status = await _ask(running, None)
            if status is not None and takeover.holds_image(status):
                running.promoted.set()
            interval_s = min(interval_s * GROWTH, STEADY_MAX_S)


async def _answers_when(
    running: Running,
    reached: Callable[[Status], bool],
    listener: Listener | None = None,
    ceiling_s: float = STARTING_MAX_S,
) -> Status:
    """Asks until the process has reached something; the status that says so."""
    interval_s = STARTING_S
    while True:
        status = await _ask(running, listener)
        if status is not None and reached(status):
            return status
        await asyncio.sleep(interval_s)
        interval_s = min(interval_s * GROWTH, ceiling_s)


def _activity(status: Status) -> tuple[object, ...]:
    """What differs between two statuses when anything happened in between."""
    return status.counters, status.queues


async def _ask(running: Running, listener: Listener | None) -> Status | None:
    """The status; None when there is none now."""
    try:
        status = await running.client.status()
    except AnswerNotUnderstood as error:  # as long as that is so, nobody knows what it does
        if running.complaint != error.message:
            running.complaint = error.message
            log.error("backend pid=%d: %s", running.pid, error)  # noqa: TRY400
        return None
    except SempervirtError:
        return None  # it does not listen yet, or has just ended, which its pidfd tells
    running.complaint = ""
    if listener is not None:
        listener.seen(running.generation, status)
    return status
