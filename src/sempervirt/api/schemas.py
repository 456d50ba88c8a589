"""What the API says, as types; the command line prints the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

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


class DiskView(BaseModel):
    """A disk of a running VM. `backend` is the active backend's own status, if it answers."""

    name: str
    condition: str
    reason: str = Field(description="why the last backend ended")
    image: Path
    size_bytes: int | None
    read_only: bool
    binary: str
    upgrade_available: bool = Field(description="the installed program is another one")
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
