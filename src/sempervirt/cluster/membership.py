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
from functools import partial

from sempervirt.cluster.certificate import OwnCertificate
from sempervirt.cluster.cluster import (
    ALIVE,
    LEVEL_KEY,
    LIST_KEY,
    OPERATORS,
    REVOKED,
    Cluster,
    forget,
    lend,
    level_of,
    remember,
)
from sempervirt.cluster.service import Service
from sempervirt.core.durations import Backoff
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.core.roles import Role
from sempervirt.host import background
from sempervirt.host.procfs import boot_id
from sempervirt.host.records import RecordDamaged
from sempervirt.host.storage_call import call_storage
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import Entry, Lease, Put, Snapshot
from sempervirt.store.records import LEVEL, Operator, Presence, RevocationList, parse

log = logging.getLogger(__name__)

# A host that is cut off counts as silent this long after it was heard last.
LEASE_S = 10.0
RENEWALS = 3
# So soon what another process changes in this host's files, as `semper host renew` does, counts.
REMEMBER_S = 2.0
BACKOFF = Backoff(free=0, first_s=0.5, ceiling_s=5.0)


class Membership:
    """Made by `kept`. `revoked` and `operators` are empty until `known` is set. `service` says
    whether VMs may come to this host.
    """

    def __init__(
        self, cluster: Cluster, lease_s: float = LEASE_S, service: Service | None = None
    ) -> None:
        self.cluster = cluster
        self.revoked: frozenset[str] = frozenset()
        self.operators: Mapping[str, Operator] = {}
        self.known = asyncio.Event()
        self.certificate = OwnCertificate(cluster, self._tell)
        self._trouble = ""
        self._told = asyncio.Event()
        self._list: Entry | None = None
        self._listed = asyncio.Event()
        self._lease_s = lease_s
        self._lease: Lease | None = None
        self._since = time.time()
        self._service = service
        if service is not None:
            service.listen(self._told.set)

    @classmethod
    @asynccontextmanager
    async def kept(
        cls, cluster: Cluster, lease_s: float = LEASE_S, service: Service | None = None
    ) -> AsyncIterator[Membership]:
        """Shows that this host is alive until the block is left."""
        membership = cls(cluster, lease_s, service)
        tasks = [
            background.start(persist(membership._announce, "presence"), "presence"),
            background.start(persist(membership._follow, "revocations"), "revocations"),
            background.start(persist(membership._keep_list, "list of revoked"), "list"),
            background.start(membership.certificate.keep(), "certificate"),
            background.start(membership._remember(), "memory of the files"),
        ]
        if isinstance(cluster.store, GuardedStore) and cluster.store.settles:
            settle = partial(_settle, cluster.store)
            tasks.append(background.start(persist(settle, "settling"), "settling"))
        try:
            yield membership
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            forget(cluster.config)
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
            out_of_service=self._service.why_not if self._service is not None else "",
            level=LEVEL,
        )
        key = ALIVE + host
        state = await store.read(key, LEVEL_KEY)
        if (needed := level_of(state)) > LEVEL:
            raise StateConflict(
                f"the cluster's level is {needed}, and this release knows {LEVEL}: this host takes "
                "no part, and no VM comes here",
                remedy="install the release that the other hosts have (semper host level)",
            )
        await store.commit([Put(key, entry.text(), lease)], expect={key: state.revision_of(key)})

    async def _follow(self, worked: Callable[[], None]) -> None:
        """All by one watch: each costs the store something for as long as the agent lives."""
        parts = (REVOKED, OPERATORS, LIST_KEY)
        async with aclosing(self.cluster.store.watch(*parts)) as states:
            async for state in states:
                worked()
                keys = [key for key in state.entries if key.startswith(REVOKED)]
                self.revoked = frozenset(key.removeprefix(REVOKED) for key in keys)
                self.known.set()
                self._list = state.entries.get(LIST_KEY)
                self._listed.set()
                self._note_operators(state)

    def _note_operators(self, state: Snapshot) -> None:
        """One that cannot be read leaves them as they were, and keeps nobody from being revoked."""
        entries = ((key, at) for key, at in state.entries.items() if key.startswith(OPERATORS))
        try:
            found = [parse(Operator, key, entry.value) for key, entry in entries]
        except RecordDamaged as error:
            log.error("operators: %s", error)  # noqa: TRY400
            return
        self.operators = {operator.name: operator for operator in found}

    async def _keep_list(self, worked: Callable[[], None]) -> None:
        """Keeps what this host's etcd is to refuse, if it has one, in a file. Whatever that takes,
        nobody waits for it.
        """
        kept: Entry | None = None
        while True:
            await self._listed.wait()
            self._listed.clear()
            entry = self._list
            if entry is None or entry == kept:
                continue
            pem = parse(RevocationList, LIST_KEY, entry.value).pem
            try:
                await asyncio.to_thread(self._write_list, pem)
            except SempervirtError:
                self._listed.set()  # the next try has it to do
                raise
            kept = entry
            worked()

    def _write_list(self, pem: str) -> None:
        self.cluster.identity.keep_list(pem)
        lend(self.cluster.identity, self.cluster.settings)

    async def _remember(self) -> None:
        """Files that hang, or are wrong, leave what was remembered in force."""
        config = self.cluster.config
        while True:
            try:
                await call_storage(config.trust_dir, partial(remember, config))
            except SempervirtError as error:
                log.debug("memory of the files: %s", error)
            await asyncio.sleep(REMEMBER_S)

    async def _leave(self) -> None:
        if self._lease is None:
            return
        try:
            await self.cluster.store.revoke(self._lease)
        except SempervirtError as error:
            log.info("presence is left to end by itself: %s", error)


async def _settle(store: GuardedStore, worked: Callable[[], None]) -> None:
    """What hosts have proposed, and counts, no host can take back from then on."""
    if not await store.is_divided():
        log.warning(
            "settling: each host can change whose the VMs of others are, as an earlier release had "
            "it; when all hosts have this release, repeat on this one: semper host init"
        )
    async with aclosing(store.keep_settled()) as turns:
        async for _ in turns:
            worked()


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
