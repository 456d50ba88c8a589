"""The routes of a migration: what would stop it, how it goes, and what hosts say to each other."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, status

from sempervirt.agent.agent import Agent
from sempervirt.api.rights import CallerHere
from sempervirt.api.routes import AgentHere, VmHere
from sempervirt.api.schemas import (
    HostSideView,
    ImageSeenView,
    MigrateRequest,
    ObstacleView,
    ResolvedView,
    ResolveRequest,
)
from sempervirt.cluster.cluster import Cluster, read_settings
from sempervirt.core.errors import NotAllowed
from sempervirt.host.http import ErrorView
from sempervirt.migration import moves
from sempervirt.migration.messages import (
    ArrivalAnswer,
    ArrivalRequest,
    DeviceRounds,
    DeviceStates,
    MigrationView,
    RunRequest,
)
from sempervirt.migration.sides import find_destination, side_of
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.phases import Arrival

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["migration"])


async def _host(caller: CallerHere) -> str:
    if caller.peer is None:
        raise NotAllowed("only another host of the cluster sends a VM here")
    return caller.peer.name


HostThere = Annotated[str, Depends(_host)]


@router.post("/migration/side")
async def migration_side(
    agent: AgentHere, caller: CallerHere, source: HostThere, spec: VmSpec
) -> HostSideView:
    """What this host is, has and sees of a VM that may come here. Changes nothing."""
    await caller.require_spec(agent.config, spec)
    await moves.require_owned(agent, spec, source)
    present = agent.vms.get(spec.name) or agent.unknown.get(spec.name)
    state = present.run if present else None
    facts = await agent.host()
    side = await side_of(
        facts,
        _own_name(agent),
        spec,
        vm_state=state,
        source=False,
        memory_left=agent.memory_left,
    )
    return HostSideView(
        name=side.name,
        accelerator=side.accelerator,
        qemu_version=side.qemu_version,
        cpu_model=side.cpu_model,
        cpu_flags=sorted(side.cpu_flags),
        memory_available=side.memory_available,
        processors=side.processors,
        vm_state=side.vm_state,
        images={
            name: ImageSeenView(id=seen.id, block_device=seen.block_device, problem=seen.problem)
            for name, seen in side.images.items()
        },
        missing=list(side.missing),
        passes_through=side.passes_through,
    )


@router.get("/vms/{name}/migration/obstacles")
async def migration_obstacles(agent: AgentHere, vm: VmHere, host: str) -> list[ObstacleView]:
    """Every reason that would stop a migration of a VM to `host`.

    Gives each image an id, if it has none, by a small file beside it.
    """
    async with Cluster.opened(agent.config) as cluster:
        member = await find_destination(cluster, host)
        found = await moves.find_obstacles(agent, vm, cluster, member)
    return [ObstacleView(what=obstacle.what, remedy=obstacle.remedy) for obstacle in found]


@router.post("/vms/{name}/migration", status_code=status.HTTP_202_ACCEPTED)
async def migrate_vm(agent: AgentHere, name: str, body: MigrateRequest) -> MigrationView:
    """Begins to move a VM to another host; ask again for how far it is."""
    return (await moves.depart(agent, name, body.to, body.policy)).view()


@router.get("/vms/{name}/migration")
async def get_migration(vm: VmHere) -> MigrationView:
    """The last migration of a VM from this host."""
    return moves.source_of(vm).view()


@router.delete("/vms/{name}/migration")
async def cancel_migration(vm: VmHere) -> MigrationView:
    """Has the VM stay; answers when the move is over. Too late once the store was asked."""
    moving = moves.source_of(vm)
    await moving.cancel()
    return moving.view()


@router.post("/vms/{name}/resolve")
async def resolve_vm(agent: AgentHere, name: str, body: ResolveRequest) -> ResolvedView:
    """Gives a VM of which the whereabouts are unknown to a host, on evidence."""
    message = await moves.resolve(agent, name, body.owner, body.evidence)
    return ResolvedView(vm=name, owner=body.owner, message=message)


# What hosts say to each other; nobody else is heard.


@router.post("/arrivals", status_code=status.HTTP_201_CREATED)
async def prepare_arrival(
    agent: AgentHere, caller: CallerHere, source: HostThere, body: ArrivalRequest
) -> ArrivalAnswer:
    """Prepares for a VM that comes from the host that asks; answers when all is ready."""
    await caller.require_spec(agent.config, body.spec)
    return (await moves.receive(agent, body, source)).answer()


@router.get("/arrivals/{migration}")
async def get_arrival(
    agent: AgentHere,
    source: HostThere,
    migration: str,
    seen: Arrival,
    wait_s: Annotated[float, Query(ge=0, le=10)] = 0.0,
) -> ArrivalAnswer:
    """How far the arrival is; answers when the phase is not `seen` any more, or after `wait_s`."""
    return await moves.destination_of(agent, migration, source).answer_after(seen, wait_s)


@router.post("/arrivals/{migration}/promise", status_code=status.HTTP_204_NO_CONTENT)
async def promise_arrival(agent: AgentHere, source: HostThere, migration: str) -> None:
    """From now on this host waits for the outcome."""
    await moves.destination_of(agent, migration, source).promise()


@router.post("/arrivals/{migration}/devices/round", status_code=status.HTTP_204_NO_CONTENT)
async def replay_devices(
    agent: AgentHere, source: HostThere, migration: str, body: DeviceRounds
) -> None:
    """Sets registers of passed-through devices as the guest has set them at the source."""
    await moves.destination_of(agent, migration, source).replay(body.writes)


@router.post("/arrivals/{migration}/devices", status_code=status.HTTP_204_NO_CONTENT)
async def receive_devices(
    agent: AgentHere, source: HostThere, migration: str, body: DeviceStates
) -> None:
    """The state of every passed-through device; answers when it is kept here."""
    await moves.destination_of(agent, migration, source).receive(body)


@router.post("/arrivals/{migration}/recover")
async def recover_arrival(agent: AgentHere, source: HostThere, migration: str) -> ArrivalAnswer:
    """Waits for a stream that broke in postcopy, on a new wire."""
    return await moves.destination_of(agent, migration, source).recover()


@router.post("/arrivals/{migration}/run", status_code=status.HTTP_204_NO_CONTENT)
async def run_arrival(
    agent: AgentHere, source: HostThere, migration: str, body: RunRequest
) -> None:
    """The VM is this host's; answers when it runs."""
    await moves.destination_of(agent, migration, source).run(body.epoch, body.claim)


@router.post("/arrivals/{migration}/abort", status_code=status.HTTP_204_NO_CONTENT)
async def abort_arrival(agent: AgentHere, source: HostThere, migration: str, why: str = "") -> None:
    """The VM does not come."""
    await moves.destination_of(agent, migration, source).abort(why)


def _own_name(agent: Agent) -> str:
    settings = read_settings(agent.config)
    return settings.host if settings else "this host"
