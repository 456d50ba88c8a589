"""The timeline of a take-over, and what a backend's status says about it: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sempervirt.core.durations import elapsed_ms
from sempervirt.core.queue_map import ThreadMap

# The order in which a spare becomes the one that serves.
STEPS = ("lock_acquired", "accepted", "started", "replayed", "first_completion")
CONNECTED_STATES = ("connected", "running")


@dataclass
class Restart:
    """One change of the active process. `milestones_ms` counts from when its end was seen."""

    time: float
    generation: int
    reason: str
    planned: bool
    successor: int | None
    successor_pid: int | None
    seen_ns: int
    replayed: int | None = None
    milestones_ms: dict[str, float | None] = field(default_factory=dict)


def milestones(timeline_ns: Mapping[str, Any], seen_ns: int) -> dict[str, float | None]:
    """Milliseconds from `seen_ns` (CLOCK_MONOTONIC) to each step; None if not yet.

    A negative number is no error: the kernel hands the lock over before the agent wakes.
    """
    return {step: elapsed_ms(seen_ns, timeline_ns.get(step)) for step in STEPS}


def is_prepared(status: Mapping[str, Any]) -> bool:
    """Whether a process that is to have the image later, a spare or the end of a migration, has
    everything ready.
    """
    waits = (status.get("claim") or {}).get("state") == "awaited"
    return waits or (status.get("timeline_ns") or {}).get("spare_ready") is not None


def holds_image(status: Mapping[str, Any]) -> bool:
    """Whether the process holds the image's lock."""
    return (status.get("timeline_ns") or {}).get("lock_acquired") is not None


def serves(status: Mapping[str, Any], *, connection_expected: bool) -> bool:
    """Whether the process holds the image and, if one is expected, has QEMU's connection."""
    state = status.get("state")
    wanted = CONNECTED_STATES if connection_expected else ("listening", *CONNECTED_STATES)
    return holds_image(status) and state in wanted


def has_progressed(status: Mapping[str, Any]) -> bool:
    """Whether the process completed a guest request."""
    return (status.get("timeline_ns") or {}).get("first_completion") is not None


def thread_map(status: Mapping[str, Any]) -> ThreadMap:
    """The thread of each queue; empty when the process does not tell."""
    threads = [queue.get("thread") for queue in status.get("queues") or []]
    return tuple(threads) if all(isinstance(thread, int) for thread in threads) else ()


def replayed_count(status: Mapping[str, Any]) -> int | None:
    """How many requests of its predecessor the process replayed."""
    counters = status.get("counters") or {}
    value = counters.get("replayed")
    return value if isinstance(value, int) else None
