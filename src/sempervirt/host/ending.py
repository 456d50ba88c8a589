"""Seeing a process end: the kernel's word, by pidfd, that nothing of it runs any more.

A process whose first thread has ended is shown as a zombie while others of its threads may still
wait in the kernel for a disk, and write. Its pidfd becomes readable only when the last thread is
gone. So what counts here is the pidfd, and never the letter in /proc/PID/stat.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sempervirt.host.procfs import ProcessId, boot_id, stat_fields

KILL_DEADLINE_S = 5.0
_POLL_S = 0.002


@contextmanager
def pidfd_of(identity: ProcessId) -> Iterator[int | None]:
    """A pidfd of that very process; None when it has ended: its number is free, another's, or of
    another boot of the host.
    """
    descriptor = None
    if identity.boot_id == boot_id():
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(identity.pid)
    try:
        # Looked at while the pidfd keeps the number from being given to another process.
        same = descriptor is not None and _born(identity.pid) == identity.start_ticks
        yield descriptor if same else None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _born(pid: int) -> int | None:
    """When it started, in ticks since boot, also of a zombie; None when there is none."""
    fields = stat_fields(pid)
    return None if fields is None else int(fields[19])


def has_ended(pidfd: int) -> bool:
    """Whether the last thread of the process is gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def kill_and_see(identity: ProcessId, deadline_s: float = KILL_DEADLINE_S) -> bool:
    """Kills a process, also one that is stopped, and waits for its end; whether that was seen.

    Not seen means that one of its threads waits in the kernel, mostly for a disk: the process may
    still write, and its end may still come.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    with pidfd_of(identity) as pidfd:
        if pidfd is None:
            return True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        while not has_ended(pidfd):
            if loop.time() >= end:
                return False
            await asyncio.sleep(_POLL_S)
        return True
