"""How the VMs of a host are run: where their files are, and by which programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sempervirt.disk.backend import BackendCommand, Blkd
from sempervirt.disk.state import Policy
from sempervirt.host.groups import Groups
from sempervirt.host.places import Places, default_run_dir, default_state_dir
from sempervirt.host.users import UserPool
from sempervirt.qemu.link import Patience

IMAGE_ROOTS_VARIABLE = "SEMPERVIRT_IMAGE_ROOTS"
SAVED_ROOTS_VARIABLE = "SEMPERVIRT_SAVED_ROOTS"
# Where images and what guests boot from is kept, and nothing that must not be read.
IMAGE_ROOTS = (
    "/srv",
    "/mnt",
    "/var/lib/sempervirt/images",
    "/var/lib/libvirt/images",
    "/usr/share/AAVMF",
    "/usr/share/OVMF",
    "/usr/share/edk2",
    "/usr/share/qemu",
)
FENCES = Path("/etc/sempervirt/fence.toml")
SAVED_ROOTS = ("/var/lib/sempervirt/saved",)


def roots_of(
    variable: str, otherwise: tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> tuple[Path, ...]:
    """The directories that a variable names, between colons."""
    chosen = environment.get(variable)
    named = otherwise if chosen is None else tuple(part for part in chosen.split(":") if part)
    return tuple(Path(part).absolute() for part in named)


@dataclass(frozen=True)
class AgentConfig(Places):
    """With `keep_vms` the VMs run on when the agent closes; otherwise they are killed.

    Guests may have `guest_memory` bytes altogether; None: as much as there is.

    What is asked for over TLS may name files below `image_roots` (images, kernels, firmware) and
    `saved_roots` (saved states), and no others.

    `fences` is a file of this host's operator (`standby.fence_file`).

    `below` is where the records and sockets of one generation of standbys are, below those of the
    host: whatever belongs to the host as a whole stays where it is.

    `backend`, `policy` and `patience` are there for tests. `qemu` is looked up on the PATH
    if it is not given. `users` are those that VMs have, or why they have none; they go through
    `users_top`, the run directory of the host (`vm.user.with_users`). `groups` are the control
    groups that limit VMs, or why there are none (`vm.groups.with_groups`).
    """

    keep_vms: bool = False
    image_roots: tuple[Path, ...] = field(
        default_factory=lambda: roots_of(IMAGE_ROOTS_VARIABLE, IMAGE_ROOTS)
    )
    saved_roots: tuple[Path, ...] = field(
        default_factory=lambda: roots_of(SAVED_ROOTS_VARIABLE, SAVED_ROOTS)
    )
    guest_memory: int | None = None
    fences: Path = FENCES
    qemu: str | None = None
    backend: BackendCommand = field(default_factory=Blkd)
    policy: Policy = field(default_factory=Policy)
    patience: Patience = field(default_factory=Patience)
    users: UserPool | str = "they are not asked for"
    users_top: Path = Path("/")
    groups: Groups | str = "the agent is part of a command, and no service"
    below: Path = Path()

    def vm_run_dir(self, name: str) -> Path:
        """Sockets and logs of one VM."""
        return self.vm_places.vm_run_dir(name)

    def vm_state_dir(self, name: str) -> Path:
        """Records of one VM."""
        return self.vm_places.vm_state_dir(name)

    @property
    def vm_places(self) -> Places:
        """Where VMs have their files; the cluster, keys, presets and users are the host's."""
        return Places(self.state_dir / self.below, self.run_dir / self.below)

    @classmethod
    def default(cls, *, keep_vms: bool = False) -> AgentConfig:
        """The directories of this user."""
        return cls(default_state_dir(), default_run_dir(), keep_vms=keep_vms)
