"""How the agent logs: one line for each operation, to stderr.

    2026-11-22T21:04:05.123Z INFO run vm=web pid=4711 accel=tcg

ERROR: something asked for did not happen. WARNING: something happened that nobody asked for
and that was dealt with. INFO: what was asked for was done.
"""

from __future__ import annotations

import logging
import sys
import time


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{moment}.{int(record.msecs):03d}Z"


def log_to_stderr(level: str) -> None:
    """Sends our log lines to stderr; libraries are heard from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sempervirt").setLevel(level.upper())
