"""Watches one backend process over its control socket and reports what it has reached.

Nothing waits for these reports while a guest stalls: the take-over itself is the kernel's and
the backends' own. So a backend is asked rarely at first after a take-over, when the processors are
needed elsewhere; and rarely when nothing happens: every question costs both processes some
processor time, and a host may have many idle disks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from sempervirt.core.errors import SempervirtError
from sempervirt.disk import liveness, takeover
from sempervirt.disk.answers import Status
from sempervirt.disk.liveness import Sample, Verdict
from sempervirt.disk.running import Running
from sempervirt.disk.state import (
    Blame,
    GoesOn,
    Progressed,
    Ready,
    Serving,
    Stalled,
    SupervisionEvent,
)
from sempervirt.host.answers import AnswerNotUnderstood
from sempervirt.host.thread_states import threads_of

log = logging.getLogger(__name__)

# Seconds between two questions: while it starts (grows), just promoted, and when all is well; the
# last grows while nothing happens.
STARTING_S, STARTING_MAX_S = 0.005, 0.1
PROMOTED_S = 0.02
STEADY_S, STEADY_MAX_S = 1.0, 10.0
GROWTH = 1.5
# A backend answers at once, whatever its requests wait for. And who is in doubt is asked often.
SILENCE_S, DOUBT_S = 2.0, 0.5

_BLAME = {
    Verdict.HANGS: Blame.BACKEND,
    Verdict.MEDIUM_HANGS: Blame.MEDIUM,
    Verdict.UNCLEAR: Blame.UNCLEAR,
}


class Listener(Protocol):
    """Whoever is told."""

    @property
    def connection_expected(self) -> bool:
        """Whether the process serves only once QEMU is connected to it."""

    def post(self, event: SupervisionEvent) -> None:
        """The process has reached something."""

    def seen(self, generation: int, status: Status) -> None:
        """The process is promoted, and told its status."""


def _is_ready(status: Status) -> bool:
    """A spare that begins while the active process dies never waits: it has the image at once."""
    return takeover.is_prepared(status) or takeover.holds_image(status)


async def observe(running: Running, listener: Listener) -> None:
    """Reports Ready, then, once `running.promoted` is set, Serving and Progressed.

    The listener sees every status of a promoted process. Runs until it is cancelled.
    """
    if not running.promoted.is_set():
        await _answers_when(running, _is_ready, listener, seen=False)
        listener.post(Ready(running.generation))
        await _wait_promoted(running, listener)
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
        status = await _ask(running, listener, seen=True)
        quiet = status is not None and _activity(status) == _activity(before)
        interval_s = min(interval_s * GROWTH, STEADY_MAX_S) if quiet else STEADY_S
        interval_s = _sooner(running, interval_s)
        before = status or before


async def _wait_promoted(running: Running, listener: Listener) -> None:
    """Returns when the process is promoted, or has the image already.

    Two processes that wait for the lock at the same time get it in an order of the kernel's.
    """
    interval_s = STEADY_S
    while not running.promoted.is_set():
        try:
            async with asyncio.timeout(interval_s):
                await running.promoted.wait()
        except TimeoutError:
            status = await _ask(running, listener)
            if status is not None and takeover.holds_image(status):
                running.promoted.set()
            interval_s = _sooner(running, min(interval_s * GROWTH, STEADY_MAX_S))


async def _answers_when(
    running: Running,
    reached: Callable[[Status], bool],
    listener: Listener,
    ceiling_s: float = STARTING_MAX_S,
    *,
    seen: bool = True,
) -> Status:
    """Asks until the process has reached something; the status that says so."""
    interval_s = STARTING_S
    while True:
        status = await _ask(running, listener, seen=seen)
        if status is not None and reached(status):
            return status
        await asyncio.sleep(_sooner(running, interval_s))
        interval_s = min(interval_s * GROWTH, ceiling_s)


def _sooner(running: Running, interval_s: float) -> float:
    """When to ask again: soon if there is work to be done, or a doubt."""
    pulse = running.pulse
    if pulse.troubled:
        return min(interval_s, DOUBT_S)
    busy = pulse.last is not None and (pulse.last.pending > 0 or not pulse.last.answered)
    return min(interval_s, STEADY_S) if busy else interval_s


def _activity(status: Status) -> tuple[object, ...]:
    """What differs between two statuses when anything happened in between."""
    return status.counters, status.queues


async def _ask(running: Running, listener: Listener, *, seen: bool = False) -> Status | None:
    """The status; None when there is none now. `seen`: the process is promoted, and the listener
    gets to see the status.
    """
    answered, status = True, None
    if running.pulse.heard and not _can_be_asked(running):
        return None
    try:
        status = await running.client.status(SILENCE_S)
        running.complaint = ""
    except AnswerNotUnderstood as error:  # as long as that is so, nobody knows what it does
        if running.complaint != error.message:
            running.complaint = error.message
            log.error("backend pid=%d: %s", running.pid, error)  # noqa: TRY400
    except SempervirtError:
        answered = False  # not listening yet, just ended, which its pidfd tells, or it hangs
    _feel_pulse(running, listener, answered=answered, status=status)
    if status is not None and seen:
        listener.seen(running.generation, status)
    return status


def _can_be_asked(running: Running) -> bool:
    """Who cannot be asked since somebody has removed its socket (`disk.sockets`) is not silent."""
    return os.path.lexists(running.control)


def _feel_pulse(
    running: Running, listener: Listener, *, answered: bool, status: Status | None
) -> None:
    """Takes one more look at whether the process works, and reports what came of it."""
    sample = Sample(time.monotonic(), answered, status)
    before = running.pulse
    if before.needs_threads(sample):
        sample = replace(sample, threads=threads_of(running.pid))
    was, _ = liveness.judge(before, running.stall_s)
    running.pulse = liveness.observe(before, sample)
    verdict, evidence = liveness.judge(running.pulse, running.stall_s)
    stopped = any(thread.stopped for thread in sample.threads)
    if verdict is Verdict.HANGS and was is not verdict and not stopped:
        return  # seen twice before it is killed: a medium may just have come back
    if verdict is not Verdict.WORKS:
        listener.post(Stalled(running.generation, _BLAME[verdict], evidence))
    elif was is not Verdict.WORKS:
        listener.post(GoesOn(running.generation))
