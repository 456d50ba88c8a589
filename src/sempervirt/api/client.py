"""The client of the agent's API. Errors are those that the agent raised."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter

from sempervirt.api.schemas import (
    AgentView,
    DiskView,
    ErrorView,
    HostView,
    JoinRequest,
    JoinView,
    LogView,
    MapView,
    MigrateRequest,
    ObstacleView,
    QemuRestartView,
    ResolvedView,
    ResolveRequest,
    RestartQemuRequest,
    RestoreRequest,
    SavedView,
    SaveRequest,
    StopRequest,
    ThreadsRequest,
    UpgradeRequest,
    VmView,
)
from sempervirt.core.errors import (
    AgentUnavailable,
    InvalidRequest,
    NotAllowed,
    OutcomeUnknown,
    SempervirtError,
    from_wire,
)
from sempervirt.core.names import split_disk_name
from sempervirt.migration.messages import ArrivalAnswer, ArrivalRequest, MigrationView, RunRequest
from sempervirt.migration.obstacles import HostSide
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.phases import Arrival

READ_TIMEOUT_S = 20.0
# Beside what it was asked to wait, another host answers at once.
ARRIVAL_TIMEOUT_S = 4.0
# Starting a VM, upgrading a disk: bounded by the agent's own deadlines.
WORK_TIMEOUT_S = 150.0
# Comparing all of a guest's memory with its disk.
MAP_TIMEOUT_S = 660.0

_START = "start one: semperd; or run a VM in the foreground: semper vm run FILE"
# Packing all of a guest's memory, or copying its disks.
SAVE_TIMEOUT_S = 3900.0

View = TypeVar("View", bound=BaseModel)


class Client:
    """Speaks to one agent. Made by `connect`. Each call raises what the agent raised;
    AgentUnavailable when none answers; OutcomeUnknown when it stopped answering midway.
    """

    def __init__(self, http: httpx.AsyncClient, place: str, remedy: str) -> None:
        self._http = http
        self._place = place
        self._remedy = remedy

    @classmethod
    @asynccontextmanager
    async def connect(cls, socket: Path) -> AsyncIterator[Client]:
        """A client for the agent at `socket`; whether it is there shows in the first call."""
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent/v1") as http:
            yield cls(http, str(socket), _START)

    @classmethod
    @asynccontextmanager
    async def connect_host(
        cls, address: str, host: str, tls: ssl.SSLContext
    ) -> AsyncIterator[Client]:
        """A client for the agent of another host. It has to prove that it is `host`."""

        async def expect(request: httpx.Request) -> None:
            request.extensions["sni_hostname"] = host

        async with httpx.AsyncClient(
            verify=tls,
            base_url=f"https://{address}/v1",
            trust_env=False,
            event_hooks={"request": [expect]},
        ) as http:
            yield cls(http, address, f"is semperd running on {host}, and is {address} right?")

    async def join(self, request: str, address: str) -> JoinView:
        """Asks for the certificate of a new host; the client shows an invitation."""
        body = JoinRequest(request=request, address=address).model_dump()
        return JoinView.model_validate(await self._call("POST", "/join", body=body))

    async def agent(self) -> AgentView:
        """The agent itself."""
        return AgentView.model_validate(await self._call("GET", "/agent"))

    async def host(self) -> HostView:
        """What the host offers."""
        return HostView.model_validate(await self._call("GET", "/host"))

    async def vms(self) -> list[VmView]:
        """All VMs."""
        return TypeAdapter(list[VmView]).validate_python(await self._call("GET", "/vms"))

    async def vm(self, name: str) -> VmView:
        """One VM."""
        return VmView.model_validate(await self._call("GET", f"/vms/{name}"))

    async def run_vm(self, spec: VmSpec) -> VmView:
        """Starts a VM."""
        body = spec.model_dump(mode="json")
        answer = await self._call("POST", "/vms", body=body, timeout_s=WORK_TIMEOUT_S)
        return VmView.model_validate(answer)

    async def pause_vm(self, name: str) -> VmView:
        """Stops the processors."""
        return VmView.model_validate(await self._call("POST", f"/vms/{name}/pause"))

    async def resume_vm(self, name: str) -> VmView:
        """Lets a paused guest run on."""
        return VmView.model_validate(await self._call("POST", f"/vms/{name}/resume"))

    async def stop_vm(self, name: str, grace_s: float) -> VmView:
        """Asks the guest to power off and waits for the end."""
        body = StopRequest(grace_s=grace_s).model_dump()
        timeout_s = WORK_TIMEOUT_S + grace_s
        answer = await self._call("POST", f"/vms/{name}/stop", body=body, timeout_s=timeout_s)
        return VmView.model_validate(answer)

    async def kill_vm(self, name: str) -> VmView:
        """Ends QEMU at once."""
        answer = await self._call("POST", f"/vms/{name}/kill", timeout_s=WORK_TIMEOUT_S)
        return VmView.model_validate(answer)

    async def restart_qemu(self, name: str, qemu: Path | None) -> QemuRestartView:
        """Moves a VM to a new QEMU process."""
        body = RestartQemuRequest(qemu=qemu).model_dump(mode="json")
        path = f"/vms/{name}/restart-qemu"
        answer = await self._call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return QemuRestartView.model_validate(answer)

    async def save_vm(self, name: str, file: Path) -> SavedView:
        """Saves a VM and ends it."""
        body = SaveRequest(file=file).model_dump(mode="json")
        answer = await self._call("POST", f"/vms/{name}/save", body=body, timeout_s=SAVE_TIMEOUT_S)
        return SavedView.model_validate(answer)

    async def restore_vm(self, request: RestoreRequest) -> VmView:
        """Makes a VM from a saved state."""
        body = request.model_dump(mode="json")
        answer = await self._call("POST", "/vms/restore", body=body, timeout_s=SAVE_TIMEOUT_S)
        return VmView.model_validate(answer)

    async def forget_vm(self, name: str) -> None:
        """Drops a VM that has ended."""
        await self._call("DELETE", f"/vms/{name}")

    async def migration_side(self, spec: VmSpec) -> HostSide:
        """What this agent's host, as a destination, is, has and sees of a VM."""
        body = spec.model_dump(mode="json")
        answer = await self._call("POST", "/migration/side", body=body)
        return TypeAdapter(HostSide).validate_python(answer)

    async def migration_obstacles(self, name: str, host: str) -> list[ObstacleView]:
        """Every reason that would stop a migration of a VM to another host."""
        query = {"host": host}
        path = f"/vms/{name}/migration/obstacles"
        answer = await self._call("GET", path, query=query, timeout_s=WORK_TIMEOUT_S)
        return TypeAdapter(list[ObstacleView]).validate_python(answer)

    async def migrate(self, name: str, request: MigrateRequest) -> MigrationView:
        """Begins to move a VM to another host."""
        body = request.model_dump(mode="json")
        path = f"/vms/{name}/migration"
        answer = await self._call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return MigrationView.model_validate(answer)

    async def migration(self, name: str) -> MigrationView:
        """The last migration of a VM from this agent's host."""
        return MigrationView.model_validate(await self._call("GET", f"/vms/{name}/migration"))

    async def cancel_migration(self, name: str) -> MigrationView:
        """Has the VM stay; answers when it does."""
        path = f"/vms/{name}/migration"
        answer = await self._call("DELETE", path, timeout_s=WORK_TIMEOUT_S)
        return MigrationView.model_validate(answer)

    async def resolve(self, name: str, owner: str, evidence: str) -> ResolvedView:
        """Gives a VM of which the whereabouts are unknown to a host."""
        body = ResolveRequest(owner=owner, evidence=evidence).model_dump()
        path = f"/vms/{name}/resolve"
        answer = await self._call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return ResolvedView.model_validate(answer)

    # What hosts say to each other

    async def prepare_arrival(self, request: ArrivalRequest) -> ArrivalAnswer:
        """Has this host prepare for a VM; answers when all is ready."""
        body = request.model_dump(mode="json")
        answer = await self._call("POST", "/arrivals", body=body, timeout_s=WORK_TIMEOUT_S)
        return ArrivalAnswer.model_validate(answer)

    async def arrival(self, migration: str, seen: Arrival, wait_s: float) -> ArrivalAnswer:
        """How far it is; answers when that is not `seen` any more, or after `wait_s`."""
        query = {"seen": seen.value, "wait_s": wait_s}
        path, timeout_s = f"/arrivals/{migration}", wait_s + ARRIVAL_TIMEOUT_S
        answer = await self._call("GET", path, query=query, timeout_s=timeout_s)
        return ArrivalAnswer.model_validate(answer)

    async def promise_arrival(self, migration: str) -> None:
        """Has this host wait for the outcome from now on."""
        await self._call("POST", f"/arrivals/{migration}/promise")

    async def recover_arrival(self, migration: str) -> ArrivalAnswer:
        """Has this host wait for a stream that broke in postcopy."""
        path = f"/arrivals/{migration}/recover"
        return ArrivalAnswer.model_validate(await self._call("POST", path))

    async def run_arrival(self, migration: str, request: RunRequest) -> None:
        """Tells this host that the VM is its own; answers when it runs."""
        path = f"/arrivals/{migration}/run"
        await self._call("POST", path, body=request.model_dump(), timeout_s=WORK_TIMEOUT_S)

    async def abort_arrival(self, migration: str, why: str) -> None:
        """Tells this host that the VM does not come."""
        path = f"/arrivals/{migration}/abort"
        await self._call("POST", path, query={"why": why}, timeout_s=ARRIVAL_TIMEOUT_S)

    async def vm_log(self, name: str, source: str, lines: int) -> LogView:
        """The end of a log."""
        query = {"source": source, "lines": lines}
        answer = await self._call("GET", f"/vms/{name}/logs", query=query)
        return LogView.model_validate(answer)

    async def disks(self) -> list[DiskView]:
        """The disks of all running VMs."""
        return TypeAdapter(list[DiskView]).validate_python(await self._call("GET", "/disks"))

    async def disk(self, name: str) -> DiskView:
        """One disk, VM/DISK."""
        return DiskView.model_validate(await self._call("GET", _disk_path(name)))

    async def upgrade_disk(self, name: str, binary: Path | None) -> DiskView:
        """Serves a disk from another binary."""
        body = UpgradeRequest(binary=binary).model_dump(mode="json")
        path = f"{_disk_path(name)}/upgrade"
        answer = await self._call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
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
        answer = await self._call("POST", path, body=body, timeout_s=WORK_TIMEOUT_S)
        return DiskView.model_validate(answer)

    async def block_map(self, name: str) -> MapView:
        """Which blocks of a disk stand in which pages, in numbers."""
        return MapView.model_validate(await self._call("GET", f"{_disk_path(name)}/map"))

    async def verify_block_map(self, name: str) -> MapView:
        """Begins to compare every page with the disk."""
        return MapView.model_validate(await self._call("POST", f"{_disk_path(name)}/map/verify"))

    async def export_block_map(self, name: str, *, verify: bool = True) -> AsyncIterator[bytes]:
        """The map in its binary form, in pieces."""
        path = f"{_disk_path(name)}/map/export"
        query = {"verify": verify}
        with self._failures(f"GET {path}"):
            async with self._http.stream(
                "GET", path, params=query, timeout=MAP_TIMEOUT_S
            ) as response:
                if response.is_error:
                    await response.aread()
                    raise _failure(response)
                async for piece in response.aiter_bytes():
                    yield piece

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: dict[str, Any] | None = None,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> Any:
        with self._failures(f"{method} {path}"):
            response = await self._http.request(
                method, path, json=body, params=query, timeout=timeout_s
            )
        if response.is_error:
            raise _failure(response)
        return response.json() if response.content else None

    @contextmanager
    def _failures(self, asked: str) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _unreachable(self._place, self._remedy, error) from error
        except (httpx.HTTPError, ssl.SSLError) as error:  # httpx lets late alerts of TLS pass
            raise OutcomeUnknown(
                f"the agent did not answer {asked}: {error!r}",
                remedy="ask again what the state is",
            ) from error


def _unreachable(place: str, remedy: str, error: Exception) -> SempervirtError:
    """Nothing was asked: nobody is there, or somebody else than expected."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return NotAllowed(
            f"who answers at {place} is not to be trusted: {cause.verify_message}",
            remedy="check the address; was the certificate replaced, or has it expired?",
        )
    return AgentUnavailable(f"no agent answers at {place}", remedy=remedy)


def _disk_path(name: str) -> str:
    try:
        vm, disk = split_disk_name(name)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    return f"/disks/{vm}/{disk}"


def _failure(response: httpx.Response) -> SempervirtError:
    """The error that a response carries."""
    try:
        body = ErrorView.model_validate_json(response.content).error
    except ValueError:
        return OutcomeUnknown(
            f"the agent answered {response.status_code} without saying why",
            remedy="look at the agent's log",
        )
    return from_wire(body.kind, body.message, body.remedy)
