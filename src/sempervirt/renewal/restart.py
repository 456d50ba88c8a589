"""Moves a running VM to a new QEMU process on the same host; its disks stay where they are.

    hold ─ start the new QEMU, which maps the same memory ─ pause ─ give ─ take ─┐
      any failure: kill the new one, let the old one run on ◄────────────────────┤
                                                                              switch
    release ─ move the sockets ─ go ◄─ lead it to disks, taps ◄─ wait for its end ◄┘
                                                        (the old one is killed)

Up to the switch the old QEMU owns the VM and only stands still; after it the new one does. The
record says on which side of it an agent died, and the next one goes back or forward
(`settle`). The guest stands still from the pause to `go`.

The requests of a disk are drained by the pause. If its backend died just then they are not, and
their record stands in the old QEMU: so the backend has to answer after the pause, and be the
same as before, or else there is no switch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass

from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    RollbackFailed,
    SempervirtError,
    StateConflict,
    Unavailable,
)
from sempervirt.disk.stand_in import StandIn
from sempervirt.host import process
from sempervirt.host.sockets import check_socket_path
from sempervirt.qemu import handover, memory
from sempervirt.qemu.command_line import Features, Incoming, build
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Request, Runstate
from sempervirt.qemu.successor import Successor, discard_quietly
from sempervirt.qemu.tap import TapStandIn
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Restarting

log = logging.getLogger(__name__)

END_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Restarted:
    """What became of it. The guest stood still for `blackout_ms`, of `total_ms` in all."""

    qemu: str
    version: str
    pid: int
    machine: str
    blackout_ms: float
    total_ms: float


@dataclass(frozen=True)
class Program:
    """The QEMU to move to."""

    path: str
    features: Features


async def restart_qemu(vm: Vm, program: Program) -> Restarted:
    """Moves `vm` to a new process of `program`.

    Raises InvalidRequest, StateConflict or Unavailable when it was not done: the VM is as it
    was. Raises RollbackFailed when it was not done and the VM is not as it was, OutcomeUnknown
    when the new QEMU owns the VM and does not answer.
    """
    refuse(vm)
    work = asyncio.create_task(_Restart(vm, program).run())
    return await asyncio.shield(work)


def refuse(vm: Vm) -> None:
    """Raises InvalidRequest for a VM of whose disks nobody can tell whether they are at rest."""
    for disk in vm.disks.values():
        if not disk.setup.command.has_control:
            raise InvalidRequest(
                f"the backend of disk {disk.name} has no control socket, so nobody can tell "
                "whether its requests are done"
            )


class _Restart:
    """One attempt."""

    def __init__(self, vm: Vm, program: Program) -> None:
        self._vm = vm
        self._machine = vm.machine
        self._program = program
        self._number = vm.record.number + 1
        self._files = vm.machine.files.successor(self._number)
        self._successor: Successor | None = None
        self._stand_ins: list[StandIn] = []
        self._taps: dict[int, TapStandIn] = {}
        self._paused = False

    async def run(self) -> Restarted:
        started = time.monotonic()
        await self._machine.hold(Request.RESTART)
        resume = self._machine.run is Runstate.RUNNING
        try:
            machine = await self._prepare(resume)
            assert self._successor is not None
            stopped = time.monotonic()
            await self._hand_over(self._successor, resume)
            self._record(switched=True, resume=resume)
            before = await self._machine.switch(self._successor)
        except BaseException as error:
            left = await self._go_back(resume)
            if isinstance(error, SempervirtError):
                self._note(f"QEMU was not restarted: {error.message}", logging.WARNING)
            if left:
                raise RollbackFailed(
                    f"QEMU of VM {self._vm.name} was not restarted ({error}), and {left}",
                    remedy=f"look at it: semper vm show {self._vm.name}; then resume or end it",
                ) from error
            if isinstance(error, OutcomeUnknown) and self._vm.run is not Runstate.UNKNOWN:
                # Whatever the new one may have done: it is dead, and the old one goes on.
                raise Unavailable(error.message, remedy=error.remedy) from error
            raise
        went = await self._go_on(self._successor, before, resume)
        restarted = Restarted(
            qemu=self._program.path,
            version=self._program.features.version,
            pid=self._successor.process.pid,
            machine=machine,
            blackout_ms=round((went - stopped) * 1e3, 1) if resume else 0.0,
            total_ms=round((time.monotonic() - started) * 1e3, 1),
        )
        self._note(
            f"moved to QEMU {restarted.version} (pid {restarted.pid}), the guest stood still "
            f"for {restarted.blackout_ms:g} ms",
            logging.INFO,
        )
        return restarted

    # Before the switch

    async def _prepare(self, resume: bool) -> str:
        """Starts the new QEMU beside the old one, which runs on; gives the type of machine."""
        vm, files = self._vm, self._files
        for path in files.sockets(vm.spec):
            check_socket_path(path)
        assert vm.pid is not None
        machine = await handover.machine_type(self._machine.execute)
        with contextlib.suppress(FileExistsError):
            files.directory.mkdir(mode=0o700)
        self._record(switched=False, resume=resume)
        sockets = {}
        for name, disk in vm.disks.items():
            stand_in = StandIn(disk.setup, files.directory)
            self._stand_ins.append(stand_in)
            stand_in.start()
            sockets[name] = stand_in.path
        for index, nic in enumerate(vm.spec.nics):
            if nic.tap is not None:
                self._taps[index] = TapStandIn.open(nic.tap, vm.pid)
        memory_fd = memory.open_of(vm.pid)
        try:
            argv = build(
                vm.spec,
                self._program.features,
                qemu=self._program.path,
                accel=vm.record.accelerator.kind,
                files=files,
                disk_sockets=sockets,
                plans=vm.plans,
                block_devices={d.image for d in vm.spec.disks if d.image.is_block_device()},
                memory_fd=memory_fd,
                incoming=Incoming(machine),
                tap_files={index: tap.files for index, tap in self._taps.items()},
            )
            self._successor = await self._start(argv, memory_fd)
        finally:
            os.close(memory_fd)
        self._record(switched=False, resume=resume)
        return machine

    async def _start(self, argv: list[str], memory_fd: int) -> Successor:
        files = self._files
        inherited = [memory_fd, *(file for tap in self._taps.values() for file in tap.files)]
        try:
            return await Successor.start(self._vm.name, files.monitor, argv, files.log, inherited)
        except Unavailable:
            for stand_in in self._stand_ins:
                stand_in.check()
            raise

    async def _hand_over(self, successor: Successor, resume: bool) -> None:
        """Pauses the guest, and has its state loaded by the new QEMU."""
        self._require_held()
        self._paused = True
        for tap in self._taps.values():
            tap.keep_packets()
        await wait_drained(self._vm, pause=resume)
        state = self._files.directory / "state"
        await handover.give(self._machine.execute, state)
        await successor.take(state)
        state.unlink(missing_ok=True)
        self._require_held()

    def _require_held(self) -> None:
        if not self._machine.held:
            state = self._machine.state
            raise StateConflict(f"VM {self._vm.name} is {state.run.value} ({state.why})")

    async def _go_back(self, resume: bool) -> str:
        """The old QEMU goes on; nothing is left of the new one. Gives what is not as it was, "" if
        all is.
        """
        machine = self._machine
        self._close_taps()
        failure = await discard_quietly(self._successor)
        for stand_in in self._stand_ins:
            with contextlib.suppress(OutcomeUnknown):
                await stand_in.end()
        status, left = "paused", ""
        if failure is not None:
            left = f"the guest stays paused: {failure.message}"
        elif machine.held:
            try:
                if self._paused:
                    await handover.reset(machine.execute)
                if resume:
                    await machine.execute("cont")
                    status = "running"
            except SempervirtError as error:
                left = f"the old QEMU does not go on: {error.message}"
        if left:
            self._note(left, logging.ERROR)
        machine.release(status)
        self._vm.end_work()
        machine.files.remove_successors(keep=self._vm.record.number)
        return left

    # After the switch

    async def _go_on(self, successor: Successor, before: process.Process, resume: bool) -> float:
        """The new QEMU runs the guest; gives the time from which on it does."""
        machine, status = self._machine, "paused"
        try:
            await asyncio.gather(
                _wait_end(self._vm.name, before),
                *(stand_in.end() for stand_in in self._stand_ins),
                *(tap.remove() for tap in self._taps.values()),
            )
            for stand_in in self._stand_ins:
                stand_in.point_to_disk()
            for tap in self._taps.values():
                await tap.take_over()
                tap.send_again()
            if resume:
                await successor.go()
                status = "running"
            went = time.monotonic()
        except Unavailable as error:
            raise OutcomeUnknown(
                f"VM {self._vm.name} is with the new QEMU, which does not go on: {error.message}",
                remedy=f"look at it: semper vm show {self._vm.name}",
            ) from error
        finally:
            self._close_taps()
            with contextlib.suppress(SempervirtError):
                await successor.settle()
            move_sockets(self._files, machine.files, self._vm.spec)
            self._vm.took_over(successor.process.identity, self._number)
            machine.release(status)
            with contextlib.suppress(Unavailable):  # then its state will say so
                await machine.link()
            machine.files.remove_successors(keep=self._number)
        return went

    def _close_taps(self) -> None:
        for tap in self._taps.values():
            tap.close()

    def _record(self, *, switched: bool, resume: bool) -> None:
        identity = self._successor.process.identity if self._successor else None
        work = Restarting(self._number, resume, switched, identity)
        if self._vm.work is None:
            self._vm.begin(work)
        elif not self._vm.advance(work):
            raise Unavailable(
                f"the record of VM {self._vm.name} cannot be written",
                remedy="make room in the state directory",
            )

    def _note(self, text: str, level: int) -> None:
        self._machine.journal.note(time.time(), "restart", text)
        log.log(level, "restart-qemu vm=%s %s", self._vm.name, text)


async def wait_drained(vm: Vm, *, pause: bool) -> None:
    """Pauses the guest; afterwards no request of a disk is under way.

    Raises Unavailable when a backend died meanwhile: then nobody knows.
    """
    served = {disk: disk.generation for disk in vm.disks.values()}
    if pause:
        await vm.machine.execute("stop")
    for disk, generation in served.items():
        await disk.status()
        if disk.generation != generation:
            raise Unavailable(f"the backend of disk {disk.name} has just changed")


async def _wait_end(name: str, before: process.Process) -> None:
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            await before.wait()
    except TimeoutError as error:
        raise OutcomeUnknown(
            f"VM {name}: the old QEMU (pid {before.pid}) was killed and does not end",
            remedy="look at /proc/PID/stack; when it has ended, resume the VM",
        ) from error


def move_sockets(source: VmFiles, target: VmFiles, spec: VmSpec) -> None:
    """Puts the new QEMU's sockets where everybody looks for them."""
    for old, new in zip(source.sockets(spec), target.sockets(spec), strict=True):
        with contextlib.suppress(FileNotFoundError):
            old.replace(new)
