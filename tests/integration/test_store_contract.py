"""One contract for every store: the same tests on SQLite and on a real etcd.

The negative control at the end is a store that does not compare: it fails the test on which
everything else rests.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from lab.etcd import Etcd
from sempervirt.core.errors import NotFound, StateConflict
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.etcd_rights import ROOT_USER, divide, secure
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import (
    Delete,
    Lease,
    LeaseEnded,
    Outdated,
    Put,
    Snapshot,
    Store,
    Write,
    boot_clock_s,
)
from sempervirt.store.records import Custody
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.store.sqlite import SqliteStore

Open = Callable[[], Store]
DEADLINE_S = 90.0
# Short for the tests' sake, and longer than a busy machine stands still.
LEASE_S = 3


@pytest.fixture(scope="module")
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "etcd"])
async def connect(
    request: pytest.FixtureRequest, tmp_path: Path, etcd: Etcd
) -> AsyncIterator[Open]:
    """Makes one more client of a store of this test alone."""
    root = f"{tmp_path.name}-{random.getrandbits(64):x}/"
    async with AsyncExitStack() as stack:

        def make() -> Store:
            store: Store
            if request.param == "sqlite":
                store = SqliteStore.open(tmp_path / "store.db")
            else:
                store = EtcdStore([etcd.url], root=root)
            stack.push_async_callback(store.close)
            return store

        yield make


@pytest.fixture
def store(connect: Open) -> Store:
    return connect()


@pytest.fixture(scope="module")
def guarded_etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "etcd", "guarded"])
async def connect_owners(
    request: pytest.FixtureRequest, tmp_path: Path, etcd: Etcd, guarded_etcd: Etcd
) -> AsyncIterator[Open]:
    """The same, and an etcd where owners change by proposals."""
    root = f"{tmp_path.name}-{random.getrandbits(64):x}/"
    credentials = Credentials(ROOT_USER, "password")
    async with AsyncExitStack() as stack:

        def make() -> Store:
            store: Store
            if request.param == "sqlite":
                store = SqliteStore.open(tmp_path / "store.db")
            elif request.param == "etcd":
                store = EtcdStore([etcd.url], root=root)
            else:
                store = GuardedStore(
                    EtcdStore([guarded_etcd.url], root=root, credentials=credentials)
                )
            stack.push_async_callback(store.close)
            return store

        if isinstance(first := make(), GuardedStore):
            await secure(first.etcd)
            await divide(first.etcd, [])
        yield make


@pytest.fixture
def store_of_owners(connect_owners: Open) -> Store:
    return connect_owners()


# The port


async def test_entries_carry_the_revision_that_wrote_them(store: Store) -> None:
    assert (await store.read()).entries == {}
    first = await store.commit(
        [Put("vms/a", "1"), Put("vms/b", "ü")], expect={"vms/a": 0, "vms/b": 0}
    )
    second = await store.commit([Put("vms/a", "2")], expect={"vms/a": first})
    assert second > first
    state = await store.read("vms/")
    assert {key: (entry.value, entry.revision) for key, entry in state.entries.items()} == {
        "vms/a": ("2", second),
        "vms/b": ("ü", first),
    }
    assert state.revision >= second
    assert state.revision_of("vms/a") == second
    assert state.revision_of("vms/absent") == 0


async def test_the_parts_that_are_named_are_all_that_is_read(store_of_owners: Store) -> None:
    store, before = store_of_owners, (await store_of_owners.read()).entries.keys()
    keys = ("hosts/a", "hosts/b", "hosts/b2", "host", "hostsx", "hosts0", "alive/a", "ü")
    await store.commit([Put(key, "") for key in keys], expect=dict.fromkeys(keys, 0))

    async def read(*parts: str) -> list[str]:
        return sorted((await store.read(*parts)).entries)

    assert await read("hosts/") == ["hosts/a", "hosts/b", "hosts/b2"]
    assert await read("hosts/b") == ["hosts/b"]
    assert await read("hosts/b", "absent", "alive/", "ü") == ["alive/a", "hosts/b", "ü"]
    assert await read("hosts/", "hosts/a") == ["hosts/a", "hosts/b", "hosts/b2"]
    assert await read("absent/", "hosts") == []
    assert await read() == sorted([*keys, *before])


async def test_many_parts_are_read_at_one_instant(connect: Open) -> None:
    """More than etcd takes at once, while all of them change together."""
    reader, writer = connect(), connect()
    keys = [f"vms/{n}" for n in range(250)]

    async def write() -> None:
        written = dict.fromkeys(keys, 0)
        for n in range(10):
            for first in range(0, 250, 50):
                some = keys[first : first + 50]
                puts = [Put(key, f"{n}") for key in some]
                expect = {key: written[key] for key in some}
                written |= dict.fromkeys(some, await writer.commit(puts, expect=expect))

    writing, seen = asyncio.create_task(write()), list[Snapshot]()
    async with asyncio.timeout(DEADLINE_S):
        while not writing.done():
            seen.append(await reader.read(*keys))
    await writing
    for state in seen:
        # As they are written: those before have the next number, or all have one.
        numbers = [int(state.entries[key].value) if state.entries.get(key) else -1 for key in keys]
        assert numbers == sorted(numbers, reverse=True), numbers
        assert numbers[0] - numbers[-1] <= 1
    assert {entry.value for entry in (await reader.read(*keys)).entries.values()} == {"9"}


async def test_a_commit_is_all_or_nothing(store: Store) -> None:
    first = await store.commit([Put("a", "1")], expect={"a": 0})
    for expect in ({"a": 0, "b": 0}, {"a": first + 1, "b": 0}, {"a": first, "b": first}):
        with pytest.raises(Outdated):
            await store.commit([Put("a", "2"), Put("b", "2")], expect=expect)
    # What is compared need not be written.
    with pytest.raises(Outdated):
        await store.commit([Put("b", "2")], expect={"b": 0, "a": 0})
    state = await store.read()
    assert {key: entry.value for key, entry in state.entries.items()} == {"a": "1"}
    await store.commit([Delete("a"), Put("b", "2")], expect={"a": first, "b": 0})
    assert list((await store.read()).entries) == ["b"]


async def test_nothing_is_written_blindly(store: Store) -> None:
    with pytest.raises(ValueError, match="without an expected revision: b"):
        await store.commit([Put("a", "1"), Put("b", "1")], expect={"a": 0})
    assert (await store.read()).entries == {}


async def test_what_was_deleted_begins_at_zero_and_never_repeats_a_revision(store: Store) -> None:
    first = await store.commit([Put("a", "1")], expect={"a": 0})
    await store.commit([Delete("a")], expect={"a": first})
    again = await store.commit([Put("a", "1")], expect={"a": 0})
    with pytest.raises(Outdated):  # the value is the same, the entry is not
        await store.commit([Put("a", "2")], expect={"a": first})
    assert again > first


async def increment(store: Store, times: int) -> None:
    """Adds one, `times` times, as everybody else does."""
    done = 0
    while done < times:
        state = await store.read("count")
        value = int(state.entries["count"].value) if state.entries else 0
        await asyncio.sleep(0)
        try:
            put = Put("count", str(value + 1))
            await store.commit([put], expect={"count": state.revision_of("count")})
            done += 1
        except Outdated:
            continue


async def count(stores: Sequence[Store]) -> int:
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(increment(store, 10) for store in stores))
    return int((await stores[0].read("count")).entries["count"].value)


async def test_no_update_is_lost(connect: Open) -> None:
    assert await count([connect() for _ in range(4)]) == 40


class Careless:
    """The negative control: a store that writes without comparing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        while True:
            state = await self._store.read()
            now = {key: state.revision_of(key) for key in expect}
            try:
                return await self._store.commit(writes, expect=now)
            except Outdated:
                continue


