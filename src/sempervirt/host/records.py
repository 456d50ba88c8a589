"""Files that outlive a process: JSON, written atomically, each with a version.

    {"version": 1, ...}

A reader that meets a version it does not know refuses the file and leaves it as it is; zero
is never written, so an empty or zeroed file cannot pass for a record.

What stands in a record's place may be anything: other bytes, a gigabyte of them, a directory, a
pipe. `read_file` opens nothing but a regular file, never waits, and reads no more than a limit; all
that is wrong comes out of `read_record` as RecordDamaged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import stat
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sempervirt.core.errors import SempervirtError
from sempervirt.core.printable import has_nul
from sempervirt.host.late_records import LateRecords

log = logging.getLogger(__name__)

# The longest record is that of a VM with a thousand disks: some hundred kilobytes.
RECORD_MAX_BYTES = 8 << 20
# What writes records in this process, if not whoever wants them written (`write_late`).
_late: LateRecords | None = None
# For umask: what an agent makes is its own user's.
PRIVATE = 0o077


class RecordDamaged(SempervirtError):
    """A record cannot be read; the message says why. The file was left as it is."""


class RecordNewer(RecordDamaged):
    """A later release wrote the record; nothing is wrong with the file."""


def write_record(
    path: Path, version: int, content: Mapping[str, Any], *, durable: bool = False
) -> None:
    """Replaces the record at `path` in one step. Raises OSError; the former record stands then.

    Most records describe processes, none of which survives what would lose a file that was not
    flushed to the medium; one that has to outlive the host's boot is `durable`: it is on the medium
    under its name when this returns. The rename keeps a killed writer from leaving half a file.
    """
    text = json.dumps({"version": version, **content}, indent=1) + "\n"
    replace_text(path, text, durable=durable)


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replaces the file at `path`, as `write_record` does with a record. Raises OSError."""
    replace_bytes(path, text.encode(), durable=durable)


def replace_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replaces the file at `path`, as `write_record` does with a record. Only its owner may read
    it: records hold command lines of guests' kernels, logs what guests say. Raises OSError.
    """
    if _late is not None and _late.covers(path):
        _late.call(path, partial(_replace_bytes, path, content, durable=durable))
    else:
        _replace_bytes(path, content, durable=durable)


def write_late(late: LateRecords) -> None:
    """From now on this process writes the records below a directory by a thread of their own."""
    global _late  # noqa: PLW0603 - there is one agent in a process
    _late = late


def _replace_bytes(path: Path, content: bytes, *, durable: bool) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)  # of a former process with this pid, killed while it wrote
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
        if durable:
            flush_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def flush_directory(directory: Path) -> None:
    """Puts the names in a directory on the medium; a file's own flush does not. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path, mode: int) -> None:
    """Makes a directory that may be there, and those above it, on the medium. Raises OSError."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(mode=mode, parents=True, exist_ok=True)
    for path in reversed(missing):
        flush_directory(path.parent)


def read_file(path: Path, limit_bytes: int = RECORD_MAX_BYTES, *, follow: bool = False) -> bytes:
    """All that the regular file at `path` holds. Raises OSError, also for one that is longer than
    `limit_bytes` and for anything else than a regular file; never waits for a writer. Symbolic
    links are only followed where users may make them.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    flags |= 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = b""
        while len(content) <= limit_bytes and (piece := os.read(descriptor, limit_bytes + 1)):
            content += piece
    finally:
        os.close(descriptor)
    if len(content) > limit_bytes:
        raise OSError(errno.EFBIG, f"longer than {limit_bytes} bytes", str(path))
    return content


def read_record(path: Path, version: int) -> dict[str, Any] | None:
    """The record at `path`, None when there is none. Raises RecordDamaged."""
    try:
        content = json.loads(read_file(path).decode(), parse_float=_finite, parse_constant=_refuse)
        json.dumps(content, ensure_ascii=False).encode()  # half of a pair (\\ud800) is no text
        if has_nul(content):
            raise ValueError("a text of it holds a NUL")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise RecordDamaged(
            f"{path} cannot be read: {cause}", remedy="move the file away and start again"
        ) from error
    found = content.get("version") if isinstance(content, dict) else None
    if type(found) is not int or found != version:
        newer = type(found) is int and found > version
        raise (RecordNewer if newer else RecordDamaged)(
            f"{path} has version {found!r:.40}, this program knows {version}",
            remedy="use the release that wrote it, or move the file away",
        )
    assert isinstance(content, dict)
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is no number that a record holds")
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number that a record holds")


def remove_record(path: Path) -> bool:
    """Removes a record that may be absent. One that cannot be removed is told in the log: what it
    says is compared with what runs, before anybody believes it. Returns whether it is gone.
    """
    remove = partial(path.unlink, missing_ok=True)
    try:
        if _late is not None and _late.covers(path):
            _late.call(path, remove)
        else:
            remove()
    except OSError as error:
        log.error("record path=%s not removed: %s", path, error.strerror)  # noqa: TRY400
        return False
    return True


def move_aside(path: Path) -> Path | None:
    """Gives what stands in a record's place another name beside it, so that a new record can be
    written and nothing is lost; None when there is nothing, or it cannot be moved.
    """
    for number in range(1, 100):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not os.path.lexists(aside):
            try:
                return path.rename(aside)
            except OSError:
                return None
    return None
