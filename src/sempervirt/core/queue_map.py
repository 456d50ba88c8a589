"""Which thread works on which queue of a device: values and arithmetic.

A *map* gives the thread of each queue, in the order of the queues: (0, 1, 0, 1) is four queues
on two threads. Threads are numbered from 0 without gaps, so that a map says by itself how many
there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ThreadMap = tuple[int, ...]
DeviceType = Literal["vhost-user-blk", "virtio-blk", "virtio-scsi", "virtio-net"]
# What does a device's I/O.
Engine = Literal[
    # semper-blkd; "auto" leaves the choice to that program, "null" does nothing
    "auto", "sync", "nowait", "uring", "mmap", "null",
    # QEMU's block layer (aio=)
    "threads", "native", "io_uring",
    # a network card: the kernel's vhost threads, or QEMU's main loop
    "vhost", "qemu",
]  # fmt: skip


def check_map(thread_map: Sequence[int], queues: int | None = None) -> ThreadMap:
    """`thread_map` as a tuple, after a check that the map is valid and of that many queues.

    Raises ValueError, with a message fit for the user.
    """
    if not thread_map:
        raise ValueError("a map names a thread for each queue; this one is empty")
    present = set(thread_map)
    # Of so many numbers one at least is missing, however large the others are.
    numbers = range(min(max(thread_map), len(thread_map)) + 1)
    missing = next((number for number in numbers if number not in present), None)
    if min(thread_map) < 0 or missing is not None:
        gap = "" if missing is None else f": nothing is on thread {missing}"
        raise ValueError(f"threads are numbered from 0 without gaps{gap}")
    if queues is not None and len(thread_map) != queues:
        raise ValueError(
            f"the map is for {counted(len(thread_map), 'queue')}, "
            f"and the device has {counted(queues, 'queue')}"
        )
    return tuple(thread_map)


def parse_map(text: str) -> ThreadMap:
    """The map that "0,0,1,1" means. Raises ValueError, fit for the user."""
    try:
        thread_map = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f'"{text}" is not a map; write for example 0,0,1,1') from None
    return check_map(thread_map)


def spread(queues: int, per_thread: int, threads_max: int | None = None) -> ThreadMap:
    """The map of the fewest threads with at most `per_thread` queues each, evenly loaded.

    Neighbouring queues are on different threads: a guest that uses only its first processors
    uses only the first queues. With `threads_max` there may be more queues on a thread.
    """
    threads = -(-queues // per_thread)
    if threads_max is not None:
        threads = min(threads, threads_max)
    return tuple(queue % threads for queue in range(queues))


def format_map(thread_map: Sequence[int]) -> str:
    """ "0,0,1,1", as it is written on command lines."""
    return ",".join(map(str, thread_map))


def counted(count: int, noun: str) -> str:
    """ "1 queue", "2 queues"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True)
class Binding:
    """A map, and who chose it."""

    map: ThreadMap
    source: str

    @property
    def queues(self) -> int:
        """How many queues the map has."""
        return len(self.map)

    @property
    def threads(self) -> int:
        """How many threads the queues are on."""
        return max(self.map) + 1


@dataclass(frozen=True)
class Choice:
    """An engine, and who chose it."""

    value: Engine
    source: str


@dataclass(frozen=True)
class DevicePlan:
    """How the queues of one device are served.

    For a network card a queue is a pair of virtqueues. `poll_us` is in microseconds, None where
    the device's own default holds.
    """

    device: DeviceType
    binding: Binding
    engine: Choice
    poll_us: int | None = None
    poll_source: str = "built-in default"

    def __str__(self) -> str:
        """ "4 queues on 2 threads, engine mmap (preset of 2026-11-23)"."""
        binding, engine = self.binding, self.engine
        noun = "queue pair" if self.device == "virtio-net" else "queue"
        queues, threads = counted(binding.queues, noun), counted(binding.threads, "thread")
        first = "" if binding.source == engine.source else f" ({binding.source})"
        return f"{queues} on {threads}{first}, engine {engine.value} ({engine.source})"
