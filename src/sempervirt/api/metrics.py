"""`GET /metrics`: what this host does, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response

from sempervirt.agent.agent import Agent
from sempervirt.host.http import ErrorView

# As of OpenMetrics 1.0, section 4.2.1.
CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# The answer of a host with 200 disks takes 0.1 s of processor time.
KEPT_S = 1.0

router = APIRouter(tags=["host"], responses={"default": {"model": ErrorView}})


async def _agent(request: Request) -> Agent:
    agent = request.app.state.agent
    assert isinstance(agent, Agent)
    return agent


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"application/openmetrics-text": {}}}},
)
async def get_metrics(agent: Annotated[Agent, Depends(_agent)]) -> Response:
    """What this host does, as OpenMetrics (docs/reference/metrics.md)."""
    # An agent that nobody scrapes need not load it.
    from sempervirt.api.openmetrics import render  # noqa: PLC0415

    return Response(await render(agent), media_type=CONTENT_TYPE)


class _Kept:
    """The last answer, for whoever asks again within `KEPT_S`: who may ask without a name must not
    keep the agent's loop busy, which supervises disks.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._answer = b""
        self._until = 0.0
        self._turn = asyncio.Lock()

    async def answer(self) -> bytes:
        """As `render`."""
        # As above.
        from sempervirt.api.openmetrics import render  # noqa: PLC0415

        async with self._turn:
            if time.monotonic() >= self._until:
                self._answer = await render(self._agent)
                self._until = time.monotonic() + KEPT_S
            return self._answer


def build_open_app(agent: Agent) -> FastAPI:
    """Metrics alone, for whoever can connect (`semperd --metrics`)."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    kept = _Kept(agent)

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(await kept.answer(), media_type=CONTENT_TYPE)

    return app
