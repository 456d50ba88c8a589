"""How the VMs of a host are run: where their files are, and by which programs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sempervirt.disk.backend import BackendCommand, Blkd
from sempervirt.disk.state import Policy
from sempervirt.host.places import Places, default_run_dir, default_state_dir
from sempervirt.qemu.link import Patience


@dataclass(frozen=True)
class AgentConfig(Places):
    """With `keep_vms` the VMs run on when the agent closes; otherwise they are killed.

    `backend`, `policy` and `patience` are there for tests. `qemu` is looked up on the PATH
    if it is not given.
    """

    keep_vms: bool = False
    qemu: str | None = None
    backend: BackendCommand = field(default_factory=Blkd)
    policy: Policy = field(default_factory=Policy)
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def default(cls, *, keep_vms: bool = False) -> AgentConfig:
        """The directories of this user."""
        return cls(default_state_dir(), default_run_dir(), keep_vms=keep_vms)
