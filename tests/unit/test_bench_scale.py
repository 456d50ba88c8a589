"""What processes hold and use, and what follows for disks and queues."""

import os
import time

import pytest

from bench import fleet, idle, scale
from bench.processes import Footprint, footprint, processor_ns
from bench.sections import SCALE

MACHINE = {
    "date": "2026-11-22T20:00:00+00:00", "processor": "P", "processors": "2",
    "hypervisor": "kvm", "memory_mib": "2048", "kernel": "6.1", "qemu": "Q",
    "semper_blkd": "semper-blkd 0.1.0", "commit": "abc",
}  # fmt: skip


def seen(queues: int, threads: int = 4, io_threads: int = 1) -> scale.Fleet:
    """A fleet in which a backend has 100 KiB of its own, and 50 for each queue."""
    own = Footprint(100 + 50 * queues, 20, 10 * queues, threads, 8)
    kinds = [scale.Kind(name, queues, 64, own) for name in ("backend", "spare", "agent")]
    return scale.Fleet(fleet.Shape(4, 16, queues), 1.0, 2.0, io_threads, kinds)


def test_a_process_is_measured() -> None:
    one = footprint(os.getpid())
    assert one.anonymous > 1000
    assert one.pss >= one.anonymous
    assert one.threads >= 1
    assert one.descriptors >= 3


def test_processor_time_is_the_process_own() -> None:
    before, start = processor_ns(os.getpid()), time.process_time_ns()
    while time.process_time_ns() < start + 10_000_000:
        pass
    assert 10_000_000 <= processor_ns(os.getpid()) - before < 1_000_000_000
    with pytest.raises(OSError, match="Invalid argument"):
        processor_ns(2**22 - 1)


def test_a_queue_is_told_from_a_disk() -> None:
    both = scale.Scale(seen(1), seen(4))
    assert both.disk_kib == 2 * (100 + 50 + 20 + 10)
    assert both.queue_kib == 2 * (50 + 10)
    assert list(both.objections()) == []
    assert "each further queue 120 KiB" in scale.document(both, MACHINE)
    assert SCALE.begin not in scale.document(both, MACHINE)


def test_threads_that_nobody_asked_for_are_objected_to() -> None:
    assert len(list(scale.Scale(seen(1), seen(4, threads=7, io_threads=4)).objections())) == 2


def test_idle_backends_have_a_limit_together() -> None:
    def use(kind: str, percent: float) -> idle.Use:
        return idle.Use(kind, 20, percent, percent / 20)

    quiet = idle.Idleness(seen(1).shape, 30.0, [use("backend", 0.09), use("agent", 3.0)])
    assert list(quiet.objections()) == []
    busy = idle.Idleness(seen(1).shape, 30.0, [use("backend", 0.2), use("spare", 0.3)])
    assert len(list(busy.objections())) == 2
    assert "| spare | 20 | 0.300 |" in idle.document(busy, MACHINE)
