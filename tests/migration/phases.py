"""The phases of a move as its source's agent writes them to its log: seen within milliseconds."""

from __future__ import annotations

import asyncio
import re
import time
from typing import BinaryIO

from lab.world import Host

PHASE = re.compile(rb"migrate vm=\S+ to \S+: \w+ -> (\w+)")
LOOK_S = 0.001
# In the order in which they come. What ends a move is never followed by another one.
ORDER = ("prepare", "precopy", "switchover", "commit", "done")
OVER = ("done", "abandoned", "lost")


class Phases:
    """Follows the log of a host from the moment it is made."""

    def __init__(self, host: Host) -> None:
        self._file: BinaryIO = host.log.open("rb")
        self._file.seek(0, 2)
        self._pending = b""
        self.seen: list[tuple[float, str]] = []

    def begun(self) -> None:
        """The move was asked for, and the agent has said yes."""
        self.seen.append((time.monotonic(), ORDER[0]))

    def close(self) -> None:
        """Closes the log."""
        self._file.close()

    def look(self) -> str:
        """The newest phase; "" before the first."""
        self._pending += self._file.read()
        *lines, self._pending = self._pending.split(b"\n")
        now = time.monotonic()
        for line in lines:
            if found := PHASE.search(line):
                self.seen.append((now, found[1].decode()))
        return self.seen[-1][1] if self.seen else ""

    async def wait(self, phase: str, deadline_s: float) -> str:
        """Returns at that phase, at a later one, or when the move is over; says which it is.

        At the deadline it gives up, with the phase that stands then.
        """
        give_up = time.monotonic() + deadline_s
        while True:
            now = self.look()
            reached = any(name == phase for _, name in self.seen)
            if reached or now in OVER or time.monotonic() > give_up:
                return now
            await asyncio.sleep(LOOK_S)  # poll interval
