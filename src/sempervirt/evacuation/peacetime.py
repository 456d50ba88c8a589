"""What is known of the other hosts in peace, for an evacuation in which nobody can be asked.

    whenever a host comes or goes:  the store ──► which hosts there are, where, and in service
    every PAUSE_S:                  each host ──► what it has left, and says of one VM, in turn

All of it is in memory. A host that dies while the store is away goes by this: to which addresses
VMs can leave. Hosts are still asked themselves, and what one of them has said before counts where
it does not answer in time. Whoever takes a VM has the last word in any case.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import aclosing, suppress

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import ALIVE, Cluster, Member
from sempervirt.cluster.membership import persist
from sempervirt.core.errors import SempervirtError, reason
from sempervirt.migration.obstacles import HostSide
from sempervirt.migration.peer import host_side
from sempervirt.migration.sides import membership_obstacles
from sempervirt.vm.house import House
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

PAUSE_S = 30.0
# A question of peace is in no hurry, and holds nothing up.
ANSWER_S = 10.0


class Peacetime:
    """Of one agent. `members` is empty until the store has answered once; `learnt` is when it did,
    on the monotonic clock.
    """

    def __init__(self) -> None:
        self.members: Mapping[str, Member] = {}
        self.learnt = 0.0
        self._sides: dict[tuple[str, str], HostSide] = {}
        self._turn = 0

    def side(self, host: str, vm: str) -> HostSide | None:
        """What a host has said of a VM, None if it was not asked yet."""
        return self._sides.get((host, vm))

    def note(self, host: str, vm: str, side: HostSide) -> None:
        """A host has said something of a VM."""
        self._sides[host, vm] = side

    @property
    def age_s(self) -> float:
        """How old the list of the members is."""
        return time.monotonic() - self.learnt

    async def keep(self, house: House, cluster: Cluster) -> None:
        """Learns until it is cancelled. What fails leaves what was known."""
        await asyncio.gather(
            persist(lambda worked: self._follow(cluster, worked), "hosts known in peace"),
            self._repeat(house, cluster),
        )

    async def _follow(self, cluster: Cluster, worked: Callable[[], None]) -> None:
        async with aclosing(cluster.store.watch(ALIVE)) as states:
            async for _ in states:
                worked()
                self._note_members(await cluster.members())

    def _note_members(self, members: Iterable[Member]) -> None:
        before, self.members = self.members, {one.host.name: one for one in members}
        self.learnt = time.monotonic()
        if before.keys() != self.members.keys() or _able(before) != _able(self.members):
            log.info("peacetime hosts=%d able=%s", len(self.members), ",".join(_able(self.members)))

    async def _repeat(self, house: House, cluster: Cluster) -> None:
        while True:
            vms = [vm for vm in house.vms.values() if not (vm.freed or vm.run.is_end)]
            self._forget(self.members, {vm.name for vm in vms})
            if vms:
                # Of an agent that has adopted its VMs: QEMU is asked now, for it is a program.
                with suppress(SempervirtError):
                    await house.host()
                self._turn += 1
                await self.ask(cluster, vms[self._turn % len(vms)])
            await asyncio.sleep(PAUSE_S)

    async def ask(self, cluster: Cluster, vm: Vm) -> None:
        """Asks each host that takes VMs about one of them. What fails is as if it was not asked."""
        others = [self.members[name] for name in _able(self.members)]
        own = cluster.settings.host
        await asyncio.gather(
            *(self._ask(cluster, one, vm) for one in others if one.host.name != own)
        )

    async def _ask(self, cluster: Cluster, member: Member, vm: Vm) -> None:
        name = member.host.name
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                peer.connect(cluster, name, member.host.address) as connection,
            ):
                self.note(name, vm.name, await host_side(connection, vm.spec))
        except (SempervirtError, TimeoutError, OSError) as error:
            log.debug("peacetime host=%s: %s", name, reason(error))

    def _forget(self, hosts: Collection[str], vms: Collection[str]) -> None:
        self._sides = {
            (host, vm): side
            for (host, vm), side in self._sides.items()
            if host in hosts and vm in vms
        }


def _able(members: Mapping[str, Member]) -> list[str]:
    """The hosts that take VMs, by the store's word."""
    return sorted(name for name, one in members.items() if not membership_obstacles(one))
