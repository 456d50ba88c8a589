"""The guest that moves: its heart as either host hears it, its writers, its address outside."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from lab.client import PORT, EchoClient, longest_ms
from lab.layers import laid
from lab.network import GUEST, TAP
from lab.world import DEADLINE_S, POLL_S, QEMU, Host, World
from sempervirt.core.errors import Unavailable
from sempervirt.guest import ProbeClient, ProbeGone, ProbeSilent
from sempervirt.guest import image as guest_image
from sempervirt.guest.reports import Stats
from sempervirt.qemu.spec import VmSpec

VM = "web"
MIB = 1 << 20
IMAGE_SIZE = 32 * MIB
LOAD: dict[str, Any] = {"writers": 4, "span_bytes": 8 * MIB, "flush_every": 32}
BEAT_MS = 5
ATTEMPTS = 3
BOOT_S = 180.0
LISTEN_S = 3600.0


# Of Debian's package ovmf: a firmware whose variables stand in a file of their own.
FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")


# Where scripts/newer-qemu puts a QEMU that can hand devices to its guest.
NEWER_QEMU = Path(__file__).parents[1] / ".cache/qemu/bin"
NVME = "nvme0n1"


def spec_of(
    image: Path, memory: str = "192M", *, uefi: bool = False, nvme: Path | None = None
) -> VmSpec:
    """The VM: one processor, one disk, one tap; with `nvme` a passed-through controller on that
    image.
    """
    guest = guest_image()
    firmware = {"firmware": str(FIRMWARE), "firmware_vars": str(FIRMWARE_VARS)} if uefi else {}
    return VmSpec.model_validate(
        {
            "name": VM,
            "memory": memory,
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "cmdline": guest.cmdline,
            "disks": [{"name": "root", "image": str(image)}],
            "passthrough": [{"name": "nvme", "image": str(nvme)}] if nvme else [],
            "nics": [{"type": "tap", "tap": TAP}],
            "channels": [{"name": "org.sempervirt.probe"}],
            **firmware,
        }
    )


class Guest:
    """Made by `booted`. Listens to the channel on both hosts all the time."""

    def __init__(self, world: World, spec: VmSpec) -> None:
        self.world = world
        self.spec = spec
        self.nonce = ""
        self._probes: dict[str, ProbeClient] = {}
        self._beats: list[float] = []
        self._heard: dict[str, list[float]] = {host.name: [] for host in world.hosts}
        # The numbers of the same beats: the guest's own count.
        self._numbers: dict[str, list[int]] = {host.name: [] for host in world.hosts}

    @classmethod
    @asynccontextmanager
    async def booted(
        cls, world: World, host: Host, *, uefi: bool = False, nvme: bool = False
    ) -> AsyncIterator[Guest]:
        """A guest with writers, heartbeat and echo, on a new image, until the block is left. With
        `nvme` also on a passed-through controller.
        """
        image = _new_image(world, "disk.raw")
        passed = _new_image(world, "nvme.raw") if nvme else None
        guest = cls(world, spec_of(image, uefi=uefi, nvme=passed))
        tasks = [asyncio.create_task(guest._listen(host)) for host in world.hosts]
        try:
            await guest._boot(host)
            yield guest
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _boot(self, host: Host) -> None:
        probe = await self._started(host)
        self.nonce = probe.nonce
        await probe.network_up("eth0", f"{GUEST}/24")
        await probe.echo_start(PORT)
        for device in self.devices:
            await probe.write_start(device, **LOAD)
        await probe.heartbeat_start(interval_ms=BEAT_MS)

    async def _started(self, host: Host) -> ProbeClient:
        """QEMU's emulator falls over in some boots (see `emulator_died` of the demo)."""
        for attempt in itertools.count(1):
            async with host.client() as client:
                await client.run_vm(self.spec)
            try:
                return await self.probe_on(host, BOOT_S)
            except (ProbeGone, ProbeSilent):
                if attempt == ATTEMPTS or host.processes(QEMU):
                    raise
        raise AssertionError

    async def _listen(self, host: Host) -> None:
        path = host.config.vm_run_dir(VM) / "probe.sock"
        while True:
            try:
                probe = await ProbeClient.connect(path, deadline_s=LISTEN_S)
            except Unavailable:
                continue
            self._probes[host.name] = probe
            async for event in probe.events():
                if event.name == "beat":
                    self._beats.append(event.received_ns / 1e9)
                    self._heard[host.name].append(self._beats[-1])
                    self._numbers[host.name].append(int(event.members["seq"]))
            if self._probes.get(host.name) is probe:
                del self._probes[host.name]
            await probe.close()

    @property
    def devices(self) -> tuple[str, ...]:
        """What its writers write to, by the names that its kernel gives."""
        return ("vda", NVME) if self.spec.passthrough else ("vda",)

    @property
    def image(self) -> Path:
        """Its disk."""
        return self.spec.disks[0].image

    def outside(self) -> AbstractAsyncContextManager[EchoClient]:
        """A TCP client of the guest that is on no host."""
        return EchoClient.connected(self.world.network.net, GUEST)

    async def probe_on(self, host: Host, deadline_s: float = DEADLINE_S) -> ProbeClient:
        """The probe, when it has answered on that host. Raises ProbeSilent, ProbeGone."""
        give_up = time.monotonic() + deadline_s
        while (probe := self._probes.get(host.name)) is None:
            if time.monotonic() > give_up:
                raise ProbeSilent(f"{VM} has no channel on {host}")
            await asyncio.sleep(POLL_S)  # poll interval
        await probe.wait_hello(deadline_s=max(0.1, give_up - time.monotonic()))
        return probe

    def beats_on(self, host: Host, since: float) -> bool:
        """Whether its heart was heard there after that instant (monotonic seconds)."""
        heard = self._heard[host.name]
        return bool(heard) and heard[-1] > since

    def heard_about(self, host: Host, instant: float, within_s: float) -> bool:
        """Whether its heart was heard there that close to an instant, or it is too early to say."""
        heard = self._heard[host.name]
        index = bisect.bisect_left(heard, instant - within_s)
        if index < len(heard) and heard[index] <= instant + within_s:
            return True
        return time.monotonic() < instant + within_s

    def heard_twice(self, source: Host, destination: Host, since: float) -> int:
        """How often it beat on the source after it had begun to beat on the destination. By its own
        count, which is in its memory: when it was heard depends on who listens.
        """
        there = self._numbers[destination.name][self._after(destination, since) :]
        here = self._numbers[source.name][self._after(source, since) :]
        return sum(number >= there[0] for number in here) if there else 0

    def _after(self, host: Host, since: float) -> int:
        return bisect.bisect_right(self._heard[host.name], since)

    async def wait_beat(self, *hosts: Host, deadline_s: float = DEADLINE_S) -> Host:
        """The first of these hosts where its heart is heard from now on. Raises ProbeSilent."""
        since = time.monotonic()
        while time.monotonic() < since + deadline_s:
            for host in hosts:
                if self.beats_on(host, since):
                    return host
            await asyncio.sleep(POLL_S)  # poll interval
        names = " and ".join(map(str, hosts))
        raise ProbeSilent(f"{VM} was not heard on {names} for {deadline_s:g} s")

    def silence_ms(self, since: float) -> float:
        """The longest time without a heartbeat since that instant."""
        return longest_ms(self._beats, since)

    async def judged(self, host: Host) -> Stats:
        """Stops the writers and reads every block back, on the host where it runs."""
        probe = await self.probe_on(host)
        return await probe.write_stop(device="vda")


def _new_image(world: World, name: str) -> Path:
    image = world.images / name
    image.unlink(missing_ok=True)
    image.with_name(f"{name}.epoch").unlink(missing_ok=True)
    shutil.rmtree(image.with_name(f"{name}.layers"), ignore_errors=True)
    image.touch()
    os.truncate(image, IMAGE_SIZE)
    return laid(image)
