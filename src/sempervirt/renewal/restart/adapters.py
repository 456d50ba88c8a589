"""The ports of a restart (`restart.ports`) on a VM of this agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.disk.stand_in import StandIn
from sempervirt.host import lending, process
from sempervirt.host.process import Process
from sempervirt.host.procfs import ProcessId
from sempervirt.host.sockets import check_socket_path
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu import device_state, memory
from sempervirt.qemu.command_line import Features, Incoming, build
from sempervirt.qemu.given import Given, give_files
from sempervirt.qemu.privileges import ground_of
from sempervirt.qemu.state import Request
from sempervirt.qemu.successor import Successor
from sempervirt.qemu.tap import TapStandIn
from sempervirt.renewal.guest import HeldGuest
from sempervirt.vm.setup import block_devices
from sempervirt.vm.user import make_workplace
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

END_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Program:
    """The QEMU to move to."""

    path: str
    features: Features


class LiveRestart(HeldGuest):
    """The old QEMU of `vm`, the new one, and the stand-ins: `Attempt`, `WayBack`, `WayForward`."""

    def __init__(self, vm: Vm, program: Program) -> None:
        number = vm.record.number + 1
        self._files = vm.machine.files.successor(number)
        super().__init__(vm, Request.RESTART, self._files.directory / "state")
        self._program = program
        self._successor: Successor | None = None
        self._old: Process | None = None
        self._stand_ins: list[StandIn] = []
        self._taps: dict[int, TapStandIn] = {}

    # Before the switch

    async def start(self) -> tuple[ProcessId, str]:
        """Starts the new QEMU beside the old one, which runs on; gives its versioned machine."""
        vm, files = self._vm, self._files
        for path in files.sockets(vm.spec):
            check_socket_path(path)
        machine = await device_state.machine_type(self._machine.execute)
        if vm.pid is None:
            raise Unavailable(f"the QEMU of VM {vm.name} has ended")
        group = lending.group_of(vm.machine.files.directory)
        with contextlib.suppress(FileExistsError):
            files.directory.mkdir(mode=0o700)
        if group is not None:
            lending.make_passage(files.directory, group)
        for disk in vm.disks.values():
            stand_in = StandIn(disk.setup, disk.image.require().descriptor, files.directory)
            self._stand_ins.append(stand_in)
            stand_in.start()
        for index, nic in enumerate(vm.spec.nics):
            if nic.tap is not None:
                self._taps[index] = TapStandIn.open(nic.tap, vm.pid)
        memory_fd = memory.open_of(vm.pid)
        given = Given()
        try:
            devices = await block_devices(vm.spec)
            if group is not None:  # only now: the old QEMU may make files there as well
                make_workplace(vm.machine.files, vm.record.number + 1, group)
            if (user := vm.record.user) is not None and user.number is not None:
                give = partial(give_files, vm.spec, vm.machine.files, user.number)
                given = await call_storage(files.directory, give)
            argv = self._argv(machine, memory_fd, devices, given)
            self._successor = await self._start(argv, memory_fd, given)
        finally:
            given.close()
            os.close(memory_fd)
        return self._new.process.identity, machine

    def _argv(self, machine: str, memory_fd: int, devices: set[Path], given: Given) -> list[str]:
        vm = self._vm
        return build(
            vm.spec,
            self._program.features,
            qemu=self._program.path,
            accel=vm.record.accelerator.kind,
            files=self._files,
            disk_sockets={
                name: stand_in.path
                for name, stand_in in zip(vm.disks, self._stand_ins, strict=True)
            },
            plans=vm.plans,
            block_devices=devices,
            memory_fd=memory_fd,
            incoming=Incoming(machine),
            tap_files={index: tap.files for index, tap in self._taps.items()},
            given=given.paths,
        )

    async def _start(self, argv: list[str], memory_fd: int, given: Given) -> Successor:
        vm, files, user = self._vm, self._files, self._vm.record.user
        taps = (file for tap in self._taps.values() for file in tap.files)
        inherited = [memory_fd, *given.descriptors, *taps]
        run_dir = vm.machine.files.directory.parent
        ground = await ground_of(vm.spec, self._program.path, run_dir, given.paths)
        identity = user.identity(ground) if user else None
        try:
            return await Successor.start(
                vm.name, files.monitor, argv, files.log, inherited, identity
            )
        except Unavailable:
            for stand_in in self._stand_ins:
                stand_in.check()
            raise

    async def keep_packets(self) -> None:
        """Keeps what is sent to the guest from now on. Raises Unavailable."""
        for tap in self._taps.values():
            tap.keep_packets()

    async def take(self) -> None:
        """Has the new QEMU load the state that the old one gave."""
        await self._new.load(self._state)
        self._state.unlink(missing_ok=True)

    async def switch(self) -> None:
        """Kills the old QEMU; the new one is the VM. Raises StateConflict: nothing was done."""
        self._old = await self._machine.switch(self._new)

    # The way back

    async def discard(self) -> None:
        """Ends the new QEMU, and the stand-ins. Raises OutcomeUnknown when QEMU does not end."""
        self._close_taps()
        if self._successor is not None:
            await self._successor.discard()
        with contextlib.suppress(OSError):  # what the old QEMU says from now on is its own
            process.note_in_log(self._machine.files.log, f"QEMU {self._vm.pid} goes on")
        for stand_in in self._stand_ins:
            with contextlib.suppress(OutcomeUnknown):
                await stand_in.end()

    def tidy(self) -> None:
        """Removes what is left of other QEMUs than the VM's."""
        self._machine.files.remove_successors(keep=self._vm.record.number)

    # The way forward

    async def end_old(self) -> None:
        """Waits until the old QEMU has ended. Raises OutcomeUnknown when it does not."""
        assert self._old is not None
        try:
            async with asyncio.timeout(END_DEADLINE_S):
                await self._old.wait()
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"the old QEMU (pid {self._old.pid}) was killed and does not end"
            ) from error

    async def end_stand_ins(self) -> None:
        """Ends the backends that stood in. Raises OutcomeUnknown when one does not end."""
        await asyncio.gather(*(stand_in.end() for stand_in in self._stand_ins))

    async def free_taps(self) -> None:
        """Takes away the taps that stood in. Raises Unavailable."""
        await asyncio.gather(*(tap.remove() for tap in self._taps.values()))

    async def connect(self) -> None:
        """Leads the new QEMU to the disks and taps, and sends the packets that were kept."""
        for stand_in in self._stand_ins:
            stand_in.point_to_disk()
        for tap in self._taps.values():
            await tap.take_over()
            tap.send_again()

    async def cont_new(self) -> None:
        """Lets the guest run in the new QEMU."""
        await self._new.go()

    async def move_in(self) -> None:
        """Puts the sockets into their places, and lets go of the monitor of the new QEMU."""
        self._close_taps()
        try:
            await self._new.finish()
        except SempervirtError as error:
            log.info("restart-qemu vm=%s %s", self._vm.name, error)
        self._machine.files.take_sockets(self._files, self._vm.spec)

    async def link(self) -> None:
        """Connects to the monitor of the new QEMU, in its place. Raises Unavailable."""
        await self._machine.link()

    @property
    def _new(self) -> Successor:
        assert self._successor is not None
        return self._successor

    def _close_taps(self) -> None:
        for tap in self._taps.values():
            tap.close()
