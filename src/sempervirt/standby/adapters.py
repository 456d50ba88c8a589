"""The ports of a VM's standbys on this host (`ports`).

Each generation is a VM of the same name in places of its own, STATE/standby/NAME/N and
RUN/standby/NAME/N: so its records, sockets and backends are those of any VM, and stay where they
are when it takes over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import assert_never
from uuid import uuid4

from sempervirt.cluster.cluster import read_settings
from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.sizes import format_size
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.driver import Disk
from sempervirt.disk.target import require_free
from sempervirt.host import background
from sempervirt.host.dhcp import Requests
from sempervirt.host.lending import group_of, lend
from sempervirt.host.places import Places
from sempervirt.host.procfs import memory_available
from sempervirt.host.records import RecordDamaged
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu import device_state, memory, saved
from sempervirt.qemu.command_line import disk_id, plug
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby import initialised, network
from sempervirt.standby.disks import FirstDisks, KnownFirst, copied, shared
from sempervirt.standby.lost import OF_A_STANDBY, remove_image
from sempervirt.standby.ports import Kept, Snapshots
from sempervirt.standby.record import Guest, below_of, generation_places, read_guest, write_guest
from sempervirt.standby.values import Tier
from sempervirt.store import epoch
from sempervirt.store.registry import Claim, StaleClaim
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.launch import Beginning, launch, wait_started
from sempervirt.vm.user import release_user
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Standing

log = logging.getLogger(__name__)

# Somebody may have started the VM anew, as another QEMU; its end is seen at once.
LOOK_S = 1.0
RUNS_S = 10.0
PLUGGED_S = 10.0
PLUGGED_POLL_S = 0.1
RECORD_S = 60.0
RELEASE_POLL_S = 0.05

Current = Callable[[], Vm | None]


def require_possible(vm: Vm) -> None:
    """Raises InvalidRequest or StateConflict when no standby can be made of `vm`."""
    initialised.how(vm.spec)
    vm.require_no_devices("a standby")
    for disk in copied(vm.spec):
        if disk.name not in vm.disks:
            raise InvalidRequest(
                f"disk {vm.name}/{disk.name} is served by QEMU itself, which takes no snapshots",
                remedy='serve it by backend = "blkd"',
            )
        volume = vm.disks[disk.name].setup.volume
        if volume is not None and volume.block_device:
            raise InvalidRequest(
                f"disk {vm.name}/{disk.name} is a block device, of which there are no snapshots",
                remedy='put it into a file, or keep = "latest"',
            )
    if vm.spec.firmware_vars is not None:
        raise InvalidRequest(f"VM {vm.name} has variables of a firmware, which a standby has not")


class LiveGenerations:
    """The standbys of a VM on this host: `ports.Generations`.

    `first` is the VM that they are for, wherever it runs, and `current` what this host knows by its
    name. `promote` has a generation be the VM; `holder` is the name of this host.
    """

    def __init__(
        self,
        config: AgentConfig,
        name: str,
        current: Current,
        facts: Callable[[], Awaitable[HostFacts]],
        promote: Callable[[Vm], Awaitable[None]],
        holder: str,
        first: KnownFirst,
    ) -> None:
        self.vms: dict[int, Vm] = {}
        self._config = config
        self._name = name
        self._current = current
        self._facts = facts
        self._promote = promote
        self._holder = holder
        self._first = first
        self._memories: dict[int, int] = {}
        self._claimed: dict[int, list[tuple[Path, Claim]]] = {}
        self._before: dict[int, VmSpec] = {}
        self._bridges: dict[int, Mapping[str, str]] = {}
        self._heard: dict[int, list[Requests]] = {}
        self._settling: list[asyncio.Task[None]] = []

    def places(self, number: int) -> Places:
        """Where a generation has its files."""
        return generation_places(self._config, self._name, number)

    def config(self, number: int) -> AgentConfig:
        """How the VM is run that a generation is."""
        return config_of(self._config, self._name, number)

    def has_file(self, number: int) -> bool:
        """Whether the memory and state of a generation are in a file."""
        return _memory_file(self.places(number)).exists()

    async def copy(self, number: int, snapshots: Snapshots, ours: Snapshots) -> tuple[str, ...]:
        """Copies snapshots to images of the generation's own, and gives up `ours`."""
        disks, numbers = self._first.disks(), dict(snapshots)
        images = {disk.name: _image_of(disk, number) for disk in copied(disks.spec)}
        if images.keys() != numbers.keys() or not images.keys() <= disks.served:
            raise Unavailable(f"VM {self._name} was started anew after the snapshot")
        notes: list[str] = []
        try:
            await self._copy(disks, number, numbers, images)
        finally:  # also of one that was not copied: each layer of the first VM costs it something
            notes += await self.give_up(snapshots, ours)
        return tuple(notes)

    async def give_up(self, snapshots: Snapshots, ours: Snapshots) -> tuple[str, ...]:
        """Gives up snapshots; notes of those that stay."""
        disks = self._first.disks()
        notes = [
            await disks.give_up(name, number, {one for disk, one in ours if disk == name})
            for name, number in snapshots
        ]
        return tuple(note for note in notes if note)

    async def _copy(
        self,
        first: FirstDisks,
        number: int,
        numbers: Mapping[str, int],
        images: Mapping[str, Path],
    ) -> None:
        places = self.places(number)
        # Before anything says that these images are the generation's: what is there is not.
        for image in images.values():
            await call_storage(image, partial(require_free, image))
        spec = first.spec
        await require_room({spec.disk(name).image: image for name, image in images.items()})
        disks = tuple(
            disk.model_copy(update={"image": images.get(disk.name, disk.image)})
            for disk in spec.disks
        )
        bridges = network.bridges_of(spec, number)
        spec = network.isolated(spec.model_copy(update={"disks": disks}), number)
        await asyncio.to_thread(_make, places, Guest(spec, bridges))
        for name, image in images.items():
            await first.copy_out(name, numbers[name], image)

    async def boot(self, number: int) -> float:
        """Boots from the copies, isolated; how long until the OS was initialised, in seconds."""
        places = self.places(number)
        spec = (await asyncio.to_thread(read_guest, places.state_dir)).spec
        await require_memory(spec)
        later = frozenset(disk.name for disk in shared(spec))
        network.prepare(spec)
        self._stop_listening(number)
        self._heard[number] = network.listen(spec)
        beginning = Beginning(
            work=Standing(self._holder),
            host=self._holder,
            isolated=True,
            later=later,
            absent=later,
        )
        facts = await self._facts()
        vm = await launch(self.config(number), facts, _identified(spec, facts), beginning)
        self.vms[number] = vm
        await wait_started(vm)
        return await initialised.wait_initialised(vm)

    async def settle(self, number: int) -> tuple[str, ...]:
        """Sees that the network spoke, and plugs in the disks that both VMs have, which wait for
        their claim.
        """
        vm, features = self.vms[number], (await self._facts()).features
        notes = [*await network.wait_spoken(vm.spec)]
        network.require_own_addresses(self._heard.get(number, ()))
        self._stop_listening(number)
        for disk in shared(vm.spec):
            socket = vm.disks[disk.name].setup.files.socket
            plan = vm.plans[disk_id(disk)]
            for command, arguments in plug(disk, plan, features, socket):
                await vm.machine.execute(command, arguments)
            if not await _wait_plugged(vm, disk):
                notes.append(f"the guest has not begun to use disk {disk.name} before the freeze")
        return tuple(notes)

    async def freeze(self, number: int, tier: Tier) -> Kept:
        """Keeps the guest's memory and state, and ends what booted."""
        vm, places = self.vms[number], self.places(number)
        served = {disk: disk.generation for disk in vm.disks.values()}
        machine = await device_state.machine_type(vm.machine.execute)
        await vm.machine.execute("stop")
        for disk, generation in served.items():
            await disk.status()
            if disk.generation != generation:
                raise Unavailable(f"the backend of disk {disk.name} has just changed")
        state = _state_file(places)
        lend(state, group_of(vm.machine.files.directory), make=True)
        await device_state.save(vm.machine.execute, state)
        if vm.pid is None:
            raise Unavailable(f"the standby has ended: {vm.state.why}")
        descriptor = memory.open_of(vm.pid)
        self._memories[number] = descriptor
        kept_bytes = os.fstat(descriptor).st_blocks * 512
        if tier is Tier.FILE:
            kept_bytes = await self._pack(vm, descriptor, places, state)
            self._close_memory(number)
        await vm.kill("its memory and state are kept")
        await vm.detach()
        del self.vms[number]
        return Kept(machine, kept_bytes)

    async def _pack(self, vm: Vm, descriptor: int, places: Places, state: Path) -> int:
        about = places.run_dir / "about"
        await asyncio.to_thread(about.write_text, json.dumps({"standby": self._name}))
        images = {disk.name: disk.image for disk in copied(vm.spec)}
        target = _memory_file(places)
        figures = await saved.save(descriptor, state, about, images, target, _ignore)
        await asyncio.to_thread(partial(state.unlink, missing_ok=True))
        return figures.file

    async def stand(self, number: int, machine: str, tier: Tier) -> None:
        """Starts what waits, with a generation ID that no VM has had; in tier FILE nothing."""
        if tier is Tier.FILE:
            return
        descriptor = self._memories.get(number)
        if descriptor is None:
            raise Unavailable(f"the memory of standby {number} is gone")
        await self._start(number, Beginning(memory_fd=descriptor), machine)
        self._close_memory(number)

    async def stand_again(self, number: int, machine: str, tier: Tier) -> None:
        """Ends what has loaded the state, or was about to, and has another QEMU wait for it: the
        guest has not run, so that its memory is as it was. In tier FILE nothing waits.
        """
        if tier is Tier.READY:
            pid = self._require(number).pid
            if pid is None:
                raise Unavailable(f"standby {number} has ended, and its memory with it")
            self._close_memory(number)
            self._memories[number] = memory.open_of(pid)
        await self._end(number, "its take-over was called off")
        await self.stand(number, machine, tier)

    async def _end(self, number: int, why: str) -> None:
        """Ends what runs of a generation, if anything does. Raises OutcomeUnknown."""
        vm = self.vms.get(number)
        if vm is not None:
            await vm.kill(why)
            await vm.detach()
            del self.vms[number]

    async def _start(
        self, number: int, beginning: Beginning, machine: str, *, alone: bool = False
    ) -> Vm:
        """A QEMU that waits for a state, with its backends. `alone`: it shares no disk."""
        places = self.places(number)
        spec = (await asyncio.to_thread(read_guest, places.state_dir)).spec
        facts = await self._facts()
        spec = _identified(spec, facts)
        beginning = replace(
            beginning,
            machine=machine,
            work=Standing(self._holder),
            host=self._holder,
            later=frozenset() if alone else await asyncio.to_thread(self._awaiting, spec),
        )
        vm = await launch(self.config(number), facts, spec, beginning)
        self.vms[number] = vm
        await wait_started(vm)
        await device_state.prepare(vm.machine.execute)
        return vm

    def _awaiting(self, spec: VmSpec) -> frozenset[str]:
        """The disks that get their claim when the standby takes over. In a cluster the VM has all
        its images by one claim of the store, also those of its own.
        """
        if read_settings(self._config) is None:
            return frozenset(disk.name for disk in shared(spec))
        return frozenset(disk.name for disk in spec.disks if not disk.read_only)

    def state_file(self, number: int) -> Path:
        """Where the state of a generation's devices is, while it is not packed."""
        return _state_file(self.places(number))

    def files(self, number: int) -> list[Path]:
        """What there is of the memory and state of a generation in files."""
        places = self.places(number)
        return [path for path in (_state_file(places), _memory_file(places)) if path.exists()]

    async def start_isolated(self, number: int, machine: str, memory_fd: int | None) -> Vm:
        """A QEMU that waits for a state which is only tried: it reaches nobody, and has its disks
        for itself. Without `memory_fd` memory and state are unpacked from its file.
        """
        alone = Beginning(isolated=True, memory_fd=memory_fd)
        if memory_fd is not None:
            return await self._start(number, alone, machine, alone=True)
        return await self._unpacked(number, machine, _state_file(self.places(number)), alone=True)

    async def gone(self, number: int) -> str:
        """Returns when what waits has ended, or is silent: why. In tier FILE it never returns."""
        vm = self.vms.get(number)
        if vm is None:
            await asyncio.Event().wait()
        assert vm is not None
        bad = (Runstate.UNKNOWN, Runstate.HALTED)
        await vm.machine.changes.wait_until(
            lambda: vm.run.is_end or vm.run in bad, timeout_s=None, what="the standby's end"
        )
        return f"what waited is {vm.run.value}: {vm.state.why}"

    async def remove(self, number: int) -> None:
        """Ends the processes of a generation, and removes its files. An image that the VM has is
        never removed, whatever it is called.

        Raises OutcomeUnknown when a process does not end, Unavailable or OSError when the storage
        does not let an image go: what tells of the generation's files stays then.
        """
        self._close_memory(number)
        self._stop_listening(number)
        await self._end(number, "the standby is not needed any more")
        await self._release_claims(number)
        places = self.places(number)
        with contextlib.suppress(RecordDamaged):  # nothing was made of it, or nobody knows what
            spec = (await asyncio.to_thread(read_guest, places.state_dir)).spec
            network.remove(spec)
            await self._remove_images(spec, number)
        for directory in (places.run_dir, places.state_dir):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        of_vm = places.vm_state_dir(self._name), places.vm_run_dir(self._name)
        release_user(self._config, self._name, *of_vm)

    async def _release_claims(self, number: int) -> None:
        """A claim under which no guest has run: it would keep the first VM from its own disks."""
        mine = self._claimed.get(number, [])
        while mine:
            record, claim = mine[-1]
            with contextlib.suppress(StaleClaim):
                await call_storage(record, partial(epoch.release, record, claim), RECORD_S)
            mine.pop()
        self._claimed.pop(number, None)

    async def release_left(self, number: int) -> None:
        """Releases what a take-over had claimed of which nothing is left, as after the death of the
        host: it would keep the first VM from its own disks.
        """
        current = self._current()
        if current is not None and not current.freed:
            return
        try:
            if await asyncio.to_thread(read_settings, self._config) is not None:
                await claims.release_own(self._config, self._name)
                return
            spec = (await asyncio.to_thread(read_guest, self.places(number).state_dir)).spec
            for disk in shared(spec):
                record = epoch.record_path(disk.image)
                await call_storage(record, partial(release_own, record, self._holder), RECORD_S)
        except (SempervirtError, OSError) as error:
            log.error("standby vm=%s its claim is not released: %s", self._name, error)  # noqa: TRY400

    async def _remove_images(self, spec: VmSpec, number: int) -> None:
        first = self._first.spec
        used = {disk.image for disk in first.disks} if first is not None else set()
        for disk in spec.disks:
            if disk.image.name.endswith(f".standby-{number}") and disk.image not in used:
                await call_storage(disk.image, partial(remove_image, disk.image))

    # Taking over

    async def load(self, number: int, machine: str, tier: Tier) -> None:
        """Has the QEMU of a generation load the state; in tier FILE QEMU is started for that."""
        state = _state_file(self.places(number))
        match tier:
            case Tier.READY:
                vm = self._require(number)
            case Tier.FILE:
                vm = await self._unpacked(number, machine, state)
            case _:
                assert_never(tier)
        lend(state, group_of(vm.machine.files.directory))
        await device_state.load(vm.machine.execute, state, prepared=True)
        # In advance: from the claim on each millisecond counts.
        guest = await asyncio.to_thread(read_guest, self.places(number).state_dir)
        self._bridges[number] = guest.bridges

    async def _unpacked(self, number: int, machine: str, state: Path, *, alone: bool = False) -> Vm:
        places = self.places(number)
        await self._end(number, "the standby is loaded anew")  # of an agent that ended meanwhile
        spec = (await asyncio.to_thread(read_guest, places.state_dir)).spec
        network.prepare(spec)  # its taps are not there any more when the host was started anew
        images = {disk.name: disk.image for disk in copied(spec)}
        unpacking: list[asyncio.Future[None]] = []

        async def unpack(descriptor: int) -> None:
            try:
                await saved.restore(_memory_file(places), descriptor, state, images, _ignore)
            finally:
                os.close(descriptor)

        def fill(_files: VmFiles, descriptor: int) -> None:
            unpacking.append(asyncio.ensure_future(unpack(os.dup(descriptor))))

        try:
            beginning = Beginning(fill=fill, isolated=alone)
            vm = await self._start(number, beginning, machine, alone=alone)
            await asyncio.gather(*unpacking)
        except BaseException:
            for task in unpacking:
                task.cancel()
            await asyncio.gather(*unpacking, return_exceptions=True)
            raise
        return vm

    async def claim(self, number: int) -> None:
        """Takes the disks that both VMs have; the generation is the VM from now on."""
        vm, first = self._require(number), self._current()
        if vm.run.is_end:
            raise StateConflict(f"standby {number} has ended: {vm.state.why}")
        if first is not None and first is not vm and shared(vm.spec):
            await asyncio.to_thread(_bring_maps, first, vm)
        if await asyncio.to_thread(read_settings, self._config) is None:
            titles = {
                disk.name: await self._on_record(number, vm.disks[disk.name])
                for disk in shared(vm.spec)
            }
        else:
            titles = await self._from_store(vm)
        self._first.let_go()
        await asyncio.gather(*(vm.disks[name].claim(title) for name, title in titles.items()))
        await self._promote(vm)
        if first is not None and first is not vm:
            self._before[number] = first.spec

    async def _from_store(self, vm: Vm) -> dict[str, ImageTitle]:
        """Has the store give the VM to this host, and puts the claim on record at its images: the
        rights of the disks that await theirs.
        """
        owner, evidence = self._first.fenced
        left = self._first.left
        claim = await claims.take_over(self._config, vm.spec, owner, evidence, left)
        vm.ledger.claimed(claim)
        titles: dict[str, ImageTitle] = {}
        for disk in vm.spec.disks:
            served = vm.disks.get(disk.name)
            if served is None or served.setup.title is None:
                continue
            title = claims.title_of(claim, disk, served.setup.volume)
            if title is not None:
                titles[disk.name] = title
        return titles

    async def _on_record(self, number: int, disk: Disk) -> ImageTitle:
        """Puts a claim of this host, newer than any other one, on record at the image: whoever gets
        the image's lock by an older one refuses from now on.

        The claim says nothing to other hosts: there is no store that would have given it. It is
        released as soon as the backend has the image's lock (`_release`), which keeps all others
        out from then on, so that whoever serves the image later needs no claim.
        """
        title = disk.setup.title
        assert title is not None
        if title.epoch is not None:  # by an attempt that was not noted
            return title
        claim = await call_storage(
            disk.setup.options.image,
            partial(_advance, title.epoch_file, self._name, self._holder),
            RECORD_S,
        )
        self._claimed.setdefault(number, []).append((title.epoch_file, claim))
        return ImageTitle(title.epoch_file, claim.host, claim.epoch, claim.id)

    async def run(self, number: int) -> tuple[str, ...]:
        """Leads the network to the guest, lets it run, and announces its addresses."""
        vm = self._require(number)
        notes: tuple[str, ...] = ()
        try:
            network.lead(await self._bridges_of(number))
        except SempervirtError as error:  # better without its network than not at all
            notes = (f"{error.message}; {error.remedy}",)
        await vm.machine.execute("cont")
        self._claimed.pop(number, None)
        vm.end_work()
        self._settling.append(
            background.start(
                _settle_in(vm, self._before.pop(number, None)), f"{vm.name}: settle in"
            )
        )
        self._begin_releasing(vm)
        return notes

    def _begin_releasing(self, vm: Vm) -> None:
        """From now on the disks have spares. A claim that the store gave is the VM's for as long as
        it runs; one that this host gave itself is released first.
        """
        if (claim := vm.record.claim) is not None:
            vm.set_claim(claim)
            for served in vm.disks.values():
                served.thaw()
            return
        for disk in shared(vm.spec):
            if disk.name in vm.disks:
                work = _release(vm.disks[disk.name], vm, self._holder)
                self._settling.append(background.start(work, f"{vm.name}/{disk.name}: release"))

    async def _bridges_of(self, number: int) -> Mapping[str, str]:
        """Also when another agent has loaded the state."""
        if (known := self._bridges.pop(number, None)) is not None:
            return known
        return (await asyncio.to_thread(read_guest, self.places(number).state_dir)).bridges

    async def probe(self, number: int) -> tuple[str, ...]:
        """Sets the guest's clock and sees that the guest answers."""
        vm = self._require(number)
        await vm.machine.wait_state(Runstate.RUNNING, timeout_s=RUNS_S)
        if isinstance(vm.work, Standing):  # the agent ended between `cont` and the note of it
            vm.end_work()
            settling = _settle_in(vm, self._before.pop(number, None))
            self._settling.append(background.start(settling, f"{vm.name}: settle in"))
        return await initialised.greet(vm)

    def _require(self, number: int) -> Vm:
        vm = self.vms.get(number)
        if vm is None:
            raise StateConflict(f"standby {number} of VM {self._name} is not there any more")
        return vm

    def _close_memory(self, number: int) -> None:
        descriptor = self._memories.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)

    def _stop_listening(self, number: int) -> None:
        for requests in self._heard.pop(number, ()):
            requests.close()

    async def settle_served(self, number: int) -> None:
        """What an agent that died after a take-over may have left to do about the shared disks."""
        self._begin_releasing(self._require(number))

    async def close(self, *, keep: bool) -> None:
        """Leaves what waits for the next agent, or ends it."""
        for task in self._settling:
            task.cancel()
        await asyncio.gather(*self._settling, return_exceptions=True)
        for number in list(self._memories):
            self._close_memory(number)
        for number in list(self._heard):
            self._stop_listening(number)
        for vm in self.vms.values():
            if vm is self._current():
                continue
            if not keep:
                with contextlib.suppress(OutcomeUnknown):
                    await vm.kill("the agent closes")
            await vm.detach()


