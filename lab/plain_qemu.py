"""Plain QEMU processes with the test guest, for tests that use nothing of the agent."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sempervirt.core.errors import Unavailable
from sempervirt.guest import ProbeClient
from sempervirt.guest import image as guest_image
from sempervirt.qemu.qmp import Monitor

DEADLINE_S = 180.0
QMP_S = 60.0
LINE_MAX_BYTES = 1 << 20


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block lasts."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def ask(socket: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """One request to a control socket."""
    reader, writer = await asyncio.open_unix_connection(str(socket), limit=LINE_MAX_BYTES)
    writer.write(json.dumps({"id": 1, "cmd": command, **arguments}).encode() + b"\n")
    answer = json.loads(await reader.readline())
    writer.close()
    assert isinstance(answer["ok"], dict), answer
    found: dict[str, Any] = answer["ok"]
    return found


async def wait_migration(monitor: Monitor, status: str) -> dict[str, Any]:
    """Waits for a state of the migration; gives all that QEMU says of it."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            info = await monitor.execute("query-migrate", timeout_s=QMP_S)
            assert info.get("status") != "failed", info
            if info.get("status") == status:
                assert isinstance(info, dict)
                return info
            await asyncio.sleep(0.02)  # poll interval


async def wait_running(monitor: Monitor) -> None:
    """Waits until the processors run."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if (await monitor.execute("query-status", timeout_s=QMP_S))["running"]:
                return
            await asyncio.sleep(0.01)  # poll interval


@dataclass(frozen=True)
class PlainHost:
    """One host: a directory with the sockets of a QEMU and of its disk's backend."""

    directory: Path
    image: Path
    program: str = field(default="qemu-system-x86_64", kw_only=True)

    def path(self, name: str) -> Path:
        """A file of this host."""
        return self.directory / name

    @property
    def control(self) -> Path:
        """The backend's control socket."""
        return self.path("blkd.control")

    @contextmanager
    def backend(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """Serves the image on this host."""
        command = [
            str(Path(sys.executable).with_name("semper-blkd")),
            f"--socket-path={self.path('disk')}",
            f"--control-socket={self.control}",
            f"--blk-file={self.image}",
            "--serial=moved",
            *options,
        ]
        with running(command, self.path("blkd.log")) as process:
            yield process

    @contextmanager
    def qemu(self, *options: str, disk: str | None = None, queues: int = 1) -> Iterator[None]:
        """A machine with the test guest; its disk is the backend's unless `disk` says another."""
        guest = guest_image()
        disk = (
            disk
            or f"""
            -chardev socket,id=disk,path={self.path("disk")},reconnect-ms=1
            -device vhost-user-blk-pci,chardev=disk,num-queues={queues}"""
        )
        command = f"""
            {self.program} -nodefaults -no-user-config -display none -cpu max
            -accel tcg,thread=multi -m 256M -machine q35,memory-backend=memory
            -object memory-backend-memfd,id=memory,size=256M,share=on
            -kernel {guest.kernel} -initrd {guest.initrd} -append 'console=ttyS0 quiet'
            -serial file:{self.path("console.log")}
            -qmp unix:{self.path("qmp")},server=on,wait=off {disk}
            -chardev socket,id=probe,path={self.path("probe")},server=on,wait=off
            -device virtio-serial-pci
            -device virtserialport,chardev=probe,name=org.sempervirt.probe
        """
        with running([*shlex.split(command), *options], self.path("qemu.log")):
            yield

    async def wait_backend(self, key: str, value: object) -> None:
        """Waits until the backend says so in its status."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    if (await ask(self.control, "status"))[key] == value:
                        return
                except OSError:  # not listening yet
                    pass
                await asyncio.sleep(0.01)  # poll interval

    async def _connect(self) -> Monitor | None:
        try:
            return await Monitor.connect(self.path("qmp"), str(self.directory), QMP_S)
        except Unavailable:  # not listening yet
            return None

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Monitor]:
        """QEMU's monitor."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                monitor = await self._connect()
                if monitor is not None:
                    break
                await asyncio.sleep(0.01)  # poll interval
        try:
            yield monitor
        finally:
            await monitor.close()

    @asynccontextmanager
    async def probe(self) -> AsyncIterator[tuple[ProbeClient, str]]:
        """The probe in the guest, and the nonce of its boot."""
        async with await ProbeClient.connect(self.path("probe"), deadline_s=DEADLINE_S) as client:
            yield client, (await client.wait_hello(deadline_s=DEADLINE_S)).nonce
