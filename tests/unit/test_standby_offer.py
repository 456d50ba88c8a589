"""What the host of a VM does for the one that keeps its standbys, and for no other one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.api.first import end_first
from sempervirt.cluster import cluster as clusters
from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster, Settings
from sempervirt.core.errors import NotAllowed, StateConflict, Unavailable
from sempervirt.core.events import Journal
from sempervirt.evacuation.elsewhere import KeptElsewhere
from sempervirt.evacuation.peacetime import Peacetime
from sempervirt.host.changes import Changes
from sempervirt.host.places import Places
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby import offer as offers
from sempervirt.standby.keeping import take_over_for
from sempervirt.standby.means import Means, Proven
from sempervirt.standby.messages import EndFirst, GiveUpFirst
from sempervirt.standby.offer import Offer
from sempervirt.standby.ports import Snapshot
from sempervirt.standby.state import Step
from sempervirt.store.registry import Registry
from sempervirt.store.sqlite import SqliteStore
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.work import Departing

SPEC = VmSpec.model_validate(
    {"name": "web", "disks": [{"name": "root", "image": "/srv/web.raw", "keep": "snapshot"}]}
)


class Fence:
    """Of a VM of which the end is seen."""

    def __init__(self, _vm: object, _places: object) -> None:
        """Nothing."""

    async def prove(self) -> Proven:
        return Proven(Means.LOCK_HERE, "seen to have ended")

    def let_go(self) -> None:
        """Nothing."""


def places(_vm: object) -> Places:
    """Of every VM."""
    return Places(Path("s"), Path("r"))


class Agent:
    """As much of an agent as is asked, with one VM that runs."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.vms: dict[str, Any] = {
            "web": SimpleNamespace(
                name="web",
                spec=SPEC,
                pinned_spec=SPEC,
                run=Runstate.RUNNING,
                disks={},
                work=None,
            )
        }

    def vm(self, name: str) -> Any:
        """The VM of that name."""
        if name not in self.vms:
            raise StateConflict(f"VM {name} is unknown")
        return self.vms[name]


@pytest.fixture
async def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Offer]:
    """Of host a, of which b keeps the standbys of web."""
    store = SqliteStore.open(tmp_path / "store.db")
    config = AgentConfig(tmp_path / "s", tmp_path / "r")

    @asynccontextmanager
    async def opened(_config: object) -> AsyncIterator[Cluster]:
        yield Cluster(config, Settings("lab", "a", "127.0.0.1:1"), store)

    async def snapshot(_vm: object, names: Sequence[str], noted: Any) -> Snapshot:
        noted(dict.fromkeys(names, 7))
        return Snapshot(1.0, tuple((name, 7) for name in names), "crash")

    monkeypatch.setattr(clusters.Cluster, "opened", opened)
    monkeypatch.setattr(offers, "require_possible", lambda _vm: None)
    registry = Registry(store)
    await registry.name_standby(await registry.claim("web", "a", []), "b")
    house: Any = Agent(config)
    monkeypatch.setattr(offers, "BEGUN_S", 0.0)
    monkeypatch.setattr(offers, "NEXT_S", 0.1)
    yield Offer(house, snapshot)
    await store.close()


@pytest.mark.parametrize("keeper", ["c", "a", ""])
async def test_nobody_else_is_answered(offer: Offer, keeper: str) -> None:
    asked = GiveUpFirst(disk="root", snapshot=7, ours=frozenset(), reader="standby-c")
    for call in (
        offer.look("web", keeper),
        offer.snapshot("web", keeper, ("root",)),
        offer.give_up("web", keeper, asked),
        offer.end("web", keeper, places, kill=True),
    ):
        with pytest.raises(NotAllowed, match="keeps standbys"):
            await call


async def test_a_vm_that_runs_is_ended_for_an_operator_only(offer: Offer) -> None:
    with pytest.raises(StateConflict, match="is running on its host"):
        await offer.end("web", "b", places, kill=False)
    # Of one that is unknown nobody can tell; that is no word that it lives.
    with pytest.raises(Unavailable, match="is unknown"):
        await offer.end("db", "b", places, kill=True)


def silent(offer: Offer, **take_over: object) -> Any:
    """The VM, of which the monitor is silent; its file says so of take-overs."""
    standby = {"service": "127.0.0.1:1", "take_over": take_over}
    if "service_silent" not in take_over:
        del standby["service"]
    vm: Any = offer._house.vms["web"]
    vm.spec = VmSpec.model_validate({**SPEC.model_dump(mode="json"), "standby": standby})
    vm.run, vm.state = Runstate.UNKNOWN, SimpleNamespace(why="no answer", killed_because="")
    vm.machine = SimpleNamespace(journal=Journal("web"))
    return vm


