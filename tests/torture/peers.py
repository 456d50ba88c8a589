"""Backends that lose requests: the negative controls. The harness must see that they do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sempervirt.core.errors import Unavailable
from sempervirt.demo.trial import Load, TrialSetup
from sempervirt.disk.backend import Blkd, Launch
from tests.torture.cells import REBOUND, Cell


@dataclass(frozen=True)
class StorageDaemon:
    """qemu-storage-daemon, which does not track requests in flight."""

    aio: str = "threads"
    environment: Mapping[str, str] = field(default_factory=dict)
    has_spare: bool = False
    has_control: bool = False

    def binary(self) -> str:
        """From the PATH."""
        found = shutil.which("qemu-storage-daemon")
        if found is None:
            raise Unavailable("qemu-storage-daemon is not installed", remedy="run make setup")
        return found

    def argv(self, launch: Launch) -> list[str]:
        """Serves the same image on the same listening socket."""
        options = launch.options
        cache = "on" if options.direct else "off"
        image = (
            f"driver=file,node-name=image,filename={options.image},aio={self.aio},"
            f"cache.direct={cache},locking=off"
        )
        export = (
            f"type=vhost-user-blk,id=disk,node-name=image,writable=on,"
            f"num-queues={options.queues},addr.type=fd,addr.str={launch.listen_fd}"
        )
        return [launch.binary, "--blockdev", image, "--export", export]


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
