"""Waiting for a named condition with a deadline, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sempervirt.core.errors import Unavailable


class Changes:
    """Wakes everyone who waits for a condition each time the state it depends on changed."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """To be called after every change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_until(
        self, condition: Callable[[], bool], *, timeout_s: float | None, what: str
    ) -> None:
        """Returns when `condition()` holds. Raises Unavailable at the deadline."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._changed.wait()
        except TimeoutError as error:
            raise Unavailable(f"waited {timeout_s:g} s for {what}") from error
