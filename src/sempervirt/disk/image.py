"""Which file or device a disk is: the one at its path when the VM was started, and no other.

A path is a name, and may lead elsewhere later (`mv new.raw disk.raw`). So the agent keeps a
descriptor of the file, every backend opens that file anew through the descriptor
(/proc/self/fd/N: the open file, and with it the lock, is the backend's own), and what tells the
file from every other one stands on the disk's record, for the next agent.

    file          device, inode, time of birth: an inode's number is used again, its birth is not
    block device  number of the device, and the kernel's number for what was behind it (diskseq)
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sempervirt.core.sizes import format_size
from sempervirt.host.procfs import PROC

SECTOR_BYTES = 512
# What is looked through for a file that was renamed, at most.
_NEIGHBOURS = 10_000

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
# struct statx: the mask comes first, the time of birth (seconds, ns) stands at byte 80.
_STATX_BYTES, _MASK, _BIRTH = 256, struct.Struct("=I"), struct.Struct("=qI")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Identity:
    """What tells a file or device from every other one. `device` is that of the file system, or
    of a block device itself; `birth_ns` and `sequence` are 0 where the kernel does not tell them.
    """

    block_device: bool
    device: int
    inode: int = 0
    birth_ns: int = 0
    sequence: int = 0

    def is_of(self, other: Identity) -> bool:
        """Whether both are of one file or device."""
        if (self.block_device, self.device, self.inode) != (
            other.block_device,
            other.device,
            other.inode,
        ):
            return False
        pairs = ((self.birth_ns, other.birth_ns), (self.sequence, other.sequence))
        return all(mine == its for mine, its in pairs if mine and its)

    def __str__(self) -> str:
        number = f"{os.major(self.device)}:{os.minor(self.device)}"
        return f"device {number}" if self.block_device else f"inode {self.inode} on {number}"


class ImageState(Enum):
    """What has become of a disk's image under its VM. The values stand in the API."""

    IN_PLACE = "in-place"
    REPLACED = "replaced"  # its path leads to something else
    REMOVED = "removed"  # its path leads nowhere
    GROWN = "grown"  # the guest does not know of its size
    SHRUNK = "shrunk"
    GONE = "gone"  # nobody has it open, and it is not at its path


@dataclass(frozen=True)
class Sight:
    """An image, looked at: whether its path still leads to it, its size, how many names it has,
    and where it is now, if that is known to be elsewhere.
    """

    state: ImageState
    size_bytes: int
    links: int
    elsewhere: Path | None = None


class ImageFile:
    """A descriptor of an image, which keeps it from being lost, and its identity.

    It is no open file where a path is enough (O_PATH): nothing is locked, read or written by it. A
    block device is opened, so that its number is not given to another device.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.identity = identity_of(descriptor)

    @classmethod
    def open(cls, path: Path) -> ImageFile:
        """Of what is at `path` now. Raises OSError."""
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if stat.S_ISBLK(os.fstat(descriptor).st_mode):
            # Without permission to read it the number is all that there is.
            with suppress(PermissionError):
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                opened = os.open(f"/proc/self/fd/{descriptor}", flags)
                os.close(descriptor)
                descriptor = opened
        try:
            return cls(descriptor)
        except OSError:
            os.close(descriptor)
            raise

    def argument(self) -> str:
        """Where a process that inherits the descriptor opens the image."""
        return f"/proc/self/fd/{self.descriptor}"

    def look(self, path: Path) -> Sight:
        """Compares it with what is at `path` now."""
        mine = os.fstat(self.descriptor)
        size_bytes = self._size(mine)
        try:
            if identity_at(path).is_of(self.identity):
                return Sight(ImageState.IN_PLACE, size_bytes, mine.st_nlink)
            state = ImageState.REPLACED
        except (FileNotFoundError, NotADirectoryError):
            state = ImageState.REMOVED
        except OSError:
            # What cannot be looked at is not known to have changed.
            return Sight(ImageState.IN_PLACE, size_bytes, mine.st_nlink)
        return Sight(state, size_bytes, mine.st_nlink, self._elsewhere())

    def _size(self, status: os.stat_result) -> int:
        if not stat.S_ISBLK(status.st_mode):
            return status.st_size
        try:
            return os.lseek(self.descriptor, 0, os.SEEK_END)
        except OSError:
            return 0

    def _elsewhere(self) -> Path | None:
        with suppress(OSError):
            now = Path(os.readlink(self.argument()))  # noqa: PTH115
            if identity_at(now).is_of(self.identity):
                return now
        return None

    def close(self) -> None:
        """Lets go of it."""
        os.close(self.descriptor)


def identity_of(descriptor: int) -> Identity:
    """Of what a descriptor stands for. Raises OSError."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return Identity(True, status.st_rdev, sequence=_sequence(status.st_rdev))
    return Identity(False, status.st_dev, status.st_ino, _birth_ns(descriptor))


