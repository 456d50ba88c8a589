"""The timeline of a take-over, and what a backend's status says about it: pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

from sempervirt.core.durations import elapsed_ms
from sempervirt.disk.answers import BackendState, ClaimState, Status, Timeline

# The order in which a spare becomes the one that serves.
STEPS = ("lock_acquired", "accepted", "started", "replayed", "first_completion")


@dataclass
class Restart:
    """One change of the active process. `milestones_ms` counts from when its end was seen.

    `time` is in seconds since 1970, `seen_ns` in ns of CLOCK_MONOTONIC. `kept_connection`: QEMU has
    noticed nothing; None while that is not known.
    """

    time: float
    generation: int
    reason: str
    planned: bool
    successor: int | None
    successor_pid: int | None
    seen_ns: int
    replayed: int | None = None
    kept_connection: bool | None = None
    milestones_ms: dict[str, float | None] = field(default_factory=dict)


def milestones(timeline: Timeline, seen_ns: int) -> dict[str, float | None]:
    """Milliseconds from `seen_ns` (CLOCK_MONOTONIC) to each step; None if not yet.

    A negative number is no error: the kernel gives the lock to the spare before the agent wakes.
    """
    return {step: elapsed_ms(seen_ns, getattr(timeline, step)) for step in STEPS}


def is_prepared(status: Status) -> bool:
    """Whether a process that is to have the image later, a spare or the backend of a VM that comes
    from another host, has everything ready.
    """
    awaits = status.claim.state is ClaimState.AWAITED
    return awaits or status.timeline_ns.spare_ready is not None


def holds_image(status: Status) -> bool:
    """Whether the process has taken the image's lock."""
    return status.timeline_ns.lock_acquired is not None


def is_connected(status: Status) -> bool:
    """Whether QEMU is connected to the process."""
    match status.state:
        case BackendState.CONNECTED | BackendState.RUNNING:
            return True
        case BackendState.SPARE | BackendState.LISTENING | BackendState.DRAINING:
            return False
        case _:
            assert_never(status.state)


def serves(status: Status, *, connection_expected: bool) -> bool:
    """Whether the process holds the image and, if one is expected, has QEMU's connection."""
    there = is_connected(status)
    if not connection_expected:
        there = there or status.state is BackendState.LISTENING
    return there and holds_image(status)


def has_progressed(status: Status) -> bool:
    """Whether the process completed a guest request."""
    return status.timeline_ns.first_completion is not None
