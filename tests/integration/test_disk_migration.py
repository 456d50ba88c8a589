"""A guest moves from one QEMU to another while its disk works: the disk's side of a migration.

Nothing of the agent is used: two plain QEMU processes, two backends on one image, QEMU's own
migration. What is shown is that semper-blkd logs every page that it writes (with a page left
out the guest would read wrong data), and that the image changes hands at the switchover.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import Unavailable
from sempervirt.guest import ProbeClient
from sempervirt.guest import image as guest_image
from sempervirt.vm.qmp import Monitor

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]
MIB = 1 << 20
BOOT_S = 60.0
MIGRATE_S = 60.0
QMP_S = 10.0


@dataclass(frozen=True)
class Host:
    """One end: a directory with the sockets of a QEMU and of its disk's backend."""

    directory: Path
    image: Path

    def path(self, name: str) -> Path:
        """A socket of this end."""
        return self.directory / name

    @contextmanager
    def backend(self, *options: str) -> Iterator[None]:
        """Serves the image on this end."""
        program = Path(sys.executable).with_name("semper-blkd")
        command = [
            str(program),
            f"--socket-path={self.path('disk')}",
            f"--control-socket={self.path('control')}",
            f"--blk-file={self.image}",
            "--serial=moved",
            *options,
        ]
        with running(command, self.path("blkd.log")):
            yield

    @contextmanager
    def qemu(self, *options: str) -> Iterator[None]:
        """A machine of this end, with the test guest."""
        guest = guest_image()
        command = f"""
            qemu-system-x86_64 -nodefaults -no-user-config -display none -cpu max
            -accel tcg,thread=multi -m 256M -machine q35,memory-backend=memory
            -object memory-backend-memfd,id=memory,size=256M,share=on
            -kernel {guest.kernel} -initrd {guest.initrd} -append 'console=ttyS0 quiet'
            -serial file:{self.path("console.log")}
            -qmp unix:{self.path("qmp")},server=on,wait=off
            -chardev socket,id=disk,path={self.path("disk")},reconnect-ms=1
            -device vhost-user-blk-pci,chardev=disk,num-queues=2
            -chardev socket,id=probe,path={self.path("probe")},server=on,wait=off
            -device virtio-serial-pci
            -device virtserialport,chardev=probe,name=org.sempervirt.probe
        """
        with running([*shlex.split(command), *options], self.path("qemu.log")):
            yield

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """One request to the backend's control socket."""
        reader, writer = await asyncio.open_unix_connection(str(self.path("control")))
        writer.write(json.dumps({"id": 1, "cmd": command, **arguments}).encode() + b"\n")
        answer = json.loads(await reader.readline())
        writer.close()
        found = answer["ok"]
        assert isinstance(found, dict)
        return found

    async def _connect(self) -> Monitor | None:
        try:
            return await Monitor.connect(self.path("qmp"), str(self.directory), QMP_S)
        except Unavailable:  # not listening yet
            return None

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Monitor]:
        """QEMU's monitor."""
        async with asyncio.timeout(BOOT_S):
            while True:
                monitor = await self._connect()
                if monitor is not None:
                    break
                await asyncio.sleep(0.01)  # poll interval
        try:
            yield monitor
        finally:
            await monitor.close()


@contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    """A process for as long as the block lasts."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def migrate(source: Monitor, target: Path) -> dict[str, Any]:
    """QEMU's own migration to its end."""
    await source.execute("migrate", {"uri": f"unix:{target}"}, timeout_s=QMP_S)
    async with asyncio.timeout(MIGRATE_S):
        while True:
            info = await source.execute("query-migrate", timeout_s=QMP_S)
            assert info.get("status") != "failed", info
            if info.get("status") == "completed":
                assert isinstance(info, dict)
                return info
            await asyncio.sleep(0.02)  # poll interval


async def until_running(target: Monitor) -> None:
    """Waits until the processors of the receiving end run."""
    async with asyncio.timeout(MIGRATE_S):
        while True:
            if (await target.execute("query-status", timeout_s=QMP_S))["running"]:
                return
            await asyncio.sleep(0.01)  # poll interval


async def writes(host: Host, more: int = 300) -> str:
    """Lets the guest write for a while; gives the nonce of its boot."""
    async with await ProbeClient.connect(host.path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        before = (await client.stats()).completions
        await client.wait_stats(lambda stats: stats.completions >= before + more)
        return client.nonce


@pytest.mark.parametrize("engine", ["mmap", "uring --direct"])
async def test_a_guest_moves_there_and_back_while_it_writes(
    place: Path, disk_image: Path, engine: str
) -> None:
    options = ["--num-queues=2", *f"--engine={engine}".split()]
    ends = [Host(place / name, disk_image) for name in "abc"]
    for end in ends:
        end.directory.mkdir()
    with ExitStack() as stack:
        stack.enter_context(ends[0].backend(*options))
        stack.enter_context(ends[0].qemu())
        async with await ProbeClient.connect(ends[0].path("probe"), deadline_s=BOOT_S) as client:
            nonce = (await client.wait_hello(deadline_s=BOOT_S)).nonce
            await client.write_start("serial:moved", writers=16, span_bytes=8 * MIB)
        for here, there in pairwise(ends):
            assert await writes(here) == nonce
            stack.enter_context(there.backend(*options, "--incoming"))
            incoming = there.path("incoming")
            stack.enter_context(there.qemu("-incoming", f"unix:{incoming}"))
            await here.ask("handover", armed=True)
            async with here.monitor() as source, there.monitor() as target:
                assert (await there.ask("status"))["owns_image"] is False
                await migrate(source, incoming)
                await until_running(target)
                # The old end has let go, and cannot have the disk back.
                assert (await here.ask("status"))["owns_image"] is False
            assert await writes(there) == nonce
            assert (await there.ask("status"))["owns_image"] is True
        async with await ProbeClient.connect(ends[-1].path("probe"), deadline_s=BOOT_S) as client:
            await client.wait_hello(deadline_s=BOOT_S)
            stats = await client.write_stop()
    assert stats.io_error_count == 0, stats
    assert stats.hung == 0, stats
    assert stats.wrong.total == 0, stats
    assert stats.verified_final is not None
    assert stats.verified_final.complete, stats
    assert stats.verified_final.wrong == 0, stats
