"""The judge of a guest that moved, or should have: was there ever a second writer, is it lost?

Nothing that our programs say counts as evidence. These do:

- the image: the guest reads every block back and knows what has to stand there (its ledger is
  in its memory, so a copy of it that wrote elsewhere, or a backend that wrote late, is seen);
- the kernel's journal of who wrote to the image, host by host;
- the guest's heart, which is heard on one host or the other, and its nonce, which is in its
  memory only;
- the TCP client outside, which never connects again.

What the hosts say of the VM is then held against that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lab.client import EchoClient
from lab.guest import LOAD, VM, Guest
from lab.journal import Journal
from lab.world import Host
from sempervirt.core.errors import NotFound
from sempervirt.guest import ProbeGone, ProbeSilent
from sempervirt.guest.reports import Stats

ABSENT = "absent"
# States in which a host does not claim that the VM may run there.
QUIET = (ABSENT, "stopped", "crashed")


@dataclass
class Judge:
    """Looks at one guest; `since` is when the trial began."""

    guest: Guest
    journal: Journal
    client: EchoClient
    since: float = field(default_factory=time.monotonic)

    async def survived(
        self, source: Host, destination: Host, home: Host, devices: Sequence[str] = ("vda",)
    ) -> list[str]:
        """What is wrong with a guest that is said to be at `home` now, and to have these disks."""
        problems = self.writers(source, destination)
        try:
            problems += await self._alive(home, devices)
        except (ProbeGone, ProbeSilent) as error:
            problems.append(f"lost: {error}")
            return problems
        if not self.client.alive:
            problems.append(f"the client outside: {self.client.problem}")
        if twice := self.guest.heard_twice(source, destination, self.since):
            problems.append(f"two guests ran: for {twice} beats on {source} as well")
        return problems + self.writers(source, destination)

    async def _alive(self, home: Host, devices: Sequence[str]) -> list[str]:
        guest = self.guest
        since = time.monotonic()
        probe = await guest.probe_on(home)
        problems = []
        if probe.nonce != guest.nonce:
            problems.append(f"lost: the guest on {home} is another boot")
        for device in devices:
            problems += faults_of(await probe.write_stop(device=device))
            await probe.write_start(device, resume=True, **LOAD)
        other = guest.world.other(home)
        if guest.beats_on(other, since):
            problems.append(f"two guests run: on {home} and on {other}")
        return problems

    def writers(self, source: Host, destination: Host) -> list[str]:
        """Whether the hosts took turns as one hand-over allows."""
        order = self.journal.order(self.since)
        allowed: tuple[list[str], ...] = (
            [],
            [source.name],
            [destination.name],
            [source.name, destination.name],
        )
        if order in allowed:
            return []
        return [f"two writers: {' '.join(order[:10])}{' …' if len(order) > 10 else ''}"]

    async def said(self, host: Host) -> str:
        """The state that a host tells."""
        async with host.client() as client:
            try:
                return (await client.vm(VM)).state.value
            except NotFound:
                return ABSENT


def faults_of(stats: Stats) -> list[str]:
    """What the guest found wrong with its disk."""
    problems = []
    if stats.wrong.total:
        first = stats.wrong_details[0] if stats.wrong_details else None
        problems.append(f"two writers: the image has {stats.wrong.total} wrong blocks, {first}")
    if stats.io_error_count:
        problems.append(f"{stats.io_error_count} requests failed, {stats.io_errors[:1]}")
    if stats.hung:
        problems.append(f"{stats.hung} requests hang")
    final = stats.verified_final
    if final is not None and not final.complete:
        problems.append(f"the image could not be read back: {final}")
    return problems
