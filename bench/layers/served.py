"""Disks that are served for the measurements of layers, and loads on them."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.backends import BackendError, export_of_qsd, running
from bench.load import PATIENCE_S, Figures, measure
from bench.storages import write_blocks
from sempervirt.core.errors import Unavailable
from sempervirt.disk.answers import Layers, LayerState, SnapshotTaken
from sempervirt.disk.client import BackendClient

QUEUES = 4
BLOCK = 4096


@dataclass(frozen=True)
class Programs:
    """What is run. `bare` is semper-blkd built without a look for layers; None: left out."""

    blkd: Path
    load: Path
    bare: Path | None


@dataclass(frozen=True)
class Place:
    """A directory for images, and how they are opened there."""

    name: str
    folder: Path
    direct: bool

    @property
    def engines(self) -> tuple[str, ...]:
        """Every engine that serves images there, the one that semper-blkd chooses first."""
        match self.name:
            case "tmpfs":
                return ("mmap", "sync", "nowait", "uring")
            case "direct":
                return ("uring", "sync", "nowait")
            case _:
                return ("mmap", "nowait", "sync", "uring")


def image(folder: Path, name: str, size: int, *, filled: bool = True) -> Path:
    """Makes an image: really written, with data that nothing below can share. Not in the page cache
    of a disk, so that O_DIRECT has nothing to throw out.
    """
    path = folder / f"{name}.raw"
    with path.open("xb", buffering=0) as file:
        if not filled:
            file.truncate(size)
            return path
        write_blocks(file, size)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@dataclass(frozen=True)
class Served:
    """A disk that a process serves."""

    name: str
    image: Path
    process: subprocess.Popen[bytes]
    folder: Path
    load_program: Path

    @property
    def client(self) -> BackendClient:
        """Of semper-blkd."""
        return BackendClient(self.folder / "control")

    def command(self, *options: str) -> list[str]:
        """A load on it."""
        socket = f"--socket={self.folder / 'disk.sock'}"
        pid = f"--pid={self.process.pid}"
        return [str(self.load_program), socket, pid, f"--patience={PATIENCE_S}", *options]

    def load(self, *options: str, seconds: float = 60.0) -> Figures:
        """Runs a load that should take `seconds` at most. Raises LoadError."""
        return measure(self.command(*options), timeout_s=seconds + 4 * PATIENCE_S)

    def fill(self, *options: str, count: int) -> None:
        """Writes `count` blocks, one after the other. Raises LoadError."""
        self.load("--mode=write", "--depth=32", "--warmup=0", f"--count={count}", *options)

    def warm(self, size: int) -> None:
        """Reads all of it once."""
        self.load("--mode=read", "--block-size=64k", "--depth=4", "--warmup=0",
                  f"--count={size >> 16}")  # fmt: skip

    def snapshot(self) -> SnapshotTaken:
        """A snapshot, once it can be read."""
        return asyncio.run(snapshot(self.client))

    def settle(self) -> None:
        """Has what is dirty written: it would be during the next measurement."""
        for path in (self.image, *beside(self.image)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def beside(path: Path) -> list[Path]:
    """The files of an image's layers."""
    folder = path.with_name(f"{path.name}.layers")
    return sorted(folder.iterdir()) if folder.is_dir() else []


async def wait_layers(client: BackendClient, reached: Callable[[Layers], bool]) -> Layers:
    """The layers, once nothing goes on and they are as told. Raises BackendError."""
    deadline = time.monotonic() + 120
    while True:
        told = await client.layers()
        if told.last_error is not None:
            raise BackendError(told.last_error)
        if told.task is None and reached(told):
            return told
        if time.monotonic() > deadline:
            raise BackendError(f"the layers did not get where they should: {told}")
        await asyncio.sleep(0.002)


async def snapshot(client: BackendClient) -> SnapshotTaken:
    """A snapshot, once it can be read. Raises BackendError or SempervirtError."""
    taken = await client.snapshot(frozen=False)
    await wait_layers(client, lambda told: told.state_of(taken.snapshot) is LayerState.SEALED)
    return taken


@contextmanager
def serving(
    programs: Programs, program: Path, place: Place, path: Path, engine: str, name: str
) -> Iterator[Served]:
    """An image served by semper-blkd, which can take snapshots."""
    # A short path: a socket's may have 107 bytes. On tmpfs: the maps of layers.
    with TemporaryDirectory(prefix="semper-layers-", dir="/dev/shm") as made:
        folder = Path(made)
        command = [
            str(program),
            f"--socket-path={folder / 'disk.sock'}",
            f"--control-socket={folder / 'control'}",
            f"--blk-file={path}",
            f"--layer-map={folder / 'map'}",
            f"--engine={engine}",
            f"--num-queues={QUEUES}",
            f"--threads={QUEUES}",
            *(["--direct"] if place.direct else []),
        ]
        with running(command, folder / "log") as process:
            served = Served(name, path, process, folder, programs.load)
            _wait_started(served)
            yield served


def _wait_started(served: Served) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if asyncio.run(served.client.status()).owns_image:
                return
        except Unavailable:
            if served.process.poll() is not None:
                raise
        if time.monotonic() > deadline:
            raise BackendError(f"{served.name}: the image was not taken")
        time.sleep(0.005)


@contextmanager
def serving_qcow2(
    programs: Programs, place: Place, base: Path, overlays: list[Path]
) -> Iterator[Served]:
    """A raw image below qcow2 overlays, the lowest first, served by qemu-storage-daemon."""
    cache = {"direct": place.direct, "no-flush": False}

    def file(path: Path) -> dict[str, object]:
        return {"driver": "file", "filename": str(path), "aio": "io_uring", "cache": cache}

    node: dict[str, object] = {"driver": "raw", "file": file(base), "cache": cache}
    for overlay in overlays:
        node = {"driver": "qcow2", "file": file(overlay), "backing": node, "cache": cache}
    node["node-name"] = "disk"
    with TemporaryDirectory(prefix="semper-layers-", dir="/dev/shm") as made:
        folder = Path(made)
        export = export_of_qsd(QUEUES, folder / "disk.sock")
        command = ["qemu-storage-daemon", "--blockdev", json.dumps(node), *export]
        with running(command, folder / "log") as process:
            yield Served("qcow2", overlays[-1], process, folder, programs.load)


def make_overlay(path: Path, size: int) -> None:
    """A qcow2 image that has nothing; what is below it is told when it is served."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        raise BackendError(made.stderr.strip())
