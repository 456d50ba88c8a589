"""A control group for each VM (`host.groups`): what it may have of the host, so that no guest keeps
the agent, or the host, from working.

An agent that is a service puts each process of a VM into the VM's group, within a second of its
start; an agent in a command leaves the command's group as it is. Ends of moves and what saves or
restores a VM stay in the agent's group.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from sempervirt.host.groups import OFF, VARIABLE, WEIGHT_MAX, Groups, Limits, find_base, tag_of
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

LOOK_S = 1.0
# Before all VMs together, as far as a weight can be.
AGENT_WEIGHT = WEIGHT_MAX
# So many times less than a VM of its size has what gives way.
GIVES_WAY = 10
# Threads of QEMU and of the backends, and some hundreds that do I/O for a moment.
TASKS = 4096
# Beside the guest's memory: QEMU, and the page cache of disks that it serves itself.
MEMORY_OVERHEAD = 4 << 30


def limits_of(spec: VmSpec) -> Limits:
    """What a VM may have: of processors as many turns as it has of its own, if others want some."""
    return Limits(
        weight=100 * (spec.vcpus + 1),
        memory_bytes=spec.memory + spec.memory // 4 + MEMORY_OVERHEAD,
        tasks=TASKS,
    )


def with_groups(config: AgentConfig, environment: Mapping[str, str] = os.environ) -> AgentConfig:
    """The same, with groups for its VMs, for an agent that is a process of its own: this one, which
    has a group of its own from now on.
    """
    return replace(config, groups=_groups(config, environment))


def _groups(config: AgentConfig, environment: Mapping[str, str]) -> Groups | str:
    if environment.get(VARIABLE) == OFF:
        return f"{VARIABLE}={OFF}"
    try:
        base = find_base()
        groups = Groups(base, tag_of(config.run_dir))
        if not base.places:
            return groups.missing
        groups.enter(AGENT_WEIGHT)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return groups


def why_no_groups(config: AgentConfig) -> str:
    """What the VMs of this host have no limits in, and why; "" when all have all limits."""
    return config.groups if isinstance(config.groups, str) else config.groups.missing


async def keep_groups(
    vms: Callable[[], Iterable[Vm]], beside: Callable[[], Iterable[Beside]], groups: Groups
) -> None:
    """Puts processes where they belong, until it is cancelled. What runs `beside` the VMs has
    groups of its own as well: that of the agent goes before all VMs.
    """
    told = ""
    try:
        while True:
            wanted = [_wanted(vm) for vm in vms() if not vm.freed]
            wanted += [_wanted(one.vm, one) for one in beside() if not one.vm.freed]
            # To move a process the kernel waits for all processors, some milliseconds.
            said = await asyncio.to_thread(put, wanted, groups)
            if said and said != told:
                log.warning("groups: %s", said)
            told = said
            await asyncio.sleep(LOOK_S)
    finally:
        groups.leave()


@dataclass(frozen=True)
class Beside:
    """What runs beside the VMs, and may be one later: a standby. `group` is its name among groups,
    which no VM can have; one that `gives_way` will never be a VM.
    """

    vm: Vm
    group: str
    gives_way: bool


@dataclass(frozen=True)
class Wanted:
    """The processes of a VM: its QEMUs, and those that serve its disks and devices."""

    vm: str
    guests: tuple[int, ...]
    others: tuple[int, ...]
    limits: Limits


def put(wanted: Collection[Wanted], groups: Groups) -> str:
    """Puts the processes of all VMs into their groups; what went wrong, "" when nothing did."""
    said = ""
    for one in wanted:
        try:
            groups.hold(one.vm, one.guests, one.others, one.limits)
        except OSError as error:
            said = f"vm {one.vm}: {error.filename}: {error.strerror}"
    groups.remove_all_but([one.vm for one in wanted])
    return said


def _wanted(vm: Vm, beside: Beside | None = None) -> Wanted:
    qemus = [vm.pid, *(one.pid for one in vm.record.qemus if one.is_alive())]
    others = [pid for disk in vm.disks.values() for pid in disk.backends.pids]
    devices = [pid for one in vm.devices.values() for pid in (one.pid, one.spare_pid)]
    limits = limits_of(vm.spec)
    if beside is not None and beside.gives_way:
        limits = replace(limits, weight=limits.weight // GIVES_WAY)
    return Wanted(
        vm.name if beside is None else beside.group,
        tuple(dict.fromkeys(pid for pid in qemus if pid is not None)),
        (*others, *(pid for pid in devices if pid is not None)),
        limits,
    )
