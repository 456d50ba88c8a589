"""Processes that are killed, and are gone when that returns: what they had open is free by then."""

from __future__ import annotations

import os
import select
import signal
from contextlib import ExitStack, suppress

# A process that waits in the kernel ends when its call returns.
ENDS_S = 90.0


def kill_and_see(*pids: int | None) -> None:
    """SIGKILL to each, in this order; returns when all of them have ended with all their threads.

    A process that was killed has its files, locks and sockets until the last of its threads has
    come to it, which on a busy machine may be after whoever killed it has gone on.
    """
    with ExitStack() as stack:
        ends = []
        for pid in pids:
            assert pid is not None
            with suppress(ProcessLookupError):
                end = os.pidfd_open(pid)
                stack.callback(os.close, end)
                ends.append(end)
                signal.pidfd_send_signal(end, signal.SIGKILL)
        for end in ends:
            waiting = select.poll()
            waiting.register(end, select.POLLIN)
            assert waiting.poll(ENDS_S * 1000), f"one of {pids} does not end"