def identity_at(path: Path) -> Identity:
    """Of what is at `path` now; nothing is opened for that. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return identity_of(descriptor)
    finally:
        os.close(descriptor)


def _birth_ns(descriptor: int) -> int:
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    failed = _libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer)
    if failed or not _MASK.unpack_from(buffer)[0] & _STATX_BTIME:
        return 0
    seconds, ns = _BIRTH.unpack_from(buffer, 80)
    return int(seconds) * 10**9 + int(ns)


def _sequence(device: int) -> int:
    """Another one whenever another medium or file is behind the same number; Linux 5.15."""
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    with suppress(OSError, ValueError):
        return int((folder / "diskseq").read_text())
    return 0


def find(identity: Identity, path: Path, pids: Iterable[int]) -> ImageFile | None:
    """The image of that identity: at its path, or what one of these processes has open, or a file
    beside the path (renamed). None when nothing of it is left.
    """
    for candidate in _candidates(identity, path, pids):
        with suppress(OSError):
            if identity_at(candidate).is_of(identity):
                return ImageFile.open(candidate)
    return None


def _candidates(identity: Identity, path: Path, pids: Iterable[int]) -> Iterator[Path]:
    yield path
    for pid in pids:
        yield from descriptors_of(pid)
    if identity.block_device:
        return
    with suppress(OSError), os.scandir(path.resolve().parent) as entries:
        for entry, _ in zip(entries, range(_NEIGHBOURS), strict=False):
            if entry.inode() == identity.inode:
                yield Path(entry.path)


def descriptors_of(pid: int) -> list[Path]:
    """What a process has open, as paths that lead there."""
    with suppress(OSError):
        return sorted((PROC / str(pid) / "fd").iterdir())
    return []


def locked_by(pid: int) -> ImageFile | None:
    """What a backend has locked, which is its image: for records that name none."""
    for descriptor in descriptors_of(pid):
        with suppress(OSError):
            if "\nlock:" not in (PROC / str(pid) / "fdinfo" / descriptor.name).read_text():
                continue
            return ImageFile.open(descriptor)
    return None


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has open what is at `path` now. Raises OSError."""
    named = identity_at(path)
    for descriptor in descriptors_of(pid):
        with suppress(OSError):
            if identity_at(descriptor).is_of(named):
                return True
    return False


@dataclass(frozen=True)
class Finding:
    """What people are told about an image: what has become of it, and what can be done."""

    state: ImageState
    cause: str = ""
    remedy: str = ""

    @property
    def misplaced(self) -> bool:
        """Whether the path does not lead to the image."""
        return self.state in (ImageState.REPLACED, ImageState.REMOVED, ImageState.GONE)

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause


SOUND = Finding(ImageState.IN_PLACE)


def judge(disk: str, path: Path, sight: Sight, served_bytes: int | None) -> Finding:
    """What is to be said of an image that a VM's disk is served from. `served_bytes`: the size that
    the backend serves, if it is known.
    """
    if sight.state in (ImageState.REPLACED, ImageState.REMOVED):
        return _misplaced(disk, path, sight)
    if served_bytes is None:
        return SOUND
    now_bytes = -(-sight.size_bytes // SECTOR_BYTES) * SECTOR_BYTES
    if now_bytes > served_bytes:
        return Finding(
            ImageState.GROWN,
            f"{path} has grown to {format_size(now_bytes)}, and the guest has "
            f"{format_size(served_bytes)} of it",
            f"give it to the guest: semper disk resize {disk} {now_bytes}",
        )
    if now_bytes < served_bytes:
        return Finding(
            ImageState.SHRUNK,
            f"{path} has shrunk from {served_bytes} to {now_bytes} bytes, and requests beyond its "
            "end fail",
            f"give it back its size (truncate --size={served_bytes} {path}), and restore what it "
            "held there",
        )
    return SOUND


def _misplaced(disk: str, path: Path, sight: Sight) -> Finding:
    leads = "to another file" if sight.state is ImageState.REPLACED else "nowhere"
    where, remedy = "", f"put it back before the VM is started again: mv {sight.elsewhere} {path}"
    if sight.elsewhere is not None:
        where = f", which is at {sight.elsewhere} now"
    else:
        remedy = f"copy it before the VM ends: semper disk rescue {disk} --to PATH"
        where = ", which has no name any more and is lost with the VM" if not sight.links else ""
    return Finding(
        sight.state,
        f"{path} leads {leads}, and the VM goes on with its own image{where}",
        remedy,
    )


def gone(disk: str, path: Path, identity: Identity) -> Finding:
    """What is to be said of an image that was not found again; nothing is served then."""
    return Finding(
        ImageState.GONE,
        f"disk {disk}: the image that the VM was started with ({identity}) is not at {path} any "
        "more, and nothing is served from another file",
        f"put it back to {path}, or end the VM",
    )
