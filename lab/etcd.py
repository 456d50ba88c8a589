"""A real etcd of one member, on loopback or in a namespace, and a relay that stops: a partition."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from lab.namespaces import inside, within
from lab.ports import free_port
from sempervirt.trust.identity import Identity

START_S = 90.0
_CACHED = Path(__file__).parents[1] / ".cache/etcd/etcd"


class Etcd:
    """Starts at `start`; keeps its data until `remove`."""

    def __init__(
        self,
        trust: Path | None = None,
        *,
        namespace: str = "",
        address: str = "127.0.0.1",
        memory: Path = Path("/dev/shm"),
    ) -> None:
        """With `trust`, a host's certificates, it speaks to members of that cluster alone."""
        self._trust = trust
        self._namespace = namespace
        self._place = Path(
            tempfile.mkdtemp(prefix="sv-etcd-", dir=memory if memory.is_dir() else None)
        )
        self._client, self._peer = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"{'https' if trust else 'http'}://{address}:{self._client}"

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Etcd]:
        """One on loopback that answers, until the block is left."""
        server = cls()
        try:
            server.start()
            yield server
        finally:
            server.remove()

    @property
    def port(self) -> int:
        """Where it serves clients."""
        return self._client

    @property
    def pid(self) -> int:
        """Of the process that runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers."""
        program = shutil.which("etcd") or str(_CACHED)
        assert Path(program).exists(), "there is no etcd; fetch it: scripts/etcd"
        peer = f"http://127.0.0.1:{self._peer}"
        argv = [
            program,
            f"--data-dir={self._place / 'data'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--heartbeat-interval=20",
            "--election-timeout=200",
            "--log-level=warn",
        ]
        if self._trust is not None:
            argv += [
                f"--cert-file={self._trust / 'host.crt'}",
                f"--key-file={self._trust / 'host.key'}",
                f"--trusted-ca-file={self._trust / 'authority.crt'}",
                "--client-cert-auth",
                f"--client-crl-file={self._trust / 'revoked.crl'}",
            ]
        log = self._place / "log"
        with log.open("ab") as output:
            command = within(self._namespace, *argv)
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + START_S
        while not inside(self._namespace, self._healthy):
            assert self._process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.02)  # poll interval

    def _healthy(self) -> bool:
        try:
            tls = Identity(self._trust).store_context() if self._trust else None
            with urllib.request.urlopen(f"{self.url}/health", timeout=2, context=tls) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Loses its data, while it is not running."""
        shutil.rmtree(self._place / "data", ignore_errors=True)

    def remove(self) -> None:
        """Ends it for good."""
        self.kill()
        shutil.rmtree(self._place, ignore_errors=True)


class Relay:
    """Forwards TCP to a port of loopback until it is told not to.

    `frozen` forwards nothing in either direction and keeps every connection open, as a cut cable
    does; `deaf` forwards requests and swallows the answers.
    """

    def __init__(self, target: int, *, namespace: str = "", address: str = "127.0.0.1") -> None:
        self._namespace = namespace
        self._address = address
        self._target = (address, target)
        self._flowing = {"there": asyncio.Event(), "back": asyncio.Event()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._trap: tuple[bytes, Callable[[], None]] | None = None
        self.port = 0
        self.heal()

    async def start(self) -> None:
        """Listens at `port`."""
        listener = inside(self._namespace, lambda: socket.create_server((self._address, 0)))
        self._server = await asyncio.start_server(self._serve, sock=listener)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """The address of what is behind it."""
        return f"http://{self._address}:{self.port}"

    def freeze(self) -> None:
        """Nothing passes from now on."""
        for flowing in self._flowing.values():
            flowing.clear()

    def deafen(self) -> None:
        """Answers are lost from now on."""
        self._flowing["back"].clear()

    def when(self, request: bytes, act: Callable[[], None]) -> None:
        """Acts when a request that contains these bytes comes by next, before it passes."""
        self._trap = (request, act)

    def drop(self) -> None:
        """Breaks every connection; what was held back never arrives."""
        for task in self._tasks:
            task.cancel()

    def heal(self) -> None:
        """Everything passes, also what was held back."""
        for flowing in self._flowing.values():
            flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = inside(self._namespace, lambda: socket.create_connection(self._target))
        far_reader, far_writer = await asyncio.open_connection(sock=far)
        there = asyncio.create_task(self._pump(reader, far_writer, "there"))
        back = asyncio.create_task(self._pump(far_reader, writer, "back"))
        for task in (there, back):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    if way == "there" and self._trap is not None and self._trap[0] in data:
                        (_, act), self._trap = self._trap, None
                        act()
                    await self._flowing[way].wait()
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    async def close(self) -> None:
        """Cuts every connection."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
