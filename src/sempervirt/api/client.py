"""The client of the agent's API. Errors are those that the agent raised."""

from __future__ import annotations

import codecs
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter

from sempervirt.api.event_schemas import AnnouncedView, GapView, read_messages
from sempervirt.api.guard_schemas import (
    DecisionView,
    GuardView,
    SimulatedView,
    SimulateRequest,
)
from sempervirt.api.schemas import (
    AgentView,
    DeviceView,
    DiskView,
    EnableStandbyRequest,
    ExportedView,
    ExportRequest,
    FailoverRequest,
    GuardRequest,
    HostView,
    LayersView,
    LogView,
    LossView,
    MapView,
    MergeRequest,
    MergingView,
    MigrateRequest,
    ObstacleView,
    QemuRestartView,
    RehearsalView,
    RescuedView,
    RescueRequest,
    ResizedView,
    ResizeRequest,
    ResolvedView,
    ResolveRequest,
    RestartQemuRequest,
    RestoreRequest,
    SavedView,
    SaveRequest,
    SnapshotRequest,
    SnapshotView,
    StandbyView,
    StopRequest,
    ThreadsRequest,
    UnpinRequest,
    UpgradeRequest,
    VmView,
)
from sempervirt.core.errors import (
    InvalidRequest,
)
from sempervirt.core.names import split_disk_name
from sempervirt.disk.image_format import ImageFormat
from sempervirt.evacuation.messages import (
    CapacityView,
    EvacuateRequest,
    EvacuationView,
    PlacesView,
    PlanView,
    ReturnRequest,
    ServiceView,
)
from sempervirt.guard.signs import SignId
from sempervirt.host.http import Connection
from sempervirt.migration.messages import MigrationView
from sempervirt.qemu.spec import VmSpec
from sempervirt.renewal.snapshot import Freezing

# Starting a VM, upgrading a disk: bounded by the agent's own deadlines.
WORK_TIMEOUT_S = 150.0
# Comparing all of a guest's memory with its disk.
MAP_TIMEOUT_S = 660.0

# A stream says that it is alive every 15 s.
EVENTS_TIMEOUT_S = 60.0

_START = "start one: semperd; or run a VM in the foreground: semper vm run FILE"
# Packing all of a guest's memory, or copying its disks.
SAVE_TIMEOUT_S = 3900.0
# Another host may be asked first.
ENABLE_TIMEOUT_S = 60.0

View = TypeVar("View", bound=BaseModel)


