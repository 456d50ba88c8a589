"""The routes between the host that runs a VM and the one that keeps its standbys (`standby.there`).

Hosts of the cluster alone ask here, and the store says which of them may.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, status
from pydantic import BaseModel

from sempervirt.api.rights import CallerHere
from sempervirt.api.routes import AgentHere
from sempervirt.api.schemas import StandbyView
from sempervirt.api.standby import standby_view
from sempervirt.core.errors import NotAllowed
from sempervirt.host.http import ErrorView
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby.keeping import keep_for, require_spec, take_over_for
from sempervirt.standby.messages import EndFirst, GiveUpFirst, KeepStandby, SnapshotFirst

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["standby"])


class EndView(BaseModel):
    """How a QEMU ended."""

    reason: str
    exit_code: int | None
    signal: int | None
    with_host: bool


class SeenView(BaseModel):
    """What a host knows of its VM."""

    run: Runstate
    why: str
    end: EndView | None
    ailing: str
    work: str


class FirstView(BaseModel):
    """A VM, for the host that keeps its standbys."""

    life: str
    seen: SeenView
    spec: VmSpec
    accelerator: str
    served: list[str]


class FirstSnapshotView(BaseModel):
    """Snapshots by disk, of one instant (`time`, in seconds since 1970)."""

    time: float
    numbers: list[tuple[str, int]]
    consistency: str


class GivenUpView(BaseModel):
    """Why a snapshot stays; "" where it does not."""

    note: str


class EndedView(BaseModel):
    """What was seen of a VM's end."""

    evidence: str


async def _host(caller: CallerHere) -> str:
    if caller.peer is None:
        raise NotAllowed("only another host of the cluster keeps standbys of a VM of this one")
    return caller.peer.name


Keeper = Annotated[str, Depends(_host)]


@router.get("/vms/{name}/first")
async def get_first(
    agent: AgentHere, keeper: Keeper, name: str, *, ready: Annotated[bool, Query()] = False
) -> FirstView:
    """What is known of a VM here, and what it has. `ready`: the host that asks has a standby of it
    that could take over now.
    """
    told = await agent.standbys.offer.look(name, keeper, ready=ready)
    seen: dict[str, Any] = asdict(told.seen)
    return FirstView(
        life=told.life,
        seen=SeenView.model_validate(seen),
        spec=told.spec,
        accelerator=told.accelerator,
        served=sorted(told.served),
    )


@router.post("/vms/{name}/first/snapshot")
async def snapshot_first(
    agent: AgentHere, keeper: Keeper, name: str, body: SnapshotFirst
) -> FirstSnapshotView:
    """Takes a snapshot of disks of a VM, of which the host that asks makes copies."""
    taken = await agent.standbys.offer.snapshot(name, keeper, body.disks)
    return FirstSnapshotView(
        time=taken.time, numbers=list(taken.numbers), consistency=taken.consistency
    )


@router.post("/vms/{name}/first/give-up")
async def give_up_first(
    agent: AgentHere, keeper: Keeper, name: str, body: GiveUpFirst
) -> GivenUpView:
    """Gives a snapshot up of which the host that asks has a copy."""
    return GivenUpView(note=await agent.standbys.offer.give_up(name, keeper, body))


@router.post("/vms/{name}/first/end")
async def end_first(agent: AgentHere, keeper: Keeper, name: str, body: EndFirst) -> EndedView:
    """Has a VM end, for a standby on the host that asks: answers when it was seen to have ended."""
    places, offer = agent.standbys.places_of, agent.standbys.offer
    return EndedView(evidence=await offer.end(name, keeper, places, kill=body.kill))


@router.put("/vms/{name}/standby/kept")
async def keep_standby(
    agent: AgentHere, caller: CallerHere, owner: Keeper, name: str, body: KeepStandby
) -> StandbyView:
    """Keeps standbys of a VM of the host that asks."""
    require_spec(body.spec, name)
    await caller.require_spec(agent.config, body.spec)
    driver = await keep_for(agent.standbys, agent.config, owner, body)
    return standby_view(agent, driver)


@router.post("/vms/{name}/standby/kept/take-over", status_code=status.HTTP_204_NO_CONTENT)
async def take_over_kept(agent: AgentHere, owner: Keeper, name: str) -> None:
    """Has a standby take over a VM of the host that asks, which is about to end; answers when its
    guest runs.
    """
    await take_over_for(agent.standbys, agent.config, owner, name)
