"""One agent for each state directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sempervirt.core.errors import StateConflict


@contextlib.contextmanager
def agent_lock(state_dir: Path) -> Iterator[None]:
    """Holds the lock of `state_dir`. Raises StateConflict, naming the agent that has it.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    path = state_dir / "agent.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "?"
            raise StateConflict(
                f"another agent (pid {holder}) works on {state_dir}",
                remedy="use that one, or end it, or choose another SEMPERVIRT_STATE_DIR",
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)
