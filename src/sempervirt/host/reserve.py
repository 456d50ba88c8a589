"""Processes that were started beforehand and wait for what they are to do.

On a host whose kernel is about to die, `fork` may be refused, and the file of a program may not be
read any more. A process that waits needs neither: it gets its command line by its stdin, as one
line of JSON: {"log": PATH, "arguments": […]}. At the end of its stdin it ends, so none outlives an
agent that does not need it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import CommandFailed
from sempervirt.host import process
from sempervirt.host.process import Process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    process: Process
    stdin: int


class Reserve:
    """Processes of `argv` that wait. They log to `log` until they have something to do."""

    def __init__(self, argv: Sequence[str], log_file: Path) -> None:
        self._argv = argv
        self._log = log_file
        self._waiting: list[_Waiting] = []

    @property
    def count(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def keep(self, count: int) -> None:
        """Starts as many as are missing. What cannot be started is in the log."""
        for ended in [one for one in self._waiting if one.process.exit is not None]:
            self._waiting.remove(ended)
            os.close(ended.stdin)
        while len(self._waiting) < count:
            try:
                self._waiting.append(self._start())
            except (CommandFailed, OSError) as error:
                log.warning("reserve: %s", error)
                return

    def take(self, arguments: Sequence[str], log_file: Path) -> Process | None:
        """Has one of them do what `arguments` say, and log to `log_file`; None when none waits."""
        line = json.dumps({"log": str(log_file), "arguments": list(arguments)}) + "\n"
        while self._waiting:
            one = self._waiting.pop(0)
            try:
                with os.fdopen(one.stdin, "w") as stdin:
                    stdin.write(line)
            except OSError as error:  # it has ended
                log.warning("reserve pid=%d: %s", one.process.pid, error)
                continue
            log.info("reserve pid=%d is taken, %d wait", one.process.pid, len(self._waiting))
            return one.process
        return None

    def release(self) -> None:
        """Ends all that wait."""
        for one in self._waiting:
            os.close(one.stdin)
        self._waiting.clear()

    def _start(self) -> _Waiting:
        reader, writer = os.pipe()
        try:
            started = process.spawn(
                self._argv, log=self._log, on_exit=lambda _end: None, stdin=reader
            )
        except CommandFailed:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        return _Waiting(started, writer)
