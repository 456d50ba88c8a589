"""How a VM begins: its memory, record, claim, disks and QEMU, one after the other.

    record ──► claim ──► backends ──► QEMU ──► its monitor answers
       ◄──────────◄──────────◄── what fails, or a request that is cancelled, undoes all before it

A backend that does not end may still write: then the claim is kept, and the record as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown, RollbackFailed, SempervirtError, Unavailable
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.driver import Disk
from sempervirt.disk.lifecycle import start_disk
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.volume import Volume
from sempervirt.host.storage_call import call_storage
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.mediator import DeviceSetup
from sempervirt.qemu import accel, memory
from sempervirt.qemu.command_line import DeviceSockets, Incoming, build, disk_id
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.given import Given, give_files, give_taps
from sempervirt.qemu.privileges import ground_of
from sempervirt.qemu.spec import DiskSpec, PassthroughSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store.registry import Claim
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.ending import merge_at_end
from sempervirt.vm.firmware import prepare_vars
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.planning import offer_of, plan_devices
from sempervirt.vm.record import VmRecord, record_path
from sempervirt.vm.setup import device_setups, disk_setup, exposed_images, inspect_images
from sempervirt.vm.taps import return_to_bridges
from sempervirt.vm.user import keep_user, prepare_run_dir, user_of
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving, Restoring, Standing

log = logging.getLogger(__name__)

# From the start of QEMU until its monitor answers; TCG on a busy machine is slow.
START_DEADLINE_S = 60.0

# Of a QEMU that is no VM, and never will be: where all processors are wanted it has a tenth of what
# a VM has, so that it comes to its end as well.
GIVES_WAY = 10

# Gets the VM's files and a descriptor of its memory, which is open until the call returns.
Fill = Callable[[VmFiles, int], None]


@dataclass(frozen=True)
class Beginning:
    """What a VM begins with, if it does not just boot.

    `machine` is the versioned name of the machine whose state QEMU waits for, and `work` what
    brings it. `fill` is called when the images are locked and QEMU is about to start. `host` is
    this host's name in its cluster, and only given with an arrival.

    A standby that boots is `isolated`: its guest reaches nobody. The disks `later` get their claim
    when it takes over, from this host by the name of `host`; those `absent` are plugged in when the
    guest is up. `memory_fd` is the memory that a guest has already.
    """

    machine: str = ""
    work: Restoring | Arriving | Standing | None = None
    fill: Fill | None = None
    host: str = ""
    isolated: bool = False
    later: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    memory_fd: int | None = None

    @property
    def used(self) -> bool:
        """Whether the guest has run with its images before."""
        return self.work is not None or self.isolated

    def title(
        self, claim: Claim | None, disk: DiskSpec | PassthroughSpec, volume: Volume
    ) -> ImageTitle | None:
        """By what right the backend of a disk, or a mediator, writes, now or later."""
        if isinstance(self.work, Arriving) or disk.name in self.later:
            return claims.awaited_title(self.host, disk)
        return claims.title_of(claim, disk, volume)


BOOT = Beginning()


async def launch(
    config: AgentConfig, facts: HostFacts, spec: VmSpec, beginning: Beginning = BOOT
) -> Vm:
    """Starts the backends and QEMU; `wait_started` follows.

    Raises StateConflict, ImageLocked, InvalidRequest or Unavailable as the cause may be: nothing is
    left running then. Raises RollbackFailed when a backend does not end: the VM must not be started
    again before that backend has ended.
    """
    if beginning.work is None:
        spec = spec.begun(generations="vmgenid" in facts.features.devices)
    files = VmFiles(config.vm_run_dir(spec.name))
    files.prepare(spec)
    if spec.firmware_vars is not None:
        prepare = partial(prepare_vars, config, spec, files)
        await call_storage(spec.firmware_vars, prepare)
    volumes = await inspect_images(spec, used=beginning.used)
    plans = plan_devices(spec, await offer_of(config, spec, facts.features))
    accelerator = accel.choose(spec.accel, facts.accelerator)
    arrives = isinstance(beginning.work, Arriving)
    user = await asyncio.to_thread(
        user_of, config, spec, facts.qemu, accelerator.kind, arrives=arrives
    )
    kept = asyncio.ensure_future(asyncio.to_thread(keep_user, config, user))
    own = prepare_run_dir(config, files, spec, user)
    record = VmRecord(spec, accelerator, time.time(), plans=plans, work=beginning.work, user=user)
    ledger = Ledger(record, record_path(config.vm_state_dir(spec.name)), files.peers)
    undo = _Undo(config, ledger)
    with _memory(spec, beginning) as memory_fd:
        ledger.create()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(undo.run)
            # Of one that arrives the source has the claim, of a standby the VM that it is for.
            if not isinstance(beginning.work, Arriving | Standing):
                await undo.claim()
            setups = _setups(config, ledger.record, volumes, beginning)
            devices = _devices(config, ledger.record, volumes, beginning)
            block_devices = {volume.path for volume in volumes.values() if volume.block_device}
            await undo.start_disks(setups)
            await undo.start_devices(devices)
            if beginning.fill is not None:
                beginning.fill(files, memory_fd)
            await kept
            with contextlib.closing(await _given(ledger.record, files)) as given:
                ground = await ground_of(spec, facts.qemu, config.users_top, given.paths)
                argv = _argv(
                    facts,
                    ledger.record,
                    own,
                    setups,
                    devices,
                    memory_fd,
                    beginning,
                    block_devices,
                    given,
                )
                machine = Machine.launch(
                    spec,
                    files,
                    argv,
                    config.patience,
                    (memory_fd, *given.descriptors),
                    beginning.absent,
                    user.identity(ground),
                    GIVES_WAY if beginning.isolated else 0,
                )
            stack.pop_all()
    for text in return_to_bridges(config.run_dir, spec):
        log.warning("run vm=%s %s", spec.name, text)
    # If this is not written, the first record stands, and QEMU is found by its monitor's socket.
    ledger.started(machine.identity)
    whose = user.why or user.number
    log.info("run vm=%s pid=%s accel=%s user=%s", spec.name, machine.pid, accelerator.kind, whose)
    release, finish = partial(claims.release, config), partial(merge_at_end, config)
    return Vm(machine, undo.disks, ledger, release, finish, undo.devices)


async def _given(record: VmRecord, files: VmFiles) -> Given:
    """What a QEMU with a user of its own gets by descriptor. Raises Unavailable."""
    number = record.user.number if record.user else None
    if number is None:
        return Given()
    given = await call_storage(files.directory, partial(give_files, record.spec, files, number))
    try:
        give_taps(given, record.spec, record.plans)
    except Unavailable:
        given.close()
        raise
    return given


def _memory(spec: VmSpec, beginning: Beginning) -> AbstractContextManager[int]:
    if beginning.memory_fd is not None:
        return nullcontext(beginning.memory_fd)
    return memory.created(spec.memory)


def _setups(
    config: AgentConfig, record: VmRecord, volumes: Mapping[str, Volume], beginning: Beginning
) -> list[DiskSetup]:
    """Of the disks that backends serve."""
    return [
        disk_setup(
            config,
            record.spec,
            disk,
            record.plans[disk_id(disk)],
            volumes[disk.name],
            beginning.title(record.claim, disk, volumes[disk.name]),
        )
        for disk in record.spec.disks
        if disk.backend == "blkd"
    ]


def _devices(
    config: AgentConfig, record: VmRecord, volumes: Mapping[str, Volume], beginning: Beginning
) -> list[DeviceSetup]:
    """Of the passed-through devices."""
    titles = {
        device.name: beginning.title(record.claim, device, volumes[device.name])
        for device in record.spec.passthrough
        if isinstance(device, PassthroughSpec)
    }
    incoming = isinstance(beginning.work, Arriving)
    return device_setups(config, record.spec, titles, incoming=incoming)


def _argv(
    facts: HostFacts,
    record: VmRecord,
    files: VmFiles,
    setups: list[DiskSetup],
    devices: list[DeviceSetup],
    memory_fd: int,
    beginning: Beginning,
    block_devices: set[Path],
    given: Given,
) -> list[str]:
    """QEMU's command line."""
    return build(
        record.spec,
        facts.features,
        qemu=facts.qemu,
        accel=record.accelerator.kind,
        files=files,
        disk_sockets={setup.short_name: setup.files.socket for setup in setups},
        plans=record.plans,
        memory_fd=memory_fd,
        block_devices=block_devices,
        tap_files=given.taps,
        given=given.paths,
        incoming=Incoming(beginning.machine) if beginning.machine else None,
        absent=beginning.absent,
        isolated=beginning.isolated,
        device_sockets={
            setup.short_name: DeviceSockets(setup.files.socket, setup.files.shim)
            for setup in devices
        },
    )


