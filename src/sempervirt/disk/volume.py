"""What a disk's image is, before anybody serves it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest

SECTOR_BYTES = 512

# Formats that would be served as raw bytes if nobody looked.
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

    The image is opened for writing unless `read_only`: only that tells whether writing is allowed.
    """
    try:
        descriptor = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR))
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"the image {path} does not exist",
            remedy=f"create it, for example with: truncate -s 1G {path}",
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


def _inspect_open(descriptor: int, path: Path, read_only: bool) -> Volume:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidRequest(
            f"the image {path} is neither a file nor a block device",
            remedy="name a raw image file or a block device",
        )
    head = os.pread(descriptor, SECTOR_BYTES, 0)
    for magic, image_format in _MAGICS:
        if head.startswith(magic):
            raise InvalidRequest(
                f"the image {path} has the format {image_format}; only raw images are served",
                remedy=f"convert it: qemu-img convert -f {image_format} -O raw {path} "
                f"{path.with_suffix('.raw')}",
            )
    size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
    if size_bytes == 0 or size_bytes % SECTOR_BYTES:
        raise InvalidRequest(
            f"the image {path} has {size_bytes} bytes, which is not a positive multiple of "
            f"{SECTOR_BYTES}: it may have been truncated",
            remedy="restore it, or extend it with truncate -s to a whole number of sectors",
        )
    return Volume(path, size_bytes, stat.S_ISBLK(mode), read_only)
