"""Copies of a running disk's image, made through the descriptor that the agent keeps.

The copy is consistent only while nobody writes: whoever asks for it has the guest stand still. On
one file system that shares blocks between files (btrfs, XFS) the copy takes milliseconds (FICLONE);
elsewhere what holds data is copied, and holes stay holes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.core.sizes import format_size
from sempervirt.disk.image import ImageFile
from sempervirt.disk.target import put_in_place, require_free, there_already
from sempervirt.host.records import flush_directory

_FICLONE = 0x40049409
_PIECE = 16 << 20
# The kernel copies for us between these two files, or it says one of these.
_BY_HAND = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class How(Enum):
    """How a copy came to be. The values stand in the API."""

    LINKED = "linked"  # no copy: the image has its name again
    CLONED = "cloned"  # shares its blocks with the image
    COPIED = "copied"


@dataclass(frozen=True)
class Made:
    """A copy, of so many bytes, of which `copied_bytes` were copied."""

    how: How
    size_bytes: int
    copied_bytes: int = 0


def link(image: ImageFile, target: Path) -> Made | None:
    """Gives an image that was renamed the name `target` again, if that is possible: on the same
    file system, and not when its last name was removed. Raises StateConflict when something is
    there.
    """
    status = os.fstat(image.descriptor)
    if image.identity.block_device or status.st_nlink == 0:
        return None
    own = os.open("/proc/self/fd", os.O_PATH | os.O_CLOEXEC)
    try:
        # With a directory, because without one Python has the kernel link the link itself.
        os.link(str(image.descriptor), target, src_dir_fd=own, follow_symlinks=True)
    except FileExistsError as error:
        raise there_already(target) from error
    except OSError:
        return None
    finally:
        os.close(own)
    flush_directory(target.parent)
    return Made(How.LINKED, status.st_size)


def check(image: ImageFile, target: Path) -> None:
    """Raises InvalidRequest or StateConflict for a target that will not do."""
    require_free(target)
    status = os.fstat(image.descriptor)
    needed = (
        status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else image.look(target).size_bytes
    )
    free = os.statvfs(target.parent)
    available = free.f_bavail * free.f_frsize
    # A clone on the same file system needs none of it.
    if needed > available and status.st_dev != target.parent.stat().st_dev:
        raise Unavailable(
            f"{target.parent} has {format_size(available)} free, and the image takes "
            f"{format_size(needed)}",
            remedy="make room, or name another place",
        )


def copy(
    image: ImageFile, target: Path, progress: Callable[[int, int], None], stop: threading.Event
) -> Made:
    """Copies the image to `target`, which is complete and durable or not there.

    `progress` is told the bytes that are done, of how many, from this thread. Raises OSError, and
    Unavailable when `stop` was set.
    """
    partial = target.with_name(f".{target.name}.rescue")
    partial.unlink(missing_ok=True)
    source = os.open(image.argument(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(source).st_mode) & 0o777
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        sink = os.open(partial, flags, mode or 0o600)
        try:
            made = _fill(source, sink, progress, stop)
            os.fsync(sink)
        finally:
            os.close(sink)
        put_in_place(partial, target)
        return made
    finally:
        os.close(source)
        partial.unlink(missing_ok=True)


def _fill(
    source: int, sink: int, progress: Callable[[int, int], None], stop: threading.Event
) -> Made:
    size_bytes = os.lseek(source, 0, os.SEEK_END)
    with suppress(OSError):
        fcntl.ioctl(sink, _FICLONE, source)
        return Made(How.CLONED, size_bytes)
    os.ftruncate(sink, size_bytes)
    copied = 0
    for start, end in _data(source, size_bytes):
        at = start
        while at < end:
            if stop.is_set():
                raise Unavailable("the copy was given up")
            moved = _move(source, sink, at, min(_PIECE, end - at))
            if moved == 0:
                raise OSError(errno.EIO, "the image became shorter under the copy")
            at += moved
            copied += moved
            progress(at, size_bytes)
    progress(size_bytes, size_bytes)
    return Made(How.COPIED, size_bytes, copied)


def _data(source: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """What is no hole: begin and end."""
    at = 0
    while at < size_bytes:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            if error.errno != errno.EINVAL:
                raise
            yield at, size_bytes  # a block device, or a file system without holes
            return
        at = min(os.lseek(source, start, os.SEEK_HOLE), size_bytes)
        yield start, at


def _move(source: int, sink: int, at: int, length: int) -> int:
    try:
        return os.copy_file_range(source, sink, length, at, at)
    except OSError as error:
        if error.errno not in _BY_HAND:
            raise
    data = os.pread(source, length, at)
    written = 0
    while written < len(data):
        written += os.pwrite(sink, data[written:], at + written)
    return written
