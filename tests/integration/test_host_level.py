"""Hosts of several releases: what a later one keeps in the store stays there, and what an earlier
one could not read is not written while it may come back.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from lab.etcd import Etcd
from lab.ports import free_address
from sempervirt.cluster import level as levels
from sempervirt.cluster import membership as memberships
from sempervirt.cluster.cluster import LEVEL_KEY, Cluster, begin_cluster
from sempervirt.cluster.joining import join_cluster
from sempervirt.cluster.level import raise_level, read_levels
from sempervirt.cluster.membership import Membership
from sempervirt.core.errors import InvalidRequest, StateConflict
from sempervirt.host.records import RecordNewer
from sempervirt.store.etcd import Credentials, EtcdStore
from sempervirt.store.etcd_rights import ROOT_USER, divide, secure
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.port import Put, Store
from sempervirt.store.records import LEVEL, Ownership, Value, parse
from sempervirt.store.registry import Registry
from sempervirt.store.sqlite import SqliteStore
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import HOUR, Served, served

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture(params=["sqlite", "etcd", "guarded"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        found: Store
        if request.param == "sqlite":
            found = SqliteStore.open(tmp_path / "store.db")
        elif request.param == "etcd":
            found = EtcdStore([request.getfixturevalue("etcd").url])
        else:
            guarded = GuardedStore(
                EtcdStore(
                    [request.getfixturevalue("etcd").url],
                    credentials=Credentials(ROOT_USER, "password"),
                )
            )
            await secure(guarded.etcd)
            await divide(guarded.etcd, [])
            found = guarded
        stack.push_async_callback(found.close)
        yield found


async def add(store: Store, key: str, more: Mapping[str, Any]) -> None:
    """As a later release writes the entry."""
    state = await store.read(key)
    value = {**json.loads(state.entries[key].value), **more}
    await store.commit([Put(key, json.dumps(value))], expect={key: state.revision_of(key)})


async def histories(store: Store) -> None:
    """All steps of the registry, on a VM and an image of which a later release says more."""
    registry = Registry(store)
    claim = await registry.claim("web", "a", ["i1"])
    if isinstance(store, GuardedStore):
        await store.settle()
    more = {"pool": {"name": "nfs", "since": 1.5}, "pins": ["a", "b"]}
    await add(store, "vms/web", more)
    if not isinstance(store, GuardedStore):  # where hosts propose, an image changes with its VM
        await add(store, "images/i1", more)
    await registry.begin_move(claim, "b")
    await registry.end_move(claim)
    await registry.begin_move(claim, "b")
    claim = await registry.hand_over(claim)
    await registry.name_standby(claim, "c")
    claim = await registry.take_over(await registry.find("web"), "c", ["i1"], "its plug is out")
    await registry.mark_unknown(claim, "?")
    await registry.release(await registry.resolve("web", "a", "seen"))
    if isinstance(store, GuardedStore):
        await store.settle()
    found = {key: json.loads(at.value) for key, at in (await store.read()).entries.items()}
    assert {"vms/web", "images/i1"} <= found.keys()
    assert (found["vms/web"]["epoch"], found["vms/web"]["custody"]) == (4, "free")
    assert {**found["vms/web"], **more} == found["vms/web"]
    if not isinstance(store, GuardedStore):
        assert {**found["images/i1"], **more} == found["images/i1"]


async def test_what_a_later_release_says_of_a_vm_stays_whoever_changes_it(store: Store) -> None:
    await histories(store)


async def test_a_release_that_drops_what_it_does_not_know_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: as releases of level 1 do."""
    monkeypatch.setitem(Value.model_config, "extra", "ignore")
    monkeypatch.setitem(Ownership.model_config, "extra", "ignore")
    Ownership.model_rebuild(force=True)
    store = SqliteStore.open(tmp_path / "store.db")
    try:
        with pytest.raises(AssertionError):
            await histories(store)
    finally:
        await store.close()
        monkeypatch.undo()
        Ownership.model_rebuild(force=True)


