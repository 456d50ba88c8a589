"""Waiting for a condition, with a deadline and a name for what did not come."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.01


class MoveError(Exception):
    """A guest that did not boot, or did not move; the message says what is known."""


async def until(
    condition: Callable[[], bool | Awaitable[bool]], what: str, deadline_s: float
) -> None:
    """Return when the condition is true. Raises MoveError when it is not by the deadline."""
    give_up = time.monotonic() + deadline_s
    while True:
        answer = condition()
        if await answer if inspect.isawaitable(answer) else answer:
            return
        if time.monotonic() > give_up:
            raise MoveError(f"{what}: not within {deadline_s:.0f} s")
        await asyncio.sleep(POLL_S)
