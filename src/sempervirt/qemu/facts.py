"""What this host offers to VMs, found out once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from sempervirt.qemu import accel, features
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.command_line import Features


@dataclass(frozen=True)
class HostFacts:
    """The QEMU binary, what it can do, and how guests run."""

    qemu: str
    features: Features
    accelerator: Accelerator


class HostProbe:
    """Asks at the first `facts`, in one go for everyone who waits."""

    def __init__(self, qemu: str | None, cache_directory: Path) -> None:
        self._qemu = qemu
        self._cache_directory = cache_directory
        self._lock = asyncio.Lock()
        self._facts: HostFacts | None = None

    async def facts(self) -> HostFacts:
        """Raises Unavailable when QEMU is missing or cannot be asked."""
        async with self._lock:
            if self._facts is None:
                qemu = self._qemu or features.find_qemu()
                found, accelerator = await asyncio.gather(
                    features.probe(qemu, self._cache_directory), accel.probe(qemu)
                )
                self._facts = HostFacts(qemu, found, accelerator)
            return self._facts
