"""Backends that lose requests: the negative controls. The harness must see that they do."""

from __future__ import annotations

from dataclasses import replace

from sempervirt.demo.peer import StorageDaemon
from sempervirt.demo.trial import Load, TrialSetup
from sempervirt.disk.backend import Blkd
from tests.torture.cells import REBOUND, Cell


def controls(seed: int) -> list[tuple[str, TrialSetup, bool]]:
    """(name, trial, whether queues move between threads): each must lose requests."""
    # Flushes take longest, so that requests end in another order than they came; and so many are
    # in flight that a few kills are enough.
    load = Load(writers=32, depth=4, flush_every=3, hang_s=5)
    one = replace(Cell("uring", (0,), "heavy", "ext4-direct").setup(seed), load=load)
    four = replace(Cell("uring", REBOUND, "heavy", "ext4-direct").setup(seed), load=load)
    return [
        ("qemu-storage-daemon", replace(one, command=StorageDaemon()), False),
        ("semper-blkd without the region", replace(one, command=without_region()), False),
        ("the same while rebinding", replace(four, command=without_region()), True),
    ]


def without_region() -> Blkd:
    """Our own backend with the in-flight region switched off."""
    return Blkd(extra=("--no-inflight",))
