"""The routes of an evacuation: what would be done, how far it is, and how the host comes back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, status

from sempervirt.agent.agent import Agent
from sempervirt.api.routes import AgentHere
from sempervirt.evacuation import orders
from sempervirt.evacuation.capacity import LOST_MAX
from sempervirt.evacuation.messages import (
    CapacityView,
    EvacuateRequest,
    EvacuationView,
    PlacesView,
    PlanView,
    ReturnRequest,
    ServiceView,
    capacity_view,
    evacuation_view,
    places_view,
    plan_view,
)
from sempervirt.evacuation.plan import Survey
from sempervirt.evacuation.values import Report
from sempervirt.host.http import ErrorView
from sempervirt.migration.source.migration import SourceMigration

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["host"])


@router.post("/host/evacuation/plan")
async def plan_evacuation(agent: AgentHere, body: EvacuateRequest) -> PlanView:
    """Which VM would go where, in which order, and which cannot go and why.

    Gives each image an id, if it has none, by a small file beside it.
    """
    order = body.order()
    return plan_view(await orders.plan_only(agent, order), order)


@router.get("/vms/{name}/places", tags=["vm"])
async def list_places(agent: AgentHere, name: str) -> PlacesView:
    """Which hosts a VM could move to, the best first, and what stands in the way of the others.

    Gives each image an id, if it has none, by a small file beside it.
    """
    return places_view(await orders.places_for(agent, name))


@router.get("/host/survey")
async def survey_host(agent: AgentHere) -> Survey:
    """The VMs of this host, and what the other hosts offer them if this one is lost.

    Gives each image an id, if it has none, by a small file beside it.
    """
    return await orders.survey(agent)


@router.get("/host/capacity")
async def get_capacity(
    agent: AgentHere, lost: Annotated[int, Query(ge=1, le=LOST_MAX)] = 1
) -> CapacityView:
    """Whether the VMs of the cluster have room when so many of its hosts are lost. Every host is
    asked, and asks all others.
    """
    return capacity_view(await orders.find_capacity(agent, lost))


@router.post("/host/evacuation", status_code=status.HTTP_202_ACCEPTED)
async def evacuate_host(agent: AgentHere, body: EvacuateRequest) -> EvacuationView:
    """Begins to empty this host, which is out of service from now on; ask again how far it is."""
    return _view(agent, (await orders.begin(agent, body.order())).state.report())


@router.get("/host/evacuation")
async def get_evacuation(agent: AgentHere) -> EvacuationView:
    """The last evacuation of this host."""
    return _view(agent, orders.last(agent).state.report())


@router.delete("/host/evacuation")
async def cancel_evacuation(agent: AgentHere) -> EvacuationView:
    """Has stay what has not left yet; answers at once. The host stays out of service."""
    driver = orders.last(agent)
    driver.give_up()
    return _view(agent, driver.state.report())


@router.post("/host/return")
async def return_host(agent: AgentHere, body: ReturnRequest) -> ServiceView:
    """Puts this host into service again. The VMs that were moved away are where they are."""
    report = await orders.bring_back(agent, after_shutdown=body.after_shutdown)
    away = {} if report is None else report.away
    return ServiceView(in_service=agent.service.absence is None, away=away)


def _view(agent: Agent, report: Report) -> EvacuationView:
    remaining = {
        name: moving.view().remaining
        for name, vm in agent.vms.items()
        if isinstance(moving := vm.moving, SourceMigration) and not moving.over
    }
    return evacuation_view(report, remaining)
