"""What is tortured: engines, storages, queues and their threads, loads, in every combination."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.queue_map import ThreadMap, format_map
from sempervirt.demo.trial import Load, TrialSetup
from sempervirt.disk.backend import Blkd
from sempervirt.qemu.spec import Engine

# Where each engine is used: synchronous ones and the mapping through the page cache, the others
# where they wait. A mapping goes not around the cache.
STORAGES: dict[Engine, tuple[str, ...]] = {
    "sync": ("tmpfs", "ext4-direct"),
    "nowait": ("tmpfs", "ext4"),
    "uring": ("tmpfs", "ext4-direct"),
    "mmap": ("tmpfs", "ext4"),
}
ENGINES = tuple(STORAGES)
# The thread of each queue: one queue; several on one thread; several on each of two threads.
LAYOUTS: tuple[ThreadMap, ...] = ((0,), (0, 0, 0, 0), (0, 1, 0, 1))
LIGHT = Load(writers=2, depth=1)
HEAVY = Load(writers=16, depth=2)
LOADS = {"light": LIGHT, "heavy": HEAVY}
TMPFS = Path("/dev/shm")
# A file system with O_DIRECT.
DISK = Path(os.environ.get("SEMPERVIRT_TORTURE_DIR", "/var/tmp"))


@dataclass(frozen=True)
class Cell:
    """One combination. `threads` gives the thread of each queue; without `keeps_connection` QEMU
    has to connect to each successor of a backend.
    """

    engine: Engine
    threads: ThreadMap
    load: str
    storage: str
    keeps_connection: bool = True

    def __str__(self) -> str:
        return f"{self.engine} {format_map(self.threads)} {self.load} {self.storage}"

    def setup(self, seed: int) -> TrialSetup:
        """The trial of this cell; its image has a name of its own."""
        folder = TMPFS if self.storage == "tmpfs" else DISK
        return TrialSetup(
            image=folder / f"semper-torture-{os.getpid()}-{seed}.raw",
            size_mib=96,
            engine=self.engine,
            direct=self.storage == "ext4-direct",
            queues=len(self.threads),
            thread_map=self.threads,
            load=LOADS[self.load],
            command=Blkd(keeps_connection=self.keeps_connection),
            seed=seed,
        )


def cells() -> list[Cell]:
    """All of them."""
    return [
        Cell(engine, threads, load, storage)
        for engine, storages in STORAGES.items()
        for storage in storages
        for threads in LAYOUTS
        for load in LOADS
    ]


def few_cells() -> list[Cell]:
    """Each engine on each of its storages, with every layout and, on every fourth, a light load."""
    return [
        Cell(engine, LAYOUTS[index % len(LAYOUTS)], "light" if index % 4 == 3 else "heavy", storage)
        for index, (engine, storage) in enumerate(engines_and_storages())
    ]


def engines_and_storages() -> list[tuple[Engine, str]]:
    """Each engine on each of its storages."""
    return [(engine, storage) for engine, storages in STORAGES.items() for storage in storages]


# Where each engine is at home, with two queues on two threads: for the crash points.
_AT_HOME: dict[Engine, str] = {
    "sync": "tmpfs",
    "uring": "ext4-direct",
    "nowait": "ext4",
    "mmap": "tmpfs",
}
POINT_CELLS = tuple(Cell(engine, (0, 1), "heavy", storage) for engine, storage in _AT_HOME.items())

EVENT_CELLS = (
    Cell("sync", (0,), "heavy", "tmpfs"),
    Cell("uring", (0, 0, 0, 0), "heavy", "ext4-direct"),
    Cell("nowait", (0, 1, 0, 1), "heavy", "ext4"),
    Cell("mmap", (0, 1, 0, 1), "heavy", "tmpfs"),
)

# Where queues begin that are moved between threads all the while.
REBOUND: ThreadMap = (0, 0, 1, 1)