def config_of(config: AgentConfig, name: str, number: int) -> AgentConfig:
    """How the VM is run that a generation is: its files are its own, the rest is the host's."""
    return replace(config, below=below_of(name, number))


def _identified(spec: VmSpec, facts: HostFacts) -> VmSpec:
    """The VM with a generation ID that no VM has had, if this QEMU has the device for it."""
    present = "vmgenid" in facts.features.devices
    return spec.model_copy(update={"generation_id": uuid4() if present else None})


def _ignore(_done: int, _total: int) -> None:
    """Nobody looks how far a standby is copied."""


def number_of(image: Path) -> int:
    """The number of the standby that an image was made for; 0 for an image of the VM itself."""
    found = OF_A_STANDBY.search(image.name)
    return int(found[0].rpartition("-")[2]) if found else 0


def _image_of(disk: DiskSpec, number: int) -> Path:
    """Where the copy of a disk is: beside its image, also if that is a copy itself."""
    name = OF_A_STANDBY.sub("", disk.image.name)
    return disk.image.with_name(f"{name}.standby-{number}")


def _make(places: Places, guest: Guest) -> None:
    for directory in (places.state_dir, places.run_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_guest(places.state_dir, guest)


async def require_memory(spec: VmSpec) -> None:
    """Raises Unavailable when another guest as large may not fit: when memory is out the kernel
    ends some QEMU, and that may be the one of the VM that runs.
    """
    available = await asyncio.to_thread(memory_available)
    if available < spec.memory:
        raise Unavailable(
            f"a second guest takes up to {format_size(spec.memory)} of memory, and this host has "
            f"{format_size(available)} available",
            remedy="make room: when memory is out the kernel ends a VM, and maybe the first one",
        )


async def require_room(copies: Mapping[Path, Path]) -> None:
    """That images can be copied, by their paths and those of the copies. Raises Unavailable where
    that would fill a file system: the disks of the VM that runs would have no room either.
    """
    wanted: dict[int, int] = {}
    for image, copy in copies.items():
        device, free, taken = await call_storage(copy, partial(_room, image, copy))
        wanted[device] = wanted.get(device, 0) + taken + taken // 10
        if wanted[device] > free:
            raise Unavailable(
                f"a copy of {image} takes up to {format_size(taken)}, and there is room for "
                f"{format_size(free)} in {copy.parent}",
                remedy="make room there: whoever fills it takes it from the VM that runs",
            )


def _room(image: Path, copy: Path) -> tuple[int, int, int]:
    """Which file system a copy would be on, the bytes that are free there, and those that the image
    takes with its layers; none for an image that is not there. Raises OSError.
    """
    there = os.statvfs(copy.parent)
    files = [image, *image.with_name(f"{image.name}.layers").glob("*")]
    taken = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            taken += file.stat().st_blocks * 512
    return copy.parent.stat().st_dev, there.f_bavail * there.f_frsize, taken


def _state_file(places: Places) -> Path:
    return places.run_dir / "state"


def _memory_file(places: Places) -> Path:
    return places.state_dir / "memory"


async def _wait_plugged(vm: Vm, disk: DiskSpec) -> bool:
    """Whether the guest's driver has taken a disk that was plugged in. The disk's backend cannot
    tell: no queue of it starts before it has its claim. A QEMU that cannot be asked tells nothing.
    """
    path = f"/machine/peripheral/{disk_id(disk)}/virtio-backend"
    deadline = time.monotonic() + PLUGGED_S
    while time.monotonic() < deadline:
        try:
            told = await vm.machine.execute("x-query-virtio-status", {"path": path})
        except SempervirtError:
            return False
        if "S_DRIVER_OK" in str(told.get("status")):
            return True
        await asyncio.sleep(PLUGGED_POLL_S)
    return False


def _advance(path: Path, vm: str, holder: str) -> Claim:
    """Puts a claim on record that is newer than the one there. Raises StateConflict when another
    host holds the image.
    """
    found = epoch.read_epoch(path)
    if found is not None and found.epoch > 0 and not found.released and found.holder != holder:
        raise StateConflict(
            f"{path} is held by {found.holder} under epoch {found.epoch}",
            remedy="see that nothing runs there, and release it",
        )
    claim = Claim(vm, holder, (found.epoch if found else 0) + 1, uuid4().hex, ())
    epoch.advance(path, claim)
    return claim


def _bring_maps(first: Vm, vm: Vm) -> None:
    """What layers of the shared disks have is in files that outlive the backends of the first VM:
    the backends of the standby find them where their own would be. Raises OSError.
    """
    for disk in shared(vm.spec):
        if disk.name not in first.disks:
            continue
        there = first.disks[disk.name].setup.files.layer_map
        here = vm.disks[disk.name].setup.files.layer_map
        for file in there.parent.glob(f"{there.name}-*"):
            shutil.copyfile(file, here.with_name(file.name))


async def _release(disk: Disk, vm: Vm, holder: str) -> None:
    """Releases the claim of `holder` on the image of a disk once the disk's backend has the lock:
    then nobody needs a claim any more. It has the lock when the guest has begun to use the disk.
    """
    record = epoch.record_path(disk.setup.options.image)
    while not vm.run.is_end:
        with contextlib.suppress(SempervirtError):
            if (await disk.status()).owns_image:
                await call_storage(record, partial(release_own, record, holder), RECORD_S)
                disk.drop_title()
                return
        await asyncio.sleep(RELEASE_POLL_S)


def release_own(record: Path, holder: str) -> None:
    """Releases an image that `holder`, this host, has claimed. Raises as `epoch.release`."""
    found = epoch.read_epoch(record)
    if found is not None and not found.released and found.holder == holder and found.epoch > 0:
        epoch.release(record, Claim("", holder, found.epoch, found.claim))


async def _settle_in(vm: Vm, before: VmSpec | None) -> None:
    """What can follow when the guest runs: the network learns where it is, QEMU may migrate, and
    the taps of a standby that was the VM `before` go.
    """
    if before is not None:
        network.remove(before)
    try:
        await vm.machine.execute(
            "announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100}
        )
        await device_state.reset(vm.machine.execute)
    except SempervirtError as error:
        log.warning("standby vm=%s %s", vm.name, error)
