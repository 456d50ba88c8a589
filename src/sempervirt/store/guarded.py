"""etcd with users, as a `Store`: owners of VMs and epochs of images change by proposals alone.

What the rule is, and why, says `proposals`. A proposal costs what a commit costs: etcd answers it
with what it depends on, as that is at that instant, and so whether it counts. If other proposals
are not settled yet, what those depend on is read as well, of that same instant. One that does not
count is removed. Where etcd has no users, since hosts trust each other, everything is written as it
is.

A change is heard of where it is proposed, before it is settled. So who watches a VM watches what
those propose of it who may change it: its owner, who keeps standbys of it, and the host with the
authority (`_concerning`). Other hosts' proposals wake nobody.

A cluster that was begun by an earlier release has hosts that write vms/… and images/… themselves.
That goes on until `semper host init` is repeated there (`etcd_rights.divide`): then DIVIDED is in
the store, and what compares with its absence is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import assert_never

from pydantic import ValidationError

from sempervirt.core.errors import NotAllowed, OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.store.etcd import EtcdStore
from sempervirt.store.etcd_rights import DIVIDED, ROOT_USER, host_of
from sempervirt.store.port import (
    Delete,
    Entry,
    Lease,
    Outdated,
    Put,
    Snapshot,
    Write,
    check_writes,
    is_within,
    outdated,
)
from sempervirt.store.proposals import (
    AUTHORITY,
    IMAGES,
    OPERATIONS_MAX,
    PROPOSALS,
    VMS,
    Proposal,
    Refusal,
    count,
    dependencies,
    is_proposed,
    proposer_prefix,
    settlement,
)
from sempervirt.store.records import Custody, Ownership

# Of more entries than that it is quicker to read all there are.
NAMED_MAX = 1000

# So often one pass over the proposals is overtaken; what overtook it is a change, which begins
# another one.
OVERTAKEN_MAX = 50


class GuardedStore:
    """A `Store` in an etcd that has a user for this host."""

    def __init__(self, etcd: EtcdStore) -> None:
        self.etcd = etcd
        self._divided = False

    @property
    def settles(self) -> bool:
        """Whether this host has the authority, and so writes vms/… and images/… itself."""
        return self._user == ROOT_USER

    @property
    def _user(self) -> str:
        """Who this host is to etcd; "" where it asks for nobody."""
        return self.etcd.credentials.user if self.etcd.credentials is not None else ""

    async def read(self, *parts: str) -> Snapshot:
        """See `Store`. Proposals are not among the entries."""
        if not _are_touched(parts):
            return await self.etcd.read(*parts)
        raw = await self._with_proposals(parts)
        found = count(raw.entries).entries
        entries = {key: at for key, at in found.items() if is_within(key, parts)}
        return Snapshot(raw.revision, entries, parts)

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        """See `Store`. Raises NotAllowed for what is another host's."""
        check_writes(writes, expect)
        if not self._user or not any(is_proposed(write.key) for write in writes):
            return await self.etcd.commit(writes, expect=expect)
        if not await self.is_divided():
            return await self.etcd.commit(writes, expect={DIVIDED: 0, **expect})
        texts = {put.key: put.value for put in writes if isinstance(put, Put) and put.lease is None}
        if len(texts) != len(writes) or not all(is_proposed(key) for key in texts):
            return await self.etcd.commit(writes, expect=expect)  # which etcd refuses
        return await self._propose(Proposal(writes=texts, expect=dict(expect)))

    async def watch(self, *parts: str) -> AsyncGenerator[Snapshot]:
        """See `Store`."""
        if not _are_touched(parts):
            async with aclosing(self.etcd.watch(*parts)) as states:
                async for state in states:
                    yield state
            return
        view = await self.read(*parts)
        yield view
        while True:
            heard = _concerning(parts, view)
            async with aclosing(self.etcd.watch(*parts, also=heard)) as states:
                async for _ in states:
                    before, view = view, await self.read(*parts)
                    if view.entries != before.entries:
                        yield view
                    if _concerning(parts, view) != heard:
                        break
                else:
                    return

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store`."""
        return await self.etcd.grant(ttl_s)

    async def renew(self, lease: Lease) -> Lease:
        """See `Store`."""
        return await self.etcd.renew(lease)

    async def revoke(self, lease: Lease) -> None:
        """See `Store`."""
        await self.etcd.revoke(lease)

    async def close(self) -> None:
        """See `Store`."""
        await self.etcd.close()

    async def is_divided(self) -> bool:
        """Whether hosts propose; else each of them can change what is another's."""
        if not self._divided:
            self._divided = DIVIDED in (await self.etcd.read(DIVIDED)).entries
        return self._divided

    async def settle(self) -> None:
        """Writes what counts into the entries, for as long as there are proposals. On the host with
        the authority. Raises Outdated, Unavailable, OutcomeUnknown: it may be repeated.

        A commit is overtaken when one of its proposals changes, which its author can do at will. So
        the next one has the first proposal alone, which an author who overwrites it puts last.
        """
        most, overtaken = OPERATIONS_MAX, 0
        while writes := settlement((raw := await self._with_proposals([PROPOSALS])).entries, most):
            expect = {write.key: raw.revision_of(write.key) for write in writes}
            try:
                await self.etcd.commit(writes, expect=expect)
            except Outdated:
                overtaken += 1
                if overtaken >= OVERTAKEN_MAX:
                    raise
                most = 1
            else:
                most = min(2 * most, OPERATIONS_MAX)

    async def keep_settled(self) -> AsyncGenerator[None]:
        """Settles whenever there is something; yields each time. Raises Unavailable."""
        async with aclosing(self.etcd.watch(PROPOSALS)) as states:
            async for state in states:
                try:
                    if state.entries:
                        await self.settle()
                except Outdated:
                    pass  # by its author, who has removed one: that is a change as well
                yield

    async def _propose(self, proposal: Proposal) -> int:
        host = AUTHORITY if self.settles else host_of(self._user)
        vm = next((one.removeprefix(VMS) for one in proposal.writes if one.startswith(VMS)), "")
        key = proposer_prefix(host, vm) + secrets.token_hex(16)
        put, touched = Put(key, proposal.text()), [*proposal.expect, PROPOSALS]
        raw = await self.etcd.commit_and_read([put], touched, expect={key: 0})
        try:
            raw = await self._with_dependencies(raw, touched)
        except Unavailable as error:
            raise OutcomeUnknown(
                f"whether a change counts cannot be read: {error.message}",
                remedy="ask again what the state is, once etcd answers",
            ) from error
        refusal = count(raw.entries).refused.get(key)
        if refusal is None:
            return raw.revision
        await self._withdraw(key, raw.revision_of(key))
        match refusal:
            case Refusal.OUTDATED:
                raise outdated(list(proposal.expect))
            case Refusal.NOT_ALLOWED | Refusal.UNREADABLE:
                raise NotAllowed(
                    f"this host may not change {', '.join(proposal.writes)}: {refusal.value}",
                    remedy="ask the host whose VM it is, or the one that has the authority, where "
                    "semper host init was run",
                )
            case _ as never:
                assert_never(never)

    async def _with_proposals(self, parts: Sequence[str]) -> Snapshot:
        """As etcd has it: these parts, all proposals, and what it takes to judge those."""
        wanted = tuple(dict.fromkeys((*parts, PROPOSALS))) if parts else ()
        return await self._with_dependencies(await self.etcd.read(*wanted), wanted)

    async def _with_dependencies(self, raw: Snapshot, parts: Sequence[str]) -> Snapshot:
        """`raw` are these parts, proposals among them. Others have proposed as well, perhaps of
        other VMs and images; by now that may be settled. Raises Unavailable.
        """
        missing = [key for key in sorted(dependencies(raw.entries)) if not is_within(key, parts)]
        if not missing:
            return raw
        return await self.etcd.also_read(raw, missing if len(missing) <= NAMED_MAX else ())

    async def _withdraw(self, key: str, revision: int) -> None:
        """Else it could count one day, when another host withdraws one that came before it."""
        try:
            await self.etcd.commit([Delete(key)], expect={key: revision})
        except Outdated:
            return  # settled: that is, removed
        except SempervirtError as error:
            raise OutcomeUnknown(
                f"a change did not count, and {key} cannot be removed: {error.message}",
                remedy="ask again what the state is, once etcd answers",
            ) from error


def _are_touched(parts: Sequence[str]) -> bool:
    """Whether entries of these parts may be changed by proposals."""
    return not parts or any(part.startswith((VMS, IMAGES, PROPOSALS)) for part in parts)


def _concerning(parts: Sequence[str], view: Snapshot) -> list[str]:
    """Where changes of these parts, of which the view is, may be proposed: everywhere if by anybody
    (of a VM that is free, of images). Proposals of an earlier release, which stand beside the
    folders of VMs, are heard of when they are settled.
    """
    found: list[str] = []
    for part in parts:
        if not _are_touched([part]):
            continue
        hosts = _changers(view.entries.get(part)) if part.startswith(VMS) else None
        if hosts is None:
            return [PROPOSALS]
        found += (proposer_prefix(host, part.removeprefix(VMS)) for host in sorted(hosts))
    return found


def _changers(entry: Entry | None) -> set[str] | None:
    """Who may change a VM's entry (`proposals`); None: any host."""
    if entry is None:
        return None
    try:
        owned = Ownership.model_validate_json(entry.value)
    except ValidationError:
        return None
    if owned.custody is Custody.FREE:
        return None
    return {AUTHORITY, owned.owner, owned.standby}