class _Undo:
    """What was begun of a VM that does not start."""

    def __init__(self, config: AgentConfig, ledger: Ledger) -> None:
        self.disks: dict[str, Disk] = {}
        self.devices: dict[str, Device] = {}
        self._config = config
        self._ledger = ledger
        self._claiming: asyncio.Future[Claim | None] | None = None

    async def claim(self) -> None:
        """Claims the VM, and puts that on record. When nobody waits for the store any more, it
        is left to `run` to find out what came of the claim.
        """
        self._claiming = asyncio.ensure_future(claims.take(self._config, self._ledger.record.spec))
        claim = await asyncio.shield(self._claiming)
        if claim is not None:
            self._ledger.claimed(claim)

    async def start_disks(self, setups: list[DiskSetup]) -> None:
        """Starts the backends. A backend that fails has ended when `start_disks` raises."""
        for setup in setups:
            self.disks[setup.short_name] = await start_disk(setup)

    async def start_devices(self, setups: list[DeviceSetup]) -> None:
        """Starts the mediators. One that fails has ended when `start_devices` raises."""
        for setup in setups:
            self.devices[setup.short_name] = await Device.start(setup)

    async def run(self) -> None:
        """Undoes everything, also when whoever asked for the VM does not wait for that."""
        await asyncio.shield(asyncio.ensure_future(self._run()))

    async def _run(self) -> None:
        ends = await asyncio.gather(
            *(disk.stop() for disk in self.disks.values()),
            *(device.stop() for device in self.devices.values()),
            return_exceptions=True,
        )
        for error in ends:
            if isinstance(error, SempervirtError):
                name = self._ledger.name
                raise RollbackFailed(
                    f"VM {name} was not started, and something of it may still run: "
                    f"{error.message}",
                    remedy="when that process has ended, start semperd again: it clears this up",
                ) from error
            if error is not None:
                raise error
        await self._release()
        self._ledger.remove()

    async def _release(self) -> None:
        if self._claiming is None:
            return
        try:
            claim = await self._claiming
        except SempervirtError:  # nothing was claimed, as was told, or nobody knows
            return
        if claim is not None:
            await claims.release(self._config, claim)


