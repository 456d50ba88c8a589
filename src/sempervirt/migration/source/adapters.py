"""The ports of a source (`ports`) on a real host: QEMU and the wire, disks, the store, the peer."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import StateConflict, Unavailable
from sempervirt.disk.driver import Disk
from sempervirt.migration import stream
from sempervirt.migration.messages import (
    ArrivalRequest,
    DeviceConfiguration,
    DeviceState,
    MovePolicy,
)
from sempervirt.migration.peer import DestinationPeer
from sempervirt.migration.source.figures import Figures
from sempervirt.migration.source.steering import Steering
from sempervirt.migration.wire_end import WireEnd
from sempervirt.passthrough.leaving import LeavingDevices
from sempervirt.qemu import device_state
from sempervirt.qemu.spec import VmSpec
from sempervirt.store.records import Custody
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.vm.claims import claimed_images
from sempervirt.vm.phases import Mode, Phase
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Departing

log = logging.getLogger(__name__)

RELEASE_S = 5.0
RELEASE_POLL_S = 0.001
WIRE_READY_S = 120.0
QEMU_S = 10.0
# QEMU says at once whether the guest runs; its blackout goes on meanwhile.
ANSWER_S = 1.0


class SourceGuest:
    """QEMU here, and this end of the wire, of a VM that is to move as `work` says."""

    def __init__(self, vm: Vm, cluster: Cluster, work: Departing, figures: Figures) -> None:
        self.wire = WireEnd(vm, cluster.wire_trust, work.id, work.destination)
        self.steering = Steering()
        self.postcopy = False
        # Before, QEMU tells how its last migration ended.
        self.started = False
        self._vm = vm
        self._work = work
        self._figures = figures

    async def start(self, address: str) -> None:
        """Starts the wire, then QEMU's migration into it."""
        execute = self._vm.machine.execute
        await self._connect(address)
        await stream.prepare_source(execute, postcopy=self.postcopy)
        await self.steering.begin(execute)
        self.wire.files.share_stream()
        await stream.start(execute, self.wire.files.stream)
        self.started = True

    async def switch_to_postcopy(self) -> None:
        """Has QEMU stop the guest; memory follows."""
        await self._vm.machine.execute("migrate-start-postcopy")

    async def finish_stream(self) -> None:
        """Has QEMU send what is left, unless it does so already."""
        execute = self._vm.machine.execute
        try:
            await stream.finish(execute)
        except StateConflict:
            if (await stream.look(execute)).status not in stream.FINISHING:
                raise

    async def recover(self, address: str) -> None:
        """Both QEMUs know what is missing; a new wire carries it."""
        await self._connect(address)
        self.wire.files.share_stream()
        await stream.go_on(self._vm.machine.execute, self.wire.files.stream)

    async def runs(self) -> bool:
        """Raises Unavailable for a QEMU that is silent, as one is that waits for a disk."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return bool((await self._vm.machine.execute("query-status"))["running"])
        except TimeoutError as error:
            raise Unavailable("QEMU does not say whether the guest stands still") from error

    def suspend(self) -> None:
        """SIGSTOP."""
        self._vm.machine.suspend(on=True)

    async def go_back(self, *, stopped: bool) -> bool:
        """Tells the switches where the guest is, if it stood still."""
        machine = self._vm.machine
        machine.suspend(on=False)
        await stream.cancel(machine.execute, QEMU_S)
        await stream.throttle(machine.execute, stream.MIN_THROTTLE)
        status = str((await machine.execute("query-status"))["status"])
        if self._work.running and status in ("paused", "postmigrate", "finish-migrate"):
            await machine.execute("cont")
            status = "running"
        runs = status == "running"
        if stopped and runs:
            await stream.announce(machine.execute)
        if runs:
            self._figures.guest_runs()
        await self.wire.end()
        machine.release(status)
        return runs

    async def end(self, because: str) -> None:
        """SIGKILL; then the disks are freed."""
        if not self._vm.run.is_end:
            await self._vm.machine.kill(because or self._farewell)
        await self._vm.wait_freed()

    async def end_wire(self) -> None:
        """Kills it, if it has not ended by itself."""
        await self.wire.end()

    @property
    def _farewell(self) -> str:
        return replace(self._work, phase=Phase.DONE).farewell

    async def _connect(self, address: str) -> None:
        await self.wire.start_source(address)
        await self.wire.wait_ready(WIRE_READY_S)


class SourceDisks:
    """The VM's writable disks. Their backends give up the images by themselves when QEMU stops."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._served: dict[str, int] = {}

    async def arm(self) -> None:
        """From now on there is no spare, and each backend lets go when its queues stop."""
        for disk in self._writable():
            await disk.freeze()
        for disk in self._writable():
            self._served[disk.name] = disk.generation
            await disk.arm_release(armed=True)

    async def released(self) -> None:
        """It has to be the backends that were armed: one that died in between has left requests
        behind.
        """
        deadline = time.monotonic() + RELEASE_S
        for disk in self._writable():
            while await disk.arm_release(armed=True):
                if time.monotonic() > deadline:
                    raise Unavailable(f"the backend of disk {disk.name} keeps the image")
                await asyncio.sleep(RELEASE_POLL_S)
            if disk.flush_failed:
                raise Unavailable(f"a flush of disk {disk.name} has just failed")
        if (ended := self.ended()) is not None:
            raise Unavailable(f"the backend of disk {ended} has just changed")

    async def take_back(self) -> None:
        """Before a spare is there: the spare would take the image first."""
        for disk in self._writable():
            if disk.generation:
                await disk.arm_release(armed=False)
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


