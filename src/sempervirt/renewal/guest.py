"""The ports that all work of this room shares (`renewal.ports`), on a VM of this agent."""

from __future__ import annotations

from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.host.lending import group_of, lend
from sempervirt.qemu import device_state
from sempervirt.qemu.state import Request, Runstate
from sempervirt.vm.vm import Vm


class HeldGuest:
    """The QEMU of `vm`, held for `request`; `state` is the file for the state of its devices."""

    def __init__(self, vm: Vm, request: Request, state: Path) -> None:
        self._vm = vm
        self._machine = vm.machine
        self._request = request
        self._state = state

    async def hold(self) -> bool:
        """Keeps others from changing the VM; whether the guest runs. Raises StateConflict."""
        await self._machine.hold(self._request)
        return self._machine.run is Runstate.RUNNING

    async def stop(self, *, pause: bool) -> None:
        """Pauses the guest, unless it is paused; afterwards no request of a disk is under way.

        Raises Unavailable when a backend died meanwhile: its last requests are then on record in
        QEMU alone, and nobody can tell whether they are done.
        """
        served = {disk: disk.generation for disk in self._vm.disks.values()}
        if pause:
            await self._machine.execute("stop")
        for disk, generation in served.items():
            await disk.status()
            if disk.generation != generation:
                raise Unavailable(f"the backend of disk {disk.name} has just changed")

    async def give(self) -> None:
        """Writes the state of the devices to the file."""
        lend(self._state, group_of(self._machine.files.directory), make=True)
        await device_state.save(self._machine.execute, self._state)

    def ended(self) -> str:
        """Why the VM has ended, or is being killed; "" while QEMU is there."""
        state = self._machine.state
        return state.killed_because or (state.why if state.run.is_end else "")

    async def reset(self) -> None:
        """Undoes what QEMU was told so that it gives or loads a state."""
        await device_state.reset(self._machine.execute)

    async def cont(self) -> None:
        """Lets the guest run on."""
        await self._machine.execute("cont")

    def release(self, *, running: bool) -> None:
        """Ends `hold`."""
        self._machine.release("running" if running else "paused")