async def test_a_silent_monitor_is_ended_for_a_standby_where_its_file_says_so(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "LocalFence", Fence)
    vm = silent(offer, monitor_silent=0.2)
    # An agent that has begun just now has asked nobody yet.
    with pytest.raises(NotAllowed, match="not known yet"):
        await offer.end("web", "b", places, kill=False)
    give_up = time.monotonic() + 5
    while True:
        try:
            assert await offer.end("web", "b", places, kill=False) == "seen to have ended"
            break
        except NotAllowed:
            assert time.monotonic() < give_up
            await asyncio.sleep(0.05)  # poll interval
    # It has answered in between: the silence begins anew.
    vm.run = Runstate.RUNNING
    with pytest.raises(StateConflict, match="is running on its host"):
        await offer.end("web", "b", places, kill=False)
    vm.run = Runstate.UNKNOWN
    with pytest.raises(NotAllowed, match="not known yet"):
        await offer.end("web", "b", places, kill=False)


async def test_a_silent_monitor_is_left_alone_where_its_file_says_nothing(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "LocalFence", Fence)
    silent(offer)
    offer._silent["web"] = time.monotonic() - 1e6
    with pytest.raises(NotAllowed, match="not known yet"):
        await offer.end("web", "b", places, kill=False)


@pytest.mark.parametrize("run", [Runstate.RUNNING, Runstate.UNKNOWN])
async def test_a_service_is_asked_once_more_before_its_vm_is_ended(
    offer: Offer, monkeypatch: pytest.MonkeyPatch, run: Runstate
) -> None:
    monkeypatch.setattr(offers, "LocalFence", Fence)
    said = ""

    async def ask(_service: str) -> str:
        return said

    monkeypatch.setattr(offers, "ask_tcp", ask)
    silent(offer, service_silent=5.0).run = run
    with pytest.raises(StateConflict, match="answers its host"):
        await offer.end("web", "b", places, kill=False)
    said = "connection refused"
    assert await offer.end("web", "b", places, kill=False) == "seen to have ended"


async def test_the_route_says_no_more_of_a_vm_that_is_unknown(
    offer: Offer,
) -> None:
    """A conflict is the word that it lives, by which the other host calls its take-over off."""
    standbys = SimpleNamespace(offer=offer, places_of=places)
    agent: Any = SimpleNamespace(standbys=standbys, vm=offer._house.vm)
    with pytest.raises(Unavailable, match="is unknown"):
        await end_first(agent, "b", "db", EndFirst(kill=False))


async def test_a_vm_that_moves_is_not_ended_for_a_standby(offer: Offer) -> None:
    """What follows of its end here says nothing of the host that it goes to by its images."""
    vm: Any = offer._house.vms["web"]
    vm.run, vm.work = Runstate.STOPPED, Departing("1", "c", "c:1", running=True, by_images=True)
    with pytest.raises(StateConflict, match="moves to c"):
        await offer.end("web", "b", places, kill=True)


