"""Many disks in one agent: what they cost while nothing happens, and how many threads they take.

`python -m bench.idle` and `python -m bench.scale` measure the same at length.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from bench import fleet, idle, scale

pytestmark = pytest.mark.guest

SHAPE = fleet.Shape(vms=2, disks=16, queues=4)
IDLE_S = 5.0
# Far above what was measured, far below a mapping or a stack that nobody meant.
OWN_MAX_KIB = 3 << 10
# Beside those that serve queues: the main thread, which speaks with the front end, the control
# socket, signals, the session with the spares, the search beside the mapped engine, and what merges
# layers.
OTHER_THREADS = 6


@dataclass(frozen=True)
class Seen:
    """One fleet, first at work and then left alone."""

    size: scale.Fleet
    idle: idle.Idleness


@pytest.fixture(scope="module")
def seen() -> Seen:
    """32 disks with 128 queues, each disk with a spare; `make scale` has twice as many."""

    async def look() -> Seen:
        async with fleet.running(SHAPE) as running:
            return Seen(scale.look(running), await idle.watch(running, IDLE_S))

    return asyncio.run(look())


def test_every_disk_is_served_and_guarded(seen: Seen) -> None:
    counts = {kind.name: kind.processes for kind in seen.size.kinds}
    assert counts == {"backend": 32, "spare": 32, "agent": 1}


def test_disks_without_io_use_no_processor_time(seen: Seen) -> None:
    # The agent still asks now and then; after a while it does so less often.
    for use in seen.idle.uses:
        if use.kind != "agent":
            assert use.worst_percent < idle.LIMIT_PERCENT, seen.idle


def test_a_disk_is_small(seen: Seen) -> None:
    for name in scale.KINDS:
        assert seen.size.typical(name).anonymous < OWN_MAX_KIB


def test_no_queue_has_a_thread_of_its_own_unless_asked(seen: Seen) -> None:
    assert seen.size.io_threads == 1
    assert seen.size.typical("backend").threads <= 1 + OTHER_THREADS


async def test_a_queue_has_a_thread_of_its_own_when_asked() -> None:
    shape = fleet.Shape(vms=1, disks=1, queues=4, memory_mib=160)
    async with fleet.running(shape, queues_per_thread=1) as running:
        assert scale.look(running).io_threads == shape.queues
