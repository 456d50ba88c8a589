"""What a client of the API may take: connections, time and bytes. See `api.server`."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from sempervirt.api.failures import to_response
from sempervirt.core.errors import InvalidRequest
from sempervirt.core.printable import has_nul

# The largest request has a VM with all its disks: some kilobytes.
BODY_MAX: Final = 256 << 10
# From a connection's first byte, or the first of its next request, until the request is whole.
REQUEST_S: Final = 10.0
# TLS has to be agreed on by then: a stranger holds a place for no longer.
HANDSHAKE_S: Final = 3.0


_ESCAPED: Final = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")


@dataclass(frozen=True)
class Places:
    """How many connections there may be: in all, and from one peer."""

    total: int
    each: int


LOCAL: Final = Places(total=256, each=256)
REMOTE: Final = Places(total=256, each=64)


class Admission:
    """Counts connections by peer: an address, or a user of this host."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._taken: Counter[Hashable] = Counter()

    def enter(self, peer: Hashable) -> bool:
        """Takes a place, if there is one."""
        if self._taken.total() >= self._places.total or self._taken[peer] >= self._places.each:
            return False
        self._taken[peer] += 1
        return True

    def leave(self, peer: Hashable) -> None:
        """Gives the place back."""
        self._taken[peer] -= 1
        if not self._taken[peer]:
            del self._taken[peer]


class _Lengths(h11.Connection):
    """Takes bodies that have a length. One in chunks of a byte each would keep the thread of all
    clients busy for a second, and no client of ours sends chunks.
    """

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises RemoteProtocolError, which is answered with status 400."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            for name, _ in event.headers:
                if name == b"transfer-encoding":
                    raise h11.RemoteProtocolError("a body without a length")
        return event


class BoundedProtocol(H11Protocol):
    """HTTP of one connection, which is cut if a request is not whole in time."""

    # To be called at the end of the connection.
    on_end: Callable[[], None] | None = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come, and should say what it wants."""
        super().connection_made(transport)
        self.conn = _Lengths(h11.SERVER)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_clock()
        super().connection_lost(exc)
        if self.on_end is not None:
            self.on_end()

    def data_received(self, data: bytes) -> None:
        """Part of a request."""
        if self._cycle is None or self._cycle.response_complete:
            self._start_clock()
        super().data_received(data)
        if self._cycle is not None and not self._cycle.more_body:
            self._stop_clock()

    def on_response_complete(self) -> None:
        """An answer was given; part of the next request may be there already."""
        super().on_response_complete()
        self._start_clock()

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        """The last request, if there was one."""
        return self.cycle

    def _start_clock(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self._cut)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cut(self) -> None:
        self._deadline = None
        self.transport.abort()


class BoundedBody:
    """An application that is given whole requests, and no large ones."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the body, and refuses one that is too large before it is read."""
        if scope["type"] != "http":
            return
        large = _announced(scope) > BODY_MAX
        body = b"" if large else await _read(receive)
        if body is None:
            return  # nobody waits for an answer
        if large or len(body) > BODY_MAX:
            await to_response(_too_large())(scope, receive, _closing(send))
            return
        if not _is_text(body):
            await to_response(_no_text())(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        await self._app(scope, receive_whole, send)


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)  # h11 has checked it
    return 0


async def _read(receive: Receive) -> bytes | None:
    """The body, or somewhat more than `BODY_MAX` of it; None if the client is gone."""
    body = bytearray()
    while len(body) <= BODY_MAX:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body)


def _is_text(body: bytes) -> bool:
    """Whether it is UTF-8, and no string in it has half of a pair (\\ud800) or a NUL: nobody could
    be told of the one, and neither is in the name of anything. Python reads JSON in UTF-16 as well
    (which has zeros), and halves that are encoded themselves.
    """
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    if b"\0" in body:
        return False
    if not _ESCAPED.search(body):
        return True
    try:
        content = json.loads(body)
        if has_nul(content):
            return False
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError):
        return True  # that it is no JSON is told elsewhere
    return True


def _no_text() -> InvalidRequest:
    return InvalidRequest(
        "the request is not UTF-8, or a string of it has a NUL, or half of a pair, \\ud800 to "
        "\\udfff, alone"
    )


def _too_large() -> InvalidRequest:
    return InvalidRequest(
        f"the request has more than {BODY_MAX >> 10} KiB",
        remedy="name files by their paths; the API takes descriptions, not contents",
    )


def _closing(send: Send) -> Send:
    """What is left of the body is not read, so the connection cannot go on."""

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[Any] = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return send_closing
