"""What the API says, as types; the command line prints the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field

from sempervirt.agent.agent import Agent
from sempervirt.agent.host import HostFacts
from sempervirt.agent.vm import Vm
from sempervirt.core.errors import SempervirtError
from sempervirt.core.events import Event
from sempervirt.disk.disk import Disk
from sempervirt.disk.takeover import Restart
from sempervirt.vm.spec import VmSpec
from sempervirt.vm.states import Runstate

API_VERSION = 1


class ErrorBody(BaseModel):
    """An error, named by its remedy; `kind` is from the table in sempervirt.core.errors."""

    kind: str
    message: str
    remedy: str = ""


class ErrorView(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


class EventView(BaseModel):
    """Something that happened. `time` is in seconds since the epoch."""

    time: float
    kind: str
    message: str

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(time=event.time, kind=event.kind, message=event.message)


class AgentView(BaseModel):
    """The agent itself."""

    api: int = API_VERSION
    version: str
    pid: int
    started: float
    state_dir: Path
    run_dir: Path


class HostView(BaseModel):
    """What the host offers to VMs."""

    accelerator: str
    accelerator_reason: str
    qemu: str
    qemu_version: str
    machines: list[str]
    networks: list[str]
    reconnect: str = Field(description="how QEMU connects to a disk again")
    sandbox: bool

    @classmethod
    def of(cls, facts: HostFacts) -> Self:
        features = facts.features
        fine = "reconnect-ms" in features.chardev_options
        return cls(
            accelerator=facts.accelerator.kind,
            accelerator_reason=facts.accelerator.reason,
            qemu=facts.qemu,
            qemu_version=features.version,
            machines=sorted({"q35", "pc"} & features.machines),
            networks=sorted({"user", "tap"} & features.netdevs),
            reconnect="milliseconds" if fine else "whole seconds",
            sandbox=features.sandbox,
        )


class EndView(BaseModel):
    """How a VM ended."""

    reason: str
    exit_code: int | None
    signal: int | None
    log: list[str] = Field(description="the last lines that QEMU wrote")


class VmView(BaseModel):
    """A VM."""

    name: str
    state: Runstate
    why: str
    pid: int | None
    accelerator: str
    memory: int
    vcpus: int
    started: float
    resets: int
    disks: list[str]
    channels: dict[str, Path]
    console: Path
    end: EndView | None
    events: list[EventView]
    spec: VmSpec

    @classmethod
    def of(cls, vm: Vm) -> Self:
        files, end = vm.machine.files, vm.end
        return cls(
            name=vm.name,
            state=vm.run,
            why=vm.state.why,
            pid=vm.pid,
            accelerator=vm.record.accelerator.kind,
            memory=vm.spec.memory,
            vcpus=vm.spec.vcpus,
            started=vm.machine.started,
            resets=vm.state.resets,
            disks=[f"{vm.name}/{disk.name}" for disk in vm.spec.disks],
            channels={c.name: files.channel(c) for c in vm.spec.channels},
            console=files.console,
            end=end
            and EndView(
                reason=end.reason,
                exit_code=end.exit_code,
                signal=end.signal,
                log=vm.log_tail(),
            ),
            events=[EventView.of(event) for event in vm.machine.journal.events],
            spec=vm.spec,
        )


class RestartView(BaseModel):
    """One change of a disk's active backend.

    `milestones_ms` counts from when the agent saw the end of the old process; a negative
    number means that the successor was there before the agent woke.
    """

    time: float
    generation: int
    reason: str
    planned: bool
    successor: int | None
    successor_pid: int | None
    replayed: int | None
    milestones_ms: dict[str, float | None]

    @classmethod
    def of(cls, restart: Restart) -> Self:
        return cls(
            time=restart.time,
            generation=restart.generation,
            reason=restart.reason,
            planned=restart.planned,
            successor=restart.successor,
            successor_pid=restart.successor_pid,
            replayed=restart.replayed,
            milestones_ms=restart.milestones_ms,
        )


class DiskView(BaseModel):
    """A disk of a running VM. `backend` is the active backend's own status, if it answers."""

    name: str
    condition: str
    reason: str = Field(description="why the last backend ended")
    image: Path
    size_bytes: int | None
    read_only: bool
    binary: str
    active_pid: int | None
    standby_pid: int | None
    standby_ready: bool
    generation: int
    restart_count: int
    upgrade_count: int
    restarts: list[RestartView]
    last_error: dict[str, Any] | None
    backend: dict[str, Any] | None
    events: list[EventView]

    @classmethod
    async def of(cls, disk: Disk) -> Self:
        try:
            backend = await disk.status() if disk.setup.command.has_control else None
        except SempervirtError:
            backend = None  # it has just ended, or hangs; the rest says more
        volume = disk.setup.volume
        return cls(
            name=disk.name,
            condition=disk.condition,
            reason=disk.reason,
            image=disk.setup.options.image,
            size_bytes=volume.size_bytes if volume else None,
            read_only=disk.setup.options.read_only,
            binary=disk.state.active.binary if disk.state.active else disk.state.binary,
            active_pid=disk.active_pid,
            standby_pid=disk.standby_pid,
            standby_ready=disk.standby_ready,
            generation=disk.generation,
            restart_count=disk.restart_count,
            upgrade_count=disk.upgrade_count,
            restarts=[RestartView.of(restart) for restart in disk.restarts],
            last_error=disk.last_error,
            backend=backend,
            events=[EventView.of(event) for event in disk.journal.events],
        )


class LogView(BaseModel):
    """The end of a log, and where it stands."""

    path: Path
    lines: list[str]


class StopRequest(BaseModel):
    """How long the guest may take to power off."""

    grace_s: float = Field(default=60.0, ge=0, le=3600)


class UpgradeRequest(BaseModel):
    """The binary to serve from; by default the installed one."""

    binary: Path | None = None


def agent_view(agent: Agent, version: str, pid: int) -> AgentView:
    """The agent's view of itself."""
    return AgentView(
        version=version,
        pid=pid,
        started=agent.started,
        state_dir=agent.config.state_dir,
        run_dir=agent.config.run_dir,
    )
