"""What a process has open, as the kernel tells it while the process goes on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def open_files(pid: int | None) -> list[tuple[Path, str, os.stat_result]]:
    """Each descriptor: the path that leads there by /proc, its name, and what it is. One that is
    closed meanwhile is left out. Raises OSError when the process is gone.
    """
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append((descriptor, str(descriptor.readlink()), descriptor.stat()))
    return found
