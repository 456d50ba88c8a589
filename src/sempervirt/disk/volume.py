"""What a disk's image is, before anybody serves it."""

from __future__ import annotations

import itertools
import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest

SECTOR_BYTES = 512

# Formats of images. A guest can write any of these heads to the first sector of its raw disk.
_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"QFI\xfb", "qcow2"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"<<< ", "vdi"),
)


@dataclass(frozen=True)
class Volume:
    """A raw image: a file or a block device."""

    path: Path
    size_bytes: int
    block_device: bool
    read_only: bool


def inspect(path: Path, *, read_only: bool) -> Volume:
    """Looks at an image. Raises InvalidRequest, with cause and remedy, if that cannot be served.

    Whatever stands in the image is taken as raw bytes: see `require_raw`.

    The image is opened for writing unless `read_only`: only that tells whether writing is allowed.
    """
    try:
        descriptor = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR))
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"the image {path} does not exist",
            remedy=f"create it, for example with: truncate -s 1G {shlex.quote(str(path))}",
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"the image {path} cannot be opened for {'reading' if read_only else 'writing'}: "
            f"{error.strerror}",
            remedy="correct its permissions, or set read_only = true",
        ) from error
    try:
        return _inspect_open(descriptor, path, read_only)
    finally:
        os.close(descriptor)


def require_raw(path: Path) -> None:
    """Raises InvalidRequest for an image that begins as one of another format does.

    To be asked of a disk that is started and whose owner did not say that it is raw. Not of one
    that a guest has used already: it was served as raw, and its guest wrote that head.
    """
    try:
        with path.open("rb") as image:
            head = image.read(SECTOR_BYTES)
    except OSError as error:
        raise InvalidRequest(
            f"the image {path} cannot be read: {error.strerror}",
            remedy="look at the storage that it is on",
        ) from error
    found = next((name for magic, name in _MAGICS if head.startswith(magic)), None)
    if found is None:
        return
    target = _free_name(path)
    raise InvalidRequest(
        f"the image {path} begins as one of the format {found} does, and disks are served as raw "
        "bytes",
        remedy='if a guest has used it as a raw disk, the guest wrote this: set format = "raw" for '
        "the disk, and never convert the image, for such a head can name any file of the host; if "
        f"it was made as {found}, convert it, and name the new image: qemu-img convert -f {found} "
        f"-O raw {shlex.quote(str(path))} {shlex.quote(str(target))}",
    )


def _free_name(path: Path) -> Path:
    """Where a converted image can go without replacing anything: beside an image, or for a device
    in the current directory.
    """
    folder = Path() if path.is_block_device() else path.parent
    names = (f"{path.stem}{count or ''}.raw" for count in itertools.count())
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def _inspect_open(descriptor: int, path: Path, read_only: bool) -> Volume:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidRequest(
            f"the image {path} is neither a file nor a block device",
            remedy="name a raw image file or a block device",
        )
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    if size_bytes == 0 or size_bytes % SECTOR_BYTES:
        raise InvalidRequest(
            f"the image {path} has {size_bytes} bytes, which is not a positive multiple of "
            f"{SECTOR_BYTES}: it may have been truncated",
            remedy="restore it, or extend it with truncate -s to a whole number of sectors",
        )
    return Volume(path, size_bytes, stat.S_ISBLK(mode), read_only)
