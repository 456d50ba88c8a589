"""The ports of a save (`save.ports`) on a VM of this agent."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempervirt.core.errors import Unavailable
from sempervirt.qemu import device_state, memory, saved
from sempervirt.qemu.saved import Figures
from sempervirt.qemu.state import Request
from sempervirt.renewal.guest import HeldGuest
from sempervirt.vm.vm import LongWork, Progress, Vm

# Of the description of a VM in a saved state.
VERSION = 1


class LiveSave(HeldGuest):
    """The QEMU of `vm`, and the program that writes `output`: `Attempt` and `Back`."""

    def __init__(self, vm: Vm, output: Path) -> None:
        directory = vm.machine.files.directory
        super().__init__(vm, Request.SAVE, directory / "state.save")
        self._about = directory / "about.save"
        self._output = output
        self._running = False
        self._packing: asyncio.Task[Figures] | None = None
        self._stopped = False

    async def hold(self) -> bool:
        """See `HeldGuest.hold`."""
        self._running = await super().hold()
        return self._running

    async def pack(self) -> Figures:
        """Writes memory, devices and description to the file, which is durable then.

        Raises InvalidRequest or Unavailable: there is no file then.
        """
        vm = self._vm
        try:
            self._about.write_text(json.dumps(await self._describe()))
            if vm.pid is None or self._stopped:
                raise Unavailable("the save was given up" if self._stopped else "QEMU has ended")
            self._packing = asyncio.create_task(self._pack(memory.open_of(vm.pid)))
            try:
                await asyncio.wait([self._packing])
            finally:
                self._packing.cancel()
            if self._packing.cancelled():
                raise Unavailable("the save was given up")
            return self._packing.result()
        finally:
            vm.progress = None
            self._remove_files()

    async def _pack(self, descriptor: int) -> Figures:
        images = {disk.name: disk.image for disk in self._vm.spec.disks}
        try:
            return await saved.save(
                descriptor, self._state, self._about, images, self._output, self._progress
            )
        finally:
            os.close(descriptor)

    def _remove_files(self) -> None:
        for path in (self._state, self._about):
            path.unlink(missing_ok=True)

    def release(self, *, running: bool) -> None:
        """See `HeldGuest.release`."""
        self._remove_files()
        super().release(running=running)

    def stop_packing(self) -> None:
        """Has `pack` fail soon, with Unavailable."""
        self._stopped = True
        if self._packing is not None:
            self._packing.cancel()

    def _progress(self, done: int, total: int) -> None:
        self._vm.progress = Progress(LongWork.SAVING, done, total)

    async def end(self) -> None:
        """Kills QEMU, and waits for its end. Raises OutcomeUnknown."""
        if not self._vm.run.is_end:
            await self._machine.kill()

    async def free(self) -> None:
        """Waits until the disks are free. Raises OutcomeUnknown when a backend does not end."""
        await self._vm.wait_freed()

    async def _describe(self) -> dict[str, Any]:
        vm = self._vm
        return {
            "version": VERSION,
            # The addresses stay, also if the VM is restored under another name.
            "spec": vm.pinned_spec.model_dump(mode="json"),
            "accelerator": vm.record.accelerator.kind,
            "machine": await device_state.machine_type(self._machine.execute),
            "plans": {name: asdict(plan) for name, plan in vm.plans.items()},
            "running": self._running,
            "saved": time.time(),
        }
