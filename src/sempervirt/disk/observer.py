"""Watches one backend process over its control socket and reports what it has reached.

Nothing waits for these reports while a guest stalls: the take-over itself is the kernel's and
the backends' own. So it asks rarely at first after a take-over, when the processors are
needed elsewhere. And it asks rarely when nothing happens: every question costs both processes
some processor time, and a host may have many idle disks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from sempervirt.core.errors import SempervirtError
from sempervirt.disk import takeover
from sempervirt.disk.running import Running
from sempervirt.disk.state import Progressed, Ready, Serving, SupervisionEvent
from sempervirt.host.control import ask

# Seconds between two questions: while it starts (grows), just promoted, and when all is well; the
# last grows while nothing happens.
STARTING_S, STARTING_MAX_S = 0.005, 0.1
PROMOTED_S = 0.02
STEADY_S, STEADY_MAX_S = 1.0, 10.0
GROWTH = 1.5

Report = Callable[[SupervisionEvent], None]
Seen = Callable[[Running, dict[str, Any]], None]


async def observe(
    running: Running, report: Report, seen: Seen, connection_expected: Callable[[], bool]
) -> None:
    """Reports Ready, then, once `running.promoted` is set, Serving and Progressed.

    `seen` gets every status of a promoted process. Runs until it is cancelled.
    """
    if not running.promoted.is_set():
        await _answers_when(running, takeover.is_prepared)
        report(Ready(running.generation))
        await _wait_promoted(running)
        await asyncio.sleep(PROMOTED_S)
    told = False

    def serves(status: dict[str, Any]) -> bool:
        nonlocal told
        if not told and takeover.is_prepared(status):
            # Meant to serve, but it waits for the lock; another may have it.
            told = True
            report(Ready(running.generation))
        return takeover.serves(status, connection_expected=connection_expected())

    await _answers_when(running, serves, seen)
    report(Serving(running.generation))
    await _answers_when(running, takeover.has_progressed, seen, STEADY_MAX_S)
    report(Progressed(running.generation))
    interval_s = STEADY_S
    while True:
        before = running.status
        await asyncio.sleep(interval_s)
        quiet = _activity(await _ask(running, seen)) == _activity(before)
        interval_s = min(interval_s * GROWTH, STEADY_MAX_S) if quiet else STEADY_S


async def _wait_promoted(running: Running) -> None:
    """Until supervision promotes it, or it has the image already.

    Two processes that wait for the lock at the same time get it in an order of the kernel's.
    """
    interval_s = STEADY_S
    while not running.promoted.is_set():
        try:
            async with asyncio.timeout(interval_s):
                await running.promoted.wait()
        except TimeoutError:
            if takeover.holds_image(await _ask(running, None)):
                running.promoted.set()
            interval_s = min(interval_s * GROWTH, STEADY_MAX_S)


async def _answers_when(
    running: Running,
    reached: Callable[[dict[str, Any]], bool],
    seen: Seen | None = None,
    ceiling_s: float = STARTING_MAX_S,
) -> None:
    interval_s = STARTING_S
    while not reached(await _ask(running, seen)):
        await asyncio.sleep(interval_s)
        interval_s = min(interval_s * GROWTH, ceiling_s)


def _activity(status: dict[str, Any]) -> tuple[Any, Any]:
    """What differs between two statuses when anything happened in between."""
    return status.get("counters"), status.get("queues")


async def _ask(running: Running, seen: Seen | None) -> dict[str, Any]:
    try:
        running.status = await ask(running.control, "status")
    except SempervirtError:
        return {}  # it does not listen yet, or has just ended, which its pidfd tells
    if seen is not None:
        seen(running, running.status)
    return running.status