def test_a_newer_form_is_named_as_such() -> None:
    text = '{"version":2,"vm":"web","custody":"free","epoch":0}'
    with pytest.raises(RecordNewer, match=r"vms/web.* version 2.*semper host level"):
        parse(Ownership, "vms/web", text)


@pytest.fixture
async def first(place: Path, etcd: Etcd) -> AsyncIterator[Served]:
    """Host a, which has the authority, and has said what it knows."""
    config = AgentConfig(place / "a" / "s", place / "a" / "r", image_roots=(place,))
    config.state_dir.mkdir(parents=True)
    await begin_cluster(config, "lab", "a", free_address(), [etcd.url])
    async with served(config) as host:
        await heard(host.cluster, {"a": LEVEL})
        yield host


async def test_the_level_rises_when_every_member_knows_the_next_one(
    first: Served, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b is off when a is upgraded: it holds the level, and is refused nothing when it is back."""
    config = AgentConfig(place / "b" / "s", place / "b" / "r", image_roots=(place,))
    config.state_dir.mkdir(parents=True)
    await join_cluster(config, await first.cluster.invite("b", HOUR), free_address())
    found = await read_levels(first.cluster)
    assert (found.level, found.known, [one.host for one in found.behind]) == (1, None, ["b"])
    with pytest.raises(StateConflict, match=r"level is 1.*b is silent.*semper host revoke"):
        await raise_level(first.cluster)

    monkeypatch.setattr(memberships, "LEVEL", 1)  # b is of the release before
    async with Cluster.opened(config) as cluster, Membership.kept(cluster) as of_b:
        await of_b.known.wait()
        await Registry(cluster.store).release(await Registry(cluster.store).claim("web", "b"))
        await heard(first.cluster, {"a": 2, "b": 1})
        with pytest.raises(StateConflict, match=r"b knows 1; start the agents of a newer"):
            await raise_level(first.cluster)
    monkeypatch.undo()
    async with Cluster.opened(config) as cluster, Membership.kept(cluster):
        await heard(first.cluster, {"a": 2, "b": 2})
        assert (await raise_level(first.cluster)).level == 2
        with pytest.raises(StateConflict, match=r"level is 2.*all know 2; install a newer"):
            await raise_level(first.cluster)
        assert (await read_levels(cluster)).level == 2


async def heard(cluster: Cluster, wanted: Mapping[str, int]) -> None:
    async with aclosing(cluster.store.watch("alive/")) as states:
        async for _ in states:
            found = await read_levels(cluster)
            if {one.host: one.knows for one in found.members} == wanted:
                return


async def test_who_does_not_know_the_level_does_not_come_in(
    first: Served, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await raise_level(first.cluster)
    config = AgentConfig(place / "b" / "s", place / "b" / "r", image_roots=(place,))
    config.state_dir.mkdir(parents=True)
    invitation = await first.cluster.invite("b", HOUR)
    monkeypatch.setattr("sempervirt.cluster.joining.LEVEL", 1)
    with pytest.raises((StateConflict, InvalidRequest), match=r"level is 2.* of b knows 1"):
        await join_cluster(config, invitation, free_address())
    monkeypatch.undo()
    await join_cluster(config, invitation, free_address())  # the token is still good
    # One that goes back to an earlier release, after a later one has raised the level.
    monkeypatch.setattr(levels, "LEVEL", 3)
    monkeypatch.setattr(memberships, "LEVEL", 3)
    async with Cluster.opened(config) as cluster, Membership.kept(cluster):
        first.membership._tell("")
        await heard(first.cluster, {"a": 3, "b": 3})
        assert (await raise_level(cluster)).level == 3
    monkeypatch.undo()
    async with Cluster.opened(config) as cluster:
        with pytest.raises(StateConflict, match=r"level is 3, and this release knows 2"):
            await Membership(cluster)._announce(lambda: None)
        assert LEVEL_KEY in (await cluster.store.read(LEVEL_KEY)).entries
    assert [one.host for one in (await read_levels(first.cluster)).behind] == ["b"]
