"""What a VM that leaves lets go of: the images of its disks, and its claim in the store."""

from __future__ import annotations

import asyncio
import logging
import time

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.disk.driver import Disk
from sempervirt.migration.events import (
    AnswerLost,
    Committed,
    NotCommitted,
    SourceEvent,
    Superseded,
    Withdrawn,
)
from sempervirt.store.records import Custody
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

RELEASE_S = 5.0
RELEASE_POLL_S = 0.001
ASK_AGAIN_S = 1.0


class DepartingDisks:
    """Its writable disks. Their backends give up the images by themselves when QEMU stops."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._served: dict[str, int] = {}

    async def arm(self) -> None:
        """From now on there is no spare, and each backend lets go when its queues stop."""
        for disk in self._writable():
            await disk.freeze()
        for disk in self._writable():
            self._served[disk.name] = disk.generation
            await disk.hand_over(armed=True)

    async def released(self) -> None:
        """Returns when the images are free. It has to be the backends that were armed: one that
        died in between has left requests behind. Raises Unavailable.
        """
        deadline = time.monotonic() + RELEASE_S
        for disk in self._writable():
            while await disk.hand_over(armed=True):
                if time.monotonic() > deadline:
                    raise Unavailable(f"the backend of disk {disk.name} keeps the image")
                await asyncio.sleep(RELEASE_POLL_S)
        if (ended := self.ended()) is not None:
            raise Unavailable(f"the backend of disk {ended} has just changed")

    async def take_back(self) -> None:
        """Undoes `arm`. Raises as `Disk.hand_over`."""
        # Before a spare is there: it would take the image first.
        for disk in self._writable():
            if disk.generation:
                await disk.hand_over(armed=False)
        for disk in self._writable():
            disk.thaw()

    def ended(self) -> str | None:
        """A disk whose backend is not the one that was armed."""
        for disk in self._writable():
            if disk.generation != self._served.get(disk.name, disk.generation):
                return disk.name
        return None

    def _writable(self) -> list[Disk]:
        return [disk for disk in self._vm.disks.values() if not disk.setup.options.read_only]


class Transfer:
    """The claim on a VM, on its way from this host to another. `handed`: the other host's."""

    def __init__(self, registry: Registry, claim: Claim, destination: str) -> None:
        self.claim = claim
        self.handed: Claim | None = None
        self._registry = registry
        self._destination = destination

    async def begin(self) -> float:
        """Tells the store where the VM is going; gives the seconds that it took.

        Raises StaleClaim, Unavailable, OutcomeUnknown.
        """
        if (await self._registry.check(self.claim)).custody is Custody.MOVING:
            await self._registry.end_move(self.claim)  # of a try that ended unknown
        before = time.monotonic()
        await self._registry.begin_move(self.claim, self._destination)
        return time.monotonic() - before

    async def commit(self) -> SourceEvent:
        """Asks the store to give the VM to the other host; what came of it."""
        try:
            self.handed = await self._registry.hand_over(self.claim)
        except StaleClaim:
            return Superseded()
        except OutcomeUnknown as error:
            return AnswerLost(str(error))
        except SempervirtError as error:
            return NotCommitted(str(error))
        return Committed()

    async def withdraw(self) -> SourceEvent | None:
        """Has the VM stay; None while the store is silent: then it is asked again."""
        try:
            await self._registry.end_move(self.claim)
        except StaleClaim:
            return Superseded()
        except SempervirtError as error:
            log.debug("migrate vm=%s %s", self.claim.vm, error)
            return None
        return Withdrawn()

    async def make_certain(self) -> None:
        """An operator may have said that the destination owns the VM: the store has to know."""
        while self.handed is None:
            try:
                owned = await self._registry.check(self.claim)
                if owned.custody is not Custody.MOVING:
                    await self._registry.begin_move(self.claim, self._destination)
                self.handed = await self._registry.hand_over(self.claim)
            except StaleClaim:
                return  # it does
            except SempervirtError as error:
                log.info("migrate vm=%s %s", self.claim.vm, error)
                await asyncio.sleep(ASK_AGAIN_S)
