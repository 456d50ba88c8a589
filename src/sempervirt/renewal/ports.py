"""What the drivers of this room reach the world by; `adapters` and `recovery` have the real ones.

Each call raises SempervirtError, or OSError, when it fails. Each call ends by itself.
"""

from __future__ import annotations

from typing import Protocol

from sempervirt.host.procfs import ProcessId
from sempervirt.vm.work import Work


class Guest(Protocol):
    """The QEMU that has the VM while the work begins."""

    async def hold(self) -> bool:
        """Keeps others from changing the VM; whether the guest runs."""

    async def stop(self, *, pause: bool) -> None:
        """Pauses the guest, unless it is paused; afterwards no request of a disk is under way."""

    async def give(self) -> None:
        """Writes the state of the devices to a file."""


class WayBack(Protocol):
    """The QEMU that has the VM, once the work is given up."""

    def ended(self) -> str:
        """Why the VM has ended, or is being killed; "" while QEMU is there."""

    async def reset(self) -> None:
        """Undoes what QEMU was told so that it gives or loads a state."""

    async def cont(self) -> None:
        """Lets the guest run on."""

    def release(self, *, running: bool) -> None:
        """Ends `hold`; `running` is what the guest does now, as far as is known."""


class Record(Protocol):
    """What the next agent is told. All but `begin` give whether their note is on record."""

    def begin(self, work: Work) -> None:
        """The first note of the work."""

    def advance(self, work: Work) -> bool:
        """The same work, further on."""

    def end_work(self) -> bool:
        """Nothing goes on any more."""

    def took_over(self, qemu: ProcessId, number: int) -> bool:
        """Nothing goes on any more, and the VM is in another QEMU."""
