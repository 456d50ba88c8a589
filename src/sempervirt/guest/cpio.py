"""The archive of an initramfs: cpio "newc" (Linux, driver-api/early-userspace/buffer-format.rst).

Each entry is a header of 110 ASCII characters, the name with a final zero byte, and the data, the
last two padded to four bytes. Times and owners are zero, so the same files give the same archive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from stat import S_IFCHR, S_IFDIR, S_IFLNK, S_IFREG


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


@dataclass
class Archive:
    """An archive that grows entry by entry; parents must come before what is in them."""

    _parts: list[bytes] = field(default_factory=list)
    _inode: int = 0

    def _entry(
        self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        raw_name = name.encode() + b"\0"
        values = [self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw_name), 0]
        header = b"070701" + b"".join(b"%08X" % value for value in values)
        self._parts += [_padded(header + raw_name), _padded(data)]

    def directory(self, name: str) -> None:
        """An empty directory."""
        self._entry(name, S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """A regular file."""
        self._entry(name, S_IFREG | (0o755 if executable else 0o644), data)

    def symlink(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._entry(name, S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """A device node, such as the console that the kernel opens for its first process."""
        self._entry(name, S_IFCHR | 0o600, device=(major, minor))

    def to_bytes(self) -> bytes:
        """The whole archive."""
        trailer = Archive()
        trailer._entry("TRAILER!!!", 0)
        return b"".join([*self._parts, *trailer._parts])
