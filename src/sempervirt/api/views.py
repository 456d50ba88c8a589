"""What the agent's objects look like to the API."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from functools import partial

import sempervirt
from sempervirt.agent.agent import Agent
from sempervirt.api.schemas import (
    AgentView,
    DiskView,
    EndView,
    EventView,
    HostView,
    QueuesView,
    RestartView,
    VmView,
    WorkView,
)
from sempervirt.cluster.standing import Standing
from sempervirt.core.errors import InvalidRequest, SempervirtError, Unavailable
from sempervirt.core.events import Journal
from sempervirt.core.queue_map import DevicePlan
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import ImageState
from sempervirt.disk.state import Condition
from sempervirt.disk.takeover import Restart
from sempervirt.disk.volume import inspect
from sempervirt.host.storage_call import call_storage
from sempervirt.host.walls import walls_missing_here
from sempervirt.migration.source.migration import SourceMigration
from sempervirt.qemu.command_line import disk_id
from sempervirt.qemu.facts import HostFacts
from sempervirt.qemu.spec import DiskSpec
from sempervirt.vm.guarded import Guarded
from sempervirt.vm.unknown import UnknownVm
from sempervirt.vm.vm import Vm

# How long a backend or an image may take to answer whoever looks at disks.
ANSWER_S = 2.0


def agent_view(agent: Agent) -> AgentView:
    """The agent that this process is."""
    return AgentView(
        version=sempervirt.__version__,
        pid=os.getpid(),
        started=agent.started,
        state_dir=agent.config.state_dir,
        run_dir=agent.config.run_dir,
    )


def host_view(
    facts: HostFacts,
    certificate: Standing | None,
    no_users: str,
    no_groups: str,
    out_of_service: str = "",
) -> HostView:
    """What the host offers. `no_users` is why VMs have no users of their own, `no_groups` what they
    are not limited in; "" when nothing is missing.
    """
    features = facts.features
    fine = "reconnect-ms" in features.chardev_options
    return HostView(
        accelerator=facts.accelerator.kind,
        accelerator_reason=facts.accelerator.reason,
        qemu=facts.qemu,
        qemu_version=features.version,
        machines=sorted({"q35", "pc"} & features.machines),
        networks=sorted({"user", "tap"} & features.netdevs),
        thread_maps=sorted(features.mapped_devices),
        reconnect="milliseconds" if fine else "whole seconds",
        sandbox=features.sandbox,
        missing_walls=walls_missing_here(no_users, no_groups),
        certificate=certificate,
        out_of_service=out_of_service,
    )


def vm_view(vm: Vm | UnknownVm) -> VmView:
    """A VM."""
    return _unknown_view(vm) if isinstance(vm, UnknownVm) else _known_view(vm)


def vm_views(agent: Agent) -> list[VmView]:
    """All VMs of a host, by name."""
    vms: dict[str, Vm | UnknownVm] = {**agent.vms, **agent.unknown}
    return [vm_view(vm) for _, vm in sorted(vms.items())]


def _unknown_view(vm: UnknownVm) -> VmView:
    """A VM of which only that is told which was seen, or could be read."""
    record, end = vm.record, vm.end
    spec = record.spec if record else None
    return VmView(
        name=vm.name,
        state=vm.run,
        why=vm.why,
        remedy=vm.remedy if end is None else "",
        pid=vm.pid,
        accelerator=record.accelerator.kind if record else None,
        memory=spec.memory if spec else None,
        vcpus=spec.vcpus if spec else None,
        started=record.started if record else None,
        resets=0,
        disks=[disk.name for disk in vm.disks.values()],
        queues={},
        channels={},
        console=vm.files.console,
        end=EndView(reason=end.reason, exit_code=None, signal=None, log=[]) if end else None,
        events=_events(vm.journal),
        spec=spec,
    )


def _known_view(vm: Vm) -> VmView:
    files = vm.machine.files
    state, why = vm.shown
    return VmView(
        name=vm.name,
        state=state,
        why="; ".join(part for part in (why, vm.ailments) if part),
        pid=vm.pid,
        accelerator=vm.record.accelerator.kind,
        memory=vm.spec.memory,
        vcpus=vm.spec.vcpus,
        started=vm.machine.started,
        resets=vm.state.resets,
        disks=[f"{vm.name}/{disk.name}" for disk in vm.spec.disks],
        queues={name: queues_view(plan) for name, plan in vm.plans.items()},
        channels={channel.name: files.channel(channel) for channel in vm.spec.channels},
        console=files.console,
        end=_end_view(vm),
        work=WorkView(**asdict(vm.progress)) if vm.progress else None,
        migration=vm.moving.view() if isinstance(vm.moving, SourceMigration) else None,
        events=_events(vm.machine.journal),
        spec=vm.spec,
    )


def _end_view(vm: Vm) -> EndView | None:
    end = vm.end
    if end is None:
        return None
    return EndView(reason=end.reason, exit_code=end.exit_code, signal=end.signal, log=vm.log_tail())


async def disk_view(disk: Disk) -> DiskView:
    """A disk; its backend is asked now, and what it does not answer is told as such."""
    silence, status = "", None
    if disk.setup.command.has_control:
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await disk.status()
        except SempervirtError as error:
            silence = error.message
        except TimeoutError:
            silence = f"backend {disk.active_pid} has not answered for {ANSWER_S:g} s"
    volume = disk.setup.volume
    return DiskView(
        name=disk.name,
        condition=disk.condition,
        reason=disk.reason,
        image=disk.setup.options.image,
        image_state=disk.image.finding.state,
        image_finding=str(disk.image.finding),
        size_bytes=status.size_bytes if status else volume and volume.size_bytes,
        read_only=disk.setup.options.read_only,
        binary=disk.binary,
        upgrade_available=disk.upgrade_available,
        active_pid=disk.active_pid,
        spare_pid=disk.spare_pid,
        spare_ready=disk.spare_ready,
        generation=disk.generation,
        restart_count=disk.restart_count,
        upgrade_count=disk.upgrade_count,
        socket=disk.setup.files.socket if disk.setup.is_guarded else None,
        queues=queues_view(disk.plan) if disk.plan else None,
        restarts=[_restart_view(restart) for restart in disk.restarts],
        last_error=disk.last_error.model_dump(mode="json") if disk.last_error else None,
        backend=status.model_dump(mode="json") if status else None,
        silence=silence,
        events=_events(disk.journal),
    )


async def own_disk_view(vm: Vm, disk: DiskSpec) -> DiskView:
    """A disk that QEMU itself serves."""
    view = _unsupervised_view(f"{vm.name}/{disk.name}", disk, Condition.QEMU)
    size, queues = await _size_bytes(disk), queues_view(vm.plans[disk_id(disk)])
    return view.model_copy(update={"size_bytes": size, "active_pid": vm.pid, "queues": queues})


def waiting_disk_view(guarded: Guarded, name: str) -> DiskView:
    """A disk of another manager's VM that cannot be served now, with the cause."""
    wanted, cause = guarded.wanted[name], guarded.waiting[name]
    view = _unsupervised_view(name, wanted.disk, Condition.FAILING)
    reason = "; ".join(part for part in (cause.message, cause.remedy) if part)
    return view.model_copy(update={"reason": reason, "socket": guarded.socket(wanted)})