class Client:
    """Speaks to one agent. Made by `connect`. Each call raises what the agent raised;
    AgentUnavailable when none answers; OutcomeUnknown when it stopped answering midway.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def connect(cls, socket: Path) -> AsyncIterator[Client]:
        """A client for the agent at `socket`; whether it is there shows in the first call."""
        async with Connection.to_socket(socket, _START) as connection:
            yield cls(connection)

    @classmethod
    @asynccontextmanager
    async def connect_host(
        cls, address: str, host: str, tls: ssl.SSLContext
    ) -> AsyncIterator[Client]:
        """A client for the agent of another host. It has to prove that it is `host`."""
        async with Connection.to_host(address, host, tls) as connection:
            yield cls(connection)

    async def agent(self) -> AgentView:
        """The agent itself."""
        return AgentView.model_validate(await self._connection.call("GET", "/agent"))

    async def host(self) -> HostView:
        """What the host offers."""
        return HostView.model_validate(await self._connection.call("GET", "/host"))

    async def metrics(self) -> str:
        """What Prometheus would read."""
        return await self._connection.text("/metrics")

    async def plan_evacuation(self, request: EvacuateRequest) -> PlanView:
        """What would be done to empty the host."""
        body, path = request.model_dump(mode="json"), "/host/evacuation/plan"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return PlanView.model_validate(answer)

    async def evacuate_host(self, request: EvacuateRequest) -> EvacuationView:
        """Begins to empty the host."""
        body = request.model_dump(mode="json")
        answer = await self._connection.call("POST", "/host/evacuation", body=body)
        return EvacuationView.model_validate(answer)

    async def evacuation(self) -> EvacuationView:
        """The last evacuation of the host."""
        return EvacuationView.model_validate(await self._connection.call("GET", "/host/evacuation"))

    async def cancel_evacuation(self) -> EvacuationView:
        """Has stay what has not left the host yet."""
        return EvacuationView.model_validate(
            await self._connection.call("DELETE", "/host/evacuation")
        )

    async def return_host(self, *, after_shutdown: bool = False) -> ServiceView:
        """Puts the host into service again; if that is wanted, only after a shutdown."""
        body = ReturnRequest(after_shutdown=after_shutdown).model_dump()
        answer = await self._connection.call("POST", "/host/return", body=body)
        return ServiceView.model_validate(answer)

    async def vms(self) -> list[VmView]:
        """All VMs."""
        return TypeAdapter(list[VmView]).validate_python(await self._connection.call("GET", "/vms"))

    async def vm(self, name: str) -> VmView:
        """One VM."""
        return VmView.model_validate(await self._connection.call("GET", f"/vms/{name}"))

    async def run_vm(self, spec: VmSpec) -> VmView:
        """Starts a VM."""
        body = spec.model_dump(mode="json")
        answer = await self._connection.call("POST", "/vms", body=body, timeout_s=WORK_TIMEOUT_S)
        return VmView.model_validate(answer)

    async def start_vm(self, name: str) -> VmView:
        """See `Agent.start_vm`; from a kept state it takes as long as a restore."""
        answer = await self._connection.call("POST", f"/vms/{name}/start", timeout_s=SAVE_TIMEOUT_S)
        return VmView.model_validate(answer)

    async def pause_vm(self, name: str) -> VmView:
        """Stops the processors."""
        return VmView.model_validate(await self._connection.call("POST", f"/vms/{name}/pause"))

    async def resume_vm(self, name: str) -> VmView:
        """Lets a paused guest run on."""
        return VmView.model_validate(await self._connection.call("POST", f"/vms/{name}/resume"))

    async def stop_vm(self, name: str, grace_s: float) -> VmView:
        """Asks the guest to power off and waits for the end."""
        body = StopRequest(grace_s=grace_s).model_dump()
        timeout_s = WORK_TIMEOUT_S + grace_s
        answer = await self._connection.call(
            "POST", f"/vms/{name}/stop", body=body, timeout_s=timeout_s
        )
        return VmView.model_validate(answer)

    async def kill_vm(self, name: str) -> VmView:
        """Ends QEMU at once."""
        answer = await self._connection.call("POST", f"/vms/{name}/kill", timeout_s=WORK_TIMEOUT_S)
        return VmView.model_validate(answer)

    async def restart_qemu(self, name: str, qemu: Path | None) -> QemuRestartView:
        """Moves a VM to a new QEMU process."""
        body = RestartQemuRequest(qemu=qemu).model_dump(mode="json")
        path = f"/vms/{name}/restart-qemu"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return QemuRestartView.model_validate(answer)

    async def save_vm(self, name: str, file: Path | None) -> SavedView:
        """Saves a VM to a file on the agent's host, by default one that the next start of the VM
        takes, and ends the VM.
        """
        body = SaveRequest(file=file).model_dump(mode="json")
        answer = await self._connection.call(
            "POST", f"/vms/{name}/save", body=body, timeout_s=SAVE_TIMEOUT_S
        )
        return SavedView.model_validate(answer)

    async def restore_vm(self, request: RestoreRequest) -> VmView:
        """Makes a VM from a saved state."""
        body = request.model_dump(mode="json")
        answer = await self._connection.call(
            "POST", "/vms/restore", body=body, timeout_s=SAVE_TIMEOUT_S
        )
        return VmView.model_validate(answer)

    async def forget_vm(self, name: str) -> None:
        """Drops a VM that has ended."""
        await self._connection.call("DELETE", f"/vms/{name}")

    async def places(self, name: str) -> PlacesView:
        """Which hosts a VM could move to, the best first."""
        path = f"/vms/{name}/places"
        answer = await self._connection.call("GET", path, timeout_s=WORK_TIMEOUT_S)
        return PlacesView.model_validate(answer)

    async def capacity(self, lost: int) -> CapacityView:
        """Whether the VMs of the cluster have room when so many hosts are lost."""
        query = {"lost": lost}
        answer = await self._connection.call(
            "GET", "/host/capacity", query=query, timeout_s=WORK_TIMEOUT_S
        )
        return CapacityView.model_validate(answer)

    async def migration_obstacles(self, name: str, host: str) -> list[ObstacleView]:
        """Every reason that would stop a migration of a VM to another host."""
        query = {"host": host}
        path = f"/vms/{name}/migration/obstacles"
        answer = await self._connection.call("GET", path, query=query, timeout_s=WORK_TIMEOUT_S)
        return TypeAdapter(list[ObstacleView]).validate_python(answer)

    async def migrate(self, name: str, request: MigrateRequest) -> MigrationView:
        """Begins to move a VM to another host."""
        body = request.model_dump(mode="json")
        path = f"/vms/{name}/migration"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return MigrationView.model_validate(answer)

    async def migration(self, name: str) -> MigrationView:
        """The last migration of a VM from this agent's host."""
        return MigrationView.model_validate(
            await self._connection.call("GET", f"/vms/{name}/migration")
        )

    async def cancel_migration(self, name: str) -> MigrationView:
        """Has the VM stay; answers when the move is over."""
        path = f"/vms/{name}/migration"
        answer = await self._connection.call("DELETE", path, timeout_s=WORK_TIMEOUT_S)
        return MigrationView.model_validate(answer)

    async def guard(self) -> GuardView:
        """How the guard of the host stands."""
        return GuardView.model_validate(await self._connection.call("GET", "/guard"))

    async def guard_events(self) -> list[DecisionView]:
        """What the guard has decided."""
        answer = await self._connection.call("GET", "/guard/events")
        return TypeAdapter(list[DecisionView]).validate_python(answer)

    async def simulate_sign(self, sign: SignId, *, act: bool) -> SimulatedView:
        """What the guard would decide; with `act` it is done."""
        body = SimulateRequest(sign=sign, act=act).model_dump(mode="json")
        answer = await self._connection.call("POST", "/guard/simulate", body=body)
        return SimulatedView.model_validate(answer)

    async def resolve(self, name: str, owner: str, evidence: str) -> ResolvedView:
        """Gives a VM of which the whereabouts are unknown to a host."""
        body = ResolveRequest(owner=owner, evidence=evidence).model_dump()
        path = f"/vms/{name}/resolve"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return ResolvedView.model_validate(answer)

    async def vm_log(self, name: str, source: str, lines: int) -> LogView:
        """The end of a log."""
        query = {"source": source, "lines": lines}
        answer = await self._connection.call("GET", f"/vms/{name}/logs", query=query)
        return LogView.model_validate(answer)

    async def disks(self) -> list[DiskView]:
        """The disks of all running VMs."""
        return TypeAdapter(list[DiskView]).validate_python(
            await self._connection.call("GET", "/disks")
        )

    async def disk(self, name: str) -> DiskView:
        """One disk, VM/DISK."""
        return DiskView.model_validate(await self._connection.call("GET", _disk_path(name)))

    async def guard_disk(self, name: str, request: GuardRequest) -> DiskView:
        """See `Agent.guard_disk`."""
        body = request.model_dump(mode="json")
        path = f"{_disk_path(name)}/guard"
        answer = await self._connection.call("PUT", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return DiskView.model_validate(answer)

    async def unguard_disk(self, name: str, *, force: bool) -> None:
        """See `Guarded.unguard`."""
        query = {"force": force}
        path = f"{_disk_path(name)}/guard"
        await self._connection.call("DELETE", path, query=query, timeout_s=WORK_TIMEOUT_S)

    async def devices(self) -> list[DeviceView]:
        """The passed-through devices of all running VMs."""
        return TypeAdapter(list[DeviceView]).validate_python(
            await self._connection.call("GET", "/passthrough")
        )

    async def device(self, name: str) -> DeviceView:
        """One passed-through device, VM/DEVICE."""
        path = _disk_path(name).replace("/disks/", "/passthrough/", 1)
        return DeviceView.model_validate(await self._connection.call("GET", path))

    async def rescue_disk(self, name: str, target: Path) -> RescuedView:
        """Copies the image of a running disk."""
        body = RescueRequest(to=target).model_dump(mode="json")
        path = f"{_disk_path(name)}/rescue"
        answer = await self._connection.call("POST", path, body=body, timeout_s=SAVE_TIMEOUT_S)
        return RescuedView.model_validate(answer)

    async def snapshot_vm(
        self, name: str, disks: Sequence[str], freezing: Freezing
    ) -> SnapshotView:
        """Takes a snapshot of disks of a VM; with no names, of all that are writable."""
        body = SnapshotRequest(disks=list(disks), freezing=freezing).model_dump(mode="json")
        path = f"/vms/{name}/snapshot"
        answer = await self._connection.call("POST", path, body=body, timeout_s=SAVE_TIMEOUT_S)
        return SnapshotView.model_validate(answer)

    async def standbys(self) -> list[StandbyView]:
        """The standbys of all VMs that have some."""
        answer = await self._connection.call("GET", "/standbys")
        return [StandbyView.model_validate(one) for one in answer]

    async def standby(self, name: str) -> StandbyView:
        """The standbys of a VM."""
        answer = await self._connection.call("GET", f"/vms/{name}/standby")
        return StandbyView.model_validate(answer)

    async def losses(self, name: str) -> list[LossView]:
        """What take-overs of a VM have lost."""
        answer = await self._connection.call("GET", f"/vms/{name}/standby/lost")
        return [LossView.model_validate(one) for one in answer]

    async def enable_standby(self, name: str, request: EnableStandbyRequest) -> StandbyView:
        """Has a VM have standbys, kept so; does not wait until one is ready."""
        body = request.model_dump(mode="json")
        path = f"/vms/{name}/standby"
        answer = await self._connection.call("PUT", path, body=body, timeout_s=ENABLE_TIMEOUT_S)
        return StandbyView.model_validate(answer)

    async def failover_standby(self, name: str, request: FailoverRequest) -> StandbyView:
        """Has a standby take over; answers when its guest runs."""
        path, body = f"/vms/{name}/standby/failover", request.model_dump(mode="json")
        answer = await self._connection.call("POST", path, body=body, timeout_s=SAVE_TIMEOUT_S)
        return StandbyView.model_validate(answer)

    async def cancel_standby(self, name: str) -> StandbyView:
        """Calls a take-over off that waits."""
        answer = await self._connection.call("POST", f"/vms/{name}/standby/cancel")
        return StandbyView.model_validate(answer)

    async def test_standby(self, name: str) -> RehearsalView:
        """Has a copy of the newest standby go on, isolated."""
        path = f"/vms/{name}/standby/test"
        answer = await self._connection.call("POST", path, timeout_s=SAVE_TIMEOUT_S)
        return RehearsalView.model_validate(answer)

    async def disable_standby(self, name: str, *, forget: bool) -> None:
        """Removes the standbys of a VM."""
        path, query = f"/vms/{name}/standby", {"forget": forget}
        await self._connection.call("DELETE", path, query=query, timeout_s=SAVE_TIMEOUT_S)

    async def layers(self, name: str) -> LayersView:
        """The layers of a disk, VM/DISK."""
        path = f"{_disk_path(name)}/layers"
        return LayersView.model_validate(await self._connection.call("GET", path))

    async def merge_layers(
        self, name: str, through: int | None, rate_bytes: int | None
    ) -> MergingView:
        """Gives snapshots of a disk up, and begins to merge; of an ended VM it merges."""
        body = MergeRequest(through=through, rate_bytes=rate_bytes).model_dump()
        path = f"{_disk_path(name)}/merge"
        answer = await self._connection.call("POST", path, body=body, timeout_s=SAVE_TIMEOUT_S)
        return MergingView.model_validate(answer)

    async def export_snapshot(
        self, name: str, snapshot: int, target: Path, image_format: ImageFormat
    ) -> ExportedView:
        """Writes a snapshot of a disk to a file of the agent's host."""
        request = ExportRequest(snapshot=snapshot, to=target, format=image_format)
        path, body = f"{_disk_path(name)}/export", request.model_dump(mode="json")
        answer = await self._connection.call("POST", path, body=body, timeout_s=SAVE_TIMEOUT_S)
        return ExportedView.model_validate(answer)

    async def unpin_snapshot(self, name: str, snapshot: int, reader: str) -> LayersView:
        """Says that a reader does not read a snapshot of a disk any more."""
        body = UnpinRequest(snapshot=snapshot, reader=reader).model_dump()
        path = f"{_disk_path(name)}/unpin"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return LayersView.model_validate(answer)

    async def resize_disk(self, name: str, size_bytes: int) -> ResizedView:
        """Makes a disk larger."""
        body = ResizeRequest(size_bytes=size_bytes).model_dump()
        path = f"{_disk_path(name)}/resize"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return ResizedView.model_validate(answer)

    async def upgrade_disk(self, name: str, binary: Path | None) -> DiskView:
        """Serves a disk from another binary."""
        body = UpgradeRequest(binary=binary).model_dump(mode="json")
        path = f"{_disk_path(name)}/upgrade"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return DiskView.model_validate(answer)

    async def move_queues(
        self,
        name: str,
        *,
        thread_map: Sequence[int] | None = None,
        queues_per_thread: int | None = None,
    ) -> DiskView:
        """Moves a disk's queues to other threads; give one of both."""
        map_asked = None if thread_map is None else list(thread_map)
        body = ThreadsRequest(map=map_asked, queues_per_thread=queues_per_thread).model_dump()
        path = f"{_disk_path(name)}/threads"
        answer = await self._connection.call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return DiskView.model_validate(answer)

    async def block_map(self, name: str) -> MapView:
        """Which blocks of a disk stand in which pages, in numbers."""
        return MapView.model_validate(await self._connection.call("GET", f"{_disk_path(name)}/map"))

    async def verify_block_map(self, name: str) -> MapView:
        """Begins to compare every page with the disk."""
        return MapView.model_validate(
            await self._connection.call("POST", f"{_disk_path(name)}/map/verify")
        )

    async def events(
        self, *, after: str = "", follow: bool = False
    ) -> AsyncIterator[AnnouncedView | GapView]:
        """What happened after the event with that id ("": all that is kept); with `follow` also
        what happens, until the agent ends.
        """
        query, rest = {"after": after, "follow": follow}, ""
        decoder = codecs.getincrementaldecoder("utf-8")()
        pieces = self._connection.pieces("/events", query=query, timeout_s=EVENTS_TIMEOUT_S)
        async for piece in pieces:
            found, rest = read_messages(rest + decoder.decode(piece))
            for event in found:
                yield event

    async def export_block_map(self, name: str, *, verify: bool = True) -> AsyncIterator[bytes]:
        """The map as bytes (docs/reference/map-format.md), in pieces."""
        path = f"{_disk_path(name)}/map/export"
        query = {"verify": verify}
        async for piece in self._connection.pieces(path, query=query, timeout_s=MAP_TIMEOUT_S):
            yield piece


def _disk_path(name: str) -> str:
    try:
        vm, disk = split_disk_name(name)
    except ValueError as error:
        raise InvalidRequest.of(error) from error
    return f"/disks/{vm}/{disk}"
