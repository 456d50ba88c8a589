"""Records below a directory whose storage may stop answering: written by a thread of their own.

    replace ──► in memory ──► the thread writes ──► on storage
       │                        ▲
       └─ waits for PATIENCE_S; │ while the thread hangs, for no time at all: the newest content of
          then OSError          └ each record stays in memory, and is written when it can be

An agent writes its records within its owners' steps. On a host that dies the root file system may
be frozen, and a call that touches it never returns. So the agent waits for a record for a while
only, and goes on knowing that the record is not written. The thread is there beforehand: a dying
host may refuse to make one.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

# Longer than a busy disk takes for a write that is not flushed.
PATIENCE_S = 3.0


class LateRecords:
    """Of the records below `directory`. Made once in a process; its thread lives as long."""

    def __init__(self, directory: Path, patience_s: float = PATIENCE_S) -> None:
        self.directory = directory
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting: dict[Path, _Write] = {}
        self._begun: float | None = None
        threading.Thread(target=self._write_all, name="records", daemon=True).start()

    def covers(self, path: Path) -> bool:
        """Whether the file is below the directory."""
        return path.is_relative_to(self.directory)

    def call(self, path: Path, write: Callable[[], None]) -> None:
        """Has `write`, which replaces or removes the file at `path`, called by the thread.

        Raises what `write` raises; OSError (ETIMEDOUT) when it was not called in time: it is called
        later, unless another write of the same file takes its place.
        """
        with self._changed:
            job = self._waiting[path] = _Write(write)
            self._changed.notify_all()
            hangs = self._begun is not None and time.monotonic() - self._begun > self._patience_s
            patience_s = 0.0 if hangs else self._patience_s
            self._changed.wait_for(lambda: job.done, timeout=patience_s)
            if not job.done:
                raise OSError(errno.ETIMEDOUT, "its storage does not answer", str(path))
        if job.error is not None:
            raise job.error

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                path = next(iter(self._waiting))
                job = self._waiting.pop(path)
                self._begun = time.monotonic()
            try:
                job.write()
            except OSError as error:
                job.error = error
            with self._changed:
                took_s = time.monotonic() - self._begun
                self._begun = None
                job.done = True
                self._changed.notify_all()
            if took_s > self._patience_s:
                log.warning("record path=%s was written after %.0f s", path, took_s)


class _Write:
    """One write; `done` is set under the lock."""

    def __init__(self, write: Callable[[], None]) -> None:
        self.write = write
        self.done = False
        self.error: OSError | None = None
