"""The fence of a VM that runs on this host.

Its owner ends it (`Vm.kill`: QEMU, then the backends, each seen to end), and `proof.Fence` then
looks for itself: are those processes gone, and is the lock of each image that the VM wrote ours?
What else holds an image although the VM has ended (a backend that nobody remembers, say) is killed
too, if it is of this VM; anything else is named, and the answer is "not yet".
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from sempervirt.core.errors import OutcomeUnknown
from sempervirt.host.places import Places
from sempervirt.host.procfs import ProcessId
from sempervirt.qemu.state import FOR_STANDBY
from sempervirt.standby.means import Ability, NotYet, Proof, Where, storage_can
from sempervirt.standby.proof import Fence, Target
from sempervirt.vm.processes import living_of
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import MergingLayers

# QEMU and its backends end at once, or wait in the kernel. What takes longer are layers of a VM
# that an operator has ended, which go into its images.
ENDS_S = 30.0


async def abilities(vm: Vm) -> Mapping[str, tuple[Path, Ability]]:
    """The images that the VM writes, and how it can be proved that nobody writes them any more."""
    return {
        disk.name: (disk.image, await storage_can(disk.image, Where.HERE))
        for disk in vm.spec.disks
        if not disk.read_only
    }


class LocalFence:
    """Of `vm`, whose processes are those of `places`. `prove` may be called again and again."""

    def __init__(self, vm: Vm, places: Places) -> None:
        self._vm = vm
        self._places = places
        self._fence: Fence | None = None

    async def prove(self) -> Proof:
        """Ends the VM, and proves that it writes no more."""
        vm = self._vm
        qemu = vm.machine.identity
        try:
            async with asyncio.timeout(ENDS_S):
                await vm.kill(FOR_STANDBY)
        except OutcomeUnknown as error:
            return NotYet(error.message)
        except TimeoutError:
            merges = isinstance(vm.work, MergingLayers)
            what = "layers of its disks go into their images" if merges else "it is being ended"
            return NotYet(f"{what}, and that was not done within {ENDS_S:g} s")
        proof = await self._attempt(() if qemu is None else (qemu,))
        if isinstance(proof, NotYet):
            proof = await self._attempt(await self._left())
        return proof

    def let_go(self) -> None:
        """See `Fence.let_go`."""
        if self._fence is not None:
            self._fence.let_go()
            self._fence = None

    async def _attempt(self, processes: tuple[ProcessId, ...]) -> Proof:
        self.let_go()
        first = Target(self._vm.name, Where.HERE, processes)
        self._fence = Fence(first, await abilities(self._vm))
        return await self._fence.prove()

    async def _left(self) -> tuple[ProcessId, ...]:
        """What lives of the VM although its owner has ended it."""
        return (await asyncio.to_thread(living_of, self._places, self._vm.name)).all
