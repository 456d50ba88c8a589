"""The routes of the host guard: how it stands, what it has decided, what it would decide."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends

from sempervirt.api.guard_schemas import (
    DecisionView,
    GuardView,
    SimulatedView,
    SimulateRequest,
    decision_view,
    guard_view,
)
from sempervirt.api.routes import AgentHere
from sempervirt.core.errors import StateConflict
from sempervirt.guard.driver import Guard
from sempervirt.host.http import ErrorView

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["guard"])


def _guard(agent: AgentHere) -> Guard:
    if agent.guard is None:
        raise StateConflict(
            "this agent guards no host: it was started by a command",
            remedy="run the agent as a service: semperd",
        )
    return agent.guard


GuardHere = Annotated[Guard, Depends(_guard)]


@router.get("/guard")
async def get_guard(guard: GuardHere) -> GuardView:
    """How the guard stands: the host, the module, every source of signs, every rule."""
    return await asyncio.to_thread(guard_view, guard)


@router.get("/guard/events")
async def list_guard_events(guard: GuardHere) -> list[DecisionView]:
    """What the guard has decided, oldest first, each with its evidence."""
    return [decision_view(guard, decision) for decision in guard.state.decisions]


@router.post("/guard/simulate")
async def simulate_sign(guard: GuardHere, request: SimulateRequest) -> SimulatedView:
    """What would be decided upon a sign as all stands now. With `act` it is done, and VMs move; the
    module is told nothing on account of it.
    """
    decisions = guard.simulate(request.sign)
    if request.act:
        guard.act(request.sign)
    return SimulatedView(
        sign=request.sign,
        acted=request.act,
        decisions=[decision_view(guard, decision) for decision in decisions],
    )