async def test_a_store_without_compare_and_set_loses_updates(connect: Open) -> None:
    careless = [Careless(connect()) for _ in range(4)]
    assert await count(careless) < 40  # type: ignore[arg-type]


async def test_a_watch_tells_the_present_and_what_follows(connect: Open) -> None:
    here, there = connect(), connect()
    await there.commit([Put("vms/a", "1"), Put("x", "1")], expect={"vms/a": 0, "x": 0})
    async with asyncio.timeout(DEADLINE_S), aclosing(here.watch("vms/")) as states:
        state = await anext(states)
        assert {key: entry.value for key, entry in state.entries.items()} == {"vms/a": "1"}
        first = await there.commit([Put("vms/b", "2")], expect={"vms/b": 0})
        state = await anext(states)
        assert state.revision_of("vms/b") == first
        await there.commit([Delete("vms/a")], expect={"vms/a": state.revision_of("vms/a")})
        assert list((await anext(states)).entries) == ["vms/b"]
        # What is told can be expected.
        await here.commit([Put("vms/b", "3")], expect={"vms/b": first})
        assert (await anext(states)).entries["vms/b"].value == "3"


async def test_a_watch_is_woken_by_nothing_but_its_parts(connect_owners: Open) -> None:
    here, there = connect_owners(), connect_owners()
    registry = Registry(there)
    claims = {name: await registry.claim(name, "a") for name in ("web", "web2", "db", "mail")}
    async with asyncio.timeout(DEADLINE_S):
        async with aclosing(here.watch("vms/web", "alive/", "vms/db")) as states:
            assert sorted((await anext(states)).entries) == ["vms/db", "vms/web"]
            told = asyncio.ensure_future(anext(states))
            for name in ("web2", "mail"):
                await registry.begin_move(claims[name], "b")
            await registry.begin_move(claims["db"], "b")
            assert '"moving"' in (await told).entries["vms/db"].value
            await there.commit([Put("alive/a", "")], expect={"alive/a": 0})
            state = await anext(states)
            assert sorted(state.entries) == ["alive/a", "vms/db", "vms/web"]
            await registry.hand_over(claims["db"])
            assert '"b"' in (await anext(states)).entries["vms/db"].value


