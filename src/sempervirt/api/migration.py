"""The routes of a migration: what would stop it. What carries one out comes later."""

from __future__ import annotations

from fastapi import APIRouter

from sempervirt.agent.agent import Agent
from sempervirt.agent.cluster import Cluster, read_settings
from sempervirt.agent.moving import find_destination, membership_obstacles, side_of
from sempervirt.api.client import Client
from sempervirt.api.routes import AgentHere, VmHere
from sempervirt.api.schemas import ErrorView, HostSideView, ImageSeenView, ObstacleView
from sempervirt.core.errors import SempervirtError
from sempervirt.migration.obstacles import HostSide, Obstacle, obstacles
from sempervirt.vm.spec import VmSpec

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["migration"])


@router.post("/migration/side")
async def migration_side(agent: AgentHere, spec: VmSpec) -> HostSideView:
    """What this host is, has and sees of a VM that may come here. Changes nothing."""
    side = await side_of(agent, _own_name(agent), spec, source=False)
    return HostSideView(
        name=side.name,
        accelerator=side.accelerator,
        qemu_version=side.qemu_version,
        cpu_model=side.cpu_model,
        cpu_flags=sorted(side.cpu_flags),
        memory_available=side.memory_available,
        vm_state=side.vm_state,
        images={
            name: ImageSeenView(id=seen.id, block_device=seen.block_device, problem=seen.problem)
            for name, seen in side.images.items()
        },
        missing=list(side.missing),
    )


@router.get("/vms/{name}/migration/obstacles")
async def migration_obstacles(agent: AgentHere, vm: VmHere, host: str) -> list[ObstacleView]:
    """Every reason that would stop a migration of a VM to `host`.

    Gives each image an id, if it has none, by a small file beside it.
    """
    async with Cluster.opened(agent.config) as cluster:
        member = await find_destination(cluster, host)
        found = list(membership_obstacles(member))
        here = await side_of(agent, cluster.settings.host, vm.spec, source=True)
        there: HostSide | None = None
        if not found:
            tls = cluster.identity.client_context()
            try:
                async with Client.connect_host(member.host.address, host, tls) as client:
                    there = await client.migration_side(vm.spec)
            except SempervirtError as error:
                found.append(Obstacle(f"{host} cannot be asked: {error.message}", error.remedy))
    if there is not None:
        found += obstacles(vm.spec, vm.record.accelerator.kind, here, there)
    return [ObstacleView(what=obstacle.what, remedy=obstacle.remedy) for obstacle in found]


def _own_name(agent: Agent) -> str:
    settings = read_settings(agent.config)
    return settings.host if settings else "this host"