async def wait_started(vm: Vm) -> None:
    """Waits until QEMU runs the guest, or has it stand still as it was told; tells of images that
    others may lock.

    Raises Unavailable with QEMU's last words when QEMU does not get there: it has ended then.
    Raises OutcomeUnknown when QEMU runs and its monitor does not answer.
    """
    started = (Runstate.RUNNING, Runstate.PAUSED, Runstate.HALTED, Runstate.UNKNOWN)
    try:
        await vm.wait_state(*started, timeout_s=START_DEADLINE_S)
    except Unavailable as error:
        await vm.kill()
        tail = "; ".join(vm.log_tail(3)) or vm.state.why
        raise Unavailable(
            f"VM {vm.name} did not start: {tail}",
            remedy=f"see its log: semper vm logs {vm.name} --source qemu",
        ) from error
    if vm.workplace != vm.machine.files.directory and vm.run is not Runstate.UNKNOWN:
        made = vm.machine.files.successor(vm.record.number)
        with contextlib.suppress(OSError):  # links lead to the sockets until then
            vm.machine.files.take_sockets(made, vm.spec)
    if vm.run is Runstate.UNKNOWN:
        raise OutcomeUnknown(
            f"VM {vm.name} was started, and its monitor does not answer: {vm.state.why}",
            remedy=f"look at it: semper vm show {vm.name}; or end it: semper vm kill {vm.name}",
        )
    for said in await exposed_images(vm.spec):
        vm.machine.journal.note(time.time(), "image", said)
        log.warning("run vm=%s %s", vm.name, said)
