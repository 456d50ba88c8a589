"""`GET /v1/events`: what happens on this host, as server-sent events.

Readers have no queue each: they read the ring of `core.events`, each from its own position, and a
message is given to the connection only when the one before has left. So a reader that is slow costs
nothing but its place, and learns by a message `gap` that it has missed something; one that takes
nothing for SEND_S is cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from sempervirt.api.event_schemas import AnnouncedView, GapView, announced_view, to_message
from sempervirt.api.rights import Operation, may_still
from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.events import STREAM, Part, Stream
from sempervirt.host.changes import Changes
from sempervirt.host.http import ErrorView

READERS_MAX = 32
# A reader that takes nothing for so long is gone, or hangs.
SEND_S = 30.0
# So often a stream without events says that it is alive: proxies cut what is silent.
ALIVE_S = 15.0
_ALIVE = b": alive\n\n"

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["host"])


class Readers:
    """Who follows the stream of this process. One for each application."""

    def __init__(self, stream: Stream = STREAM, *, send_s: float = SEND_S) -> None:
        self.stream = stream
        self.send_s = send_s
        self.count = 0
        self._closed = False
        self._changes = Changes()

    def close(self) -> None:
        """Every stream ends, as the agent does; the readers come again."""
        self._closed = True
        self._changes.notify()

    async def follow(self, part: Part) -> AsyncGenerator[bytes]:
        """Messages from `part` on, until the agent ends."""
        leave = self.stream.listen(lambda _: self._changes.notify())
        try:
            yield _ALIVE  # at once: the reader knows that it is heard
            while not self._closed:
                for message in messages(self.stream, part):
                    yield message
                if not await self._news(part.position):
                    yield _ALIVE
                part = self.stream.after(part.position)
        finally:
            leave()

    async def _news(self, position: int) -> bool:
        """Waits for an event, or the end; whether there is one in time."""
        try:
            await self._changes.wait_until(
                lambda: self.stream.position > position or self._closed,
                timeout_s=ALIVE_S,
                what="an event",
            )
        except Unavailable:
            return False
        return True


def messages(stream: Stream, part: Part) -> list[bytes]:
    """The messages for a part of the stream."""
    views: list[AnnouncedView | GapView] = [GapView()] if part.gap else []
    views += [announced_view(stream, announced) for announced in part.events]
    return [to_message(view) for view in views]


class EventStream(Response):
    """The answer to who follows. Each message waits until the reader has taken the one before; none
    is sent to one who is not `allowed` to follow any more, and the answer ends.
    """

    media_type = "text/event-stream"

    def __init__(self, readers: Readers, part: Part, allowed: Callable[[], bool]) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._readers = readers
        self._part = part
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the reader is gone, hangs, or the agent ends."""
        gone = asyncio.ensure_future(_gone(receive))
        sending = asyncio.ensure_future(self._send(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._readers.count -= 1
            for task in (gone, sending):
                task.cancel()
                with suppress(asyncio.CancelledError, TimeoutError):
                    await task

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._in_time(send, start)
        async with aclosing(self._readers.follow(self._part)) as found:
            async for message in found:
                if not self._allowed():
                    break
                body = {"type": "http.response.body", "body": message, "more_body": True}
                await self._in_time(send, body)
        await self._in_time(send, {"type": "http.response.body", "body": b""})

    async def _in_time(self, send: Send, message: dict[str, object]) -> None:
        """Raises TimeoutError when the reader takes nothing."""
        async with asyncio.timeout(self._readers.send_s):
            await send(message)


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


@router.get(
    "/events",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {}}, "model": AnnouncedView}},
)
async def list_events(
    request: Request,
    last_event_id: Annotated[str, Header(max_length=64)] = "",
    after: Annotated[str, Query(max_length=64)] = "",
    *,
    follow: bool = False,
) -> Response:
    """What happened on this host, as server-sent events, oldest first; with `follow` also what
    happens from now on. Goes on after the event named by `Last-Event-ID`, or by `after`; a message
    `gap` says that events before it are not kept any more.
    """
    readers = request.app.state.readers
    assert isinstance(readers, Readers)
    try:
        part = readers.stream.after_id(last_event_id or after)
    except ValueError as error:
        raise InvalidRequest(str(error), remedy="give the id of the last event read") from error
    if not follow:
        body = b"".join(messages(readers.stream, part))
        return Response(body, media_type=EventStream.media_type)
    if readers.count >= READERS_MAX:
        raise Unavailable(f"{READERS_MAX} clients follow the events already")
    readers.count += 1
    return EventStream(readers, part, lambda: may_still(request, Operation.LIST_EVENTS))
