"""Many standbys of one snapshot go on, and each draws 32 bytes: no two may draw the same.

    one VM ─► one standby, which waits ─► a copy of it goes on, N times, as in a take-over
                                          └─► 32 bytes from /dev/urandom

A guest whose kernel has a driver for generation IDs, and one that has none, whose agent has it draw
a new seed. The control has neither: there the same bytes come again, or the trial shows nothing.

`python -m tests.standby.randomness [--count 50]` (`make standby-randomness`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sempervirt.agent import Agent, AgentConfig, Vm
from sempervirt.core.errors import Unavailable
from sempervirt.guest import ProbeClient, debian
from sempervirt.guest import image as guest_image
from sempervirt.guest.initramfs import Recipe, build
from sempervirt.guest.location import GuestImage
from sempervirt.host.directories import make_scratch
from sempervirt.qemu.spec import GUEST_AGENT_CHANNEL, VmSpec
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.rehearsal import Rehearsing
from sempervirt.standby.values import EVERY_MAX_S, Policy, Tier

ROOT = Path(__file__).resolve().parents[2]
CHANNEL = "org.sempervirt.probe"
BUSYBOX = "/bin/busybox"
DRAW = f"{BUSYBOX} head -c 32 /dev/urandom | {BUSYBOX} hexdump -v -e '/1 \"%02x\"'"
BOOT_S, READY_S = 180.0, 300.0
MIB = 1 << 20


class Drawing(Rehearsing):
    """A rehearsal of a take-over whose guest draws 32 bytes once it has answered."""

    drawn = ""

    async def _look(self, vm: Vm) -> None:
        probe = await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S)
        try:
            await probe.wait_hello(deadline_s=BOOT_S)
            self.drawn = (await probe.execute("sh", "-c", DRAW)).stdout.strip()
        finally:
            await probe.close()


def _spec(guest: GuestImage, root: Path, memory: str, *channels: str) -> VmSpec:
    standby = {"initialised": "channel", "channel": CHANNEL, "marker": "hello"}
    return VmSpec.model_validate(
        {
            "name": "web",
            "memory": memory,
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "cmdline": guest.cmdline,
            "disks": [{"name": "root", "image": str(root)}],
            "channels": [{"name": name} for name in (CHANNEL, *channels)],
            "standby": {"initialised": "agent"} if channels else standby,
        }
    )


def _empty(place: Path) -> Path:
    root = place / "root.raw"
    root.touch()
    os.truncate(root, 16 * MIB)
    return root


def with_driver(place: Path) -> VmSpec:
    """A kernel of which `vmgenid` is a part."""
    recipe = Recipe(ROOT / ".cache/guard/6.12", ROOT / ".venv/bin/semper-probe")
    return _spec(build(recipe, place / "guest")[0], _empty(place), "256M")


def with_agent(place: Path) -> VmSpec:
    """A Debian 12, which has no driver."""
    guest, root = debian(), place / "root.raw"
    subprocess.run(["cp", "--sparse=always", str(guest.root), str(root)], check=True)
    return _spec(guest, root, "512M", GUEST_AGENT_CHANNEL)


def with_neither(place: Path) -> VmSpec:
    """The same kernel as Debian's, and no agent."""
    return _spec(guest_image(), _empty(place), "256M")


GUESTS: dict[str, Callable[[Path], VmSpec]] = {
    "driver": with_driver,
    "agent": with_agent,
    "neither": with_neither,
}


async def _wait_ready(driver: StandbyDriver) -> None:
    await driver.changes.wait_until(
        lambda: bool(driver.state.ready or driver.state.trouble),
        timeout_s=READY_S,
        what="a standby",
    )
    if not driver.state.ready:
        raise Unavailable(driver.state.trouble)


async def draw(name: str, count: int) -> list[str]:
    """What so many standbys of one snapshot have drawn, in hexadecimal. Raises Unavailable, or what
    the agent raises.
    """
    place = make_scratch("svr-", Path("/tmp"))
    try:
        async with Agent.open(AgentConfig(place / "s", place / "r", keep_vms=False)) as agent:
            vm = await agent.run_vm(await asyncio.to_thread(GUESTS[name], place))
            probe = await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S)
            await probe.wait_hello(deadline_s=BOOT_S)
            await probe.close()
            driver = await agent.standbys.enable(vm, Policy(EVERY_MAX_S, 1, Tier.READY))
            await _wait_ready(driver)
            kept, drawn = agent.standbys.kept["web"], list[str]()
            for _ in range(count):
                trial = Drawing(kept.generations, driver.state.ready[-1], kept.first.disks())
                done = await trial.run()
                if done.failure:
                    raise Unavailable(done.failure)
                drawn.append(trial.drawn)
            return drawn
    finally:
        shutil.rmtree(place, ignore_errors=True)


def repeated(drawn: Sequence[str]) -> int:
    """How many of them were drawn before. Raises Unavailable for what is no 32 bytes."""
    for one in drawn:
        if len(one) != 64 or not set(one) <= set("0123456789abcdef"):
            raise Unavailable(f"a guest has drawn no 32 bytes: {one!r}")
    return len(drawn) - len(set(drawn))


def main() -> int:
    """The exit status is 0 if only the control has drawn anything twice."""
    parser = argparse.ArgumentParser(prog="make standby-randomness")
    parser.add_argument("--count", type=int, default=50, help="standbys of one snapshot")
    parser.add_argument("--guest", choices=[*GUESTS], action="append", default=[])
    options = parser.parse_args()
    logging.getLogger("sempervirt").setLevel(logging.ERROR)
    bad = False
    for name in options.guest or GUESTS:
        begun = time.monotonic()
        drawn = asyncio.run(draw(name, options.count))
        again = repeated(drawn)
        wrong = again == 0 if name == "neither" else again > 0
        bad |= wrong
        said = f"{name}: {len(drawn)} standbys, {again} have drawn what another one drew"
        took = f"({time.monotonic() - begun:.0f} s)"
        sys.stdout.write(f"{said} {took}{': NOT AS IT MUST BE' if wrong else ''}\n")
        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
