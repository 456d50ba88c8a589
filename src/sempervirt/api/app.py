"""The application: routes and errors around one agent.

`python -m sempervirt.api.app` prints the OpenAPI document (docs/reference/openapi.json).
"""

from __future__ import annotations

import json
import sys

from fastapi import Depends, FastAPI

import sempervirt
from sempervirt.agent.agent import Agent
from sempervirt.api import (
    evacuation,
    events,
    failures,
    first,
    guard,
    metrics,
    migration,
    passthrough,
    standby,
)
from sempervirt.api.rights import require_complete, require_right
from sempervirt.api.routes import router
from sempervirt.cluster.cluster import Cluster


def build_app(agent: Agent | None = None, cluster: Cluster | None = None) -> FastAPI:
    """The application; without an agent only its description is of use.

    With a cluster it also admits hosts that show an invitation.
    """
    app = FastAPI(
        title="sempervirt agent",
        version=sempervirt.__version__,
        description=(
            "Virtual machines of one host and their disks. Served on a unix socket that only "
            "its owner may open, and over mutual TLS to the hosts of its cluster and to operators, "
            "each within the rights of a role."
        ),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(require_right)],
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.agent = agent
    app.state.cluster = cluster
    app.state.readers = events.Readers()
    routers = (
        router,
        passthrough.router,
        migration.router,
        standby.router,
        first.router,
        guard.router,
        evacuation.router,
        events.router,
        metrics.router,
    )
    require_complete(routers)
    for included in routers:
        app.include_router(included)
    failures.install(app)
    return app


def openapi_text() -> str:
    """The OpenAPI document as it is checked in."""
    return json.dumps(build_app().openapi(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(openapi_text())
