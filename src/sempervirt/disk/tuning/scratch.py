"""What candidates are measured on: a scratch image beside the user's, and without a name.

A file that has lost its name goes away with the last process that has it open, so nothing is left
behind however this one ends. Backends open it as /proc/PID/fd/N.

Beside a block device there is no room for a scratch image, and a user's device is never written:
there only reads are measured.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.sizes import format_size

MIB = 1 << 20
# Left to others on the file system.
RESERVE_BYTES = 64 * MIB
_CHUNK = 4 * MIB


@dataclass(frozen=True)
class Ground:
    """`path` is valid while this process has `descriptor` open. Only `ours` is written to."""

    descriptor: int
    path: Path
    ours: bool

    async def write_back(self, *, drop: bool) -> None:
        """Writes dirty pages to the image now, and not during the next measurement.

        With `drop` the host's page cache forgets the image as well.
        """
        if self.ours:
            await asyncio.to_thread(os.fsync, self.descriptor)
        if drop:
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def block_device(path: Path) -> Iterator[Ground]:
    """The user's block device, to be read. Raises InvalidRequest when that is not allowed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be opened for reading: {error.strerror}",
            remedy="correct its permissions",
        ) from error
    try:
        yield Ground(descriptor, path, ours=False)
    finally:
        os.close(descriptor)


def check_room(directory: Path, size_bytes: int) -> None:
    """Raises InvalidRequest or Unavailable when no scratch image of that size fits there."""
    if not directory.is_dir():
        raise InvalidRequest(
            f"{directory} is not a directory", remedy="name an image or a directory"
        )
    if not os.access(directory, os.W_OK):
        raise InvalidRequest(
            f"{directory} cannot be written to", remedy="name a directory that you may write to"
        )
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < size_bytes + RESERVE_BYTES:
        raise Unavailable(
            f"{directory} has {format_size(free)} free; the scratch image takes "
            f"{format_size(size_bytes)}, and {format_size(RESERVE_BYTES)} are left alone",
            remedy="make room, or choose a smaller --size",
        )


@asynccontextmanager
async def scratch_image(
    directory: Path, size_bytes: int, wrote: Callable[[int], None] = lambda _: None
) -> AsyncIterator[Ground]:
    """A scratch image in `directory`, every block of it really written.

    `wrote` is told how many bytes are written so far. Raises as `check_room` does, and Unavailable
    when the disk becomes full meanwhile.
    """
    check_room(directory, size_bytes)
    try:
        descriptor = _nameless(directory)
    except OSError as error:
        raise Unavailable(
            f"no scratch image can be made in {directory}: {error.strerror}",
            remedy="name another directory of the same storage",
        ) from error
    try:
        await _write(descriptor, directory, size_bytes, wrote)
        yield Ground(descriptor, Path(f"/proc/{os.getpid()}/fd/{descriptor}"), ours=True)
    finally:
        os.close(descriptor)


def _nameless(directory: Path) -> int:
    with suppress(OSError):  # not every file system has it
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, name = tempfile.mkstemp(prefix=".semper-tune-", dir=directory)
    os.unlink(name)  # noqa: PTH108
    return descriptor


async def _write(
    descriptor: int, directory: Path, size_bytes: int, wrote: Callable[[int], None]
) -> None:
    # Random, so that nothing below compresses it or finds two blocks alike.
    block = os.urandom(_CHUNK)
    try:
        for start in range(0, size_bytes, _CHUNK):
            turn = start // _CHUNK * 4099 % _CHUNK
            data = (block[turn:] + block[:turn])[: size_bytes - start]
            while data:
                data = data[os.write(descriptor, data) :]
            wrote(min(start + _CHUNK, size_bytes))
            await asyncio.sleep(0)  # Ctrl-C is heard here
        await asyncio.to_thread(os.fsync, descriptor)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(
                f"{directory} is full: {error.strerror}",
                remedy="make room, or choose a smaller --size",
            ) from error
        raise Unavailable(f"the scratch image in {directory}: {error.strerror}") from error
