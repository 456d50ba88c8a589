"""Serves the API on a unix socket, and over mutual TLS.

Connections live in a thread with an event loop of its own: accepting, TLS, HTTP, everything that a
stranger can ask for. What is to be done with a whole request is done in the agent's loop, which
supervises disks and VMs and has no place for strangers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from sempervirt.agent.agent import Agent
from sempervirt.api.app import build_app
from sempervirt.api.bounds import (
    HANDSHAKE_S,
    LOCAL,
    REMOTE,
    Admission,
    BoundedBody,
    BoundedProtocol,
    Places,
)
from sempervirt.api.metrics import build_open_app
from sempervirt.api.peers import LocalProtocol, SharedProtocol, guarded_protocol
from sempervirt.cluster.membership import Membership
from sempervirt.core.errors import SempervirtError
from sempervirt.host import background
from sempervirt.host.peers import peer_uid
from sempervirt.host.sockets import listen_tcp, listen_unix, share_with_group

log = logging.getLogger(__name__)

# Longer than any request but a stop with a long grace.
CLOSE_DEADLINE_S = 5.0
# How long to leave alone a socket that cannot be accepted from: no descriptor is free.
PAUSE_S = 0.1
# How soon it is seen that somebody has removed the socket.
LOOK_S = 2.0

Result = TypeVar("Result")


@asynccontextmanager
async def serving(agent: Agent, socket_path: Path) -> AsyncIterator[None]:
    """Serves until the block is left, also when somebody removes the socket: it is made again.

    Raises Unavailable when the socket cannot be bound.
    """
    async with AsyncExitStack() as served:
        await _serve(agent, socket_path, served)
        keeping = background.start(_keep(agent, socket_path, served), "api socket")
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            _unlink(socket_path)


async def _serve(agent: Agent, path: Path, served: AsyncExitStack) -> None:
    listener = listen_unix(path)
    protocol = SharedProtocol if share_with_group(path) else LocalProtocol
    app = build_app(agent)
    server = _Server(app, listener, protocol, LOCAL)
    await served.enter_async_context(server.running())
    served.callback(app.state.readers.close)  # first: their streams have no end of their own


async def _keep(agent: Agent, path: Path, served: AsyncExitStack) -> None:
    """Makes the socket again whenever it is gone, as after a cleaner of temporary files. Who is
    connected already goes on.
    """
    while True:
        await asyncio.sleep(LOOK_S)
        if await asyncio.to_thread(path.is_socket):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            await _serve(agent, path, served)
        except (OSError, SempervirtError) as error:
            log.error("serve socket=%s is gone, and is not made again: %s", path, error)  # noqa: TRY400
        else:
            log.warning("serve socket=%s was removed, and was made again", path)


@asynccontextmanager
async def serving_hosts(agent: Agent, membership: Membership) -> AsyncIterator[None]:
    """Serves other hosts at this host's address, TLS 1.3 with certificates on both ends.

    Waits until revocations are known. Raises Unavailable when the address cannot be bound.
    """
    cluster = membership.cluster
    context = cluster.server_context()
    listener = listen_tcp(cluster.settings.address)
    await membership.known.wait()
    protocol = guarded_protocol(membership)

    def tls() -> ssl.SSLContext:
        """With the certificate that is in force when somebody connects."""
        return membership.certificate.server or context

    app = build_app(agent, cluster)
    server = _Server(app, listener, protocol, REMOTE, tls)
    async with server.running():
        try:
            yield
        finally:
            app.state.readers.close()


@asynccontextmanager
async def serving_metrics(agent: Agent, address: str) -> AsyncIterator[None]:
    """Serves the metrics, and nothing else, to whoever can connect to "HOST:PORT".

    Raises Unavailable when the address cannot be bound.
    """
    listener = listen_tcp(address)
    server = _Server(build_open_app(agent), listener, BoundedProtocol, REMOTE)
    async with server.running():
        yield


class _InAgent:
    """An application that runs in the agent's loop, for connections that are in another."""

    def __init__(self, app: ASGIApp, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._loop = loop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands the request over, and waits for the end of the answer."""
        here = asyncio.get_running_loop()

        async def receive_here() -> Message:
            return await _elsewhere(receive(), here)

        async def send_here(message: Message) -> None:
            await _elsewhere(send(message), here)

        await _elsewhere(self._app(scope, receive_here, send_here), self._loop)


async def _elsewhere(work: Awaitable[Result], loop: asyncio.AbstractEventLoop) -> Result:
    """Has `work` done in the loop of another thread, and waits for it."""

    async def do() -> Result:
        return await work

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(do(), loop))


class _Server:
    """One listening socket and its connections, in a thread."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        protocol: type[BoundedProtocol],
        places: Places,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._app = app
        self._listener = listener
        self._protocol = protocol
        self._admission = Admission(places)
        self._tls = tls
        self._state = ServerState()
        self._beginnings: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serves until the block is left; requests that go on then are given some time."""
        app = BoundedBody(_InAgent(self._app, asyncio.get_running_loop()))
        self._config = uvicorn.Config(
            app,
            ws="none",
            proxy_headers=False,
            server_header=False,
            log_config=None,
            access_log=False,
            lifespan="off",
        )
        self._config.load()
        up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended = asyncio.get_running_loop().create_future()
        thread = threading.Thread(
            target=self._live, args=(asyncio.get_running_loop(), up, ended), name="api", daemon=True
        )
        thread.start()
        await up
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._leave.set)
            # Requests that go on are carried out in this loop.
            await ended
            thread.join()

    def _live(
        self,
        agent: asyncio.AbstractEventLoop,
        up: asyncio.Future[None],
        ended: asyncio.Future[None],
    ) -> None:
        try:
            asyncio.run(self._serve(agent, up))
        except Exception:
            log.exception("the API is not served any more")
        finally:
            self._listener.close()
            agent.call_soon_threadsafe(_resolve, up)
            agent.call_soon_threadsafe(_resolve, ended)

    async def _serve(self, agent: asyncio.AbstractEventLoop, up: asyncio.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        self._listener.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        agent.call_soon_threadsafe(_resolve, up)
        await self._leave.wait()
        accepting.cancel()
        self._listener.close()
        for task in [*self._beginnings]:
            task.cancel()
        for connection in [*self._state.connections]:
            connection.shutdown()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                # uvicorn does not tell of the end of a connection.
                while self._state.connections or self._state.tasks:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        for task in [*self._state.tasks]:
            task.cancel()

    async def _accept(self) -> None:
        while True:
            try:
                client, address = await self._loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("no client of the API can be accepted: %s", error)
                await asyncio.sleep(PAUSE_S)
                continue
            peer = _peer(client, address)
            if not self._admission.enter(peer):
                log.warning("refuse client of the API from=%s: too many connections", peer)
                client.close()
                continue
            task = asyncio.create_task(self._begin(client, peer))
            self._beginnings.add(task)
            task.add_done_callback(self._beginnings.discard)

    async def _begin(self, client: socket.socket, peer: Hashable) -> None:
        """Agrees on TLS, if that is wanted; the connection keeps its place until its end."""
        place = ExitStack()
        place.callback(self._admission.leave, peer)
        # Whoever comes first gives the place back; then there is nothing left to give.
        leave = place.close

        def make() -> BoundedProtocol:
            protocol = self._protocol(self._config, self._state, {})
            protocol.on_end = leave
            return protocol

        with suppress(OSError), ExitStack() as failed:  # TLS was not agreed on
            failed.callback(client.close)
            failed.callback(leave)
            client.setblocking(False)
            await self._loop.connect_accepted_socket(
                make,
                client,
                ssl=self._tls() if self._tls else None,
                ssl_handshake_timeout=HANDSHAKE_S if self._tls else None,
            )
            failed.pop_all()


def _peer(client: socket.socket, address: object) -> Hashable:
    """Whose places a connection takes: an address, or a user of this host."""
    if client.family == socket.AF_UNIX:
        return f"user {peer_uid(client)}"
    return str(address[0]) if isinstance(address, tuple) else ""


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
