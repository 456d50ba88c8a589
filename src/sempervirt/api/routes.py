"""The routes of version 1."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, status
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from sempervirt.agent.agent import Agent
from sempervirt.api.reach import Caller
from sempervirt.api.rights import CallerHere
from sempervirt.api.schemas import (
    AgentView,
    DiskView,
    ExportedView,
    ExportRequest,
    GuardRequest,
    HostView,
    LayersView,
    LogView,
    MapView,
    MergeRequest,
    MergingView,
    QemuRestartView,
    RescuedView,
    RescueRequest,
    ResizedView,
    ResizeRequest,
    RestartQemuRequest,
    RestoreRequest,
    SavedView,
    SaveRequest,
    SnapshotRequest,
    SnapshotView,
    StopRequest,
    ThreadsRequest,
    UnpinRequest,
    UpgradeRequest,
    VmView,
)
from sempervirt.api.views import (
    agent_view,
    disk_view,
    host_view,
    own_disk_view,
    vm_view,
    vm_views,
    waiting_disk_view,
)
from sempervirt.cluster.certificate import RenewRequest, RenewView, read_standing
from sempervirt.cluster.cluster import Cluster, check_address
from sempervirt.cluster.joining import JoinRequest, JoinView
from sempervirt.core.errors import InvalidRequest, NotAllowed, NotFound, Unavailable
from sempervirt.core.names import split_disk_name, suggest
from sempervirt.core.queue_map import Binding, spread
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.state import Condition
from sempervirt.host import process
from sempervirt.host.http import ErrorView
from sempervirt.qemu import saved
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.renewal.restore.plan import Changes, plan_of
from sempervirt.vm.autostart import kept_state
from sempervirt.vm.groups import why_no_groups
from sempervirt.vm.guarded import GuardedDisk
from sempervirt.vm.user import why_no_users
from sempervirt.vm.vm import Vm

EJECTED = (
    "the guest has unplugged it; its image is free when the VM has ended, and semper vm "
    "restart-qemu puts it into its slot again"
)

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}})


# Coroutines, all of them: for a plain function a thread is made, which a dying host may refuse.
async def _agent(request: Request) -> Agent:
    agent = request.app.state.agent
    assert isinstance(agent, Agent)
    return agent


AgentHere = Annotated[Agent, Depends(_agent)]


async def _vm(name: str, agent: AgentHere) -> Vm:
    return agent.vm(name)


VmHere = Annotated[Vm, Depends(_vm)]


@router.get("/agent", tags=["host"])
async def get_agent(agent: AgentHere) -> AgentView:
    """The agent itself."""
    return agent_view(agent)


@router.get("/host", tags=["host"])
async def get_host(agent: AgentHere) -> HostView:
    """What the host offers to VMs."""
    standing = await asyncio.to_thread(read_standing, agent.config)
    no_users, no_groups = why_no_users(agent.config), why_no_groups(agent.config)
    return host_view(await agent.host(), standing, no_users, no_groups, agent.service.why_not)


@router.post("/join", tags=["host"])
async def join(request: Request, caller: CallerHere, body: JoinRequest) -> JoinView:
    """Issues the certificate of a host. Only for the holder of an invitation, over TLS."""
    cluster = request.app.state.cluster
    if not isinstance(cluster, Cluster) or caller.peer is None:
        raise NotAllowed("hosts join over TLS, with an invitation")
    address = check_address(body.address)
    issued, credentials = await cluster.admit(caller.peer, body.request, address, body.level)
    settings = cluster.settings
    return JoinView(
        certificate=issued.pem,
        cluster=settings.cluster,
        store=list(settings.store),
        store_user=credentials.user,
        store_password=credentials.password,
        doors=cluster.doors,
    )


@router.post("/renew", tags=["host"])
async def renew_certificate(request: Request, caller: CallerHere, body: RenewRequest) -> RenewView:
    """Issues another certificate for the host that shows one, of the same name. Only over TLS, by
    the host that has the authority.
    """
    cluster = request.app.state.cluster
    if not isinstance(cluster, Cluster) or caller.peer is None:
        raise NotAllowed("certificates are renewed over TLS, for hosts")
    issued = await cluster.renew(caller.peer, body.request)
    return RenewView(certificate=issued.pem, time=time.time())


@router.get("/vms", tags=["vm"])
async def list_vms(agent: AgentHere) -> list[VmView]:
    """All VMs, also those that have ended, and those that are unknown."""
    return vm_views(agent)


@router.post("/vms", tags=["vm"], status_code=status.HTTP_201_CREATED)
async def run_vm(agent: AgentHere, caller: CallerHere, spec: VmSpec) -> VmView:
    """Starts a VM; answers when QEMU runs it."""
    await caller.require_spec(agent.config, spec)
    return vm_view(await agent.run_vm(spec))


@router.get("/vms/{name}", tags=["vm"])
async def get_vm(agent: AgentHere, name: str) -> VmView:
    """One VM."""
    return vm_view(agent.unknown.get(name) or agent.vm(name))


@router.delete("/vms/{name}", tags=["vm"], status_code=status.HTTP_204_NO_CONTENT)
async def forget_vm(agent: AgentHere, name: str) -> None:
    """Takes a VM that has ended off the list; deletes its logs and its firmware's variables."""
    await agent.remove_vm(name)


