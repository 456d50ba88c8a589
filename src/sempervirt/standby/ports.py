"""What the driver of a VM's standbys reaches the world by; `adapters` has the real ones.

Each call raises SempervirtError, or OSError, when it fails. Each call ends by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sempervirt.standby.state import First, Standby
from sempervirt.standby.values import Tier

Snapshots = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Snapshot:
    """Snapshots by disk, all of the instant `time` (seconds since the epoch)."""

    time: float
    numbers: Snapshots
    consistency: str


@dataclass(frozen=True)
class Kept:
    """Memory and state of a guest. `machine` is the versioned name of its machine."""

    machine: str
    memory_bytes: int


class FirstVm(Protocol):
    """The VM that the standbys are for, whichever QEMU that is now."""

    def seen(self) -> tuple[First, str]:
        """What it is, and why its QEMU has ended."""

    async def changed(self, seen: tuple[First, str]) -> None:
        """Returns when it is, or may be, something else than `seen`."""

    async def take(self) -> Snapshot:
        """Takes a snapshot of the disks of which a standby has copies."""

    async def fence(self, *, kill: bool, word: str = "") -> None:
        """Returns when it was proved that it writes no more; with `kill` it is ended for that, and
        what an operator says by `word` counts where nothing else can be had.
        Raises StateConflict when it is not to be taken over any more.
        """

    async def prove_anew(self, *, kill: bool, word: str = "") -> None:
        """As `fence`, where an earlier agent has proved it, this one has not, and the claim of the
        standby depends on it: of a VM of another host that is not this one's yet.
        """

    def let_go(self) -> None:
        """Frees what the fence keeps."""


class Generations(Protocol):
    """Standbys, by number."""

    async def copy(self, number: int, snapshots: Snapshots, ours: Snapshots) -> tuple[str, ...]:
        """Copies snapshots to images of the generation's own, and gives up `ours`; notes."""

    async def give_up(self, snapshots: Snapshots, ours: Snapshots) -> tuple[str, ...]:
        """Gives up snapshots that are not copied; notes of those that stay."""

    async def boot(self, number: int) -> float:
        """Boots from the copies, isolated; how long until the OS was initialised, in seconds."""

    async def settle(self, number: int) -> tuple[str, ...]:
        """Prepares the guest for the freeze; notes."""

    async def freeze(self, number: int, tier: Tier) -> Kept:
        """Keeps the guest's memory and state, and ends what booted."""

    async def stand(self, number: int, machine: str, tier: Tier) -> None:
        """Starts what waits."""

    async def stand_again(self, number: int, machine: str, tier: Tier) -> None:
        """Ends what has loaded the state, or was about to, and starts what waits for it anew."""

    async def gone(self, number: int) -> str:
        """Returns when what waits has ended, or is silent: why. In tier FILE it never returns."""

    async def remove(self, number: int) -> None:
        """Ends the processes of a generation, and removes its files."""

    async def load(self, number: int, machine: str, tier: Tier) -> None:
        """Has the QEMU of a generation load the state."""

    async def claim(self, number: int) -> None:
        """Takes the disks that both VMs have; the generation is the VM from now on."""

    async def run(self, number: int) -> tuple[str, ...]:
        """Leads the network to the guest and lets it run; notes."""

    async def probe(self, number: int) -> tuple[str, ...]:
        """Sets the guest's clock and sees that the guest answers; notes."""


class Record(Protocol):
    """What the next agent is told."""

    def write(self, state: Standby) -> None:
        """Raises OSError."""


@dataclass(frozen=True)
class Ports:
    """All of them."""

    first: FirstVm
    generations: Generations
    record: Record
