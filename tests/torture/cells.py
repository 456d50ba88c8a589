"""What is tortured: engines, queues, loads and storages, in every combination."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from sempervirt.demo.trial import Load, TrialSetup

LIGHT = Load(writers=2, depth=1)
HEAVY = Load(writers=16, depth=2)
LOADS = {"light": LIGHT, "heavy": HEAVY}
TMPFS = Path("/dev/shm")
# A file system with O_DIRECT; the checkout's own is one on every machine that builds it.
DISK = Path(os.environ.get("SEMPERVIRT_TORTURE_DIR", "/var/tmp"))


@dataclass(frozen=True)
class Cell:
    """One combination."""

    engine: str
    queues: int
    load: str
    storage: str

    def __str__(self) -> str:
        return f"{self.engine} {self.queues}q {self.load} {self.storage}"

    def setup(self, seed: int) -> TrialSetup:
        """The trial of this cell; its image has a name of its own."""
        direct = self.storage == "ext4-direct"
        folder = DISK if direct else TMPFS
        return TrialSetup(
            image=folder / f"semper-torture-{os.getpid()}-{seed}.raw",
            size_mib=96,
            engine=self.engine,
            direct=direct,
            queues=self.queues,
            load=LOADS[self.load],
            seed=seed,
        )


def cells() -> list[Cell]:
    """All of them."""
    return [
        Cell(*combination)
        for combination in itertools.product(
            ("sync", "uring"), (1, 4), ("light", "heavy"), ("tmpfs", "ext4-direct")
        )
    ]