@router.post("/vms/{name}/start", tags=["vm"])
async def start_vm(agent: AgentHere, name: str) -> VmView:
    """Starts a VM that has ended, as it was last started, or where its state was kept; answers when
    QEMU runs it.
    """
    return vm_view(await agent.start_vm(name))


@router.post("/vms/{name}/pause", tags=["vm"])
async def pause_vm(vm: VmHere) -> VmView:
    """Stops the processors."""
    await vm.pause()
    return vm_view(vm)


@router.post("/vms/{name}/resume", tags=["vm"])
async def resume_vm(vm: VmHere) -> VmView:
    """Lets a paused guest run on."""
    await vm.resume()
    return vm_view(vm)


@router.post("/vms/{name}/stop", tags=["vm"])
async def stop_vm(agent: AgentHere, vm: VmHere, request: StopRequest) -> VmView:
    """Asks the guest to power off; answers when QEMU has ended."""
    await agent.standbys.call_off(vm.name)
    await vm.stop(request.grace_s)
    return vm_view(vm)


@router.post("/vms/{name}/kill", tags=["vm"])
async def kill_vm(agent: AgentHere, name: str) -> VmView:
    """Ends QEMU at once, and settles a VM that is unknown; answers when its disks are free."""
    await agent.standbys.call_off(name)
    return vm_view(await agent.kill_vm(name))


@router.post("/vms/{name}/restart-qemu", tags=["vm"])
async def restart_qemu(
    agent: AgentHere, caller: CallerHere, name: str, request: RestartQemuRequest
) -> QemuRestartView:
    """Moves a running VM to a new QEMU process; answers when that one runs the guest."""
    caller.require_installed(request.qemu)
    done = await agent.restart_qemu(name, request.qemu)
    return QemuRestartView(vm=name, **asdict(done))


