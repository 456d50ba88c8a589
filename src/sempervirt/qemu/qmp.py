"""QEMU's monitor, on the library qemu.qmp: typed, with a deadline on every call.

What the caller can rely on: `StateConflict` — QEMU refused, nothing was done; `Unavailable` —
not connected, nothing was sent; `OutcomeUnknown` — sent, and no answer came by the deadline
or before the connection ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate

from sempervirt.core.errors import OutcomeUnknown, StateConflict, Unavailable, reason
from sempervirt.host.peers import require_peer

# Each failure that the library logs is also raised, and is told there in our words.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

OnEvent = Callable[[str, Mapping[str, Any]], None]


# QEMU's main loop may wait for a page of the guest that only these commands will bring: they are
# carried out beside it.
_OUT_OF_BAND = frozenset({"migrate-pause", "migrate-recover"})


class Monitor:
    """One connection. Made by `connect`; `close` has to be called in any case."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    @classmethod
    async def connect(
        cls, path: Path, name: str, timeout_s: float, pid: int | None = None
    ) -> Monitor:
        """Connects and negotiates. With `pid` it has to be that process which listens.

        Raises Unavailable when nobody listens, OutcomeUnknown when somebody does and says
        nothing (the process is there, but hangs or talks to another client), or is another process.
        """
        client = QMPClient(name)
        try:
            async with asyncio.timeout(timeout_s):
                await client.connect(await _connected(path, pid))
        except TimeoutError as error:
            raise OutcomeUnknown(f"the monitor of {name} does not greet") from error
        except (QMPError, OSError, EOFError) as error:
            raise Unavailable(
                f"the monitor of {name}, {path}, cannot be reached: {reason(error)}"
            ) from error
        return cls(client)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
    ) -> Any:
        """Runs a command; what is raised, see the module."""
        if self._client.runstate is not Runstate.RUNNING:
            raise Unavailable(f"not connected to the monitor, {command} was not sent")
        try:
            async with asyncio.timeout(timeout_s):
                oob = command in _OUT_OF_BAND
                return await self._client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            raise StateConflict(f"QEMU refused {command}: {error}") from error
        except TimeoutError as error:
            raise OutcomeUnknown(
                f"the monitor did not answer {command} within {timeout_s:g} s"
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise OutcomeUnknown(
                f"the monitor was lost during {command}: {reason(error)}"
            ) from error

    def execute_within(self, timeout_s: float) -> Callable[..., Awaitable[Any]]:
        """`execute` with a deadline for each command."""

        async def execute(command: str, arguments: Mapping[str, Any] | None = None) -> Any:
            return await self.execute(command, arguments, timeout_s=timeout_s)

        return execute

    async def query_status(self, timeout_s: float) -> str:
        """QEMU's own runstate, for example "running" or "paused"."""
        answer = await self.execute("query-status", timeout_s=timeout_s)
        if not isinstance(answer, dict) or "status" not in answer:
            raise OutcomeUnknown("the monitor answered query-status without a status")
        return str(answer["status"])

    async def peripherals(self, timeout_s: float) -> frozenset[str]:
        """The ids of the devices that QEMU has now."""
        answer = await self.execute(
            "qom-list", {"path": "/machine/peripheral"}, timeout_s=timeout_s
        )
        items = answer if isinstance(answer, list) else []
        return frozenset(str(item.get("name")) for item in items if isinstance(item, dict))

    async def follow(self, on_event: OnEvent) -> None:
        """Passes events on until the connection ends, then returns."""
        ended = asyncio.create_task(self._wait_ended())
        event: asyncio.Future[Any] = ended
        try:
            while not ended.done():
                event = asyncio.ensure_future(self._client.events.get())
                await asyncio.wait((event, ended), return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    message = event.result()
                    data = message.get("data")
                    on_event(str(message["event"]), data if isinstance(data, dict) else {})
        finally:
            event.cancel()
            ended.cancel()

    async def _wait_ended(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """Disconnects. The library keeps the reason of a lost connection until this takes it.

        That reason may be any exception that QEMU's bytes provoked in the library's reader: a line
        that is too long, nested too deeply or no text. None of them may end the agent.
        """
        if self._client.runstate is not Runstate.IDLE:
            with contextlib.suppress(Exception):
                await self._client.disconnect()


async def _connected(path: Path, pid: int | None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(connection, str(path))
        if pid is not None:
            require_peer(connection, pid, path)
    except BaseException:
        connection.close()
        raise
    return connection
