"""A guest moves between two plain QEMUs through both ends of semper-wired, over TLS.

Nothing of the agent is used. The memory is compared with both machines stopped; then the guest
goes on at the destination, and is the same boot that it was before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.plain_qemu import DEADLINE_S, QMP_S, PlainHost, ask, running, wait_migration
from sempervirt.guest import ProbeClient
from sempervirt.qemu.qmp import Monitor
from sempervirt.trust.authority import CERTIFICATE_FILE as AUTHORITY_FILE
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import CERTIFICATE_FILE, KEY_FILE, Identity, KeyRequest

pytestmark = pytest.mark.guest
MIB = 1 << 20
MEMORY = 256 * MIB
DISK = 48 * MIB


async def exit_of(process: subprocess.Popen[bytes]) -> int:
    """Waits until a process ends; its exit status."""
    return await asyncio.to_thread(process.wait, DEADLINE_S)


@dataclass(frozen=True)
class Host(PlainHost):
    """One host: a directory with sockets, a certificate, and the shared image."""

    name: str
    blkd: bool
    wired: str = "semper-wired"

    def certify(self, authority: Authority) -> None:
        """Makes key and certificate."""
        identity = Identity(self.directory)
        asked = KeyRequest.made(self.name)
        issued = authority.issue_host(asked.text, self.name, "127.0.0.1:1")
        identity.keep(asked, issued.pem, Issued(authority.certificate).pem)

    @contextmanager
    def machine(self, *options: str, incoming: bool = False) -> Iterator[None]:
        """QEMU with the test guest, and its disk's backend."""
        qemus_own = f"""-blockdev driver=file,node-name=disk,filename={self.image},locking=off
                        -device virtio-blk-pci,drive=disk,share-rw=on"""
        with ExitStack() as stack:
            if self.blkd:
                stack.enter_context(self.backend(*(["--incoming"] if incoming else [])))
            disk = None if self.blkd else qemus_own
            stack.enter_context(self.qemu(*options, disk=disk))
            yield

    @contextmanager
    def end(self, kind: str, peer: Host, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """One end of the wire."""
        command = [
            str(Path(sys.executable).parent / self.wired),
            kind,
            "--migration=test",
            f"--ca={self.path(AUTHORITY_FILE)}",
            f"--cert={self.path(CERTIFICATE_FILE)}",
            f"--key={self.path(KEY_FILE)}",
            f"--peer-name={peer.name}",
            f"--qemu-socket={self.path('stream')}",
            f"--control-socket={self.path('wired.control')}",
            *options,
        ]
        with running(command, self.path("wired.log")) as process:
            yield process

    async def wait_wired(self, key: str, value: object = None) -> Any:
        """Waits until its end of the wire tells something (that value, if one is given)."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    found = (await ask(self.path("wired.control"), "status"))[key]
                except OSError:  # not listening yet
                    found = None
                if found is not None and value in {None, found}:
                    return found
                await asyncio.sleep(0.02)  # poll interval

    def outcome(self) -> dict[str, Any]:
        """The last word of its end of the wire."""
        lines = self.path("wired.log").read_text().splitlines()
        said = [line.partition("migration status=")[2] for line in lines]
        outcome = json.loads(next(text for text in reversed(said) if text))
        assert isinstance(outcome, dict)
        return outcome


@pytest.fixture
def hosts(place: Path, request: pytest.FixtureRequest) -> tuple[Host, Host]:
    """Two hosts with certificates, and a disk that both can read, full of data."""
    image = place / "disk.raw"
    image.write_bytes(random.Random(4).randbytes(DISK))
    authority = Authority.create(place, "test")
    blkd = request.param == "semper-blkd"
    pair = Host(place / "a", image, "a.example", blkd), Host(place / "b", image, "b.example", blkd)
    for host in pair:
        host.directory.mkdir()
        host.certify(authority)
    return pair


async def boot(host: Host) -> str:
    """Waits for the guest, lets it read its disk into its page cache; gives its nonce."""
    async with await ProbeClient.connect(host.path("probe"), deadline_s=DEADLINE_S) as client:
        nonce = (await client.wait_hello(deadline_s=DEADLINE_S)).nonce
        ran = await client.execute("dd", "if=/dev/vda", "of=/dev/null", "bs=1M")
        assert ran.status == 0, ran
        return nonce


async def start_writers(host: Host) -> None:
    """Blocks that were referred to are overwritten from now on: so few that the disk is not given
    up for it (`LUCK` of the wire's encoder), however fast they are.
    """
    async with await ProbeClient.connect(host.path("probe"), deadline_s=DEADLINE_S) as client:
        await client.wait_hello(deadline_s=DEADLINE_S)
        await client.write_start("vda", writers=8, span_bytes=MIB // 4)
        await client.wait_stats(lambda stats: stats.completions > 300)


async def stop_writers(host: Host) -> None:
    """Whatever was written is there."""
    async with await ProbeClient.connect(host.path("probe"), deadline_s=DEADLINE_S) as client:
        await client.wait_hello(deadline_s=DEADLINE_S)
        before = (await client.stats()).completions
        await client.wait_stats(lambda stats: stats.completions > before + 300)
        stats = await client.write_stop()
    assert stats.is_clean, stats


async def nonce_of(host: Host) -> str:
    """The nonce that the guest tells now."""
    async with await ProbeClient.connect(host.path("probe"), deadline_s=DEADLINE_S) as client:
        return (await client.wait_hello(deadline_s=DEADLINE_S)).nonce


@asynccontextmanager
async def joined(here: Host, there: Host) -> AsyncIterator[list[subprocess.Popen[bytes]]]:
    """Both ends of the wire, ready for the stream; the QEMU there listens already."""
    disk = f"--disk=root={here.image}"
    with there.end("destination", here, "--listen=127.0.0.1:0", disk) as receiver:
        address = await there.wait_wired("address")
        map_of = f",backend={here.control}" if here.blkd else ""
        with here.end("source", there, f"--connect={address}", disk + map_of) as sender:
            await here.wait_wired("state", "ready")
            yield [sender, receiver]


async def memory_of(monitor: Monitor, file: Path) -> str:
    """A hash of all memory of a machine that stands still."""
    assert not (await monitor.execute("query-status", timeout_s=QMP_S))["running"]
    arguments = {"val": 0, "size": MEMORY, "filename": str(file)}
    await monitor.execute("pmemsave", arguments, timeout_s=QMP_S)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.mark.parametrize("hosts", ["semper-blkd", "QEMU's own disk"], indirect=True)
async def test_the_memory_of_a_guest_is_the_same_on_the_other_side(
    hosts: tuple[Host, Host],
) -> None:
    here, there = hosts
    incoming = ["-incoming", f"unix:{there.path('stream')}", "-S"]
    with here.machine(), there.machine(*incoming, incoming=True):
        nonce = await boot(here)
        async with here.monitor() as source, there.monitor() as target, joined(here, there) as ends:
            if here.blkd:
                await ask(here.control, "handover", armed=True)
                await start_writers(here)
            await source.execute("migrate", {"uri": f"unix:{here.path('stream')}"}, timeout_s=QMP_S)
            await wait_migration(source, "completed")
            assert [await exit_of(end) for end in ends] == [0, 0]
            before = await memory_of(source, here.path("memory"))
            assert await memory_of(target, there.path("memory")) == before
            await target.execute("cont", timeout_s=QMP_S)
        assert await nonce_of(there) == nonce
        if here.blkd:
            await stop_writers(there)
        assert await boot(there) == nonce
    sent, arrived = here.outcome(), there.outcome()
    # The guest has read the whole disk, and some of it has had to make room.
    assert sent["references"] > DISK / 4096 / 2
    assert sent["stream_bytes"] == arrived["stream_bytes"]
    assert sent["wire_bytes_sent"] < sent["stream_bytes"] / 2


@pytest.mark.parametrize("hosts", ["semper-blkd", "QEMU's own disk"], indirect=True)
async def test_postcopy_goes_through(hosts: tuple[Host, Host]) -> None:
    here, there = hosts
    capability = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
    with here.machine(), there.machine("-incoming", "defer", incoming=True):
        nonce = await boot(here)
        async with here.monitor() as source, there.monitor() as target:
            for monitor in (source, target):
                await monitor.execute("migrate-set-capabilities", capability, timeout_s=QMP_S)
            uri = {"uri": f"unix:{there.path('stream')}"}
            await target.execute("migrate-incoming", uri, timeout_s=QMP_S)
            if here.blkd:
                await ask(here.control, "handover", armed=True)
                await start_writers(here)
            async with joined(here, there) as ends:
                # Slow enough to be overtaken.
                slow = {"max-bandwidth": 8 * MIB}
                await source.execute("migrate-set-parameters", slow, timeout_s=QMP_S)
                uri = {"uri": f"unix:{here.path('stream')}"}
                await source.execute("migrate", uri, timeout_s=QMP_S)
                await wait_migration(source, "active")
                await source.execute("migrate-start-postcopy", timeout_s=QMP_S)
                await wait_migration(source, "completed")
                assert [await exit_of(end) for end in ends] == [0, 0]
        assert await nonce_of(there) == nonce
        if here.blkd:
            await stop_writers(there)
    assert here.outcome()["references"] > 1000
