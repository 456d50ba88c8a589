"""The programs that are compared, and one running process of one of them."""

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.storages import Storage

STOP_TIMEOUT_S = 10.0
CONTRIB = "qemu-contrib"
AIOS = ("io_uring", "threads", "native")


class BackendError(Exception):
    """A backend that did not start or stop; the message ends with what it said."""


class Backend(Protocol):
    """One way to serve an image."""

    @property
    def name(self) -> str:
        """Unique among the backends of a run."""

    def serves(self, storage: Storage, queues: int) -> bool:
        """Whether it can serve this storage with so many queues at all."""

    def command(self, storage: Storage, queues: int, socket: Path) -> list[str]:
        """The program and its arguments."""


@dataclass(frozen=True)
class Blkd:
    """semper-blkd. `program` and `options` are arguments of its own."""

    name: str
    program: tuple[str, ...]
    engine: str | None = "auto"
    options: tuple[str, ...] = ()

    def serves(self, storage: Storage, queues: int) -> bool:
        """On the null storage one stands for all; a mapping goes through the page cache."""
        if storage.null:
            return self.engine in (None, "auto")
        return not (storage.direct and self.engine == "mmap")

    def command(self, storage: Storage, queues: int, socket: Path) -> list[str]:
        """One thread for each queue: what the other backends may not do is their limit."""
        engine = "null" if storage.null else self.engine
        return [
            *self.program,
            f"--socket-path={socket}",
            f"--blk-file={storage.image}",
            f"--num-queues={queues}",
            f"--threads={queues}",
            *([f"--engine={engine}"] if engine else []),
            *(["--direct"] if storage.direct else []),
            *self.options,
        ]


def blkd_variants(program: tuple[str, ...]) -> list[Blkd]:
    """semper-blkd as it is, with each engine, and with its features taken away."""
    engines = ("sync", "nowait", "uring", "mmap")
    return [
        Blkd("blkd", program),
        *(Blkd(f"blkd-{engine}", program, engine) for engine in engines),
        Blkd("bare", program, options=("--no-inflight", "--no-map")),
        Blkd("tracking", program, options=("--no-map",)),
        Blkd("map", program, options=("--no-inflight",)),
        Blkd("tracking+map", program),
        *(Blkd(f"look-{us}", program, options=(f"--poll-us={us}",)) for us in (0, 50, 1000)),
    ]


@dataclass(frozen=True)
class QemuStorageDaemon:
    """qemu-storage-daemon's vhost-user-blk export with an iothread of its own."""

    name: str
    aio: str
    program: str = "qemu-storage-daemon"

    def serves(self, storage: Storage, queues: int) -> bool:
        """aio=native needs O_DIRECT; null has no aio, so one of the three stands for it."""
        if storage.null:
            return self.aio == "io_uring"
        return storage.direct or self.aio != "native"

    def command(self, storage: Storage, queues: int, socket: Path) -> list[str]:
        """The node is the file itself: no format layer above it, which is QEMU's shortest path."""
        if storage.null:
            node = f"driver=null-co,size={storage.size_bytes},read-zeroes=off"
        else:
            image = str(storage.image).replace(",", ",,")
            direct = "on" if storage.direct else "off"
            node = f"driver=file,filename={image},aio={self.aio},cache.direct={direct}"
        return [
            self.program,
            "--blockdev",
            f"{node},node-name=disk",
            *export_of_qsd(queues, socket),
        ]


def export_of_qsd(queues: int, socket: Path) -> list[str]:
    """Options of qemu-storage-daemon that serve its node "disk", with an iothread of its own."""
    export = (
        f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},"
        f"iothread=thread0,addr.type=unix,addr.path={socket}"
    )
    return ["--object", "iothread,id=thread0", "--export", export]


@dataclass(frozen=True)
class Peer:
    """Any other vhost-user-blk backend, by a template of its command.

    Known in the template: {socket}, {image}, {queues}, {direct} (on or off), {size}.
    """

    name: str
    template: str
    storages: tuple[str, ...] = ("tmpfs", "cached", "direct")
    queues_max: int | None = None

    def serves(self, storage: Storage, queues: int) -> bool:
        """Where it is told to; nothing is known of a null engine of its."""
        if self.queues_max is not None and queues > self.queues_max:
            return False
        return storage.name in self.storages and not storage.null

    def command(self, storage: Storage, queues: int, socket: Path) -> list[str]:
        """The template with its places filled."""
        fields = {
            "socket": str(socket),
            "image": str(storage.image),
            "queues": str(queues),
            "direct": "on" if storage.direct else "off",
            "size": str(storage.size_bytes),
        }
        return [word.format_map(fields) for word in shlex.split(self.template)]


def contrib(program: Path) -> Peer:
    """QEMU's contrib/vhost-user-blk, which scripts/peer builds.

    It tracks requests in flight, is synchronous, always opens the image with O_DIRECT (which tmpfs
    takes and ignores), tells the driver of one queue only, and ends with its connection.
    """
    command = f"{shlex.quote(str(program))} --socket-path={{socket}} --blk-file={{image}}"
    return Peer(CONTRIB, command, storages=("tmpfs", "direct"), queues_max=1)


@contextmanager
def running(
    command: list[str], log: Path, pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a backend for the duration of the block; stop it with SIGTERM.

    Raises BackendError if it cannot be started, has failed, or must be killed. One that ended
    with status 0 did so because its front end was gone.
    """
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=pass_fds
            )
        except OSError as error:
            raise BackendError(f"{shlex.join(command)}: {error.strerror}") from error
    try:
        yield process
        if process.poll():
            raise BackendError(f"ended with status {process.returncode}: {last_words(log)}")
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            message = f"had to be killed {STOP_TIMEOUT_S:.0f} s after SIGTERM"
            raise BackendError(message) from error


def last_words(log: Path, lines: int = 5) -> str:
    """The end of what a backend printed, in one line."""
    text = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(text[-lines:]) or "it printed nothing"
