"""Stores when what they stand on fails: killed writers, full media, a lost etcd, a partition."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path

import pytest

from lab.etcd import Etcd, Relay
from sempervirt.core.errors import OutcomeUnknown, Unavailable
from sempervirt.host.records import RecordDamaged, RecordNewer
from sempervirt.store.etcd import EtcdStore
from sempervirt.store.port import LeaseEnded, Put
from sempervirt.store.registry import Registry
from sempervirt.store.sqlite import SqliteStore

DEADLINE_S = 90.0
KILLS = 20
# So soon the silence of etcd is noticed, which is much longer than etcd takes.
SOON_S = 2

# Writes pairs and says so, until it is killed. Each line is an acknowledged commit.
WRITER = """
import asyncio, sys
from pathlib import Path
from sempervirt.store.port import Put
from sempervirt.store.sqlite import SqliteStore

async def main():
    store = SqliteStore.open(Path(sys.argv[1]))
    print("begun", flush=True)
    while True:
        state = await store.read()
        n = int(state.entries["a"].value) + 1 if state.entries else 1
        puts = [Put("a", str(n)), Put("b", str(n))]
        await store.commit(puts, expect={key: state.revision_of(key) for key in "ab"})
        print(n, flush=True)

asyncio.run(main())
"""


async def test_sqlite_keeps_what_it_acknowledged_when_its_writer_is_killed(tmp_path: Path) -> None:
    path, draw = tmp_path / "store.db", random.Random(9)
    written = 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:  # noqa: ASYNC220
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            # Mostly it has the time for some commits, however busy the machine is.
            first = [writer.stdout.readline() for _ in range(draw.randrange(4))]
            await asyncio.sleep(draw.uniform(0, 0.05))
            writer.kill()
            acknowledged = [int(line) for line in (*first, *writer.stdout.read().split())]
        with closing(sqlite3.connect(path)) as direct:
            assert direct.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store = SqliteStore.open(path)
        state = await store.read()
        await store.close()
        values = {entry.value for entry in state.entries.values()}
        assert len(values) <= 1, "half a commit"
        assert len({entry.revision for entry in state.entries.values()}) <= 1
        present = int(values.pop()) if values else 0
        # The last one may have been committed and not been told.
        assert present - max(acknowledged, default=present) in (0, 1)
        written = present
    assert written > KILLS


@contextmanager
def small_medium(directory: Path, size: str) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.root
async def test_sqlite_says_that_the_medium_is_full_and_goes_on_when_it_is_not(
    tmp_path: Path,
) -> None:
    with small_medium(tmp_path / "small", "512k") as place:
        store = SqliteStore.open(place / "store.db")
        try:
            first = await store.commit([Put("a", "1")], expect={"a": 0})
            filler = place / "filler"
            with pytest.raises(OSError, match="No space"), filler.open("wb") as file:
                file.write(bytes(1 << 20))
            with pytest.raises(Unavailable, match=r"no space is left.*make room"):
                await fill(store)
            # Nothing of it is there, and what was there can be read.
            state = await store.read()
            assert state.entries["a"].value == "1"
            count = len(state.entries)
            filler.unlink()
            await store.commit([Put("a", "2")], expect={"a": first})
            after = await store.read()
            assert (after.entries["a"].value, len(after.entries)) == ("2", count)
        finally:
            await store.close()


async def fill(store: SqliteStore) -> None:
    for n in range(1000):
        await store.commit([Put(f"k{n}", "x" * 4000)], expect={f"k{n}": 0})


async def test_sqlite_does_not_follow_a_link_to_a_file_that_is_not_there(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "store").symlink_to(elsewhere)
    with pytest.raises(Unavailable, match="no regular file"):
        SqliteStore.open(tmp_path / "store")
    assert not elsewhere.exists()


async def test_sqlite_refuses_a_later_release_and_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await SqliteStore.open(path).close()
    assert path.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(path)) as direct:
        direct.execute("PRAGMA user_version = 2")
    with pytest.raises(RecordNewer, match="version 2"):
        SqliteStore.open(path)
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(RecordDamaged, match="restore it"):
        SqliteStore.open(path)
    with pytest.raises(Unavailable, match="check the directory"):
        SqliteStore.open(tmp_path / "absent" / "store.db")


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture
async def relay(etcd: Etcd) -> AsyncIterator[Relay]:
    relay = Relay(etcd.port)
    await relay.start()
    yield relay
    await relay.close()


async def test_etcd_restarts_with_everything_that_was_acknowledged(etcd: Etcd) -> None:
    store = EtcdStore([etcd.url])
    registry = Registry(store)
    claim = await registry.claim("web", "a", ["i1"])
    lease = await store.grant(30)
    await store.commit([Put("alive/a", "", lease)], expect={"alive/a": 0})
    etcd.kill()
    with pytest.raises(Unavailable, match=r"etcd does not answer.*etcdctl endpoint health"):
        await registry.check(claim)
    with pytest.raises(Unavailable):  # nobody took it: known not done
        await registry.release(claim)
    with pytest.raises(Unavailable):
        await store.renew(lease)
    await asyncio.to_thread(etcd.start)
    assert (await registry.check(claim)).owner == "a"
    assert (await store.renew(lease)).ttl_s == lease.ttl_s
    await registry.release(claim)
    await store.close()


async def test_a_watch_ends_when_etcd_is_lost(etcd: Etcd) -> None:
    store = EtcdStore([etcd.url], silence_s=SOON_S)
    async with aclosing(store.watch()) as states:
        await anext(states)
        etcd.kill()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(anext(states), DEADLINE_S)
    await store.close()


async def test_another_member_is_asked_when_one_is_gone(etcd: Etcd) -> None:
    store = EtcdStore(["http://127.0.0.1:1", etcd.url])
    await store.commit([Put("a", "1")], expect={"a": 0})
    assert list((await store.read()).entries) == ["a"]
    await store.close()


async def test_a_partition_is_noticed_and_changes_nothing(etcd: Etcd, relay: Relay) -> None:
    """One host is cut off; the other one goes on, and its view of the first one ends in time."""
    cut = EtcdStore([relay.url], timeout_s=SOON_S, silence_s=SOON_S)
    patient = EtcdStore([relay.url])
    free = EtcdStore([etcd.url])
    registry = Registry(patient)
    claim = await registry.claim("web", "a", ["i1"])
    lease = await patient.grant(SOON_S)
    await patient.commit([Put("alive/a", "", lease)], expect={"alive/a": 0})
    async with aclosing(cut.watch()) as states:
        await anext(states)
        relay.freeze()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(anext(states), DEADLINE_S)
    with pytest.raises(Unavailable, match="does not answer"):
        await cut.read()
    with pytest.raises(Unavailable):
        await cut.renew(lease)
    # Its lease ends. Its VM stays its own all the same: nobody knows whether it still runs.
    async with asyncio.timeout(DEADLINE_S), aclosing(free.watch("alive/")) as states:
        async for state in states:
            if not state.entries:
                break
    assert (await Registry(free).find("web")).owner == "a"
    relay.heal()
    assert (await registry.check(claim)).owner == "a"
    with pytest.raises(LeaseEnded):
        await patient.renew(lease)
    for store in (cut, patient, free):
        await store.close()


async def test_a_lost_answer_is_an_unknown_outcome(etcd: Etcd, relay: Relay) -> None:
    cut = EtcdStore([relay.url], timeout_s=SOON_S)
    free = EtcdStore([etcd.url])
    await cut.read()
    relay.deafen()
    with pytest.raises(OutcomeUnknown, match="its answer was lost"):
        await cut.commit([Put("b", "1")], expect={"b": 0})
    assert "b" in (await free.read()).entries  # it was done, and nobody here could know
    relay.freeze()
    with pytest.raises(OutcomeUnknown):
        await cut.commit([Put("c", "1")], expect={"c": 0})
    assert "c" not in (await free.read()).entries  # and this one was not
    await cut.close()
    await free.close()


async def test_a_claim_whose_answer_was_lost_is_found_again(etcd: Etcd, relay: Relay) -> None:
    """The answer of the first connection is lost, the second one works: nobody is left unsure."""
    free = EtcdStore([etcd.url])
    both = EtcdStore([relay.url, etcd.url], timeout_s=SOON_S)
    registry = Registry(both)
    await both.read()
    reading = both.read

    async def read_then_deafen(*parts: str) -> object:
        state = await reading(*parts)
        relay.deafen()
        return state

    both.read = read_then_deafen  # type: ignore[method-assign, assignment]
    claim = await registry.claim("web", "a", ["i1"])
    assert (await Registry(free).check(claim)).claim == claim.id
    relay.heal()
    await both.close()
    # With nobody to ask, it is said to be unknown.
    only = EtcdStore([relay.url], timeout_s=SOON_S)
    await only.read()
    reading = only.read
    only.read = read_then_deafen  # type: ignore[method-assign, assignment]
    with pytest.raises((OutcomeUnknown, Unavailable)) as caught:
        await Registry(only).claim("db", "a", ["i2"])
    assert isinstance(caught.value, OutcomeUnknown)
    await only.close()
    await free.close()
