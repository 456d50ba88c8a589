"""Who has connected: over the unix socket a user of this host, over TCP who shows a certificate.

Every request of a connection carries a `Caller`; what a caller may do is decided by `rights`. One
who is revoked, or whose certificate says nothing that is known, is cut without a word.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol, assert_never

from starlette.types import ASGIApp, Receive, Scope, Send

from sempervirt.api.bounds import BoundedProtocol
from sempervirt.api.failures import to_response
from sempervirt.api.reach import Caller
from sempervirt.core.errors import NotAllowed
from sempervirt.core.roles import Role
from sempervirt.host.peers import peer_pid, peer_uid, works_for_a_vm
from sempervirt.trust.identity import Holder, Peer, peer_of

log = logging.getLogger(__name__)


class Standing(Protocol):
    """What is known of those who hold certificates: `cluster.membership.Membership`."""

    def is_revoked(self, serial: str) -> bool:
        """Whether a certificate counts no more."""
        ...

    def operator_role(self, name: str, serial: str) -> Role | None:
        """The role of an operator with that certificate, None for one who has none."""
        ...


def caller_for(peer: Peer, standing: Standing, now: float) -> Caller | None:
    """The holder of a certificate as it stands now (seconds since the epoch); None for a stranger,
    also for one whose certificate has ended while the connection was open.
    """
    if peer.ends <= now or standing.is_revoked(peer.serial):
        return None
    match peer.holder:
        case Holder.HOST:
            role: Role | None = Role.HOST
        case Holder.INVITATION:
            role = Role.INVITATION
        case Holder.OPERATOR:
            role = standing.operator_role(peer.name, peer.serial)
        case _:
            assert_never(peer.holder)
    return Caller(f"{peer.holder.value} {peer.name}", role, peer) if role is not None else None


class Introduced:
    """An application as one caller sees it. `caller` gives None once the caller is a stranger; an
    answer without an end asks again (`rights.may_still`).
    """

    def __init__(self, app: ASGIApp, caller: Callable[[], Caller | None]) -> None:
        self._app = app
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; a connection may outlive the right to use it."""
        caller = self._caller()
        if caller is None:
            refusal = NotAllowed("this certificate was revoked, or has ended")
            await to_response(refusal)(scope, receive, send)
            return
        await self._app({**scope, "caller": caller, "caller_now": self._caller}, receive, send)


class LocalProtocol(BoundedProtocol):
    """HTTP of one connection over the unix socket: root, the user whose agent this is, and where
    the socket has been given to a group its members; but no program of a VM, which as a process of
    the same user would be let in.
    """

    shared = False  # whether the socket is a group's: then the kernel let nobody else connect

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Looks at the process before a byte of the connection is read."""
        super().connection_made(transport)
        raw: Any = transport.get_extra_info("socket")
        with socket.socket(fileno=os.dup(raw.fileno())) as connection:
            uid, pid = peer_uid(connection), peer_pid(connection)
        own = uid in (0, os.geteuid())
        if not (own or self.shared) or works_for_a_vm(pid):
            log.warning("refuse user=%d pid=%d at the socket", uid, pid)
            transport.abort()
            return
        local = Caller(f"user {uid}", Role.ADMIN, bounded=not own)
        self.app = Introduced(self.app, lambda: local)


class SharedProtocol(LocalProtocol):
    """The same at a socket that a group may connect to."""

    shared = True


def guarded_protocol(standing: Standing) -> type[BoundedProtocol]:
    """The HTTP protocol of a server whose peers have shown certificates."""

    class GuardedProtocol(BoundedProtocol):
        """One connection; TLS has been agreed on when it is made."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Looks at the peer before a byte of the connection is read."""
            super().connection_made(transport)
            connection: Any = transport.get_extra_info("ssl_object")
            peer = peer_of(connection) if connection is not None else None
            if peer is None or caller_for(peer, standing, time.time()) is None:
                log.warning("refuse peer=%s from=%s", peer and peer.name, self.client)
                transport.abort()
                return
            self.app = Introduced(self.app, lambda: caller_for(peer, standing, time.time()))

    return GuardedProtocol
