"""Whom the campaign kills and what it cuts, on either side of a move; and how that is mended."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from lab.world import QEMU, Host, World

PROGRAMS = {"qemu": QEMU, "backend": "semper-blkd", "wire": "semper-wired"}
PROCESSES = tuple(f"{side} {what}" for side in ("source", "destination") for what in PROGRAMS)
# Of a VM with a passed-through device.
MEDIATORS = ("source mediator", "destination mediator")
MEDIATOR = "semper-vfiod"
AGENTS = ("source agent", "destination agent")
CUTS = ("link", "source store", "destination store")
ETCD = "etcd"
VICTIMS = (*AGENTS, *PROCESSES, *CUTS, ETCD)
# For how long something is cut, or an agent is dead, in seconds.
HELD_S = (0.0, 3.0)


@dataclass(frozen=True)
class Sides:
    """Which host is which, in one move."""

    world: World
    source: Host
    destination: Host

    def host(self, victim: str) -> Host:
        """The host of a victim."""
        return self.source if victim.startswith("source") else self.destination


def aim(sides: Sides, victim: str) -> list[int]:
    """The processes that it may hit; looking for them takes longer than some phases."""
    if victim in MEDIATORS:
        return sides.host(victim).processes(MEDIATOR)
    if victim not in PROCESSES:
        return []
    return sides.host(victim).processes(PROGRAMS[victim.split()[1]])


async def strike(sides: Sides, victim: str, aimed: Sequence[int], chance: random.Random) -> str:
    """Does it. Says what was hit, or "" when there was nobody to kill."""
    if victim in (*PROCESSES, *MEDIATORS):
        return _kill(sides.host(victim), aimed, chance) or _kill(
            sides.host(victim), aim(sides, victim), chance
        )
    if victim in AGENTS:
        sides.host(victim).kill_agent()
    elif victim == ETCD:
        await asyncio.to_thread(sides.world.etcd.kill)
    else:
        sides.world.network.cut(_cable(sides, victim))
    return victim


async def mend(sides: Sides, victim: str) -> None:
    """Starts or heals what was struck; processes of a VM are their agent's affair."""
    if victim in AGENTS:
        await sides.host(victim).start_agent()
    elif victim == ETCD:
        await asyncio.to_thread(sides.world.etcd.start)
    elif victim in CUTS:
        sides.world.network.heal(_cable(sides, victim))


def _cable(sides: Sides, victim: str) -> str:
    return "link" if victim == "link" else f"store-{sides.host(victim)}"


def _kill(host: Host, pids: Sequence[int], chance: random.Random) -> str:
    if not pids:
        return ""
    pid = chance.choice(pids)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return f"pid {pid} on {host}"
    return ""