def _unsupervised_view(name: str, disk: DiskSpec, condition: Condition) -> DiskView:
    return DiskView(
        name=name,
        condition=condition,
        reason="",
        image=disk.image,
        image_state=ImageState.IN_PLACE,
        image_finding="",
        size_bytes=None,
        read_only=disk.read_only,
        binary="",
        upgrade_available=False,
        active_pid=None,
        spare_pid=None,
        spare_ready=False,
        generation=0,
        restart_count=0,
        upgrade_count=0,
        queues=None,
        restarts=[],
        last_error=None,
        backend=None,
        silence="",
        events=[],
    )


async def _size_bytes(disk: DiskSpec) -> int | None:
    look = partial(inspect, disk.image, read_only=True)
    try:
        return (await call_storage(disk.image, look, ANSWER_S)).size_bytes
    except (InvalidRequest, Unavailable):
        return None  # it was removed under the VM, or its storage hangs


def queues_view(plan: DevicePlan) -> QueuesView:
    """How the queues of a device are served."""
    return QueuesView(
        device=plan.device,
        queues=plan.binding.queues,
        threads=plan.binding.threads,
        map=list(plan.binding.map),
        map_source=plan.binding.source,
        engine=plan.engine.value,
        engine_source=plan.engine.source,
        poll_us=plan.poll_us,
        poll_source=plan.poll_source,
        summary=str(plan),
    )


def _restart_view(restart: Restart) -> RestartView:
    return RestartView(
        time=restart.time,
        generation=restart.generation,
        reason=restart.reason,
        planned=restart.planned,
        successor=restart.successor,
        successor_pid=restart.successor_pid,
        replayed=restart.replayed,
        kept_connection=restart.kept_connection,
        milestones_ms=restart.milestones_ms,
    )


def _events(journal: Journal) -> list[EventView]:
    return [
        EventView(time=event.time, kind=event.kind, message=event.message)
        for event in journal.events
    ]
