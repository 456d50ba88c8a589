"""A TCP client of the guest, outside: one connection for ever, and how long it heard nothing."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from lab.namespaces import inside

PORT = 7
# How often it says something. A message is its own number, so the echo proves their order.
INTERVAL_S = 0.005
_MESSAGE = struct.Struct("<Q")
CONNECT_S = 60.0


class EchoClient:
    """Speaks to the guest's echo without a pause. Made by `connected`; never connects again."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._heard: list[float] = []
        self._heard_count = 0
        self.problem = ""

    @classmethod
    @asynccontextmanager
    async def connected(cls, namespace: str, address: str) -> AsyncIterator[EchoClient]:
        """A client in a namespace, for as long as the block lasts. Waits until it is heard."""

        def connect() -> socket.socket:
            return socket.create_connection((address, PORT), timeout=CONNECT_S)

        connection = await asyncio.to_thread(inside, namespace, connect)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        client = cls(connection)
        tasks = [asyncio.create_task(client._speak()), asyncio.create_task(client._listen())]
        try:
            await client.wait_heard()
            yield client
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            connection.close()

    async def _speak(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            for number in itertools.count():
                await loop.sock_sendall(self._socket, _MESSAGE.pack(number))
                await asyncio.sleep(INTERVAL_S)  # poll interval
        except OSError as error:
            self.problem = self.problem or f"cannot send: {error}"

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        pending = b""
        try:
            while data := await loop.sock_recv(self._socket, 65536):
                self._heard.append(time.monotonic())
                pending += data
                whole = len(pending) - len(pending) % _MESSAGE.size
                for (number,) in _MESSAGE.iter_unpack(pending[:whole]):
                    if number != self._heard_count:
                        self.problem = f"heard {number} instead of {self._heard_count}"
                        return
                    self._heard_count += 1
                pending = pending[whole:]
            self.problem = self.problem or "the guest closed the connection"
        except OSError as error:
            self.problem = self.problem or f"the connection broke: {error}"

    @property
    def alive(self) -> bool:
        """Whether the connection stands, and every byte came back in its order."""
        return not self.problem

    async def wait_heard(self, deadline_s: float = CONNECT_S) -> None:
        """Waits for an answer to something that is said from now on."""
        before = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self.alive and (not self._heard or self._heard[-1] <= before):  # noqa: ASYNC110
                    await asyncio.sleep(INTERVAL_S)  # poll interval
        assert self.alive, self.problem
        assert self._heard, "nothing was heard"
        heard = self._heard[-1] > before
        assert heard, f"nothing was heard for {deadline_s:g} s: {self.connection_state()}"

    def connection_state(self) -> str:
        """What the kernel knows of the connection: who waits for whom, and since when."""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        kinds, words = struct.unpack("<8B24I", info), ("retransmits", "probes", "backoff")
        said = [f"{word} {value}" for word, value in zip(words, kinds[2:5], strict=True)]
        figures = kinds[8:]
        names = {"rto us": 0, "unacked": 4, "lost": 6, "ms since sent": 9, "since data": 11}
        said += [f"{word} {figures[index]}" for word, index in names.items()]
        return ", ".join((f"state {kinds[0]}", *said, f"ms since ack {figures[12]}"))

    def silence_ms(self, since: float) -> float:
        """The longest time without an answer since that instant (monotonic seconds)."""
        return longest_ms(self._heard, since)


def longest_ms(instants: list[float], since: float) -> float:
    """The longest interval between consecutive instants that ended after `since`."""
    pairs = itertools.pairwise(instants)
    return max((after - before for before, after in pairs if after > since), default=0.0) * 1000
