"""One load on one engine: it begins with the backend, which is killed in the middle of it."""

import asyncio
import json
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.backends import BackendError, last_words, running
from bench.cold.figures import INTERVAL_MS, Figures, figures
from bench.load import PATIENCE_S
from bench.storages import Storage
from sempervirt.core.errors import SempervirtError
from sempervirt.disk.answers import Status
from sempervirt.disk.client import BackendClient

KILL_AFTER_S, SECONDS = 1.6, 3.0
DEPTH = 32


def measure(
    programs: tuple[Path, Path], storage: Storage, engine: str, mode: str, seed: int
) -> Figures:
    """Run one load. `programs` are semper-blkd and semper-load.

    Raises BackendError, SempervirtError, OSError or ValueError.
    """
    blkd, load = programs
    with ExitStack() as stack:
        # A short path: a socket's may have 107 bytes.
        made = tempfile.TemporaryDirectory(prefix="semper-cold-", dir="/tmp")
        folder = Path(stack.enter_context(made))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "disk.sock"))
        listener.listen()
        number = listener.fileno()
        # As the agent does it: both inherit the socket, and the bits of the map are handed on.
        command = [
            str(blkd),
            f"--blk-file={storage.image}",
            f"--engine={engine}",
            f"--fd={number}",
            f"--map-file=/dev/shm/{folder.name}.map",
        ]
        stack.callback(Path(f"/dev/shm/{folder.name}.map").unlink, missing_ok=True)
        active = _start([*command, f"--control-socket={folder / 'active'}"], number)
        stack.callback(_end, active)
        _wait(folder / "active", lambda status: status.owns_image)
        log = folder / "spare.log"
        spare = [*command, "--spare", f"--control-socket={folder / 'spare'}"]
        stack.enter_context(running(spare, log, pass_fds=(number,)))
        _wait(folder / "spare", lambda status: status.timeline_ns.spare_ready is not None)
        arguments = [
            f"--socket={folder / 'disk.sock'}",
            f"--mode={mode}",
            f"--depth={DEPTH}",
            f"--seconds={SECONDS}",
            "--warmup=0",
            f"--series={INTERVAL_MS}",
            f"--seed={seed}",
            f"--patience={PATIENCE_S}",
            "--reconnect",
        ]
        driver = subprocess.Popen(
            [str(load), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(KILL_AFTER_S)
        killed_ns = time.monotonic_ns()
        active.send_signal(signal.SIGKILL)
        try:
            said, complaint = driver.communicate(timeout=SECONDS + 4 * PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            driver.kill()
            raise BackendError("the load did not end") from error
        if driver.returncode != 0:
            raise BackendError(f"{complaint.strip()}; {last_words(log)}")
        series = json.loads(said)["series"]
        resumed_ns = _wait(folder / "spare", _resumed).timeline_ns.first_completion or 0
    to_ms = [(at - series["started_ns"]) / 1e6 for at in (killed_ns, resumed_ns)]
    return figures(series["completed"], *to_ms)


def _resumed(status: Status) -> bool:
    return status.timeline_ns.first_completion is not None


def _start(command: list[str], number: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(number,)
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _wait(control: Path, reached: Callable[[Status], bool]) -> Status:
    """The first status that says so."""
    client = BackendClient(control)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            status = asyncio.run(client.status())
            if reached(status):
                return status
        except SempervirtError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise BackendError(f"{control.name} did not get where it should")
        time.sleep(0.01)
