"""The ports of a destination (`ports`) on a real host."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise

from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import NotFound
from sempervirt.migration import stream
from sempervirt.migration.by_images import ImageWord
from sempervirt.migration.destination.state import OwnershipSeen
from sempervirt.migration.events import Side
from sempervirt.migration.wire_end import WireEnd
from sempervirt.passthrough.arriving import ArrivingDevices
from sempervirt.passthrough.ports import PortSpace
from sempervirt.store.records import Custody, Ownership
from sempervirt.store.registry import Claim, Registry
from sempervirt.vm.claims import claim_of, put_on_record, title_of
from sempervirt.vm.phases import Arrival
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving

log = logging.getLogger(__name__)

Forget = Callable[[], Awaitable[None]]


class DestinationOwnership:
    """The store, asked about a VM that comes as `work` says."""

    def __init__(self, vm: Vm, cluster: Cluster, work: Arriving) -> None:
        self._vm = vm
        self._host = cluster.settings.host
        self._registry = Registry(cluster.store)
        self._work = work
        self._by_images = ImageWord(vm, self._host, work) if work.by_images else None

    async def look(self) -> OwnershipSeen:
        """A VM that the store knows nothing of is not this host's."""
        if self._by_images is not None:
            return await self._by_images.look()
        try:
            return self._judge(await self._registry.find(self._vm.name))
        except NotFound:
            return OwnershipSeen(Side.SOURCE)

    def _judge(self, owned: Ownership) -> OwnershipSeen:
        epoch = self._work.epoch
        if owned.epoch > epoch and owned.owner == self._host and owned.custody is Custody.OWNED:
            return OwnershipSeen(Side.DESTINATION, claim=claim_of(owned))
        same = owned.epoch == epoch and owned.owner == self._work.source
        under_way = owned.custody in (Custody.MOVING, Custody.UNKNOWN)
        return OwnershipSeen(Side.SOURCE, moving=same and under_way)

    async def give_back(self, claim: Claim | None) -> None:
        """Whoever runs the VM next may claim it."""
        if claim is not None:
            self._vm.set_claim(claim)
        await self._vm.release_claim()


class DestinationGuest:
    """QEMU here, its disks and this end of the wire. `forget` drops the VM from the agent."""

    def __init__(self, vm: Vm, cluster: Cluster, work: Arriving, forget: Forget) -> None:
        self.wire = WireEnd(vm, cluster.wire_trust, work.id, work.source)
        self.devices = ArrivingDevices(list(vm.devices.values()), PortSpace(vm.machine.execute))
        self._vm = vm
        self._work = work
        self._forget = forget

    async def take_images(self, claim: Claim) -> None:
        """From now on the backends write."""
        vm = self._vm
        marks = [time.monotonic()]
        await put_on_record(claim, vm.spec)
        marks.append(time.monotonic())
        for name, disk in vm.disks.items():
            title = title_of(claim, vm.spec.disk(name), disk.setup.volume)
            if title is not None:
                await disk.claim(title)
        await self.devices.claim(claim.epoch, claim.id)
        marks.append(time.monotonic())
        vm.set_claim(claim)
        steps = [round((end - begin) * 1e3, 1) for begin, end in pairwise(marks)]
        log.info("arrival vm=%s has the images, ms: epoch %s, claim %s", vm.name, *steps)

    async def run(self) -> None:
        """Then the VM is everybody's to use, and its disks have spares again."""
        vm, runs = self._vm, self._work.running
        await self.devices.resume()
        if runs:
            await stream.let_run(vm.machine.execute)
        vm.machine.release("running" if runs else "paused")
        for disk in vm.disks.values():
            disk.thaw()

    async def end(self, because: str) -> None:
        """SIGKILL; then the disks are freed."""
        text = f"it did not come from {self._work.source}: {because}"
        await self._vm.kill(text)

    async def end_wire(self) -> None:
        """Kills it, if it has not ended by itself."""
        await self.wire.end()

    async def forget(self) -> None:
        """A VM of which something is left stays, and can be looked at."""
        await self._vm.wait_freed()
        await self._forget()


class DestinationRecord:
    """The VM's record, where an arrival is its work."""

    def __init__(self, vm: Vm, work: Arriving) -> None:
        self._vm = vm
        self._work = work

    def write(self, phase: Arrival) -> bool:
        """Notes how far the VM is."""
        self._work = replace(self._work, phase=phase)
        return self._vm.advance(self._work)

    def end(self) -> None:
        """The VM is here, or has ended here."""
        self._vm.end_work()
