"""The VMs of one host, as the rooms see them that work with all of them: the agent is a `House`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from sempervirt.cluster.service import Service
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.unknown import UnknownVm
from sempervirt.vm.vm import Vm


class House(Protocol):
    """What the agent has. `unknown` are VMs of which something may run that the agent could not
    take over; `launching` those of which QEMU is being started and which are not among `vms` yet.
    """

    config: AgentConfig
    vms: dict[str, Vm]
    unknown: dict[str, UnknownVm]
    launching: dict[str, VmSpec]
    service: Service

    async def host(self) -> HostFacts:
        """What this host offers. Raises Unavailable."""
        ...

    def vm(self, name: str) -> Vm:
        """The VM of that name. Raises NotFound, StateConflict."""
        ...


@dataclass
class Adopted:
    """What an earlier agent has left running, by name; each VM is in one of the two."""

    vms: dict[str, Vm] = field(default_factory=dict)
    unknown: dict[str, UnknownVm] = field(default_factory=dict)
