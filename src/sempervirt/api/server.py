"""Serves the API on a unix socket, and over mutual TLS, in the event loop of the agent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn

from sempervirt.agent.agent import Agent
from sempervirt.api.app import build_app
from sempervirt.api.peers import guarded_protocol
from sempervirt.cluster.membership import Membership
from sempervirt.host.sockets import listen_tcp, listen_unix

# Longer than any request but a stop with a long grace.
CLOSE_DEADLINE_S = 5


class _Server(uvicorn.Server):
    """Leaves signals to the program around it, and says when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts serving."""
        await super().startup(sockets)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures nothing."""
        yield


@asynccontextmanager
async def serving(agent: Agent, socket_path: Path) -> AsyncIterator[None]:
    """Serves until the block is left. Raises Unavailable when the socket cannot be bound."""
    listener = listen_unix(socket_path)
    config = uvicorn.Config(
        build_app(agent),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=CLOSE_DEADLINE_S,
    )
    try:
        async with _running(config, listener):
            yield
    finally:
        _unlink(socket_path)


@asynccontextmanager
async def serving_hosts(agent: Agent, membership: Membership) -> AsyncIterator[None]:
    """Serves other hosts at this host's address, TLS 1.3 with certificates on both ends.

    Waits until revocations are known. Raises Unavailable when the address cannot be bound.
    """
    cluster = membership.cluster
    context = cluster.identity.server_context()
    listener = listen_tcp(cluster.settings.address)
    await membership.known.wait()
    config = uvicorn.Config(
        build_app(agent, cluster),
        http=guarded_protocol(membership.is_revoked),
        ws="none",
        proxy_headers=False,
        server_header=False,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=CLOSE_DEADLINE_S,
    )
    config.load()
    config.ssl = context
    async with _running(config, listener):
        yield


@asynccontextmanager
async def _running(config: uvicorn.Config, listener: socket.socket) -> AsyncIterator[None]:
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="api")
    try:
        await server.up.wait()
        yield
    finally:
        server.should_exit = True
        await task


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
