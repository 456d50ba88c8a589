"""The routes of standbys, and what they show."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Query, status

from sempervirt.agent.agent import Agent
from sempervirt.api.rights import CallerHere
from sempervirt.api.routes import AgentHere
from sempervirt.api.schemas import (
    EnableStandbyRequest,
    FailoverRequest,
    GenerationView,
    LossView,
    LostDiskView,
    RehearsalView,
    StandbyView,
    StandbyWindowView,
    StepView,
    TakeOverView,
)
from sempervirt.cluster.cluster import read_settings
from sempervirt.core.errors import InvalidRequest, StateConflict, Unavailable
from sempervirt.host.http import ErrorView
from sempervirt.host.storage_call import call_storage
from sempervirt.standby import keeping
from sempervirt.standby.disks import copied
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.lost import Loss
from sempervirt.standby.means import Ability, Storage, Where, ability_of
from sempervirt.standby.rehearsal import Rehearsal
from sempervirt.standby.state import Generation, TakeOver
from sempervirt.standby.values import Policy

# On this host a proof is had the same way, whatever the storage.
HERE = ability_of(Storage(block_device=False), Where.HERE, command=False)
router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["standby"])


@router.get("/standbys")
async def list_standbys(agent: AgentHere) -> list[StandbyView]:
    """The standbys of all VMs that have some."""
    return [standby_view(agent, kept.driver) for _, kept in sorted(agent.standbys.kept.items())]


@router.get("/vms/{name}/standby")
async def get_standby(agent: AgentHere, caller: CallerHere, name: str) -> StandbyView:
    """The standbys of a VM, and its last take-over; also where another host keeps them."""
    if agent.standbys.find(name) is None:
        keeper = await keeping.keeper_of(agent.config, name)
        if keeper and caller.local:
            shown = await keeping.show_there(agent.config, name, keeper)
            return StandbyView.model_validate(shown)
    return standby_view(agent, agent.standbys.require(name))


@router.put("/vms/{name}/standby", status_code=status.HTTP_202_ACCEPTED)
async def enable_standby(agent: AgentHere, name: str, request: EnableStandbyRequest) -> StandbyView:
    """Has a VM have standbys; answers at once, and the standbys tell how far they are."""
    try:
        policy = Policy(request.every_s, request.keep, request.tier, request.test_every_s)
    except ValueError as error:
        raise InvalidRequest.of(error) from error
    settings = read_settings(agent.config)
    if request.on and (settings is None or request.on != settings.host):
        vm = agent.vm(name)
        shown = await keeping.hand_to(agent.standbys, agent.config, vm, policy, request.on)
        return StandbyView.model_validate(shown)
    if keeper := await keeping.keeper_of(agent.config, name):
        raise StateConflict(
            f"host {keeper} keeps standbys of VM {name}",
            remedy=f"first: semper standby disable {name}; or --on {keeper}",
        )
    return standby_view(agent, await agent.standbys.enable(agent.vm(name), policy))


@router.post("/vms/{name}/standby/failover")
async def failover_standby(agent: AgentHere, name: str, request: FailoverRequest) -> StandbyView:
    """Has a standby take over; answers when its guest runs."""
    driver = agent.standbys.require(name)
    if agent.standbys.is_here(name):
        agent.vm(name)  # of one that is unknown, or forgotten, nobody could tell that it has ended
    if request.fresh:
        await driver.refresh()
    await driver.failover(force=request.force, word=request.i_know.strip())
    return standby_view(agent, driver)


@router.post("/vms/{name}/standby/cancel")
async def cancel_standby(agent: AgentHere, name: str) -> StandbyView:
    """Calls a take-over off that waits; nothing that is seen of this death declares another one."""
    driver = agent.standbys.require(name)
    await driver.cancel()
    return standby_view(agent, driver)


@router.post("/vms/{name}/standby/test")
async def test_standby(agent: AgentHere, name: str) -> RehearsalView:
    """Has a copy of the newest standby go on, isolated; answers when nothing is left of that."""
    return _rehearsal(await agent.standbys.rehearse(name))


def _rehearsal(done: Rehearsal) -> RehearsalView:
    return RehearsalView(
        number=done.number,
        time=done.time,
        steps=[StepView(name=name, after_ms=ms) for name, ms in done.steps],
        notes=list(done.notes),
        failure=done.failure,
    )


@router.delete("/vms/{name}/standby", status_code=status.HTTP_204_NO_CONTENT)
async def disable_standby(
    agent: AgentHere, name: str, *, forget: Annotated[bool, Query()] = False
) -> None:
    """Removes the standbys of a VM; answers when nothing is left of them. Another host that keeps
    them sees that they are not wanted, and removes them by itself. `forget`: the VM has ended, and
    may be run with the images that it had before a standby took over, on whichever host that was.
    """
    if agent.standbys.find(name) is not None:
        await agent.standbys.disable(name, forget=forget)
    elif forget and await agent.standbys.forget_left(name):
        return
    elif await keeping.keeper_of(agent.config, name):
        await keeping.take_back(agent.config, agent.vm(name))
    else:
        agent.standbys.require(name)


@router.get("/vms/{name}/standby/lost")
async def list_losses(agent: AgentHere, name: str) -> list[LossView]:
    """What take-overs of a VM have lost, and where it is."""
    losses = await agent.standbys.losses(name)
    if not losses and name not in agent.vms:
        agent.standbys.require(name)  # of a name that nobody has there is nothing to tell
    return [await _loss(name, loss) for loss in losses]


async def _loss(vm: str, loss: Loss) -> LossView:
    disks = []
    for one in loss.disks:
        try:
            there = await call_storage(one.image, one.image.exists)
        except (OSError, Unavailable):
            there = True  # what cannot be looked at is not known to be gone
        disks.append(LostDiskView(disk=f"{vm}/{one.disk}", image=one.image, there=there))
    return LossView(
        standby=loss.standby,
        since=loss.since,
        ended=loss.ended,
        kept_until=loss.kept_until,
        disks=disks,
    )


def standby_view(agent: Agent, driver: StandbyDriver) -> StandbyView:
    state, now = driver.state, time.time()
    tried = agent.standbys.rehearsals.get(state.vm)
    spec = agent.standbys.spec_of(state.vm)
    newest = state.ready[-1] if state.ready else None
    windows = []
    for disk in spec.disks if spec is not None else ():
        lost_s: float | None = None if newest is None else now - newest.taken
        if disk.read_only or disk.keep == "latest":
            lost_s = 0.0
        windows.append(StandbyWindowView(disk=f"{state.vm}/{disk.name}", window_s=lost_s))
    images = [str(disk.image) for disk in copied(spec)] if spec is not None else []
    abilities = agent.standbys.abilities(state.vm)
    settings = read_settings(agent.config)
    return StandbyView(
        vm=state.vm,
        every_s=state.policy.every_s,
        keep=state.policy.keep,
        tier=state.policy.tier,
        first=state.first,
        why=state.why,
        closing=state.closing,
        generations=[_generation(one) for one in state.generations],
        windows=windows,
        images=images,
        trouble=state.trouble,
        take_over=_take_over(state.take_over),
        last_take_over=_take_over(state.past),
        last_rehearsal=_rehearsal(tried) if tried is not None else None,
        judged=_judged(agent, state.vm),
        fence="; ".join(dict.fromkeys(map(_ability, abilities.values()))) or _ability(HERE),
        fences={disk: _ability(ability) for disk, ability in abilities.items()},
        host=settings.host if settings is not None else "",
        test_every_s=state.policy.test_every_s,
    )


def _ability(ability: Ability) -> str:
    if ability.means is None:
        return f"nothing proves it, so only an operator has it take over: {ability.why}"
    return f"{ability.means.value}: {ability.why}"


def _judged(agent: Agent, name: str) -> str:
    kept = agent.standbys.kept.get(name)
    if kept is None:  # they were removed while the answer was made
        return ""
    judged = kept.first.watch.judge()
    return f"{judged.verdict.kind}: {judged.permission.why}"


def _generation(one: Generation) -> GenerationView:
    return GenerationView(
        number=one.number,
        life=one.life,
        tier=one.tier,
        taken=one.taken,
        consistency=one.consistency,
        memory_bytes=one.memory_bytes,
        boot_s=one.made_s,
        notes=list(one.notes),
    )


def _take_over(over: TakeOver | None) -> TakeOverView | None:
    if over is None:
        return None
    return TakeOverView(
        number=over.number,
        cause=over.cause,
        time=over.began,
        step=over.step,
        steps=[StepView(name=name, after_ms=ms) for name, ms in over.steps],
        trouble=over.trouble,
        notes=list(over.notes),
    )
