"""VMs of a host that is about to die, and standbys of them on other hosts.

    this host                                     host b, which keeps standbys of web
      falls ── take web over ───────────────────► is it ready? its state is loaded
      QEMU and backends end, by pidfd  ◄───────── end web: b's fence
      "seen to have ended" ─────────────────────► its proof; the claim; the guest runs
      web is on b  ◄─────────────────────────────

Nothing ends here before b has said that it has one that can go on. Who keeps them, and whether one
could take over, b says with each of its questions (`standby.offer`), so the store is not asked for
that here; b itself needs the store.
"""

from __future__ import annotations

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import StateConflict
from sempervirt.evacuation.peacetime import Peacetime
from sempervirt.standby.messages import FirstPeer
from sempervirt.standby.offer import Offer
from sempervirt.vm.config import AgentConfig


class KeptElsewhere:
    """By `offer`, what other hosts have asked and said, and `peacetime`, where they are."""

    def __init__(self, config: AgentConfig, offer: Offer, peacetime: Peacetime) -> None:
        self._config = config
        self._offer = offer
        self._peacetime = peacetime

    async def keeper(self, vm: str) -> str | None:
        """See `adapters.Elsewhere`."""
        return await self._offer.find_keeper(vm)

    async def take_over(self, vm: str) -> None:
        """See `adapters.Elsewhere`."""
        keeper = self._offer.let_fall(vm)
        async with Cluster.opened(self._config) as cluster:
            member = self._peacetime.members.get(keeper)
            if member is None:
                member = next((m for m in await cluster.members() if m.host.name == keeper), None)
            if member is None:
                raise StateConflict(f"where host {keeper} is nobody knows")
            async with peer.connect(cluster, keeper, member.host.address) as connection:
                await FirstPeer(connection, vm).take_over()
