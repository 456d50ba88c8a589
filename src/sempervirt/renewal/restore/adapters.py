"""The ports of a restore (`restore.ports`) on a VM of this agent; how its memory is unpacked."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.host import background
from sempervirt.host.lending import group_of, lend
from sempervirt.qemu import device_state, saved
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.state import Request
from sempervirt.renewal.guest import HeldGuest
from sempervirt.renewal.restore.plan import Plan
from sempervirt.vm.vm import LongWork, Progress, Vm


class Unpacking:
    """The memory of a saved state on its way into that of a VM which is being started."""

    def __init__(self, file: Path, plan: Plan) -> None:
        self.file = file
        self.plan = plan
        self.state = Path()
        self._failure: SempervirtError | None = None
        self._task: asyncio.Task[None] | None = None
        self._vm: Vm | None = None

    def begin(self, files: VmFiles, memory_fd: int) -> None:
        """Unpacks from now on; QEMU does not look at the memory before it loads a state."""
        self.state = files.directory / "state.restore"
        work = self._unpack(os.dup(memory_fd))
        self._task = background.start(work, f"unpack {self.file}")

    async def _unpack(self, descriptor: int) -> None:
        try:
            await saved.restore(self.file, descriptor, self.state, self.plan.images, self._progress)
        except SempervirtError as error:
            self._failure = error
        finally:
            os.close(descriptor)

    def show_progress(self, vm: Vm | None) -> None:
        """Has `vm` tell how far the unpacking is; None: nobody any more."""
        if self._vm is not None:
            self._vm.progress = None
        self._vm = vm

    def _progress(self, done: int, total: int) -> None:
        if self._vm is not None:
            self._vm.progress = Progress(LongWork.RESTORING, done, total)

    async def wait(self) -> None:
        """Waits for the end. Raises StateConflict when a disk is in another state, InvalidRequest
        when the file cannot be used, Unavailable.
        """
        if self._task is None:
            raise Unavailable("the memory was never unpacked")
        await asyncio.wait([self._task])
        if self._task.cancelled():
            raise Unavailable("the restore was given up")
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """Gives up."""
        if self._task is not None:
            self._task.cancel()
        self.remove_state()

    def remove_state(self) -> None:
        """Removes the file with the state of the devices."""
        with contextlib.suppress(OSError):
            self.state.unlink(missing_ok=True)


class LiveRestore(HeldGuest):
    """The QEMU of `vm`, which waits for what `unpacking` brings: `Attempt` and `Back`."""

    def __init__(self, vm: Vm, unpacking: Unpacking) -> None:
        super().__init__(vm, Request.RESTORE, unpacking.state)
        self._unpacking = unpacking

    async def unpacked(self) -> None:
        """Waits until the memory is as it was saved."""
        self._unpacking.show_progress(self._vm)
        try:
            await self._unpacking.wait()
        finally:
            self._unpacking.show_progress(None)

    async def take(self) -> None:
        """Has QEMU load the state of the devices."""
        lend(self._state, group_of(self._machine.files.directory))
        await device_state.load(self._machine.execute, self._state)
        self._unpacking.remove_state()

    async def end(self) -> None:
        """Kills QEMU, and waits until the disks are free. Raises OutcomeUnknown."""
        self._unpacking.cancel()
        await self._vm.kill()
