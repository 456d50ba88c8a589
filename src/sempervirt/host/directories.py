"""Directories that nobody but their owner may change: sockets in them lead to VMs, and records in
them say what is ended and started.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.host.records import make_directory


def make_scratch(prefix: str, parent: Path | None = None) -> Path:
    """A new directory for an agent of a while, which users of VMs go through and do not look into.
    Raises OSError.
    """
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    made.chmod(0o711)
    return made


def make_private(directory: Path, variable: str, *, linked: bool) -> None:
    """Makes a directory for the present user only, or checks one that is there; with `linked` it
    may be a symbolic link of this user or root.

    Raises Unavailable, with the remedy, for a directory that somebody else owns or could replace;
    `variable` chooses another place.
    """
    elsewhere = f"or choose another place by {variable}"
    try:
        make_directory(directory, 0o700)
        link, real = directory.lstat(), directory.resolve(strict=True)
        there = real.stat()
        above = [(path, path.lstat()) for path in directory.absolute().parents]
    except OSError as error:
        raise Unavailable(
            f"cannot make {directory}: {error.strerror}", remedy=f"choose another by {variable}"
        ) from error
    if stat.S_ISLNK(link.st_mode) and not (linked and _trusted(link)):
        raise Unavailable(
            f"{directory} is a symbolic link, to {real}",
            remedy=f"remove the link if it is not yours, {elsewhere}",
        )
    if there.st_uid != os.geteuid():
        raise Unavailable(
            f"{directory} belongs to user {there.st_uid}, and not to user {os.geteuid()}",
            remedy=f"ask who made it; if it is yours: chown {os.geteuid()} {real}, {elsewhere}",
        )
    if there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unavailable(
            f"{directory} can be changed by others (mode {stat.S_IMODE(there.st_mode):04o})",
            remedy=f"who may have done so? If nobody: chmod go-w {real}, {elsewhere}",
        )
    _check_above(directory, link, above, elsewhere)


def _check_above(
    directory: Path, link: os.stat_result, above: list[tuple[Path, os.stat_result]], elsewhere: str
) -> None:
    """In a directory where everybody may make entries, an entry has to be ours or root's."""
    below, its = directory, link
    for path, found in above:
        if found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode):
            if not found.st_mode & stat.S_ISVTX:
                raise Unavailable(
                    f"{directory} can be replaced by anybody, since {path} can be changed by all",
                    remedy=f"chmod +t {path}, {elsewhere}",
                )
            if not _trusted(its):
                raise Unavailable(
                    f"{below} belongs to user {its.st_uid}, who could replace {directory}",
                    remedy=f"ask who made it, {elsewhere}",
                )
        below, its = path, found


def _trusted(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())
