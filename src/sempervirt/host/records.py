"""Files that outlive a process: JSON, written atomically, each with a version.

    {"version": 1, ...}

A reader that meets a version it does not know refuses the file and leaves it as it is; zero
is never written, so an empty or zeroed file cannot pass for a record.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sempervirt.core.errors import SempervirtError


class RecordDamaged(SempervirtError):
    """A record cannot be read; the message says why. The file was left as it is."""


class RecordNewer(RecordDamaged):
    """A later release wrote the record; nothing is wrong with the file."""


def write_record(
    path: Path, version: int, content: Mapping[str, Any], *, durable: bool = False
) -> None:
    """Replaces the record at `path` in one step.

    Most records describe processes, none of which survives what would lose a file that was not
    flushed to the medium; one that has to outlive the host's boot is `durable`: it is on the medium
    under its name when this returns. The rename keeps a killed writer from leaving half a file.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w") as file:
        file.write(json.dumps({"version": version, **content}, indent=1) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())
    scratch.replace(path)
    if durable:
        flush_directory(path.parent)


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


def read_record(path: Path, version: int) -> dict[str, Any] | None:
    """The record at `path`, None when there is none. Raises RecordDamaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RecordDamaged(
            f"{path} cannot be read: {error}", remedy="move the file away and start again"
        ) from error
    found = content.get("version") if isinstance(content, dict) else None
    if found != version:
        newer = isinstance(found, int) and found > version
        raise (RecordNewer if newer else RecordDamaged)(
            f"{path} has version {found!r}, this program knows {version}",
            remedy="use the release that wrote it, or move the file away",
        )
    assert isinstance(content, dict)
    return content


def remove_record(path: Path) -> None:
    """Removes a record that may be absent."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