async def wait_gone(store: Store, key: str) -> float:
    """When an entry was first seen to be gone, on the boot clock."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if key not in (await store.read(key)).entries:
                return boot_clock_s()
            await asyncio.sleep(0.02)  # poll interval


async def test_a_lease_ends_with_its_entries_and_never_before_its_deadline(connect: Open) -> None:
    store, other = connect(), connect()
    lease = await store.grant(LEASE_S)
    await store.commit(
        [Put("alive/a", "", lease), Put("kept", "")], expect={"alive/a": 0, "kept": 0}
    )
    assert await wait_gone(other, "alive/a") >= lease.deadline
    assert list((await other.read()).entries) == ["kept"]
    with pytest.raises(LeaseEnded):
        await store.renew(lease)
    with pytest.raises(LeaseEnded):
        await store.commit([Put("alive/a", "", lease)], expect={"alive/a": 0})
    # Gone is absent: another host's agent may write it.
    await store.commit([Put("alive/a", "2")], expect={"alive/a": 0})


async def kept_beyond_its_deadline(store: Store) -> Lease | None:
    """A lease that was renewed until its first deadline had passed; None when this machine stood
    still for so long that nothing was shown.
    """
    lease = first = await store.grant(LEASE_S)
    state = await store.read()
    try:
        await store.commit(
            [Put("alive/a", "", lease)], expect={"alive/a": state.revision_of("alive/a")}
        )
        while boot_clock_s() < first.deadline + 0.2:
            assert "alive/a" in (await store.read()).entries
            lease = await store.renew(lease)
            await asyncio.sleep(0.05)  # poll interval
    except (AssertionError, LeaseEnded):
        if boot_clock_s() < lease.deadline - LEASE_S / 2:
            raise
        return None
    return lease


async def test_a_lease_goes_on_while_it_is_renewed(store: Store) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (lease := await kept_beyond_its_deadline(store)) is None:
            pass
    assert await wait_gone(store, "alive/a") >= lease.deadline


async def test_a_lease_can_be_given_back(store: Store) -> None:
    lease = await store.grant(60)
    await store.commit([Put("alive/a", "", lease)], expect={"alive/a": 0})
    await store.revoke(lease)
    assert (await store.read()).entries == {}
    await store.revoke(lease)
    with pytest.raises(LeaseEnded):
        await store.renew(lease)


async def test_a_watch_sees_a_lease_end(connect: Open) -> None:
    store, other = connect(), connect()
    lease = await store.grant(LEASE_S)
    await store.commit([Put("alive/a", "", lease)], expect={"alive/a": 0})
    async with asyncio.timeout(DEADLINE_S), aclosing(other.watch("alive/")) as states:
        assert list((await anext(states)).entries) == ["alive/a"]
        assert list((await anext(states)).entries) == []


# Ownership, on the port


async def test_one_of_many_gets_a_vm(connect_owners: Open) -> None:
    registries = [Registry(connect_owners()) for _ in range(6)]
    answers = await asyncio.gather(
        *(registry.claim("web", f"host{n}", ["i1"]) for n, registry in enumerate(registries)),
        return_exceptions=True,
    )
    claims = [answer for answer in answers if isinstance(answer, Claim)]
    assert len(claims) == 1
    assert all(isinstance(answer, Claim | StateConflict) for answer in answers)
    present = await registries[0].check(claims[0])
    assert (present.owner, present.epoch, present.custody) == (claims[0].host, 1, Custody.OWNED)


async def test_ownership_moves_with_a_greater_epoch_and_the_old_claim_is_refused(
    connect_owners: Open,
) -> None:
    source, destination = Registry(connect_owners()), Registry(connect_owners())
    old = await source.claim("web", "a", ["i1", "i2"])
    with pytest.raises(StateConflict, match="owned by a"):
        await destination.claim("web", "b", ["i1"])
    with pytest.raises(StateConflict, match="not moving"):
        await source.hand_over(old)
    await source.begin_move(old, "b")
    new = await source.hand_over(old)
    assert (new.host, new.epoch, new.images) == ("b", old.epoch + 1, old.images)
    assert (await destination.find("web")).owner == "b"
    for stale in (
        source.check(old),
        source.release(old),
        source.begin_move(old, "a"),
        source.end_move(old),
        source.hand_over(old),
        source.mark_unknown(old, "?"),
    ):
        with pytest.raises(StaleClaim, match="owned by b"):
            await stale
    await destination.release(new)
    with pytest.raises(StaleClaim):
        await destination.check(new)
    assert (await source.claim("web", "a", ["i1"])).epoch == new.epoch + 1


async def test_only_its_owner_may_claim_a_vm_again(store_of_owners: Store) -> None:
    """It alone knows that it does not run it, after a crash for example, also of a move."""
    registry = Registry(store_of_owners)
    old = await registry.claim("web", "a", ["i1"])
    await registry.begin_move(old, "b")
    with pytest.raises(StateConflict, match="being moved from a to b"):
        await registry.claim("web", "b", ["i1"])
    new = await registry.claim("web", "a", ["i1"])
    assert new.epoch == old.epoch + 1
    with pytest.raises(StaleClaim):  # the move is over with it
        await registry.hand_over(old)


async def test_giving_up_and_handing_over_exclude_each_other(connect_owners: Open) -> None:
    source, late = Registry(connect_owners()), Registry(connect_owners())
    for turn in range(8):
        claim = await source.claim(f"web{turn}", "a")
        await source.begin_move(claim, "b")
        answers = await asyncio.gather(
            source.end_move(claim), late.hand_over(claim), return_exceptions=True
        )
        refused = [answer for answer in answers if isinstance(answer, StateConflict)]
        owner = (await source.find(claim.vm)).owner
        # end_move first leaves nothing to hand over; hand_over first makes end_move stale.
        assert len(refused) == 1, answers
        assert owner == ("a" if isinstance(answers[1], StateConflict) else "b")


async def test_an_image_is_of_one_vm_and_its_epochs_only_grow(store_of_owners: Store) -> None:
    registry = Registry(store_of_owners)
    web = await registry.claim("web", "a", ["i1"])
    with pytest.raises(StateConflict, match="image i1 belongs to VM web"):
        await registry.claim("db", "a", ["i2", "i1"])
    await registry.release(web)
    epoch = web.epoch
    for vm in ("db", "web", "new"):
        claim = await registry.claim(vm, "a", ["i1"])
        assert claim.epoch > epoch
        epoch = claim.epoch
        await registry.release(claim)


async def test_unknown_is_left_by_evidence_alone(store_of_owners: Store) -> None:
    registry = Registry(store_of_owners)
    with pytest.raises(NotFound):
        await registry.find("web")
    old = await registry.claim("web", "a", ["i1"])
    with pytest.raises(StateConflict, match="nothing to settle"):
        await registry.resolve("web", "b", "none")
    await registry.mark_unknown(old, "host a went silent during switchover")
    for host in ("a", "b"):
        with pytest.raises(StateConflict, match=r"host a went silent.*semper vm resolve web"):
            await registry.claim("web", host, ["i1"])
    new = await registry.resolve("web", "b", "host a is switched off")
    assert new.epoch == old.epoch + 1
    present = await registry.check(new)
    assert present.why == "settled: host a is switched off"
    with pytest.raises(StaleClaim):
        await registry.release(old)


async def test_images_that_change_while_a_vm_is_settled_are_read_again(
    store_of_owners: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = Registry(store_of_owners), Registry(store_of_owners)
    await registry.mark_unknown(await registry.claim("web", "a", ["i1"]), "?")
    read, meanwhile = store_of_owners.read, [True]

    async def read_late(*keys: str) -> Snapshot:
        found = await read(*keys)
        if meanwhile and meanwhile.pop():
            meanwhile.clear()
            await other.resolve("web", "b", "first")
            await other.mark_unknown(await other.claim("web", "b", ["i1", "i2"]), "again")
        return found

    monkeypatch.setattr(store_of_owners, "read", read_late)
    new = await registry.resolve("web", "a", "second")
    assert (set(new.images), meanwhile) == ({"i1", "i2"}, [])
    assert (await registry.check(new)).owner == "a"


async def test_epochs_grow_whatever_is_done(store_of_owners: Store) -> None:
    """Random histories: no two claims share an epoch, and only the newest is good."""
    registry, draw = Registry(store_of_owners), random.Random(4)
    claims: list[Claim] = []
    for _ in range(60):
        claim = claims[draw.randrange(len(claims))] if claims else Claim("web", "a", 0, "")
        before = (await registry.find("web")).epoch if claims else 0
        try:
            match draw.randrange(6):
                case 0:
                    claims.append(await registry.claim("web", draw.choice("ab"), ["i1"]))
                case 1:
                    await registry.begin_move(claim, "b")
                case 2:
                    claims.append(await registry.hand_over(claim))
                case 3:
                    await registry.release(claim)
                case 4:
                    await registry.mark_unknown(claim, "?")
                case _:
                    claims.append(await registry.resolve("web", "a", "seen"))
        except (StateConflict, NotFound):
            assert not claims or (await registry.find("web")).epoch == before
    epochs = [claim.epoch for claim in claims]
    assert len(epochs) > 3
    assert epochs == sorted(set(epochs))
    for claim in claims[:-1]:
        with pytest.raises(StaleClaim):
            await registry.check(claim)


async def test_a_snapshot_is_of_one_moment(connect_owners: Open) -> None:
    """Two entries that are always written together are never read apart."""
    writer, reader = connect_owners(), connect_owners()

    async def write() -> None:
        revision = 0
        for n in range(40):
            puts = [Put("pair/a", str(n)), Put("pair/b", str(n))]
            revision = await writer.commit(puts, expect={"pair/a": revision, "pair/b": revision})

    writing = asyncio.create_task(write())
    seen: list[Snapshot] = []
    async with asyncio.timeout(DEADLINE_S):
        while not writing.done():
            seen.append(await reader.read("pair/"))
    await writing
    assert len(seen) > 2
    for state in seen:
        assert len({(entry.value, entry.revision) for entry in state.entries.values()}) <= 1
