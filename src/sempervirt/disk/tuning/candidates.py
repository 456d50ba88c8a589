"""What can be tried, and which of two equals is the simpler."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from sempervirt.core.queue_map import counted
from sempervirt.disk.presets import Engine
from sempervirt.disk.storage import StorageKey

POLLS_US = (0, 20, 50)
# QEMU's own upper bound for the polling of an iothread is 32 µs.
QEMU_POLLS_US = (0, 32)

# From the simplest to the least: fewer parts that can go wrong come first.
_ENGINE_ORDER: tuple[Engine, ...] = (
    "sync", "nowait", "mmap", "uring",
    "threads", "native", "io_uring",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One way to serve the queues of a disk."""

    engine: Engine
    queues_per_thread: int
    poll_us: int

    def __str__(self) -> str:
        polling = f"polling {self.poll_us} µs" if self.poll_us else "no polling"
        return f"{self.engine}, {counted(self.queues_per_thread, 'queue')} a thread, {polling}"

    def threads_for(self, queues: int) -> int:
        """How many threads serve that many queues."""
        return -(-queues // self.queues_per_thread)

    @property
    def simplicity(self) -> tuple[int, int, int]:
        """Sorts the simpler first: no polling, then the plainer engine, then fewer threads."""
        return self.poll_us, _ENGINE_ORDER.index(self.engine), -self.queues_per_thread


def blkd_candidates(
    storage: StorageKey, queues: int, cpus: int, machine: str = platform.machine()
) -> list[Candidate]:
    """What semper-blkd could do on a storage, the simplest first."""
    return _product(
        _blkd_engines(storage, machine),
        _spreads(queues, cpus),
        POLLS_US if cpus > 1 else POLLS_US[:1],
    )


def qemu_candidates(storage: StorageKey, queues: int) -> list[Candidate]:
    """What QEMU's block layer could do; its one thread for an export serves all queues."""
    return _product(_qemu_engines(storage), (queues,), QEMU_POLLS_US)


def _blkd_engines(storage: StorageKey, machine: str) -> tuple[Engine, ...]:
    if storage.direct:
        return ("sync",) if storage.in_memory else ("sync", "uring")
    mapped: tuple[Engine, ...] = ("mmap",) if machine == "x86_64" else ()
    if storage.in_memory:
        # No request ever misses, so "nowait" is "sync"; io_uring hands each to another thread.
        return ("sync", *mapped)
    return ("sync", "nowait", *mapped, "uring")


def _qemu_engines(storage: StorageKey) -> tuple[Engine, ...]:
    if storage.in_memory:
        return ("threads",)
    return ("threads", "native", "io_uring") if storage.direct else ("threads", "io_uring")


def _spreads(queues: int, cpus: int) -> list[int]:
    """Queues for each thread: all, half of them, … while there is a processor for each thread."""
    spreads = [queues]
    threads = 2
    while threads <= min(queues, cpus):
        spreads.append(-(-queues // threads))
        threads *= 2
    return list(dict.fromkeys(spreads))


def _product(
    engines: Sequence[Engine], spreads: Sequence[int], polls: Sequence[int]
) -> list[Candidate]:
    found = [
        Candidate(engine, spread, poll)
        for engine in engines
        for spread in spreads
        for poll in polls
    ]
    return sorted(found, key=lambda candidate: candidate.simplicity)
