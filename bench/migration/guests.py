"""The guests that move: the same Debian, after having done different things."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from bench.migration.waiting import MoveError
from sempervirt.guest import ProbeClient

PREPARE_S = 180.0
# Of all memory: a tmpfs may have half of it.
PRIVATE_SHARE = 0.4
WRITTEN_MIB = 32
"""What the writer goes round in."""


async def shell(probe: ProbeClient, script: str) -> str:
    """What a script says in the guest. Raises MoveError when it fails."""
    ran = await probe.execute("sh", "-c", script, deadline_s=PREPARE_S)
    if ran.status != 0:
        raise MoveError(f"in the guest, {script!r} ended with {ran.status}: {ran.stderr}")
    return ran.stdout


async def _nothing(_probe: ProbeClient, _memory_mib: int) -> None:
    pass


async def _read_packages(probe: ProbeClient, _memory_mib: int) -> None:
    # The tree's disk, or without one what the root has.
    await shell(
        probe,
        "mount -o ro /dev/vdb /mnt 2>/dev/null; "
        "find /usr /mnt -xdev -type f -exec cat {} + >/dev/null",
    )


async def _fill_with_random(probe: ProbeClient, memory_mib: int) -> None:
    count = int(memory_mib * PRIVATE_SHARE)
    await shell(probe, f"dd if=/dev/urandom of=/dev/shm/private bs=1M count={count}")


async def _keep_writing(probe: ProbeClient, _memory_mib: int) -> None:
    """Quarters of a MiB, with pauses, for ever: some MB in a second."""
    loop = (
        f"while :; do for i in $(seq {WRITTEN_MIB * 4}); do "
        "dd if=/dev/urandom of=/dev/shm/written bs=256k count=1 seek=$i conv=notrunc 2>/dev/null; "
        "sleep 0.05; done; done"
    )
    await shell(probe, f"setsid sh -c '{loop}' </dev/null >/dev/null 2>&1 &")


@dataclass(frozen=True)
class Guest:
    """One of them. `needs_tree`: the disk with the package tree is its second."""

    name: str
    label: str
    prepare: Callable[[ProbeClient, int], Awaitable[None]]
    needs_tree: bool = False

    def disks(self, root: Path, tree: Path | None) -> dict[str, Path]:
        """Its images by name, in their order."""
        disks = {"root": root}
        if self.needs_tree and tree is not None:
            disks["tree"] = tree
        return disks


BOOTED = Guest("booted", "just booted", _nothing)
CACHED = Guest("cached", "page cache full of packages", _read_packages, needs_tree=True)
PRIVATE = Guest("private", "private random data", _fill_with_random)
WRITER = Guest("writer", "a writer that dirties memory", _keep_writing)
GUESTS = {guest.name: guest for guest in (BOOTED, CACHED, PRIVATE, WRITER)}
