"""One agent for each state directory, and for each run directory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sempervirt.core.errors import StateConflict, Unavailable

log = logging.getLogger(__name__)

LOCK_FILE = "agent.lock"


@contextlib.contextmanager
def agent_lock(*directories: Path) -> Iterator[None]:
    """Holds the lock of each directory. Raises StateConflict, naming the agent that has it.

    The lock is on the directory itself, so that a file system that is full or read-only has one as
    well; releases before this one locked a file in it, which is locked too where that can be done.
    The kernel lets go of a lock when the process ends, however it ends.
    """
    with contextlib.ExitStack() as held:
        for directory in dict.fromkeys(path.resolve() for path in directories):
            held.enter_context(_locked(directory))
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            own = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"{directory} cannot be opened: {error.strerror}") from error
        held.callback(os.close, own)
        file = _lock_file(directory)
        if file is not None:
            held.callback(os.close, file)
        for descriptor in (own, file):
            if descriptor is not None:
                _lock(descriptor, file, directory)
        if file is not None:
            _note_holder(file, f"{os.getpid()}\n")
            held.callback(_note_holder, file, "")
        yield


def _lock_file(directory: Path) -> int | None:
    """The file that tells who has the lock; None where it cannot be had."""
    path = directory / LOCK_FILE
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    cause = ""
    for more in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            return os.open(path, flags | more, 0o600)
        except OSError as error:
            cause = error.strerror or str(error)
    log.warning("lock file=%s is not used: %s", path, cause)
    return None


def _lock(descriptor: int, file: int | None, directory: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StateConflict(
            f"another agent (pid {_holder(file)}) works on {directory}",
            remedy="use that one, or end it, or choose another SEMPERVIRT_STATE_DIR and "
            "SEMPERVIRT_RUN_DIR",
        ) from error
    except OSError as error:  # a file system without locks
        log.warning("lock path=%s cannot be taken: %s", directory, error.strerror)


def _holder(file: int | None) -> str:
    with contextlib.suppress(OSError):
        if file is not None and (text := os.pread(file, 32, 0).decode(errors="replace").strip()):
            return text
    return "?"


def _note_holder(file: int, text: str) -> None:
    with contextlib.suppress(OSError):  # read-only, or full: nobody depends on it
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)
