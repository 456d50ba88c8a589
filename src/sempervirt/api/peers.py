"""Which peer may ask what over TCP. The unix socket belongs to one user, who may ask everything.

host          everything
invitation    POST /v1/join
revoked, or anything else that TLS let through: the connection is cut without a word
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from sempervirt.api.bounds import BoundedProtocol
from sempervirt.api.failures import to_response
from sempervirt.core.errors import NotAllowed
from sempervirt.trust.identity import Peer, Role, peer_of

log = logging.getLogger(__name__)

JOIN = "/v1/join"


class Guarded:
    """An application as one peer sees it."""

    def __init__(self, app: ASGIApp, peer: Peer, is_revoked: Callable[[str], bool]) -> None:
        self._app = app
        self._peer = peer
        self._is_revoked = is_revoked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves what the peer may ask; a connection may outlive the right to use it."""
        if self._is_revoked(self._peer.serial):
            await to_response(NotAllowed("this certificate was revoked"))(scope, receive, send)
        elif self._peer.role is Role.INVITATION and scope["path"] != JOIN:
            refusal = NotAllowed("an invitation is good for joining, and for nothing else")
            await to_response(refusal)(scope, receive, send)
        else:
            await self._app({**scope, "peer": self._peer}, receive, send)


def guarded_protocol(is_revoked: Callable[[str], bool]) -> type[BoundedProtocol]:
    """The HTTP protocol of a server whose peers have shown certificates."""

    class GuardedProtocol(BoundedProtocol):
        """One connection; TLS has been agreed on when it is made."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Looks at the peer before a byte of the connection is read."""
            super().connection_made(transport)
            connection: Any = transport.get_extra_info("ssl_object")
            peer = peer_of(connection) if connection is not None else None
            if peer is None or is_revoked(peer.serial):
                log.warning("refuse peer=%s from=%s", peer and peer.host, self.client)
                transport.abort()
                return
            self.app = Guarded(self.app, peer, is_revoked)

    return GuardedProtocol
