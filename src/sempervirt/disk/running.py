"""One backend process of a disk: its files, its start, and what it said when it ended."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sempervirt.disk.backend import BackendCommand, Launch
from sempervirt.disk.client import BackendClient
from sempervirt.disk.liveness import Pulse
from sempervirt.disk.program import Programs
from sempervirt.disk.state import STALL_S
from sempervirt.host import process
from sempervirt.host.process import Exit, Process
from sempervirt.host.procfs import ProcessId, find_processes

LOGS_KEPT = 5
# Not an option: a backend of a release that does not know it would end.
FLUSH_FILE_VARIABLE = "SEMPER_BLKD_FLUSH_FILE"
LAYER_MAP_VARIABLE = "SEMPER_BLKD_LAYER_MAP"
PEER_FILE_VARIABLE = "SEMPER_BLKD_PEER_FILE"


@dataclass(frozen=True)
class DiskFiles:
    """Where a disk keeps its sockets and logs: RUN/vm/<vm>/disk-<disk>…; `front` is where QEMU
    connects, if that is elsewhere.
    """

    directory: Path
    disk: str
    front: Path | None = None

    @property
    def socket(self) -> Path:
        """What QEMU connects to."""
        return self.front or self.directory / f"disk-{self.disk}.sock"

    @property
    def touched(self) -> Path:
        """Which blocks of the disk were ever used, for the next backend."""
        return self.directory / f"disk-{self.disk}.touched"

    @property
    def session(self) -> Path:
        """Where spares learn what QEMU has said to the active process."""
        return self.directory / f"disk-{self.disk}.session"

    @property
    def flush_failed(self) -> Path:
        """There when a flush of the image has failed: while it is, every backend fails flushes."""
        return self.directory / f"disk-{self.disk}.flush-failed"

    @property
    def layer_map(self) -> Path:
        """Which blocks the layers of the image have, for the next backend: a file for each layer,
        with its numbers behind this name (docs/design/snapshots.md).
        """
        return self.directory / f"disk-{self.disk}.layer"

    def control(self, generation: int) -> Path:
        """The control socket of one process."""
        return self.directory / f"disk-{self.disk}-{generation}.ctl"

    def log(self, generation: int) -> Path:
        """What one process wrote."""
        return self.directory / f"disk-{self.disk}-{generation}.log"

    def logs(self) -> list[Path]:
        """The logs that are there; last the one that was written to last.

        Generations begin anew with each run of the VM, so a high number can be that of an old one.
        """
        pattern = re.compile(rf"disk-{re.escape(self.disk)}-(\d+)\.log")
        found = [
            (path.stat().st_mtime_ns, int(match[1]), path)
            for path in self.directory.glob("disk-*.log")
            if (match := pattern.fullmatch(path.name))
        ]
        return [path for *_, path in sorted(found)]

    def prune(self, generation: int) -> None:
        """Removes what a process of that generation left, except the last logs."""
        with contextlib.suppress(OSError):
            for path in (self.control(generation), *self.logs()[:-LOGS_KEPT]):
                path.unlink(missing_ok=True)

    def find_processes(self) -> list[int]:
        """Pids of this disk's backends, recorded or not."""
        return sorted(identity.pid for identity in self.find_identities())

    def find_identities(self) -> list[ProcessId]:
        """As `find_processes`, with what a later process of such a pid is told apart by."""
        control = re.escape(str(self.directory / f"disk-{self.disk}-"))
        pattern = re.compile(rf"--control-socket={control}\d+\.ctl")
        return [found.identity for found in find_processes(pattern)]


@dataclass
class Running:
    """A process that was started and has not been seen to end.

    `complaint` is why the process's last answer could not be understood, if that is so; `pulse`
    what is known of whether it works, which is in doubt after `stall_s`.
    """

    generation: int
    binary: str
    process: Process
    control: Path
    log: Path
    listen_fd: int
    promoted: asyncio.Event = field(default_factory=asyncio.Event)
    observing: asyncio.Task[None] | None = None
    complaint: str = ""
    stall_s: float = STALL_S
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def client(self) -> BackendClient:
        """What can be asked of the process."""
        return BackendClient(self.control, self.pid)

    def detach(self) -> None:
        """Stops watching the process, which runs on."""
        if self.observing is not None:
            self.observing.cancel()
        self.process.forget()

    def last_words(self) -> str:
        """The cause that the process gave, in one line, or an empty string."""
        return next((line for line in reversed(process.said(self.log)) if line.strip()), "")


def start(
    command: BackendCommand,
    launch: Launch,
    files: DiskFiles,
    generation: int,
    programs: Programs,
    token: str,
    on_exit: Callable[[Exit], None],
) -> Running:
    """Starts one process from the program `token`.

    Raises CommandFailed when it cannot be started.
    """
    log = files.log(generation)
    executable, descriptors = programs.executable(token)
    started = process.spawn(
        command.argv(launch),
        log=log,
        on_exit=on_exit,
        executable=executable,
        pass_fds=(*launch.inherited, *descriptors),
        environment={
            **command.environment,
            FLUSH_FILE_VARIABLE: str(files.flush_failed),
            LAYER_MAP_VARIABLE: str(files.layer_map),
            **({PEER_FILE_VARIABLE: str(launch.peers)} if launch.peers else {}),
        },
    )
    return Running(generation, token, started, launch.control, log, launch.listen_fd)


async def kill_orphans(files: DiskFiles, keep: set[int]) -> list[int]:
    """Kills this disk's backends that nobody watches: such a backend listens on a stale socket.

    Returns the pids.
    """
    found = await asyncio.to_thread(files.find_identities)
    orphans = [identity for identity in found if identity.pid not in keep]
    for identity in orphans:
        orphan = process.adopt(identity, lambda _end: None)
        if orphan:
            await orphan.end(0)
    return [identity.pid for identity in orphans]
