"""What an agent does for as long as it is a member: shows that it lives, and learns who is revoked.

Neither ever harms a VM. A store that cannot be reached is logged once and tried again; meanwhile
the VMs run on, and what was known of revocations stays in force.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress

from sempervirt.cluster.certificate import OwnCertificate
from sempervirt.cluster.cluster import LIST_KEY, Cluster, lend
from sempervirt.core.durations import Backoff
from sempervirt.core.errors import SempervirtError
from sempervirt.core.roles import Role
from sempervirt.host import background
from sempervirt.host.procfs import boot_id
from sempervirt.store.port import Lease, Put
from sempervirt.store.records import Operator, Presence, RevocationList, parse

log = logging.getLogger(__name__)

# A host that is cut off counts as silent this long after it was heard last.
LEASE_S = 10.0
RENEWALS = 3
BACKOFF = Backoff(free=0, first_s=0.5, ceiling_s=5.0)


class Membership:
    """Made by `kept`. `revoked` and `operators` are empty until `known` is set."""

    def __init__(self, cluster: Cluster, lease_s: float = LEASE_S) -> None:
        self.cluster = cluster
        self.revoked: frozenset[str] = frozenset()
        self.operators: Mapping[str, Operator] = {}
        self.known = asyncio.Event()
        self.certificate = OwnCertificate(cluster, self._tell)
        self._trouble = ""
        self._told = asyncio.Event()
        self._lease_s = lease_s
        self._lease: Lease | None = None
        self._since = time.time()

    @classmethod
    @asynccontextmanager
    async def kept(cls, cluster: Cluster, lease_s: float = LEASE_S) -> AsyncIterator[Membership]:
        """Shows that this host is alive until the block is left."""
        membership = cls(cluster, lease_s)
        tasks = [
            background.start(persist(membership._announce, "presence"), "presence"),
            background.start(persist(membership._follow, "revocations"), "revocations"),
            background.start(persist(membership._follow_operators, "operators"), "operators"),
            background.start(persist(membership._follow_list, "list of revoked"), "list"),
            background.start(membership.certificate.keep(), "certificate"),
        ]
        try:
            yield membership
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await membership._leave()

    def is_revoked(self, serial: str) -> bool:
        """Whether a certificate counts no more."""
        return serial in self.revoked

    def operator_role(self, name: str, serial: str) -> Role | None:
        """The role of an operator with that certificate, None for one who has none."""
        known = self.operators.get(name)
        return Role(known.role) if known is not None and known.serial == serial else None

    def _tell(self, trouble: str) -> None:
        """Has the other hosts hear what is wrong with this host's certificate; "": nothing."""
        self._trouble = trouble
        self._told.set()

    async def _announce(self, worked: Callable[[], None]) -> None:
        self._lease = await self.cluster.store.grant(self._lease_s)
        await self._enter(self._lease)
        while True:
            worked()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease.ttl_s / RENEWALS):
                    await self._told.wait()
            if self._told.is_set():
                await self._enter(self._lease)
            self._lease = await self.cluster.store.renew(self._lease)

    async def _enter(self, lease: Lease) -> None:
        store, host = self.cluster.store, self.cluster.settings.host
        self._told.clear()
        entry = Presence(
            host=host,
            boot_id=boot_id(),
            pid=os.getpid(),
            since=self._since,
            certificate=self._trouble,
        )
        key = f"alive/{host}"
        state = await store.read(key)
        await store.commit([Put(key, entry.text(), lease)], expect={key: state.revision_of(key)})

    async def _follow(self, worked: Callable[[], None]) -> None:
        async with aclosing(self.cluster.store.watch("revoked/")) as states:
            async for state in states:
                worked()
                self.revoked = frozenset(key.removeprefix("revoked/") for key in state.entries)
                self.known.set()

    async def _follow_operators(self, worked: Callable[[], None]) -> None:
        async with aclosing(self.cluster.store.watch("operators/")) as states:
            async for state in states:
                worked()
                found = (parse(Operator, key, entry.value) for key, entry in state.entries.items())
                self.operators = {operator.name: operator for operator in found}

    async def _follow_list(self, worked: Callable[[], None]) -> None:
        """Keeps what this host's etcd is to refuse, if it has one, in a file."""
        async with aclosing(self.cluster.store.watch(LIST_KEY)) as states:
            async for state in states:
                worked()
                entry = state.entries.get(LIST_KEY)
                if entry is not None:
                    pem = parse(RevocationList, LIST_KEY, entry.value).pem
                    await asyncio.to_thread(self._keep_list, pem)

    def _keep_list(self, pem: str) -> None:
        self.cluster.identity.keep_list(pem)
        lend(self.cluster.identity, self.cluster.settings)

    async def _leave(self) -> None:
        if self._lease is None:
            return
        try:
            await self.cluster.store.revoke(self._lease)
        except SempervirtError as error:
            log.info("presence is left to end by itself: %s", error)


async def persist(work: Callable[[Callable[[], None]], Awaitable[None]], what: str) -> None:
    """Begins `work` again whenever the store fails it; says so when that begins and ends."""
    failures = 0

    def worked() -> None:
        nonlocal failures
        if failures:
            log.info("%s: the store answers again", what)
        failures = 0

    while True:
        try:
            await work(worked)
        except SempervirtError as error:
            failures += 1
            if failures == 1:
                log.warning("%s: %s", what, error)
        await asyncio.sleep(BACKOFF.delay_s(max(1, failures)))