@router.post("/vms/{name}/save", tags=["vm"])
async def save_vm(
    agent: AgentHere, caller: CallerHere, name: str, request: SaveRequest
) -> SavedView:
    """Saves a VM to a file and ends the VM; answers when the file is durable."""
    if request.file is not None:
        await caller.require_new_saved(agent.config, request.file)
    file = request.file or kept_state(agent.config.state_dir, name)
    if request.file is None:
        try:
            await asyncio.to_thread(file.parent.mkdir, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(
                f"{file.parent} cannot be made: {error.strerror}",
                remedy="see why; or name a file for the state elsewhere",
            ) from error
    done = await agent.save_vm(name, file)
    figures = done.figures.model_dump()
    size = figures.pop("file")
    return SavedView(vm=name, file=file, size=size, paused_ms=done.paused_ms, **figures)


@router.post("/vms/restore", tags=["vm"], status_code=status.HTTP_201_CREATED)
async def restore_vm(agent: AgentHere, caller: CallerHere, request: RestoreRequest) -> VmView:
    """Makes a VM from a saved state; answers when it runs on, or is paused as it was."""
    changes = Changes(request.name, request.images, request.taps, request.new_macs)
    if not caller.local:
        await _require_restorable(agent, caller, request, changes)
    if request.copy_disks_to is not None:
        vm = await agent.clone_vm(request.file, request.copy_disks_to, changes)
    else:
        vm = await agent.restore_vm(request.file, changes)
    return vm_view(vm)


async def _require_restorable(
    agent: Agent, caller: Caller, request: RestoreRequest, changes: Changes
) -> None:
    """Raises NotAllowed unless all that is read and written is what the caller may name: also what
    the saved state itself names, which whoever can write to its directory has chosen.
    """
    config = agent.config
    await caller.require_saved(config, request.file)
    shown = await saved.show(request.file)
    await caller.require_images(config, shown.images.values())
    await caller.require_spec(config, plan_of(shown, changes).spec)
    if request.copy_disks_to is not None:
        await caller.require_images(config, [request.copy_disks_to])


@router.get("/vms/{name}/logs", tags=["vm"])
async def get_vm_log(
    vm: VmHere,
    source: str = "console",
    lines: Annotated[int, Query(ge=1, le=10000)] = 100,
) -> LogView:
    """The end of a log: `console`, `qemu`, or the name of a disk, for the process that serves it;
    `DISK:spare` and `DISK:previous` for the one that waits, and the last one that has ended.
    """
    files = vm.machine.files
    paths = {"console": files.console_log, "qemu": files.log}
    for disk in vm.spec.disks:
        logs = DiskFiles(files.directory, disk.name).logs()
        paths[disk.name] = logs[-1] if logs else files.directory / f"disk-{disk.name}.log"
        if (served := vm.disks.get(disk.name)) is not None:
            own = served.logs.items()
            paths |= {f"{disk.name}:{role}" if role else disk.name: log for role, log in own}
    if source not in paths:
        known = ", ".join(paths)
        raise InvalidRequest(
            f"VM {vm.name} has no log {source}; there are: {known}", remedy=suggest(source, paths)
        )
    return LogView(path=paths[source], lines=process.tail_of(paths[source], lines))


@router.get("/disks", tags=["disk"])
async def list_disks(agent: AgentHere) -> list[DiskView]:
    """The disks of all running VMs, also those that QEMU itself serves."""
    views = await asyncio.gather(
        *(disk_view(disk) for disk in agent.disks.values()),
        *(own_disk_view(vm, disk) for vm, disk in agent.own_disks.values()),
    )
    views += [waiting_disk_view(agent.guarded, name) for name in agent.guarded.waiting]
    return sorted((_unless_ejected(agent, view) for view in views), key=lambda view: view.name)


@router.get("/disks/{vm}/{disk}", tags=["disk"])
async def get_disk(agent: AgentHere, vm: str, disk: str) -> DiskView:
    """One disk."""
    if f"{vm}/{disk}" in agent.guarded.waiting:
        return waiting_disk_view(agent.guarded, f"{vm}/{disk}")
    own = agent.own_disks.get(f"{vm}/{disk}")
    view = await (own_disk_view(*own) if own else disk_view(agent.disk(f"{vm}/{disk}")))
    return _unless_ejected(agent, view)


def _unless_ejected(agent: Agent, view: DiskView) -> DiskView:
    """The view of a disk; of one that its guest has ejected, that."""
    vm, disk = split_disk_name(view.name)
    owner = agent.vms.get(vm)
    if owner is None or not owner.has_ejected(disk):
        return view
    return view.model_copy(update={"condition": Condition.EJECTED, "reason": EJECTED})


@router.post("/disks/{vm}/{disk}/upgrade", tags=["disk"])
async def upgrade_disk(
    agent: AgentHere, caller: CallerHere, vm: str, disk: str, request: UpgradeRequest
) -> DiskView:
    """Serves a disk from another binary; answers when that one serves."""
    caller.require_installed(request.binary)
    found = agent.disk(f"{vm}/{disk}")
    await found.upgrade(str(request.binary) if request.binary else None)
    return _unless_ejected(agent, await disk_view(found))


@router.post("/disks/{vm}/{disk}/resize", tags=["disk"])
async def resize_disk(agent: AgentHere, vm: str, disk: str, request: ResizeRequest) -> ResizedView:
    """Makes a disk larger while its guest runs; answers when all of it is served."""
    done = await agent.resize_disk(f"{vm}/{disk}", request.size_bytes)
    return ResizedView(disk=f"{vm}/{disk}", size_bytes=done.size_bytes, told=done.told)


@router.put("/disks/{vm}/{disk}/guard", tags=["disk"], status_code=status.HTTP_201_CREATED)
async def guard_disk(
    agent: AgentHere, caller: CallerHere, vm: str, disk: str, request: GuardRequest
) -> DiskView:
    """Serves an image to the QEMU of another manager; answers when it is served."""
    if request.socket is not None and not caller.local:
        raise NotAllowed("where the socket is, is not chosen from elsewhere", remedy="leave it out")
    await caller.require_images(agent.config, [request.image])
    options = request.model_dump(exclude={"socket", "owner", "group", "mode"}, exclude_none=True)
    try:
        described = DiskSpec.model_validate({"name": disk, **options})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InvalidRequest(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    wanted = GuardedDisk(
        vm=vm,
        disk=described,
        socket=request.socket,
        owner=request.owner,
        group=request.group,
        mode=request.mode,
    )
    return await disk_view(await agent.guard_disk(wanted))


@router.delete("/disks/{vm}/{disk}/guard", tags=["disk"], status_code=status.HTTP_204_NO_CONTENT)
async def unguard_disk(
    agent: AgentHere, vm: str, disk: str, *, force: Annotated[bool, Query()] = False
) -> None:
    """Ends the backends of such a disk; answers when the image is free."""
    await agent.guarded.unguard(f"{vm}/{disk}", force=force)


@router.post("/disks/{vm}/{disk}/rescue", tags=["disk"])
async def rescue_disk(
    agent: AgentHere, caller: CallerHere, vm: str, disk: str, request: RescueRequest
) -> RescuedView:
    """Copies the image of a running disk while the guest stands still; answers when the copy is
    durable.
    """
    await caller.require_new_image(agent.config, request.to)
    done = await agent.rescue_disk(f"{vm}/{disk}", request.to)
    return RescuedView(
        disk=f"{vm}/{disk}", path=request.to, paused_ms=done.paused_ms, **asdict(done.made)
    )


@router.post("/vms/{name}/snapshot", tags=["disk"], status_code=status.HTTP_201_CREATED)
async def snapshot_vm(agent: AgentHere, name: str, request: SnapshotRequest) -> SnapshotView:
    """Takes a snapshot of a VM's disks at one instant; answers when it is sealed."""
    done = await agent.snapshot_vm(name, request.disks, request.freezing)
    return SnapshotView(vm=name, **asdict(done))


@router.get("/disks/{vm}/{disk}/layers", tags=["disk"])
async def get_layers(agent: AgentHere, vm: str, disk: str) -> LayersView:
    """The layers of a disk, its snapshots, and who reads them."""
    name = f"{vm}/{disk}"
    layers = await agent.disk(name).active().layers()
    return LayersView(disk=name, **layers.model_dump())


@router.post("/disks/{vm}/{disk}/merge", tags=["disk"])
async def merge_layers(agent: AgentHere, vm: str, disk: str, request: MergeRequest) -> MergingView:
    """Gives snapshots up and begins to merge; answers at once, and the layers tell how far it is:
    those that are merged are gone. For a VM that has ended it answers when they are.
    """
    name = f"{vm}/{disk}"
    layers, done = await agent.merge_layers(name, request.through, request.rate_bytes)
    return MergingView(disk=name, merging=list(layers), done=done)


@router.post("/disks/{vm}/{disk}/unpin", tags=["disk"])
async def unpin_snapshot(agent: AgentHere, vm: str, disk: str, request: UnpinRequest) -> LayersView:
    """Forgets a reader that died."""
    backend = agent.disk(f"{vm}/{disk}").active()
    pins = (await backend.layers()).pins
    if not any((one.snapshot, one.reader) == (request.snapshot, request.reader) for one in pins):
        found = ", ".join(f"{one.reader} reads {one.snapshot}" for one in pins)
        raise NotFound(
            f"{request.reader} reads no snapshot {request.snapshot} of {vm}/{disk}",
            remedy=found or f"nobody reads one: semper disk snapshots {vm}/{disk}",
        )
    await backend.unpin(request.snapshot, request.reader)
    return await get_layers(agent, vm, disk)


@router.post("/disks/{vm}/{disk}/export", tags=["disk"], status_code=status.HTTP_201_CREATED)
async def export_snapshot(
    agent: AgentHere, caller: CallerHere, vm: str, disk: str, request: ExportRequest
) -> ExportedView:
    """Writes a snapshot to a file; answers when the file is durable."""
    await caller.require_new_image(agent.config, request.to)
    name = f"{vm}/{disk}"
    done = await agent.export_snapshot(name, request.snapshot, request.to, request.format)
    return ExportedView(disk=name, snapshot=request.snapshot, **asdict(done))


@router.post("/disks/{vm}/{disk}/threads", tags=["disk"])
async def move_queues(agent: AgentHere, vm: str, disk: str, request: ThreadsRequest) -> DiskView:
    """Moves a disk's queues to other threads under way; answers when the queues are there."""
    found = agent.disk(f"{vm}/{disk}")
    if request.queues_per_thread is not None:
        thread_map = spread(found.setup.options.queues, request.queues_per_thread)
    else:
        thread_map = tuple(request.map or ())
    await found.rebind(Binding(thread_map, "semper disk threads"))
    return _unless_ejected(agent, await disk_view(found))


@router.get("/disks/{vm}/{disk}/map", tags=["disk"])
async def get_map(agent: AgentHere, vm: str, disk: str) -> MapView:
    """Which blocks stand in which pages of the guest's memory, in numbers."""
    name = f"{vm}/{disk}"
    block_map = await agent.disk(name).block_map()
    return MapView(disk=name, **block_map.model_dump(mode="json"))


@router.post("/disks/{vm}/{disk}/map/verify", tags=["disk"])
async def verify_map(agent: AgentHere, vm: str, disk: str) -> MapView:
    """Begins to compare every page in memory with the disk, and answers at once; the map tells
    how far that is.
    """
    await agent.disk(f"{vm}/{disk}").verify_block_map()
    return await get_map(agent, vm, disk)


@router.get(
    "/disks/{vm}/{disk}/map/export",
    tags=["disk"],
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
async def export_map(
    agent: AgentHere, vm: str, disk: str, *, verify: bool = True
) -> StreamingResponse:
    """The map as bytes (docs/reference/map-format.md): verified first, or as recorded."""
    pieces = aiter(agent.disk(f"{vm}/{disk}").export_block_map(verify=verify))
    # An error must come before the answer has begun.
    first = await anext(pieces)

    async def _all() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(_all(), media_type="application/octet-stream")
