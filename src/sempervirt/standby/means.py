"""What a proof is, and what the storage of a disk can do for one; `standby.proof` has the table.

storage_can(image, where) ──► Ability     found out when a standby is enabled, and shown
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.disk.storage import Mount, mount_of
from sempervirt.host.reservations import Reservations
from sempervirt.host.storage_call import call_storage

# File systems of which the server, or the cluster, takes a silent client's locks away and refuses
# what it writes later; and how.
REVOKING: Mapping[str, str] = {
    "nfs4": "the server ends the lease of a client that is silent",
    "ceph": "the metadata server evicts a client that is silent, and the stores refuse it",
    "gfs2": "the lock manager waits for the fence of the host that is silent",
    "ocfs2": "the lock manager waits for the fence of the host that is silent",
}
# Those that only one host sees: nobody elsewhere has the image at all.
_OF_ONE_HOST = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "tmpfs", "ramfs", "overlay"}
)


class Means(Enum):
    """What a proof stands on. The values stand in the API."""

    LOCK_HERE = "lock-here"
    LOCK_REVOKED = "lock-revoked"
    RESERVATION = "reservation"
    COMMAND = "command"
    OWN_HOST = "own-host"
    OPERATOR = "operator"


class Where(Enum):
    """Where the first VM runs, seen from the host that would take over."""

    HERE = "here"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Ability:
    """How it can be proved of a disk that nobody writes it; `means` None: only an operator can say.

    `why` is the reason, in words for people.
    """

    means: Means | None
    why: str


@dataclass(frozen=True)
class Proven:
    """The first VM writes no more. `evidence` says what was seen."""

    means: Means
    evidence: str


@dataclass(frozen=True)
class NotYet:
    """It may still write. `why` names who, where that can be seen."""

    why: str


@dataclass(frozen=True)
class Impossible:
    """Nobody can tell; only an operator can."""

    why: str


Proof = Proven | NotYet | Impossible


def together(vm: str, proofs: Mapping[str, Proof]) -> Proof:
    """What is proved of a VM by what is proved of its disks: all, or nothing. Pure."""
    for name, proof in proofs.items():
        if isinstance(proof, Impossible):
            return Impossible(f"disk {vm}/{name}: {proof.why}")
    for name, proof in proofs.items():
        if isinstance(proof, NotYet):
            return NotYet(f"disk {vm}/{name}: {proof.why}")
    proven = [proof for proof in proofs.values() if isinstance(proof, Proven)]
    if not proven:
        return Impossible(f"VM {vm} has no disk by which its end could be proved")
    evidence = "; ".join(dict.fromkeys(proof.evidence for proof in proven))
    return Proven(proven[0].means, evidence)


# What a storage can

NO_MOUNT = Mount()


@dataclass(frozen=True)
class Storage:
    """What an image lies on. `reserves`: of a block device, whether it knows reservations; None
    when that cannot be found out.
    """

    block_device: bool
    mount: Mount = NO_MOUNT
    reserves: bool | None = None


def ability_of(
    storage: Storage, where: Where, *, command: bool, revoking: Mapping[str, str] = REVOKING
) -> Ability:
    """How a proof is had on that storage. `command`: the operator has named one. Pure."""
    if where is Where.HERE:
        return Ability(Means.LOCK_HERE, "its processes run here: they are killed and seen to end")
    means, why = _shared(storage, revoking)
    if means is None and command:
        return Ability(Means.COMMAND, f"{why}; the command of this host's fence.toml fences it")
    return Ability(means, why)


def _shared(storage: Storage, revoking: Mapping[str, str]) -> tuple[Means | None, str]:
    if storage.block_device:
        match storage.reserves:
            case True:
                return Means.RESERVATION, "the device knows persistent reservations"
            case False:
                return None, "the device knows no persistent reservations"
            case None:
                return None, "whether the device knows reservations cannot be found out"
    kind, options = storage.mount.kind, storage.mount.options
    if kind in _OF_ONE_HOST:
        return None, f"{kind} belongs to one host: another one has no part in its locks"
    if kind == "nfs":
        return None, "NFS before version 4 keeps the locks of a client that is silent for ever"
    if kind not in revoking:
        return None, f"nothing is known of the locks of {kind}"
    local = [option for option in options if option in ("nolock", "local_lock=all")]
    local += [option for option in options if option.startswith("local_lock=posix")]
    if local:
        return None, f"{kind} is mounted with {local[0]}: its locks do not reach other hosts"
    return Means.LOCK_REVOKED, revoking[kind]


def look_at(image: Path) -> Storage:
    """What an image lies on; may wait for the storage. Raises OSError."""
    status = image.stat()
    if not stat.S_ISBLK(status.st_mode):
        return Storage(block_device=False, mount=mount_of(image, status))
    try:
        device = Reservations.open(image)
    except PermissionError:
        return Storage(block_device=True)
    with contextlib.closing(device):
        return Storage(block_device=True, reserves=device.supported())


async def storage_can(
    image: Path, where: Where, *, command: bool = False, revoking: Mapping[str, str] = REVOKING
) -> Ability:
    """How it can be proved that nobody else writes `image`. Raises nothing: what cannot be looked
    at proves nothing. On the VM's own host nothing is looked at.
    """
    if where is Where.HERE:
        return ability_of(Storage(block_device=False), where, command=command)
    try:
        storage = await call_storage(image, partial(look_at, image))
    except (OSError, Unavailable) as error:
        said = error.message if isinstance(error, Unavailable) else error.strerror
        return Ability(None, f"{image} cannot be looked at: {said}")
    return ability_of(storage, where, command=command, revoking=revoking)
