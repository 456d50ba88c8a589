"""Follows a log file, also across truncation."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

INTERVAL_S = 0.2


def follow(path: Path, write: Callable[[str], object]) -> None:
    """Calls `write` with each line that is appended, until interrupted."""
    position = path.stat().st_size if path.exists() else 0
    rest = ""
    while True:
        time.sleep(INTERVAL_S)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                position = 0 if size < position else position
                file.seek(position)
                text = rest + file.read().decode(errors="replace")
                position = file.tell()
        except FileNotFoundError:
            continue
        *lines, rest = text.split("\n")
        for line in lines:
            write(line)
