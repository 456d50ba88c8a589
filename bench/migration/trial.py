"""One guest: booted, prepared, moved once, and asked whether it is still itself."""

import asyncio
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.migration.ends import End, Hardware
from bench.migration.figures import Figures
from bench.migration.guests import Guest
from bench.migration.pulse import BEAT_MS, Instants, Pulse, gap_ms, jump_ms, steps_ms
from bench.migration.waiting import MoveError, until
from bench.migration.ways import Way, certify
from lab.client import PORT, EchoClient
from lab.network import GUEST, Link, Network
from sempervirt.core.errors import SempervirtError
from sempervirt.guest import DebianImage, ProbeClient
from sempervirt.qemu.qmp import Monitor

BOOT_S = 240.0
BEATS_S = 60.0
# Enough to know its clock, before and after.
BEATS = 60


@dataclass(frozen=True)
class Setting:
    """What all measurements share. `tree` is the image with the package tree, if there is one."""

    guest: DebianImage
    tree: Path | None
    memory_mib: int


@dataclass
class Stand:
    """Two hosts and the guest on the first of them."""

    network: Network
    here: End
    there: End
    here_pulse: Pulse
    there_pulse: Pulse


async def measure(
    setting: Setting, link: Link, guest: Guest, way: Way
) -> tuple[Figures, dict[str, Any]]:
    """Boot the guest, move it once, and say how it went. Raises MoveError."""
    try:
        async with _stand(setting, link, guest) as stand:
            probe = await _booted(stand)
            nonce = probe.nonce
            await guest.prepare(probe, setting.memory_mib)
            await probe.echo_start(PORT)
            await probe.heartbeat_start(interval_ms=BEAT_MS)
            async with EchoClient.connected(stand.network.net, GUEST) as client:
                await stand.here_pulse.beating(BEATS, BEATS_S)
                seen = await _moved(stand, way, client)
                after = await stand.there_pulse.beating(1, BEATS_S)
                if (await after.wait_hello()).nonce != nonce:
                    raise MoveError("the guest booted anew")
                if not client.alive:
                    raise MoveError(f"its client: {client.problem}")
            return seen
    except (SempervirtError, TimeoutError, OSError, AssertionError) as error:
        raise MoveError(f"{type(error).__name__}: {error}") from error


@asynccontextmanager
async def _stand(setting: Setting, link: Link, guest: Guest) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        # A short path: a socket's may have 107 bytes.
        folder = tempfile.TemporaryDirectory(prefix="sm-", dir="/tmp", ignore_cleanup_errors=True)
        place = Path(stack.enter_context(folder))
        root = place / "root.raw"
        # A hole stays a hole.
        copy = ["cp", "--sparse=always", str(setting.guest.root), str(root)]
        await asyncio.to_thread(subprocess.run, copy, check=True)
        tree = setting.tree
        # The cleaner of the network removes the folder, too, if this program is killed.
        network = await asyncio.to_thread(Network, link, place)
        stack.push_async_callback(asyncio.to_thread, network.close)
        address = f"ip={GUEST}:::255.255.255.0::eth0:none"
        hardware = Hardware(
            setting.guest,
            f"{setting.guest.cmdline} {address}",
            setting.memory_mib,
            guest.disks(root, tree),
        )
        ends = [
            stack.enter_context(End(name, network, place / name, hardware)) for name in ("a", "b")
        ]
        pulses = [await stack.enter_async_context(Pulse.felt(end.path("probe"))) for end in ends]
        yield Stand(network, ends[0], ends[1], pulses[0], pulses[1])


async def _booted(stand: Stand) -> ProbeClient:
    """The guest on the first host, when its probe has greeted."""
    stand.here.boot(incoming=False)
    probe = await stand.here_pulse.connected(BOOT_S)
    await probe.wait_hello(deadline_s=BOOT_S)
    # Beats of systemd's last services would be measured as well.
    await probe.execute("/usr/bin/systemctl", "is-system-running", "--wait", deadline_s=BOOT_S)
    return probe


async def _moved(stand: Stand, way: Way, client: EchoClient) -> tuple[Figures, dict[str, Any]]:
    here, there = stand.here, stand.there
    certify(here, there)
    there.boot(incoming=True)
    async with here.monitor() as source, there.monitor() as target:
        await until(lambda: waits(target), "the QEMU that receives", BOOT_S)
        stops, runs = Instants("STOP"), Instants("RESUME")
        watching = [
            asyncio.create_task(source.follow(stops)),
            asyncio.create_task(target.follow(runs)),
        ]
        wire, processor = stand.network.sent(), _processor_s(stand)
        began = time.monotonic()
        told = await way.move(here, there, source, target)
        ended = time.monotonic()
        wire, processor = stand.network.sent() - wire, _processor_s(stand) - processor
        await stand.there_pulse.beating(BEATS, BEATS_S)
        with suppress(AssertionError):  # told by its `problem`
            await client.wait_heard()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    before, after = stand.here_pulse.beats, stand.there_pulse.beats
    figures = Figures(
        wire_mb=wire / 1e6,
        total_s=ended - began,
        migrate_s=told["qemu"].get("total-time", 0) / 1000,
        blackout_ms=gap_ms(before, after),
        stopped_ms=jump_ms(before, after),
        echo_ms=client.silence_ms(began),
        cpu_s=processor,
    )
    told["steps_ms"] = steps_ms(before, stops.seen_ns, runs.seen_ns, after)
    return figures, told


def _processor_s(stand: Stand) -> float:
    return stand.here.processor_s() + stand.there.processor_s()


async def waits(target: Monitor) -> bool:
    """Whether a QEMU has everything that it needs to receive a guest."""
    return await target.query_status(BOOT_S) == "inmigrate"
