"""What a disk is made from; none of it changes while the disk exists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sempervirt.core.queue_map import Binding, DevicePlan
from sempervirt.disk.backend import BackendCommand, DiskOptions, ImageTitle
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.state import Policy
from sempervirt.disk.volume import Volume
from sempervirt.host.sockets import Access


def supervised(policy: Policy, command: BackendCommand, *, read_only: bool) -> Policy:
    """How a disk is supervised. A spare waits for the image's lock and the front end's words, and a
    read-only disk has neither: a new process is started when its backend dies.
    """
    return replace(policy, spare=policy.spare and command.has_spare and not read_only)


@dataclass(frozen=True)
class DiskSetup:
    """`name` is VM/DISK; `record` is the file that the next agent adopts the disk from.

    `volume` is None for an adopted disk whose image cannot be looked at any more. `plan` is how
    its queues are served at first; None leaves that to the program. `title` is by what right this
    host writes the image; None where nobody claims it. `peers` is the file that says which QEMU is
    served; None: whoever connects, as `access` lets in; the VM may end and come again then.
    """

    name: str
    volume: Volume | None
    options: DiskOptions
    command: BackendCommand
    policy: Policy
    files: DiskFiles
    record: Path
    plan: DevicePlan | None = None
    title: ImageTitle | None = None
    peers: Path | None = None
    access: Access | None = None

    @property
    def is_guarded(self) -> bool:
        """Whether the QEMU is another manager's (`vm.guarded`)."""
        return self.access is not None

    @property
    def short_name(self) -> str:
        """The name within the VM."""
        return self.name.rpartition("/")[2]

    @property
    def binding(self) -> Binding | None:
        """Which thread works on which queue at first."""
        return self.plan.binding if self.plan else None