async def test_a_snapshot_of_which_its_keeper_has_never_heard_keeps_no_other_one(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[set[int]] = []

    async def give_up(_disk: object, _snapshot: int, ours: set[int]) -> str:
        given.append(set(ours))
        return ""

    async def unpin(*_: object) -> None:
        """Nobody reads it."""

    monkeypatch.setattr(offers, "give_up", give_up)
    active = SimpleNamespace(unpin=unpin)
    offer._house.vms["web"].disks["root"] = SimpleNamespace(active=lambda: active)  # type: ignore[assignment]
    await offer.snapshot("web", "b", ("root",))  # the answer is lost
    for number, expected in ((8, {7, 8}), (9, {9})):
        asked = GiveUpFirst(
            disk="root", snapshot=number, ours=frozenset({number}), reader="standby-b"
        )
        assert await offer.give_up("web", "b", asked) == ""
        assert given[-1] == expected


async def told(offer: Offer, *, ready: bool) -> str | None:
    """Who could take web over, once b has asked."""
    vm: Any = offer._house.vms["web"]
    vm.record = SimpleNamespace(
        claim=None, started=1.0, accelerator=SimpleNamespace(kind="tcg"), spec=SPEC
    )
    vm.state, vm.end, vm.ailments = SimpleNamespace(qemu=1, resets=0, why=""), None, ""
    await offer.look("web", "b", ready=ready)
    return await offer.find_keeper("web")


async def test_who_could_take_a_vm_over_says_so_and_is_believed_for_a_while(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await offer.find_keeper("web") is None
    assert await told(offer, ready=True) == "b"
    assert await told(offer, ready=False) is None
    with pytest.raises(NotAllowed):  # one that keeps none says nothing that counts
        await offer.look("web", "c", ready=True)
    with pytest.raises(StateConflict, match="could take over"):
        offer.let_fall("web")
    assert await told(offer, ready=True) == "b"
    monkeypatch.setattr(offers, "READY_S", -1.0)
    assert await offer.find_keeper("web") is None


async def test_without_the_store_only_the_host_that_was_asked_to_take_over_is_answered(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await told(offer, ready=True) == "b"

    @asynccontextmanager
    async def away(_config: object) -> AsyncIterator[Cluster]:
        raise Unavailable("the store is away")
        yield  # type: ignore[unreachable]

    monkeypatch.setattr(clusters.Cluster, "opened", away)
    monkeypatch.setattr(offers, "LocalFence", Fence)
    vm: Any = offer._house.vms["web"]
    vm.run, vm.machine = Runstate.PAUSED, SimpleNamespace(journal=Journal("web"))
    with pytest.raises(Unavailable, match="does not say who keeps"):
        await offer.end("web", "b", places, kill=True)
    with pytest.raises(Unavailable):
        await offer.look("web", "b", ready=True)
    assert offer.let_fall("web") == "b"
    with pytest.raises(Unavailable):
        await offer.end("web", "c", places, kill=True)
    assert await offer.end("web", "b", places, kill=True) == "seen to have ended"


class Driver:
    """Of the standbys of web."""

    def __init__(self, store: SqliteStore) -> None:
        self.state = SimpleNamespace(take_over=None, past=None)
        self.changes = Changes()
        self.asked: list[str] = []
        self._registry = Registry(store)

    async def failover(self, *, force: bool, cause: str) -> None:
        assert force
        self.asked.append(cause)
        await self._registry.take_over(await self._registry.find("web"), "b", ["j" * 32], cause)
        self.state.past = SimpleNamespace(step=Step.DONE, trouble="")


async def test_a_host_has_its_own_vm_taken_over_and_no_other_ones(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On b; the request may be repeated."""
    async with clusters.Cluster.opened(offer._house.config) as cluster:
        store: Any = cluster.store

    @asynccontextmanager
    async def opened(config: AgentConfig) -> AsyncIterator[Cluster]:
        yield Cluster(config, Settings("lab", "b", "127.0.0.1:2"), store)

    monkeypatch.setattr(clusters.Cluster, "opened", opened)
    driver = Driver(store)
    standbys: Any = SimpleNamespace(require=lambda _name: driver)
    config = offer._house.config
    with pytest.raises(NotAllowed, match="c's VM web"):
        await take_over_for(standbys, config, "c", "web")
    for _ in range(2):
        await take_over_for(standbys, config, "a", "web")
    assert len(driver.asked) == 1
    assert "host a asked" in driver.asked[0]
    driver.state.past = SimpleNamespace(step=Step.FAILED, trouble="it did not load")
    with pytest.raises(StateConflict, match="did not load"):
        await take_over_for(standbys, config, "a", "web")


async def test_a_vm_falls_to_the_host_that_has_said_that_it_could(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, str]] = []

    @asynccontextmanager
    async def connect(_cluster: object, host: str, address: str) -> AsyncIterator[Any]:
        async def call(method: str, path: str, *, timeout_s: float) -> None:
            assert timeout_s > 0
            asked.append((host, address, f"{method} {path}"))

        yield SimpleNamespace(call=call)

    monkeypatch.setattr(peer, "connect", connect)
    member: Any = SimpleNamespace(host=SimpleNamespace(name="b", address="b:1"))
    peacetime = Peacetime()
    peacetime.members = {"b": member}
    falls = KeptElsewhere(offer._house.config, offer, peacetime)
    with pytest.raises(StateConflict, match="could take over"):
        await falls.take_over("web")
    assert asked == []
    assert await told(offer, ready=True) == await falls.keeper("web") == "b"
    await falls.take_over("web")
    assert asked == [("b", "b:1", "POST /vms/web/standby/kept/take-over")]
