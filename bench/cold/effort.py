"""What a request costs a backend when everything is cold, and when it is warm, in processor time.

Not by the clock on the wall: a neighbour on the machine is not in it, so a check can rely on it.
On a quiet machine the thread that serves is busy all the time with 32 requests in flight, and its
speed is what a request costs it. The thread that searches the image works beside, and is told by
itself.
"""

import json
import subprocess
import tempfile
from pathlib import Path

from bench.backends import BackendError, running
from bench.cold.figures import Effort
from bench.load import PATIENCE_S
from bench.storages import Storage

FIRST, WARMING, WARM = 35_000, 200_000, 50_000
"""Requests: what `sync` serves here in 100 ms, and what follows."""
BESIDE = "search"
DEPTH = 32


def measure(
    programs: tuple[Path, Path], storage: Storage, engine: str, mode: str, seed: int
) -> Effort:
    """Start a backend and count what it uses. Raises BackendError, OSError or ValueError."""
    blkd, load = programs
    # A short path: a socket's may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="semper-cold-", dir="/tmp") as folder:
        path = Path(folder) / "disk.sock"
        # A look at the rings in vain is no work.
        command = [str(blkd), f"--socket-path={path}", f"--blk-file={storage.image}",
                   f"--engine={engine}", "--poll-us=0"]  # fmt: skip
        with running(command, Path(folder) / "log") as process:

            def used(count: int) -> tuple[float, float]:
                before = _threads_us(process.pid)
                _load(load, path, mode, count, seed)
                after = _threads_us(process.pid)
                return after[0] - before[0], after[1] - before[1]

            # The backend is there, and has nothing to do yet.
            _load(load, path, mode, 1, seed)
            first, beside = used(FIRST)
            used(WARMING)
            warm, _ = used(WARM)
    return Effort(first / FIRST, warm / WARM, beside / FIRST)


def _load(load: Path, path: Path, mode: str, count: int, seed: int) -> None:
    command = [str(load), f"--socket={path}", f"--mode={mode}", f"--depth={DEPTH}",
               f"--count={count}", "--warmup=0", f"--seed={seed}",
               f"--patience={PATIENCE_S}"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if result.returncode != 0 or json.loads(result.stdout)["ios"] < count:
        raise BackendError(result.stderr.strip() or "the load did not end")


def _threads_us(pid: int) -> tuple[float, float]:
    """Processor time of the threads that serve, and of the one that searches."""
    served = beside = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        ran_us = int((task / "schedstat").read_text().split()[0]) / 1e3
        if (task / "comm").read_text().strip() == BESIDE:
            beside += ran_us
        else:
            served += ran_us
    return served, beside
