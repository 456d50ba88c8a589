"""The connection to semper-probe: JSON lines over the host's end of a virtio-serial port.

    connecting ──hello──► greeted ──hello, another nonce──► greeted (the guest booted again)
                             └──────── end of stream ──────► gone

QEMU keeps the socket open over a reboot of the guest, so one connection lives through many boots. A
command that was under way when the guest rebooted ends in ProbeRebooted; nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sempervirt.core.errors import Unavailable
from sempervirt.guest.errors import ProbeGone, ProbeRebooted, ProbeRefused, ProbeSilent
from sempervirt.guest.reports import Hello

# A timeline of ten minutes is one line of 300 kB.
LINE_MAX_BYTES = 32 << 20
GREETING_ID = 0
# The sockets of QEMU appear while it starts.
CONNECT_POLL_S = 0.01


@dataclass(frozen=True)
class Event:
    """Something that the probe said unasked: `hello` or `beat`."""

    name: str
    members: dict[str, Any]
    received_ns: int


@dataclass
class _Call:
    command: str
    answer: asyncio.Future[dict[str, Any]]


class EventStream:
    """Events of the probe, from the making of the stream to the end of the connection.

    Use with `async for`.
    """

    def __init__(self, listeners: list[asyncio.Queue[Event | None]]) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners = listeners
        listeners.append(self._queue)

    def close(self) -> None:
        """No more events are kept for this stream."""
        if self._queue in self._listeners:
            self._listeners.remove(self._queue)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._queue.get()
        if event is None:
            self.close()
            raise StopAsyncIteration
        return event


async def _open(path: Path, deadline_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    give_up = time.monotonic() + deadline_s
    while True:
        try:
            return await asyncio.open_unix_connection(path, limit=LINE_MAX_BYTES)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            if time.monotonic() > give_up:
                raise Unavailable(f"nobody listens on {path}: {error}") from error
            await asyncio.sleep(CONNECT_POLL_S)


class ProbeConnection:
    """One connection. Make it by `connect`; end it by `close`, or use it in `async with`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._calls: dict[int, _Call] = {}
        # Not from 1: a guest may still answer the host that was connected before.
        self._last_id = secrets.randbelow(1 << 40)
        self._hello: Hello | None = None
        self._changed = asyncio.Condition()
        self._listeners: list[asyncio.Queue[Event | None]] = []
        self._gone = ""
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, deadline_s: float = 60.0) -> Self:
        """Connects to the socket, which QEMU may be about to make. Does not wait for the guest.

        Raises Unavailable when nobody listens there by the deadline.
        """
        reader, writer = await _open(path, deadline_s)
        client = cls(reader, writer)
        client._task = asyncio.create_task(client._read(), name="probe-reader")
        # A guest that is up already, and did not notice the change of hosts, greets when asked.
        client._send({"id": GREETING_ID, "cmd": "hello"})
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; commands under way end in ProbeGone."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
        await self._end("the client was closed")

    # -- what arrives -------------------------------------------------------------------------

    async def _read(self) -> None:
        cause = "the guest's end was closed"
        try:
            while line := await self._reader.readline():
                await self._take(line)
        except (OSError, ValueError) as error:
            cause = str(error)
        await self._end(cause)

    async def _end(self, cause: str) -> None:
        if self._gone:
            return
        self._gone = cause
        self._fail_calls(ProbeGone(f"the connection to the probe ended: {cause}"))
        for listener in self._listeners:
            listener.put_nowait(None)
        async with self._changed:
            self._changed.notify_all()

    async def _take(self, line: bytes) -> None:
        received_ns = time.monotonic_ns()
        try:
            message = json.loads(line)
        except ValueError:
            return  # half a line of a guest that rebooted in the middle of it
        if not isinstance(message, dict):
            return
        if name := message.pop("event", None):
            if name == "hello":
                await self._greet(Hello.model_validate(message))
            for listener in self._listeners:
                listener.put_nowait(Event(str(name), message, received_ns))
        elif message.get("id") == GREETING_ID and "ok" in message:
            await self._greet(Hello.model_validate(message["ok"]))
        else:
            self._answer(message)

    async def _greet(self, hello: Hello) -> None:
        if self._hello is not None and self._hello.nonce != hello.nonce:
            self._fail_calls(ProbeRebooted("the guest rebooted"))
        self._hello = hello
        async with self._changed:
            self._changed.notify_all()

    def _fail_calls(self, error: Exception) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.answer.done():
                call.answer.set_exception(error)

    def _answer(self, message: dict[str, Any]) -> None:
        call = self._calls.pop(message.get("id", -1), None)
        if call is None or call.answer.done():
            return  # its asker gave up
        if error := message.get("error"):
            refused = ProbeRefused(call.command, error.get("kind", ""), error.get("message", ""))
            call.answer.set_exception(refused)
        else:
            call.answer.set_result(message.get("ok", {}))

    # -- what is asked ------------------------------------------------------------------------

    def _send(self, request: dict[str, Any]) -> None:
        self._writer.write(json.dumps(request).encode() + b"\n")

    async def ask(
        self, command: str, arguments: dict[str, Any], *, deadline_s: float = 90.0
    ) -> dict[str, Any]:
        """Sends one command and gives its answer. An argument that is None is left out.

        Raises ProbeRefused, ProbeSilent, ProbeRebooted or ProbeGone.
        """
        if self._gone:
            raise ProbeGone(f"the connection to the probe ended: {self._gone}")
        self._last_id += 1
        identity = self._last_id
        call = _Call(command, asyncio.get_running_loop().create_future())
        self._calls[identity] = call
        given = {name: value for name, value in arguments.items() if value is not None}
        self._send({"id": identity, "cmd": command, **given})
        try:
            async with asyncio.timeout(deadline_s):
                return await call.answer
        except TimeoutError as error:
            raise ProbeSilent(f"no answer to {command} within {deadline_s:g} s") from error
        finally:
            self._calls.pop(identity, None)

    async def call(
        self, command: str, *, deadline_s: float = 90.0, **arguments: Any
    ) -> dict[str, Any]:
        """`ask`, with the arguments by name."""
        return await self.ask(command, arguments, deadline_s=deadline_s)

    def events(self) -> EventStream:
        """What the probe says unasked from now on, until the connection ends."""
        stream = EventStream(self._listeners)
        if self._gone:
            self._listeners[-1].put_nowait(None)
        return stream

    @property
    def nonce(self) -> str:
        """The nonce of the boot that greeted last; "" before the first greeting."""
        return self._hello.nonce if self._hello else ""

    async def wait_hello(self, *, other_than: str = "", deadline_s: float = 180.0) -> Hello:
        """Waits for the greeting of a boot whose nonce is not `other_than`, and gives the greeting.

        Raises ProbeSilent or ProbeGone.
        """

        def greeted() -> bool:
            return bool(self._gone) or (self.nonce != "" and self.nonce != other_than)

        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(greeted)
        except TimeoutError as error:
            raise ProbeSilent(f"no guest greeted within {deadline_s:g} s") from error
        if self._hello is None or self._hello.nonce == other_than:
            raise ProbeGone(f"the connection to the probe ended: {self._gone}")
        return self._hello
