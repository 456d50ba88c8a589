"""Where the image lies."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

NAMES = ("tmpfs", "cached", "direct", "null")
SPARSE_NAMES = ("tmpfs-sparse", "cached-sparse")
SPARSE_BYTES = 1 << 40
CHUNK = 16 << 20
UNLOCK_TIMEOUT_S = 10.0


class StorageError(Exception):
    """A place for images that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Storage:
    """One image and how it is opened. `null`: the image is never touched."""

    name: str
    image: Path
    size_bytes: int
    file_system: str
    direct: bool = False
    null: bool = False
    sparse: bool = False

    @property
    def label(self) -> str:
        """For people: `ext4 O_DIRECT`."""
        if self.null:
            return "null"
        whole = f", sparse {self.size_bytes >> 40} TiB" if self.sparse else ""
        if self.file_system == "tmpfs":
            return f"tmpfs{whole}"
        return f"{self.file_system} {'O_DIRECT' if self.direct else 'cached'}{whole}"

    def settle(self) -> None:
        """Bring the image to rest after a run: what is dirty would be written during the next.

        Raises StorageError if a lock of the run stays on the image.
        """
        self._wait_unlocked()
        if self.null or self.file_system == "tmpfs":
            return
        descriptor = os.open(self.image, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            if self.direct or self.sparse:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def _wait_unlocked(self) -> None:
        """The kernel frees an io_uring, and with it its files' locks, after the process is gone."""
        deadline = time.monotonic() + UNLOCK_TIMEOUT_S
        with self.image.open("rb+") as image:
            while True:
                try:
                    fcntl.lockf(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if time.monotonic() > deadline:
                        message = f"{self.image} is still locked {UNLOCK_TIMEOUT_S:.0f} s later"
                        raise StorageError(message) from error
                    time.sleep(0.002)
                else:
                    return


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, from the kernel's table of mounts."""
    best, kind = -1, "unknown"
    resolved = path.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        point = Path(mount.encode().decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), found
    return kind


@contextmanager
def prepared(
    names: tuple[str, ...], directory: Path, memory: Path, size_bytes: int
) -> Iterator[list[Storage]]:
    """Make an image for each storage, and remove them all at the end.

    Raises StorageError for a place that is too small or is not what it should be.
    """
    made: list[Storage] = []
    try:
        for name in names:
            folder = memory if name in {"tmpfs", "tmpfs-sparse", "null"} else directory
            folder.mkdir(parents=True, exist_ok=True)
            kind, sparse = file_system(folder), name in SPARSE_NAMES
            _demand_room(folder, kind, name, 0 if sparse else size_bytes)
            storage = Storage(
                name,
                folder / f"semper-bench-{os.getpid()}-{name}.img",
                SPARSE_BYTES if sparse else size_bytes,
                kind,
                direct=name == "direct",
                null=name == "null",
                sparse=sparse,
            )
            made.append(storage)
            _write(storage)
        yield made
    finally:
        for storage in made:
            storage.image.unlink(missing_ok=True)


def _demand_room(folder: Path, kind: str, name: str, size_bytes: int) -> None:
    if name.startswith("tmpfs") and kind != "tmpfs":
        raise StorageError(f"{folder} is {kind}, not tmpfs; choose another with --memory")
    if name.startswith(("cached", "direct")) and kind == "tmpfs":
        raise StorageError(f"{folder} is tmpfs, not on a disk; choose another with --directory")
    free = shutil.disk_usage(folder).free
    if free < size_bytes + (64 << 20):
        raise StorageError(f"{folder} has {free >> 20} MiB free: too few; choose a smaller --size")


def _write(storage: Storage) -> None:
    """Really write every block, with data that nothing below can compress or share.

    A sparse image is one hole.
    """
    with storage.image.open("xb", buffering=0) as image:
        if storage.sparse:
            image.truncate(storage.size_bytes)
            return
        write_blocks(image, storage.size_bytes)
    storage.settle()


def write_blocks(file: RawIOBase, size_bytes: int) -> None:
    """Data that nothing below can compress or share."""
    block = os.urandom(min(CHUNK, size_bytes))
    for start in range(0, size_bytes, len(block)):
        # Rotated by its own place, so that no two chunks are the same.
        turn = (start // len(block) * 4099) % len(block)
        file.write((block[turn:] + block[:turn])[: size_bytes - start])
