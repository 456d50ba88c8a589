"""The disks of the VM that standbys are for, wherever that VM runs.

DisksHere     it runs on this host: its own backends take snapshots, and are asked for copies
DisksThere    it runs on another one (`standby.there`): that host takes them, this one copies
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.disk.answers import LayerState
from sempervirt.disk.driver import Disk
from sempervirt.disk.export import export
from sempervirt.disk.image_format import ImageFormat
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.standby.ports import Snapshot
from sempervirt.store.records import Ownership
from sempervirt.vm.vm import Vm

# Is told the number of each snapshot before the next agent would keep them.
Noted = Callable[[Mapping[str, int]], None]
TakeSnapshot = Callable[[Vm, Sequence[str], Noted | None], Awaitable[Snapshot]]


def copied(spec: VmSpec) -> list[DiskSpec]:
    """The disks of which a standby has a copy."""
    return [disk for disk in spec.disks if disk.keep == "snapshot" and not disk.read_only]


def shared(spec: VmSpec) -> list[DiskSpec]:
    """The disks that the standby takes over from the first VM."""
    return [disk for disk in spec.disks if disk.keep == "latest"]


class FirstDisks(Protocol):
    """See the module. Each call raises SempervirtError."""

    @property
    def spec(self) -> VmSpec:
        """The VM as its guest sees it (`Vm.pinned_spec`)."""

    @property
    def served(self) -> frozenset[str]:
        """The disks of which snapshots can be taken."""

    async def take(self, names: Sequence[str]) -> Snapshot:
        """Takes a snapshot of those disks, at one instant."""

    async def copy_out(self, disk: str, snapshot: int, target: Path) -> None:
        """Writes a snapshot to a raw image of its own, where nothing may be."""

    async def give_up(self, disk: str, snapshot: int, ours: set[int]) -> str:
        """Gives a snapshot up, `ours` are those that were taken for standbys; why it stays, ""
        where it does not.
        """


class KnownFirst(Protocol):
    """The VM that standbys are for, as far as they depend on it; `ports.FirstVm` is what their
    owner asks of it.
    """

    @property
    def spec(self) -> VmSpec | None:
        """What it has; None: nobody here knows."""

    @property
    def fenced(self) -> tuple[Ownership | None, str]:
        """Of which owner it was proved last that it writes no more, and by what; None: the VM is of
        this host.
        """

    @property
    def left(self) -> VmSpec | None:
        """What it has on another host; None where it is of this one."""

    def disks(self) -> FirstDisks:
        """Raises Unavailable."""

    def let_go(self) -> None:
        """The claims are on record: the fence keeps the images' locks no longer."""


class DisksHere:
    """Of `vm`, which runs on this host."""

    def __init__(self, vm: Vm, snapshot: TakeSnapshot, noted: Noted | None = None) -> None:
        self._noted = noted
        self._vm = vm
        self._snapshot = snapshot

    @property
    def spec(self) -> VmSpec:
        """See `FirstDisks`."""
        return self._vm.pinned_spec

    @property
    def served(self) -> frozenset[str]:
        """See `FirstDisks`."""
        return frozenset(self._vm.disks)

    async def take(self, names: Sequence[str]) -> Snapshot:
        """See `FirstDisks`."""
        return await self._snapshot(self._vm, names, self._noted)

    async def copy_out(self, disk: str, snapshot: int, target: Path) -> None:
        """See `FirstDisks`."""
        await export(self._disk(disk), snapshot, target, ImageFormat.RAW, _ignore)

    async def give_up(self, disk: str, snapshot: int, ours: set[int]) -> str:
        """See `FirstDisks`."""
        return await give_up(self._disk(disk), snapshot, ours)

    def _disk(self, name: str) -> Disk:
        if name not in self._vm.disks:
            raise Unavailable(f"VM {self._vm.name} has no disk {name} that a backend serves")
        return self._vm.disks[name]


async def give_up(disk: Disk, snapshot: int, ours: set[int]) -> str:
    """Gives up a snapshot that was copied, unless another one that somebody else took lies below:
    that one would be given up as well. What was not done, for people.
    """
    try:
        layers = await disk.active().layers()
        below = {
            one.id for one in layers.layers if one.id < snapshot and one.state is LayerState.SEALED
        }
        if others := below - ours:
            return (
                f"snapshot {snapshot} of disk {disk.name} stays, for snapshot {min(others)} lies "
                f"below it: semper disk merge {disk.name} --through {snapshot} gives both up"
            )
        await disk.active().merge(snapshot, None)
    except SempervirtError as error:
        return f"snapshot {snapshot} of disk {disk.name} stays: {error.message}"
    return ""


def _ignore(_done: int, _total: int) -> None:
    """Nobody looks how far a standby is copied."""
