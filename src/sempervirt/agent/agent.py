"""The agent: which VMs there are, starting them, and letting go of them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sempervirt.agent import adoption
from sempervirt.agent.lock import agent_lock
from sempervirt.cluster.service import Service
from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    RollbackFailed,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.core.names import split_disk_name, suggest
from sempervirt.core.sizes import format_size
from sempervirt.disk.answers import Resized
from sempervirt.disk.driver import Disk
from sempervirt.disk.export import Made, export
from sempervirt.disk.image_format import ImageFormat
from sempervirt.evacuation.driver import EvacuationDriver
from sempervirt.evacuation.peacetime import Peacetime
from sempervirt.guard.driver import Guard
from sempervirt.host import background, descriptors
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu import accel, features, saved
from sempervirt.qemu.facts import HostFacts, HostProbe
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.renewal.operations import RestartReport, restart_qemu, restore_into, save_vm
from sempervirt.renewal.rescue import Rescued, rescue_disk
from sempervirt.renewal.restart.adapters import Program
from sempervirt.renewal.restore.adapters import Unpacking
from sempervirt.renewal.restore.plan import (
    NO_CHANGES,
    Changes,
    Plan,
    check_accelerator,
    copy_images,
    plan_of,
)
from sempervirt.renewal.save.state import Saved
from sempervirt.renewal.snapshot import (
    Freezing,
    Noted,
    Taken,
    snapshot_disks,
    snapshot_guarded,
)
from sempervirt.standby.ports import Snapshot
from sempervirt.standby.standbys import Standbys
from sempervirt.vm import claims
from sempervirt.vm.autostart import kept_state
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.ending import merge_ended
from sempervirt.vm.firmware import remove_vars
from sempervirt.vm.guarded import Guarded, GuardedDisk
from sempervirt.vm.launch import BOOT, Beginning, launch, wait_started
from sempervirt.vm.processes import living_of
from sempervirt.vm.setup import prepare_directories
from sempervirt.vm.unknown import UnknownVm
from sempervirt.vm.upkeep import keep
from sempervirt.vm.user import release_user, with_users
from sempervirt.vm.vm import LongWork, Progress, Vm
from sempervirt.vm.work import Arriving, Restoring

log = logging.getLogger(__name__)

# At most, of the agent: the monitor, a pidfd, the memory while QEMU starts; of each disk the image,
# its socket, two pidfds, two programs, and what a start takes for a moment.
VM_DESCRIPTORS, DISK_DESCRIPTORS = 10, 12


class Agent:
    """Owns the VMs of one state directory. Made by `Agent.open`.

    `unknown` are the VMs of which something may run that this agent cannot take over: they can only
    be looked at and killed, and their names are not free. `launching` are those of which QEMU is
    being started and which are not among `vms` yet. `service` says whether VMs may come here;
    `evacuation` is the last one of this host (`evacuation.orders`).
    """

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.started = time.time()
        self.vms: dict[str, Vm] = {}
        self.unknown: dict[str, UnknownVm] = {}
        self.service = Service.read(config.state_dir)
        self.evacuation: EvacuationDriver | None = None
        self.peacetime = Peacetime()
        self.launching: dict[str, VmSpec] = {}
        self._starting: set[str] = set()
        self.guard: Guard | None = None  # of an agent that is a service
        self._host = HostProbe(config.qemu, config.state_dir / "cache")
        self.standbys = Standbys(self, adoption.adopt_all, take_snapshot)
        self.guarded = Guarded(config)

    @classmethod
    @asynccontextmanager
    async def open(cls, config: AgentConfig) -> AsyncIterator[Agent]:
        """Locks the state directory and adopts what an earlier agent left running.

        Raises StateConflict when another agent works there. On leaving, VMs run on or are
        killed, as `config.keep_vms` says.
        """
        prepare_directories(config)
        config = with_users(config)
        with agent_lock(config.state_dir, config.run_dir):
            agent = cls(config)
            adopted = await adoption.adopt_all(config)
            agent.vms.update(adopted.vms)
            agent.unknown.update(adopted.unknown)
            await agent.standbys.open()
            await agent.guarded.open(agent.host)
            upkeep = background.start(keep(agent.vms.values, config.users_top), "upkeep")
            try:
                yield agent
            finally:
                upkeep.cancel()
                await agent._close()

    @property
    def disks(self) -> Mapping[str, Disk]:
        """The disks of the VMs that have not ended and are served by backends, by VM/DISK."""
        disks = [disk for vm in self.vms.values() if not vm.freed for disk in vm.disks.values()]
        disks += [disk for vm in self.unknown.values() for disk in vm.disks.values()]
        return {disk.name: disk for disk in (*disks, *self.guarded.disks.values())}

    @property
    def own_disks(self) -> Mapping[str, tuple[Vm, DiskSpec]]:
        """The disks of the VMs that have not ended and are served by QEMU itself, by VM/DISK."""
        return {
            f"{vm.name}/{disk.name}": (vm, disk)
            for vm in self.vms.values()
            if not vm.freed
            for disk in vm.spec.disks
            if disk.backend == "qemu"
        }

    async def host(self) -> HostFacts:
        """What this host offers. Raises Unavailable when QEMU cannot be used."""
        return await self._host.facts()

    def vm(self, name: str) -> Vm:
        """The VM of that name. Raises NotFound; StateConflict, with the cause, for one that could
        not be taken over.
        """
        if name in self.vms:
            return self.vms[name]
        self._require_known(name)
        hint = suggest(name, self.vms) or "list them with: semper vm list"
        raise NotFound(f"there is no VM {name}", remedy=hint)

    def disk(self, name: str) -> Disk:
        """The disk VM/DISK that a backend serves.

        Raises NotFound, StateConflict, and InvalidRequest also for one that QEMU serves.
        """
        try:
            vm_name, disk_name = split_disk_name(name)
        except ValueError as error:
            raise InvalidRequest.of(error) from error
        if name in self.disks:
            return self.disks[name]
        self.guarded.require_served(name)
        vm = self.vm(vm_name)
        names = [disk.name for disk in vm.spec.disks]
        if disk_name not in names:
            raise NotFound(f"there is no disk {name}", remedy=suggest(disk_name, names))
        if vm.freed:
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
        or Unavailable as the cause may be (nothing is left running then), RollbackFailed when a
        backend does not end, OutcomeUnknown when QEMU runs and its monitor does not answer (the VM
        is there, in the state unknown).
        """
        self.service.require(f"VM {spec.name} is not started")
        with self._name_taken(spec.name):
            self.standbys.require_startable(spec)
            async with self._known_again(spec.name):
                vm = await self._launch(spec)
            # It has booted: what was kept of an earlier run belongs to the disks of before.
            await asyncio.to_thread(_drop_kept, self.config.state_dir, spec.name)
            return vm

    async def receive_vm(self, spec: VmSpec, machine: str, host: str, arrival: Arriving) -> Vm:
        """Starts a VM that is to come from another host.

        Its backends await their claim, and QEMU, of the versioned `machine`, its state. Raises
        what `run_vm` raises; nothing is left of the VM then.
        """
        self.service.require(f"VM {spec.name} cannot come here")
        with self._name_taken(spec.name):
            return await self._launch(spec, Beginning(machine, arrival, host=host))

    async def start_vm(self, name: str) -> Vm:
        """Starts a VM that has ended as it was last started, or where its state was kept.

        Raises as `run_vm` and `restore_vm`; NotFound.
        """
        ended = self.unknown.get(name)
        spec = ended.record.spec if ended and ended.end and ended.record else self.vm(name).spec
        kept = kept_state(self.config.state_dir, name)
        if not await asyncio.to_thread(kept.exists):
            return await self.run_vm(spec)
        self._require_free(name)
        try:
            vm = await self.restore_vm(kept)
        except (InvalidRequest, StateConflict) as error:
            raise StateConflict(
                f"VM {name} does not go on where it was saved: {error.message}",
                remedy=f"to give that state up and boot: rm {kept}; semper vm start {name}",
            ) from error
        await asyncio.to_thread(_drop_kept, self.config.state_dir, name)
        return vm

    async def save_vm(self, name: str, output: Path) -> Saved:
        """Saves a VM to a file and ends it. Raises as `operations.save_vm`; NotFound."""
        return await save_vm(self.vm(name), output)

    async def restore_vm(self, file: Path, changes: Changes = NO_CHANGES) -> Vm:
        """Makes a VM from a saved state; it runs on, or is paused, as it was.

        Raises InvalidRequest for a file that cannot be used, StateConflict for disks in another
        state, Unavailable: nothing is left running then. Raises RollbackFailed or OutcomeUnknown
        when the VM is still there.
        """
        return await self._restore(file, plan_of(await saved.show(file), changes))

    async def clone_vm(self, file: Path, directory: Path, changes: Changes) -> Vm:
        """As `restore_vm`, with copies of the disks in `directory`; `changes` must name the VM."""
        name = changes.name
        assert name is not None
        shown = await saved.show(file)
        with self._name_taken(name):
            images = await copy_images(shown, directory, name)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._remove_copies, name, images)
            vm = await self._restore(file, plan_of(shown, replace(changes, images=images)))
            undo.pop_all()
            return vm

    async def _remove_copies(self, name: str, images: Mapping[str, Path]) -> None:
        """Removes copies of images, unless a VM may still use them."""
        if name not in self.vms and name not in self.unknown:
            for image in images.values():
                try:
                    await call_storage(image, partial(image.unlink, missing_ok=True))
                except (OSError, Unavailable) as error:
                    log.error("the copy %s is left behind: %s", image, error)  # noqa: TRY400

    async def _restore(self, file: Path, plan: Plan) -> Vm:
        self.service.require(f"VM {plan.spec.name} is not restored")
        with self._name_taken(plan.spec.name):
            facts = await self.host()
            check_accelerator(plan, accel.choose(plan.spec.accel, facts.accelerator).kind)
            unpacking = Unpacking(file, plan)
            async with self._known_again(plan.spec.name):
                return await self._unpacked(plan, unpacking)

    async def _unpacked(self, plan: Plan, unpacking: Unpacking) -> Vm:
        async with AsyncExitStack() as undo:
            undo.callback(unpacking.cancel)
            beginning = Beginning(plan.machine, Restoring(), unpacking.begin)
            vm = await self._launch(plan.spec, beginning)
            undo.pop_all()
        try:
            await restore_into(vm, unpacking)
        except SempervirtError:
            if vm.freed:
                await self.forget_vm(vm.name)
            raise
        return vm

    async def restart_qemu(self, name: str, qemu: Path | None = None) -> RestartReport:
        """Moves a VM to a new QEMU process, by default of the installed program.

        Raises as `operations.restart_qemu`; NotFound.
        """
        vm = self.vm(name)
        if qemu is None:
            facts = await self.host()
            program = Program(facts.qemu, facts.features)
        else:
            cache = self.config.state_dir / "cache"
            program = Program(str(qemu), await features.probe(str(qemu), cache))
        report = await restart_qemu(vm, program)
        vm.doubts.clear()  # its processes, sockets and record are new
        return report

    async def kill_vm(self, name: str) -> Vm | UnknownVm:
        """Ends a VM at once, and settles one that is unknown. Raises NotFound, OutcomeUnknown."""
        vm = self.unknown.get(name) or self.vm(name)
        await vm.kill()
        if isinstance(vm, UnknownVm) and vm.record is not None and vm.record.claim is not None:
            await claims.release(self.config, vm.record.claim)
        return vm

    async def resize_disk(self, name: str, size_bytes: int) -> Resized:
        """Makes a disk larger while its guest runs. Raises as `disk`; StateConflict while work goes
        on with the VM, InvalidRequest for a size that will not do, Unavailable, OutcomeUnknown.
        """
        disk = self.disk(name)
        if disk.setup.options.read_only:
            raise InvalidRequest(f"disk {name} is read-only, and its image is never changed")
        if not disk.setup.command.has_control:
            raise InvalidRequest(f"the backend of disk {name} cannot be told to resize it")
        if not disk.setup.is_guarded:
            self.vm(name.partition("/")[0]).ledger.require_idle()
        return await disk.resize(size_bytes)

    async def guard_disk(self, wanted: GuardedDisk) -> Disk:
        """Serves a disk to the QEMU of another manager. Raises as `Guarded.guard`; StateConflict
        for the name of a VM of this host.
        """
        if wanted.vm in self.vms or wanted.vm in self.unknown or wanted.vm in self._starting:
            raise StateConflict(f"{wanted.vm} is a VM of this host", remedy="choose another name")
        return await self.guarded.guard(wanted, (await self.host()).features)

    async def snapshot_vm(self, name: str, disks: Sequence[str], freezing: Freezing) -> Taken:
        """Takes a snapshot of disks of a VM at one instant. Raises as `vm` and `snapshot_disks`."""
        if guarded := self.guarded.of(name):
            return await snapshot_guarded(guarded, disks, freezing)
        return await snapshot_disks(self.vm(name), disks, freezing)

    async def merge_layers(
        self, name: str, through: int | None, rate_bytes: int | None
    ) -> tuple[tuple[int, ...], bool]:
        """Gives up the snapshots of a disk up to `through`. For a VM that runs: begins to merge,
        and returns the layers that go. For one that has ended: merges, and returns the layers that
        are gone, and True.

        Raises as `disk` and `merge_ended`.
        """
        vm_name, _, disk_name = name.partition("/")
        vm = self.vms.get(vm_name)
        described = [] if vm is None else [d for d in vm.spec.disks if d.name == disk_name]
        if vm is None or not vm.freed or not described:
            begun = await self.disk(name).active().merge(through, rate_bytes)
            return begun.merging, False
        with self._name_taken(vm_name):
            config = self.standbys.config_of(vm)
            done = await merge_ended(config, vm.record, described[0], through)
        return done.merged, True

    async def export_snapshot(
        self, name: str, snapshot: int, target: Path, image_format: ImageFormat
    ) -> Made:
        """Writes a snapshot of a disk to a file. Raises as `disk` and `export`."""
        disk, vm = self.disk(name), self.vms.get(name.partition("/")[0])

        def progress(done: int, total: int) -> None:
            if vm is None:
                return
            if vm.progress is None or vm.progress.what is LongWork.EXPORTING:
                vm.progress = Progress(LongWork.EXPORTING, done, total)

        try:
            return await export(disk, snapshot, target, image_format, progress)
        finally:
            if vm and vm.progress is not None and vm.progress.what is LongWork.EXPORTING:
                vm.progress = None

    async def rescue_disk(self, name: str, target: Path) -> Rescued:
        """Copies the image of a running disk to `target`. Raises as `disk` and `rescue_disk`."""
        disk = self.disk(name)
        if name in self.guarded.disks:
            raise InvalidRequest(
                f"{name} is a disk of another manager's VM, which nobody here can hold still",
                remedy=f"end that VM, and copy {disk.image.path}",
            )
        return await rescue_disk(self.vm(name.partition("/")[0]), disk, target)

    async def forget_vm(self, name: str) -> None:
        """Drops a VM that has ended, with its logs. Raises NotFound, StateConflict."""
        if (unknown := self.unknown.get(name)) is not None and unknown.end is not None:
            await unknown.detach()
            del self.unknown[name]
            for directory in unknown.directories:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            return
        vm = self.vm(name)
        if not vm.freed:
            raise StateConflict(
                f"VM {name} is {vm.run.value}", remedy=f"end it first: semper vm stop {name}"
            )
        self.standbys.require_no_take_over(name)  # which has to see how the VM has ended
        await vm.detach()
        del self.vms[name]
        await self._drop_files(vm)

    async def remove_vm(self, name: str) -> None:
        """Drops a VM that has ended, with its logs and the variables of its firmware. Raises
        NotFound, StateConflict.
        """
        if name in self.standbys.kept:
            raise StateConflict(
                f"VM {name} has standbys", remedy=f"first: semper standby disable {name} --forget"
            )
        if name in self._starting:
            raise StateConflict(f"VM {name} is being started or removed")
        self._starting.add(name)  # one that is started meanwhile would lose its files
        try:
            await self._remove(name)
        finally:
            self._starting.discard(name)

    async def _remove(self, name: str) -> None:
        await self.forget_vm(name)
        await asyncio.to_thread(remove_vars, self.config, name)
        kept = kept_state(self.config.state_dir, name)
        await asyncio.to_thread(kept.unlink, missing_ok=True)
        places = self.config.vm_state_dir(name), self.config.vm_run_dir(name)
        release_user(self.config, name, *places)

    @contextmanager
    def _name_taken(self, name: str) -> Iterator[None]:
        self._require_free(name)
        self._starting.add(name)
        try:
            yield
        finally:
            self._starting.discard(name)

    @asynccontextmanager
    async def _known_again(self, name: str) -> AsyncIterator[None]:
        """A VM that has ended, and does not start, is known as it was: it can be started later."""
        former = self.vms.get(name) or self.unknown.get(name)
        try:
            yield
        except BaseException:
            if name in self.vms or name in self.unknown:
                pass
            elif isinstance(former, UnknownVm):
                self.unknown[name] = former
            elif former is not None:
                record, path = former.record, former.ledger.path
                config = self.standbys.config_of(former)
                vm = self.vms[name] = adoption.remembered(config, record, path)
                vm.ledger.recreate()
                await vm.wait_freed()
            raise

    def _require_free(self, name: str) -> None:
        if name in self._starting:
            raise StateConflict(f"VM {name} is being started or removed")
        self.standbys.require_no_take_over(name)
        self.guarded.require_no_vm(name)
        self._require_known(name)
        present = self.vms.get(name)
        if present is not None and not present.freed:
            if present.run.is_end:
                present.ledger.require_idle()
            state, why = present.shown
            remedy = f"end it first: semper vm stop {name}"
            if present.run is Runstate.UNKNOWN:
                remedy = (
                    f"its QEMU may still run; see what is known: semper vm show {name}; to give "
                    f"the VM up: semper vm kill {name}"
                )
            because = f": {why}" if state is Runstate.UNKNOWN and why else ""
            with present.naming_disks():
                raise StateConflict(f"VM {name} is {state.value}{because}", remedy=remedy)

    def _require_known(self, name: str) -> None:
        vm = self.unknown.get(name)
        if vm is not None and vm.end is None:
            raise StateConflict(f"VM {name} is unknown: {vm.why}", remedy=vm.remedy) from vm.cause

    async def _require_absent(self, name: str) -> None:
        """Raises StateConflict when a process of a VM of that name lives, whoever started it: from
        then on that VM is there, and unknown.
        """
        seen = await asyncio.to_thread(living_of, self.config, name)
        if seen.all:
            cause = StateConflict(f"no record tells of it, and there is {seen}")
            self.unknown[name] = await UnknownVm.take(self.config, name, cause, seen)
            self._require_known(name)

    async def _launch(self, spec: VmSpec, beginning: Beginning = BOOT) -> Vm:
        """Starts a VM. One that was to be restored or received is gone again when `_launch` raises:
        the guest never ran here.
        """
        wanted = VM_DESCRIPTORS + DISK_DESCRIPTORS * len(spec.imaged)
        descriptors.require(wanted, f"VM {spec.name}")
        self._require_memory(spec)
        self.launching[spec.name] = spec
        former = self.vms.get(spec.name)
        try:
            vm = self.vms[spec.name] = await self._begun(spec, beginning)
        finally:
            del self.launching[spec.name]
        async with AsyncExitStack() as undo:
            if beginning.work is not None:
                undo.push_async_callback(self._drop, vm)
            await wait_started(vm)
            undo.pop_all()
        if former is not None and former.ledger.path != vm.ledger.path:
            await self._drop_files(former)  # of a standby: the next agent would find two of it
        return vm

    async def _drop_files(self, vm: Vm) -> None:
        """Those of a VM that has ended; of one that was a standby they are elsewhere."""
        for directory in (vm.ledger.path.parent, vm.machine.files.directory):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        release_user(self.config, vm.name, vm.ledger.path.parent, vm.machine.files.directory)

    async def _begun(self, spec: VmSpec, beginning: Beginning) -> Vm:
        facts = await self.host()
        ended = self.vms.pop(spec.name, None) or self.unknown.pop(spec.name, None)
        if ended is not None:
            await ended.detach()
        await self._require_absent(spec.name)
        try:
            if not isinstance(beginning.work, Arriving):
                self.standbys.prepare_start(spec)
            return await launch(self.config, facts, spec, beginning)
        except RollbackFailed as error:
            self.unknown[spec.name] = UnknownVm(self.config, spec.name, error, None)
            raise

    @property
    def memory_left(self) -> int | None:
        """What guests may still have of this host's memory, in bytes; None: no limit was set."""
        limit = self.config.guest_memory
        if limit is None:
            return None
        specs = [vm.spec for vm in self.vms.values() if not vm.freed]
        # Those that are being started have theirs as well: several come at once.
        return max(0, limit - sum(spec.memory for spec in (*specs, *self.launching.values())))

    def _require_memory(self, spec: VmSpec) -> None:
        left = self.memory_left
        if left is not None and left < spec.memory:
            raise StateConflict(
                f"VM {spec.name} has {format_size(spec.memory)} of memory, and guests of this host "
                f"may have {format_size(left)} more",
                remedy="end another VM here, or raise the limit: semperd --guest-memory SIZE",
            )

    async def _drop(self, vm: Vm) -> None:
        try:
            await vm.kill()
        except SempervirtError as error:
            raise RollbackFailed(
                f"VM {vm.name} did not start, and does not end: {error.message}",
                remedy=f"end it: semper vm kill {vm.name}",
            ) from error
        await self.forget_vm(vm.name)

    async def _close(self) -> None:
        if self.evacuation is not None:
            await self.evacuation.detach()
        await self.standbys.close(keep=self.config.keep_vms)
        await self.guarded.close(keep=self.config.keep_vms)
        if self.config.keep_vms:
            log.info("close vms=%d left running", sum(not vm.freed for vm in self.vms.values()))
        else:
            await asyncio.gather(*(self._kill(vm) for vm in self.vms.values()))
        vms: list[Vm | UnknownVm] = [*self.vms.values(), *self.unknown.values()]
        await asyncio.gather(*(vm.detach() for vm in vms))

    async def _kill(self, vm: Vm) -> None:
        try:
            await vm.kill()
        except SempervirtError as error:
            log.error("close vm=%s is left behind: %s", vm.name, error)  # noqa: TRY400


def _drop_kept(state_dir: Path, name: str) -> None:
    """Removes the state of a VM that runs. One that stays is refused later, for its disks have
    changed; the VM runs all the same.
    """
    kept = kept_state(state_dir, name)
    try:
        kept.unlink(missing_ok=True)
    except OSError as error:
        log.error("start vm=%s its former state %s is left: %s", name, kept, error.strerror)  # noqa: TRY400


async def take_snapshot(vm: Vm, names: Sequence[str], noted: Noted | None = None) -> Snapshot:
    """Of those disks of a VM, at one instant; the file systems are frozen where they can be."""
    begun = time.time()
    taken = await snapshot_disks(vm, names, Freezing.AUTO, noted)
    numbers = tuple((one.disk.partition("/")[2], one.snapshot) for one in taken.disks)
    return Snapshot(begun, numbers, taken.consistency.value)
