"""Tasks that nobody awaits: what they raise is dealt with at once, and not when they are collected.

An exception that leaves such a task is a mistake in the program. Where the task is part of an owner
(`host.owner`) the process ends by it: nobody could tell what the owner's state is worth, and
whoever waits for the owner would wait for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)

# EX_SOFTWARE of sysexits.h.
CRASHED = 70


def end_process(what: str, error: BaseException) -> None:
    """Ends this process at once, without a clean-up that would act on a state that may be wrong.

    QEMU and the backends run on; the next agent adopts them.
    """
    log.critical(
        "%s has failed: %s: %s; the agent ends here, the VMs run on, and the next agent takes them "
        "over (systemd starts it; by hand: semperd)",
        what,
        type(error).__name__,
        error,
        exc_info=error,
    )
    logging.shutdown()
    os._exit(CRASHED)


# What a failed owner leads to; tests put something else in its place.
fail: Callable[[str, BaseException], None] = end_process


def start(work: Coroutine[Any, Any, None], name: str, *, crash: bool = False) -> asyncio.Task[None]:
    """Runs `work` in a task; the caller keeps the task. With `crash` a failure of it ends the
    process, otherwise it is logged.
    """
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_end_with if crash else _complain)
    return task


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the task %s has failed", task.get_name(), exc_info=error)


def _end_with(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        fail(task.get_name(), error)
