"""The agent: which VMs there are, starting them, and letting go of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sempervirt.agent import adoption
from sempervirt.agent.lock import agent_lock
from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.names import split_disk_name, suggest
from sempervirt.disk.backend import ImageTitle
from sempervirt.disk.driver import Disk
from sempervirt.disk.lifecycle import start_disk
from sempervirt.qemu import accel, features, memory, saved
from sempervirt.qemu.command_line import Incoming, build, disk_id
from sempervirt.qemu.driver import Machine
from sempervirt.qemu.facts import HostFacts, HostProbe
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.renewal.restart import Program, Restarted, restart_qemu
from sempervirt.renewal.saving import (
    NO_CHANGES,
    Changes,
    Origin,
    Plan,
    Saving,
    check_accelerator,
    copy_images,
    plan_of,
    save_vm,
)
from sempervirt.store.registry import Claim
from sempervirt.vm import claims
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.planning import offer_of, plan_devices
from sempervirt.vm.record import VmRecord
from sempervirt.vm.setup import disk_setup, inspect_images, prepare_directories
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Arriving, Restoring

log = logging.getLogger(__name__)

# From the start of QEMU until its monitor answers; TCG on a busy machine is slow.
VM_START_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Beginning:
    """What a VM begins with, if it does not just boot: a saved state or another host's QEMU, of
    that versioned machine. `host` is this host's name, and only given with an arrival.
    """

    machine: str = ""
    origin: Origin | None = None
    arrival: Arriving | None = None
    host: str = ""

    def title(self, claim: Claim | None, disk: DiskSpec) -> ImageTitle | None:
        """By what right the backend of a disk writes, now or later."""
        if self.arrival is not None:
            return claims.awaited_title(self.host, disk)
        return claims.title_of(claim, disk)


class Agent:
    """Owns the VMs of one state directory. Made by `Agent.open`."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.started = time.time()
        self.vms: dict[str, Vm] = {}
        self._starting: set[str] = set()
        self._host = HostProbe(config.qemu, config.state_dir / "cache")

    @classmethod
    @asynccontextmanager
    async def open(cls, config: AgentConfig) -> AsyncIterator[Agent]:
        """Locks the state directory and adopts what an earlier agent left running.

        Raises StateConflict when another agent works there. On leaving, VMs run on or are
        killed, as `config.keep_vms` says.
        """
        prepare_directories(config)
        with agent_lock(config.state_dir):
            agent = cls(config)
            agent.vms = await adoption.adopt_all(config)
            try:
                yield agent
            finally:
                await agent._close()

    @property
    def disks(self) -> Mapping[str, Disk]:
        """The disks of the VMs that have not ended and are served by backends, by VM/DISK."""
        return {
            disk.name: disk
            for vm in self.vms.values()
            if not vm.settled
            for disk in vm.disks.values()
        }

    @property
    def own_disks(self) -> Mapping[str, tuple[Vm, DiskSpec]]:
        """The disks of the VMs that have not ended and are served by QEMU itself, by VM/DISK."""
        return {
            f"{vm.name}/{disk.name}": (vm, disk)
            for vm in self.vms.values()
            if not vm.settled
            for disk in vm.spec.disks
            if disk.backend == "qemu"
        }

    async def host(self) -> HostFacts:
        """What this host offers. Raises Unavailable when QEMU cannot be used."""
        return await self._host.facts()

    def vm(self, name: str) -> Vm:
        """The VM of that name. Raises NotFound."""
        try:
            return self.vms[name]
        except KeyError:
            hint = suggest(name, self.vms) or "list them with: semper vm list"
            raise NotFound(f"there is no VM {name}", remedy=hint) from None

    def disk(self, name: str) -> Disk:
        """The disk VM/DISK that a backend serves.

        Raises NotFound, StateConflict, and InvalidRequest also for one that QEMU serves.
        """
        try:
            vm_name, disk_name = split_disk_name(name)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        vm = self.vm(vm_name)
        names = [disk.name for disk in vm.spec.disks]
        if disk_name not in names:
            raise NotFound(f"there is no disk {name}", remedy=suggest(disk_name, names))
        if vm.settled:
            raise StateConflict(f"VM {vm_name} has ended, its disks are not served")
        if disk_name not in vm.disks:
            raise InvalidRequest(
                f"disk {name} is served by QEMU itself, which does as it was told at its start",
                remedy='for a disk that can be changed while it runs: backend = "blkd"',
            )
        return vm.disks[disk_name]

    async def run_vm(self, spec: VmSpec) -> Vm:
        """Starts a VM and returns when QEMU runs it.

        Raises StateConflict when one of that name has not ended, ImageLocked, InvalidRequest
        or Unavailable as the cause may be (nothing is left running then), OutcomeUnknown when
        QEMU runs and its monitor does not answer (the VM is there, in the state unknown).
        """
        with self._name_taken(spec.name):
            return await self._run(spec)

    @contextmanager
    def _name_taken(self, name: str) -> Iterator[None]:
        self._require_free(name)
        self._starting.add(name)
        try:
            yield
        finally:
            self._starting.discard(name)

    async def save_vm(self, name: str, output: Path) -> Saving:
        """Saves a VM to a file and ends it. Raises as `saving.save_vm`; NotFound."""
        return await save_vm(self.vm(name), output)

    async def restore_vm(self, file: Path, changes: Changes = NO_CHANGES) -> Vm:
        """Makes a VM from a saved state; it runs on, or is paused, as it was.

        Raises InvalidRequest for a file that cannot be used, StateConflict for disks in another
        state; Unavailable. Nothing is left running then.
        """
        return await self._restore(file, plan_of(await saved.show(file), changes))

    async def clone_vm(self, file: Path, directory: Path, changes: Changes) -> Vm:
        """As `restore_vm`, with copies of the disks in `directory`; it needs a name."""
        assert changes.name is not None
        shown = await saved.show(file)
        with self._name_taken(changes.name):
            images = await copy_images(shown, directory, changes.name)
        try:
            return await self._restore(file, plan_of(shown, replace(changes, images=images)))
        except BaseException:
            for image in images.values():
                image.unlink(missing_ok=True)
            raise

    async def _restore(self, file: Path, plan: Plan) -> Vm:
        with self._name_taken(plan.spec.name):
            facts = await self.host()
            check_accelerator(plan, accel.choose(plan.spec.accel, facts.accelerator).kind)
            origin = Origin(file, plan)
            try:
                vm = await self._run(plan.spec, Beginning(plan.machine, origin=origin))
            except BaseException:
                origin.cancel()
                raise
            try:
                await origin.load(vm)
            except BaseException:
                origin.cancel()
                if not vm.settled:
                    await vm.kill()
                await self.forget_vm(vm.name)
                raise
            log.info("restore vm=%s file=%s", vm.name, file)
            return vm

    async def restart_qemu(self, name: str, qemu: Path | None = None) -> Restarted:
        """Moves a VM to a new QEMU process, by default of the installed program.

        Raises as `restart.restart_qemu`; NotFound.
        """
        vm = self.vm(name)
        if qemu is None:
            facts = await self.host()
            program = Program(facts.qemu, facts.features)
        else:
            cache = self.config.state_dir / "cache"
            program = Program(str(qemu), await features.probe(str(qemu), cache))
        return await restart_qemu(vm, program)

    async def forget_vm(self, name: str) -> None:
        """Drops a VM that has ended, with its logs. Raises NotFound, StateConflict."""
        vm = self.vm(name)
        if not vm.settled:
            raise StateConflict(
                f"VM {name} is {vm.run.value}", remedy=f"end it first: semper vm stop {name}"
            )
        await vm.detach()
        del self.vms[name]
        await asyncio.to_thread(self._remove_files, name)

    def _remove_files(self, name: str) -> None:
        shutil.rmtree(self.config.vm_state_dir(name), ignore_errors=True)
        shutil.rmtree(self.config.vm_run_dir(name), ignore_errors=True)

    def _require_free(self, name: str) -> None:
        present = self.vms.get(name)
        if name in self._starting:
            raise StateConflict(f"VM {name} is being started")
        if present is not None and not present.settled:
            remedy = f"end it first: semper vm stop {name}"
            if present.run is Runstate.UNKNOWN:
                remedy = f"its QEMU may still run; settle it: semper vm kill {name}"
            raise StateConflict(f"VM {name} is {present.run.value}", remedy=remedy)

    async def receive_vm(self, spec: VmSpec, machine: str, host: str, arrival: Arriving) -> Vm:
        """Starts a VM that is to come from another host.

        Its backends await their claim, and QEMU, of the versioned `machine`, its state. Raises
        what `run_vm` raises.
        """
        with self._name_taken(spec.name):
            try:
                return await self._run(spec, Beginning(machine, arrival=arrival, host=host))
            except BaseException:
                # It never ran: whatever its QEMU does, it can go.
                if (vm := self.vms.get(spec.name)) is not None:
                    await vm.kill()
                    await self.forget_vm(spec.name)
                raise

    async def _run(self, spec: VmSpec, beginning: Beginning = Beginning()) -> Vm:
        facts = await self.host()
        accelerator = accel.choose(spec.accel, facts.accelerator)
        if (ended := self.vms.pop(spec.name, None)) is not None:
            await ended.detach()
        files = VmFiles(self.config.vm_run_dir(spec.name))
        files.prepare(spec)
        record_path = adoption.vm_record_path(self.config, spec.name)
        volumes = inspect_images(spec)
        plans = plan_devices(spec, await offer_of(self.config, spec, facts.features))
        origin = beginning.origin
        record = VmRecord(
            spec,
            accelerator,
            time.time(),
            plans=plans,
            work=Restoring() if origin is not None else beginning.arrival,
        )
        disks: dict[str, Disk] = {}
        with memory.created(spec.memory) as memory_fd:
            self._write_first(record, record_path)
            try:
                record = await self._claimed(record, record_path)
                setups = [
                    disk_setup(
                        self.config,
                        spec,
                        disk,
                        plans[disk_id(disk)],
                        volumes[disk.name],
                        beginning.title(record.claim, disk),
                    )
                    for disk in spec.disks
                    if disk.backend == "blkd"
                ]
                argv = build(
                    spec,
                    facts.features,
                    qemu=facts.qemu,
                    accel=accelerator.kind,
                    files=files,
                    disk_sockets={setup.short_name: setup.files.socket for setup in setups},
                    plans=plans,
                    memory_fd=memory_fd,
                    block_devices={v.path for v in volumes.values() if v.block_device},
                    incoming=Incoming(beginning.machine) if beginning.machine else None,
                )
                for setup in setups:
                    disks[setup.short_name] = await start_disk(setup)
                if origin is not None:  # while QEMU starts, and with the images locked
                    origin.begin(files, memory_fd)
                machine = Machine.launch(spec, files, argv, self.config.patience, memory_fd)
            except BaseException:
                await asyncio.gather(*(disk.stop() for disk in disks.values()))
                if record.claim is not None:
                    await claims.give_back(self.config, record.claim)
                record_path.unlink(missing_ok=True)
                raise
        record = replace(record, qemu=machine.identity)
        # If this fails, the first record stands, and QEMU is found by its monitor's socket.
        with contextlib.suppress(OSError):
            record.write(record_path)
        vm = Vm(machine, disks, record, record_path, partial(claims.give_back, self.config))
        self.vms[spec.name] = vm
        await self._wait_started(vm)
        log.info("run vm=%s pid=%s accel=%s", vm.name, vm.pid, accelerator.kind)
        return vm

    async def _claimed(self, record: VmRecord, path: Path) -> VmRecord:
        """With a claim, unless the VM comes from a host that has one."""
        if isinstance(record.work, Arriving):
            return record
        record = replace(record, claim=await claims.take(self.config, record.spec))
        self._write_first(record, path)
        return record

    def _write_first(self, record: VmRecord, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            record.write(path)
        except OSError as error:
            raise Unavailable(
                f"cannot write {path}: {error.strerror}",
                remedy="make room, or choose another SEMPERVIRT_STATE_DIR",
            ) from error

    async def _wait_started(self, vm: Vm) -> None:
        started = (Runstate.RUNNING, Runstate.PAUSED, Runstate.HALTED, Runstate.UNKNOWN)
        try:
            await vm.wait_state(*started, timeout_s=VM_START_DEADLINE_S)
        except Unavailable as error:
            if not vm.run.is_end:
                await vm.kill()
            await vm.wait_settled()
            tail = "; ".join(vm.log_tail(3)) or vm.state.why
            raise Unavailable(
                f"VM {vm.name} did not start: {tail}",
                remedy=f"see its log: semper vm logs {vm.name} --source qemu",
            ) from error
        if vm.run is Runstate.UNKNOWN:
            raise OutcomeUnknown(
                f"VM {vm.name} was started, and its monitor does not answer: {vm.state.why}",
                remedy=f"look at it: semper vm show {vm.name}; or end it: semper vm kill {vm.name}",
            )

    async def _close(self) -> None:
        if self.config.keep_vms:
            log.info("close vms=%d left running", sum(not vm.settled for vm in self.vms.values()))
        else:
            await asyncio.gather(*(self._kill(vm) for vm in self.vms.values()))
        for vm in self.vms.values():
            await vm.detach()

    async def _kill(self, vm: Vm) -> None:
        try:
            await vm.kill()
        except SempervirtError as error:
            log.error("close vm=%s is left behind: %s", vm.name, error)  # noqa: TRY400
