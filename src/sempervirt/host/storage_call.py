"""Calls that touch storage: never in the event loop, and never waited for without a deadline.

A file system whose medium has stopped answering (a dead NFS server, a hung FUSE daemon, a disk in
error recovery) holds every call on it, for minutes or for good, and no signal ends the wait. So
each such call has a thread of its own: a pool would be used up by the calls that hang, and whoever
needs the pool next, for the store say, would wait for a medium that is none of its business.

The thread of a call that hangs cannot be ended; it is left behind until the medium answers. So that
they do not add up, a path on which `HANGING_MAX` calls hang is not called again until one of them
has come back. A host that is about to die may refuse to make a thread: `prepare` makes some before.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sempervirt.core.errors import Unavailable

T = TypeVar("T")

# Opening a volume over a network takes seconds when its path has to be found first.
DEADLINE_S = 10.0
HANGING_MAX = 3

# By path: when the calls that have not come back by their deadline were begun.
_hanging: dict[Path, list[float]] = defaultdict(list)
# What no thread could be made for, and how many threads wait for that.
_left_over: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_prepared = 0


async def call_storage(path: Path, call: Callable[[], T], timeout_s: float = DEADLINE_S) -> T:
    """What `call`, which touches the storage of `path`, gives or raises.

    Raises Unavailable when the storage does not answer within `timeout_s`; what was begun may still
    happen then, when the storage answers again.
    """
    begun = _hanging.get(path, [])
    if len(begun) >= HANGING_MAX:
        raise _silent(path, min(begun))
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    started = time.monotonic()

    def deliver(result: T | None, error: BaseException | None) -> None:
        with contextlib.suppress(ValueError):
            _hanging[path].remove(started)
        if not _hanging[path]:
            del _hanging[path]
        if answer.done():
            return
        if error is None:
            answer.set_result(result)  # type: ignore[arg-type]  # T may be None
        else:
            answer.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001  (raised in the caller)
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, failure)

    _begin(run, path)
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(answer)
    except TimeoutError as error:
        if not answer.done():
            _hanging[path].append(started)
            raise _silent(path, started) from error
        raise
    finally:
        # Whoever asked may be gone; what the call raises then is nobody's.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())


def prepare(count: int) -> None:
    """Starts threads that wait, for a host that refuses to make one. Called once in a process."""
    global _prepared  # noqa: PLW0603 - as `_hanging`, of the process
    _prepared = count
    for _ in range(count):
        threading.Thread(target=_wait, name="storage, waiting", daemon=True).start()


def _wait() -> None:
    while True:
        _left_over.get()()


def _begin(run: Callable[[], None], path: Path) -> None:
    """In a thread of its own; where none can be made, in one that was prepared and is free."""
    try:
        threading.Thread(target=run, name=f"storage {path}", daemon=True).start()
    except RuntimeError as error:
        if not _prepared:
            raise Unavailable(f"{path} cannot be looked at: {error}") from error
        _left_over.put(run)


def _silent(path: Path, since: float) -> Unavailable:
    return Unavailable(
        f"the storage of {path} has not answered for {time.monotonic() - since:.0f} s",
        remedy="look at that medium and at its mount; what waits for it goes on by itself",
    )