class SourceDevices:
    """The VM's passed-through devices, on their way to `peer`."""

    def __init__(self, vm: Vm, peer: DestinationPeer) -> None:
        self.devices = LeavingDevices(list(vm.devices.values()), vm.machine.execute)
        self._vm = vm
        self._peer = peer

    async def configurations(self) -> dict[str, DeviceConfiguration]:
        """As the guest has set them by now."""
        found = await self.devices.configurations()
        return {name: DeviceConfiguration.of(one) for name, one in found.items()}

    async def capture(self) -> None:
        """Captures doorbells, and has QEMU do the devices' DMA."""
        await self.devices.arm()

    async def send_round(self) -> None:
        """Gives the destination the register writes since the last call."""
        if rounds := await self.devices.rounds():
            await self._peer.replay_devices(rounds)

    async def move(self) -> None:
        """In one message: the destination has the state of all devices, or that of none."""
        if not self._vm.devices:
            return
        moved = await self.devices.move()
        await self._peer.receive_devices({name: DeviceState.of(one) for name, one in moved.items()})

    async def go_on(self) -> None:
        """QEMU may be suspended: it is needed for this."""
        if self._vm.devices:
            self._vm.machine.suspend(on=False)
            await self.devices.take_back()

    def ended(self) -> str | None:
        """A device whose mediator has ended."""
        return self.devices.ended()


class Transfer:
    """The claim on a VM, on its way from this host to another."""

    def __init__(self, registry: Registry, claim: Claim, destination: str) -> None:
        self.claim = claim
        self._registry = registry
        self._destination = destination

    async def begin(self) -> float:
        """Tells the store where the VM is going; gives the seconds that the store took.

        Raises StaleClaim, Unavailable, OutcomeUnknown.
        """
        if (await self._registry.check(self.claim)).custody is Custody.MOVING:
            await self._registry.end_move(self.claim)  # of a try that ended unknown
        before = time.monotonic()
        await self._registry.begin_move(self.claim, self._destination)
        return time.monotonic() - before

    async def hand_over(self) -> Claim:
        """Asks the store to give the VM to the other host."""
        return await self._registry.hand_over(self.claim)

    async def withdraw(self) -> None:
        """Has the VM stay, unless it was handed over (StaleClaim)."""
        await self._registry.end_move(self.claim)

    async def make_certain(self) -> Claim | None:
        """An operator may have said that the destination owns the VM: the store has to know."""
        try:
            if (await self._registry.check(self.claim)).custody is not Custody.MOVING:
                await self._registry.begin_move(self.claim, self._destination)
            return await self._registry.hand_over(self.claim)
        except StaleClaim:
            return None


class SourceRecord:
    """The VM's record, where a departure is its work."""

    def __init__(self, vm: Vm, work: Departing) -> None:
        self._vm = vm
        self._work = work

    def write(self, phase: Phase, mode: Mode) -> bool:
        """Notes how far the VM is."""
        self._work = replace(self._work, phase=phase, mode=mode)
        return self._vm.advance(self._work)

    def end(self) -> None:
        """The VM stays."""
        self._vm.end_work()


class Destination:
    """The agent of the host that the VM goes to."""

    def __init__(
        self,
        peer: DestinationPeer,
        vm: Vm,
        host: str,
        work: Departing,
        claim: Claim,
        policy: MovePolicy,
        figures: Figures,
        devices: SourceDevices,
    ) -> None:
        self._peer = peer
        self._vm = vm
        self._host = host
        self._work = work
        self._claim = claim
        self._policy = policy
        self._figures = figures
        self._devices = devices

    async def prepare(self) -> str:
        """Describes the VM as the guest sees it, and the images by their ids."""
        vm, claim = self._vm, self._claim
        claimed = await _claimed_disks(vm.spec)
        answer = await self._peer.prepare(
            ArrivalRequest(
                id=self._work.id,
                source=self._host,
                epoch=claim.epoch,
                spec=vm.pinned_spec,
                machine=await device_state.machine_type(vm.machine.execute),
                accelerator=vm.record.accelerator.kind,
                running=self._work.running,
                postcopy=self._policy.postcopy,
                by_images=self._work.by_images,
                images=dict(zip(claimed, claim.images, strict=True)),
                devices=await self._devices.configurations(),
            )
        )
        return answer.address

    async def promise(self) -> None:
        """From now on the destination waits for the outcome."""
        await self._peer.promise()

    async def run(self, claim: Claim) -> None:
        """Returns when the guest runs there."""
        await self._peer.run(claim.epoch, claim.id)
        self._figures.guest_runs()
        log.info(
            "migrate vm=%s blackout_ms=%s after its stop: %s",
            self._vm.name,
            self._figures.blackout_ms,
            self._figures.timeline_ms,
        )

    async def abort(self, why: str) -> None:
        """The VM does not come."""
        await self._peer.abort(why)

    async def recover(self) -> str:
        """The new address of the destination's wire."""
        return (await self._peer.recover()).address


async def _claimed_disks(spec: VmSpec) -> list[str]:
    images = set(await claimed_images(spec))
    return [disk.name for disk in spec.imaged if disk.image in images and not disk.read_only]
