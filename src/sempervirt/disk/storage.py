"""What an image lies on, as far as it decides how fast which engine is.

    tmpfs                     memory
    ext4 cached on vda        a file system, through the host's page cache
    ext4 direct on vda        the same, around it
    block direct on sda       a block device itself
    none                      a device without storage (a network card)

The device is named by the most lasting name that the kernel has for it: the file behind a loop
device, a world-wide name, a device-mapper or RAID identity, a serial number, or else the name under
/dev. A partition goes by its whole disk.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sempervirt.core.errors import InvalidRequest
from sempervirt.host.procfs import unescape

SYS_BLOCK = Path("/sys/dev/block")
MOUNTS = Path("/proc/self/mountinfo")
MEMORY = frozenset({"tmpfs", "ramfs"})
_IDENTITIES = (
    "loop/backing_file",
    "wwid",
    "device/wwid",
    "dm/uuid",
    "md/uuid",
    "device/serial",
    "serial",
)


class StorageKey(BaseModel):
    """`kind` is a file system type, "block" or "none"; `device` is empty for memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    device: str = ""
    direct: bool = False

    def __str__(self) -> str:
        if self.kind in MEMORY or self.kind == "none":
            return f"{self.kind} direct" if self.direct else self.kind
        how = "direct" if self.direct else "cached"
        return f"{self.kind} {how}" + (f" on {self.device}" if self.device else "")

    @property
    def in_memory(self) -> bool:
        """Whether the storage is memory, with no device at all behind the file system."""
        return self.kind in MEMORY


NO_STORAGE = StorageKey(kind="none")


def storage_key(path: Path, *, direct: bool) -> StorageKey:
    """The key of an image, or of a directory for images to come.

    Raises InvalidRequest when there is nothing at `path`.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be looked at: {error.strerror}",
            remedy="name an image or a directory that exists",
        ) from error
    if stat.S_ISBLK(status.st_mode):
        return StorageKey(kind="block", device=_identity(status.st_rdev), direct=direct)
    mount = mount_of(path, status)
    if mount.kind in MEMORY:
        return StorageKey(kind=mount.kind, direct=direct)
    # Some file systems (btrfs, overlay, NFS) have no device number of their own.
    device = _identity(status.st_dev) or _identity_of_source(mount.source)
    return StorageKey(kind=mount.kind, device=device, direct=direct)


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its type, what is mounted, and the options of the file system."""

    kind: str = "unknown"
    source: str = ""
    options: frozenset[str] = frozenset()


def mount_of(path: Path, status: os.stat_result) -> Mount:
    """The innermost mount above `path`, of which `status` was taken. Raises OSError.

    36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw
    """
    path, device = path.resolve(), status.st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    best, found = (False, -1), Mount()
    for line in MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, source, *options) = before.split(), after.split()
        point = Path(unescape(fields[4]))
        if not path.is_relative_to(point):
            continue
        # A mount that is hidden by another has the wrong number; of equals the last is on top.
        rank = (fields[2] == number, len(point.parts))
        if rank >= best:
            known = frozenset(option for text in options for option in text.split(","))
            best, found = rank, Mount(kind, unescape(source), known)
    return found


def _identity_of_source(source: str) -> str:
    try:
        status = os.stat(source)  # noqa: PTH116
    except OSError:
        return source
    return (_identity(status.st_rdev) if stat.S_ISBLK(status.st_mode) else "") or source


def _identity(device: int) -> str:
    """The lasting name of a block device; empty when the number is not that of one."""
    try:
        folder = (SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    except OSError:
        return ""
    if (folder / "partition").exists():
        folder = folder.parent
    for name in _IDENTITIES:
        try:
            value = " ".join((folder / name).read_text(errors="replace").split())
        except OSError:
            continue
        if value:
            return value
    return folder.name
