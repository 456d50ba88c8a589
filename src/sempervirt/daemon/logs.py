"""How the agent logs: one line for each operation, to stderr.

    2026-11-22T21:04:05.123Z INFO run vm=web pid=4711 accel=tcg

ERROR: something asked for did not happen. WARNING: something happened that nobody asked for
and that was dealt with. INFO: what was asked for was done.

Lines go to memory first, and a thread writes them: who reads stderr may stand still, as systemd's
journal does on a host whose file system is frozen, and the agent must not wait for that.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from typing import TextIO

# Some megabytes, of hours of trouble.
LINES_MAX = 20_000
FLUSH_S = 1.0


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{moment}.{int(record.msecs):03d}Z"


class MemoryFirst(logging.Handler):
    """Hands lines to a thread, which writes them to `stream`. Lines that find no place are counted,
    and their number is told before the next line that is written.
    """

    def __init__(self, stream: TextIO, lines_max: int = LINES_MAX) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str] = queue.Queue(lines_max)
        self._lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Never waits."""
        try:
            line = self.format(record)
        except (TypeError, ValueError):  # a mistake in the line must not harm what it tells of
            self.handleError(record)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def flush(self) -> None:
        """Waits until all lines are written, for FLUSH_S at most."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(
                lambda: not self._lines.unfinished_tasks, timeout=FLUSH_S
            )

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if self._lost:
                lost, self._lost = self._lost, 0
                line = f"{lost} lines of the log are lost, for nobody took them\n{line}"
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                self._stream.write(line + "\n")
                self._stream.flush()
            self._lines.task_done()


def log_to_stderr(level: str) -> None:
    """Sends our log lines to stderr; libraries are heard from WARNING on."""
    handler = MemoryFirst(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sempervirt").setLevel(level.upper())
