"""The host that comes back: every VM that it has lost leaves the network at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.core.errors import NotAllowed
from sempervirt.core.events import Journal
from sempervirt.host import tap as taps
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store import epoch
from sempervirt.store.port import Entry, Snapshot
from sempervirt.store.records import Custody, Ownership
from sempervirt.store.registry import Claim, Registry
from sempervirt.store.sqlite import SqliteStore
from sempervirt.vm import fencing


class Store:
    """Two VMs that belong to b by now; `bad` is what stands in a third entry."""

    def __init__(self, bad: str) -> None:
        owned = {
            f"vms/{name}": Ownership(
                vm=name, custody=Custody.OWNED, owner="b", epoch=9, claim="c" * 32
            ).model_dump_json()
            for name in ("db", "web")
        }
        entries = {"vms/a": bad, **owned} if bad else owned
        self._entries = {key: Entry(value, 1) for key, value in entries.items()}

    async def watch(self, *_parts: str) -> AsyncIterator[Snapshot]:
        """Says it once."""
        yield Snapshot(1, self._entries)


class Lost:
    """A VM of which the QEMU waits for a disk, and takes its time to end."""

    def __init__(self, name: str, said: list[str]) -> None:
        nics = [{"type": "tap", "tap": f"tap-{name}"}]
        self.spec = VmSpec.model_validate({"name": name, "nics": nics})
        self.name, self.freed, self.moving = name, False, None
        self.record = SimpleNamespace(claim=Claim(name, "a", 8, "b" * 32))
        self.machine = SimpleNamespace(journal=Journal(name))
        self.run = Runstate.RUNNING
        self._said = said

    async def kill(self) -> None:
        """Not at once."""
        await asyncio.sleep(0)
        self._said.append(f"ended {self.name}")


@pytest.mark.parametrize("bad", ["", "{", '{"vm": 7}'])
async def test_no_vm_waits_for_the_end_of_another_one_to_leave_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """Nor does an entry that cannot be read, which any host can write, keep one on it."""
    said: list[str] = []
    monkeypatch.setattr(taps, "bridge_of", lambda _tap: "br0")
    monkeypatch.setattr(taps, "leave", lambda tap, _bridge: said.append(f"left {tap}"))
    vms: Any = {name: Lost(name, said) for name in ("db", "web")}
    store: Any = Store(bad)
    await fencing.follow_claims(store, "a", tmp_path, lambda: vms, lambda: None)
    assert sorted(said[:2]) == ["left tap-db", "left tap-web"]
    assert sorted(said[2:]) == ["ended db", "ended web"]


async def test_a_vm_that_has_just_moved_leaves_its_taps_on_their_bridges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store tells of its new host while its disks are still being freed here. Taken from the
    bridge, the tap would leave the guest without a network when it comes back. The other VM, which
    runs, is the control.
    """
    said: list[str] = []
    monkeypatch.setattr(taps, "bridge_of", lambda _tap: "br0")
    monkeypatch.setattr(taps, "leave", lambda tap, _bridge: said.append(f"left {tap}"))
    vms: Any = {name: Lost(name, said) for name in ("db", "web")}
    vms["web"].run, vms["web"].moving = Runstate.STOPPED, SimpleNamespace(over=True)
    store: Any = Store("")
    await fencing.follow_claims(store, "a", tmp_path, lambda: vms, lambda: None)
    assert said == ["left tap-db", "ended db"]


class Came(Lost):
    """A VM that came to b by its image, which has the claim of epoch 8."""

    def __init__(self, place: Path, said: list[str], number: int) -> None:
        super().__init__("web", said)
        image = place / "web.raw"
        image.touch()
        disks = [{"name": "root", "image": str(image)}]
        self.spec = VmSpec.model_validate({"name": "web", "disks": disks})
        self.path = epoch.record_path(image)
        claim = Claim("web", "b", number, "8" * 32, (epoch.identify(self.path),))
        epoch.advance(self.path, claim)
        self.record = SimpleNamespace(claim=claim)

    def set_claim(self, claim: Claim) -> None:
        """As of `Vm`."""
        self.record = SimpleNamespace(claim=claim)


async def follow(store: Any, vm: Any, condition: Callable[[], Awaitable[bool]]) -> None:
    """What b does, until something holds."""
    following = fencing.follow_claims(
        store, "b", Path("/nowhere"), lambda: {"web": vm}, lambda: None
    )
    watch = asyncio.create_task(following)
    async with asyncio.timeout(90):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # poll interval
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore.open(tmp_path / "store.db")
    yield opened
    await opened.close()


async def test_a_vm_that_comes_while_the_store_says_nothing_new_is_entered(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its former host alone was without the store, which then hears of no change."""
    monkeypatch.setattr(fencing, "AGAIN_S", 0.05)
    registry = Registry(store)
    await registry.claim("web", "a")
    came: Any = Came(tmp_path, [], 2)
    came.moving = SimpleNamespace(over=False)
    vms, told = {"web": came}, asyncio.Event()
    watch = asyncio.create_task(fencing.follow_claims(store, "b", tmp_path, lambda: vms, told.set))
    await told.wait()  # all that it has
    came.moving.over = True
    async with asyncio.timeout(90):
        while (await registry.find("web")).owner != "b":  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # poll interval
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


class Asked:
    """What is asked for is told."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self.asked: list[tuple[str, ...]] = []

    def watch(self, *parts: str) -> AsyncGenerator[Snapshot]:
        self.asked.append(parts)
        return self._store.watch(*parts)


async def test_the_store_is_asked_about_the_vms_of_this_host_as_they_come_and_go(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fencing, "OTHERS_S", 0.01)
    monkeypatch.setattr(taps, "bridge_of", lambda _tap: None)
    registry, said, asked = Registry(store), list[str](), Asked(store)
    vms: dict[str, Any] = {}
    of_stores: Any = asked
    watch = asyncio.create_task(
        fencing.follow_claims(of_stores, "a", tmp_path, lambda: vms, lambda: None)
    )

    async def see(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # poll interval

    for name in ("web", "db", "mail"):
        await registry.claim(name, "b")
    for name in ("web", "db"):
        vms.clear()
        vms[name] = lost = Lost(name, said)
        lost.record = SimpleNamespace(claim=Claim(name, "a", 0, "b" * 32))
        await see(lambda: said[-1:] == [f"ended {next(iter(vms))}"])
        assert asked.asked[-1] == (f"vms/{name}",)
        lost.freed = True
    vms["free"] = SimpleNamespace(freed=True, record=vms["db"].record)
    vms["alone"] = SimpleNamespace(freed=False, record=SimpleNamespace(claim=None))
    assert {part for parts in asked.asked for part in parts} == {"vms/web", "vms/db"}
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


async def test_a_store_that_refuses_is_not_asked_again_while_it_says_the_same(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where etcd has users only the former host may change the entry; it may be off for days."""
    monkeypatch.setattr(fencing, "AGAIN_S", 0.01)
    registry, asked = Registry(store), list[str]()
    before = await registry.claim("web", "a")
    vm: Any = Came(tmp_path, [], before.epoch + 1)
    looks = 0

    async def refuses(_self: object, claim: Claim) -> None:
        asked.append(claim.vm)
        raise NotAllowed("this host may not change that")

    async def looked() -> bool:
        nonlocal looks
        looks += asked != []
        return looks > 20

    monkeypatch.setattr(Registry, "settle", refuses)
    await follow(store, vm, looked)
    assert asked == ["web"]
    await registry.release(before)  # the control: by now its host has let go of it

    async def entered() -> bool:
        return (await registry.find("web")).owner == "b"

    await follow(store, vm, entered)


@pytest.mark.parametrize("released", [False, True])
async def test_a_vm_that_came_without_the_store_is_entered_there_and_not_ended(
    tmp_path: Path, store: SqliteStore, released: bool
) -> None:
    """The store still has the claim of the host that the VM has left, or that host let go of it."""
    registry, said = Registry(store), list[str]()
    before = await registry.claim("web", "a")
    if released:
        await registry.release(before)
    vm: Any = Came(tmp_path, said, before.epoch + 1)

    async def entered() -> bool:
        owned = await registry.find("web")
        return (owned.owner, owned.claim) == ("b", vm.record.claim.id)

    await follow(store, vm, entered)
    assert said == []
    on_record = epoch.read_epoch(vm.path)
    assert on_record is not None
    assert on_record.claim == vm.record.claim.id
    # The control: a newer claim of another host ends it.
    await registry.settle(Claim("web", "c", 100, "c" * 32))

    async def ended() -> bool:
        return said == ["ended web"]

    await follow(store, vm, ended)


@pytest.mark.parametrize("on_record", [True, False])
async def test_what_the_store_has_given_meanwhile_counts_only_if_the_images_have_it(
    tmp_path: Path, store: SqliteStore, on_record: bool
) -> None:
    """An operator has given the VM to c while b took it by its images: the same epoch."""
    registry, said = Registry(store), list[str]()
    first = await registry.claim("web", "a")
    vm: Any = Came(tmp_path, said, first.epoch + 1)
    await registry.mark_unknown(first, "a is silent")
    given = await registry.resolve("web", "c", "its power is off")
    assert given.epoch == vm.record.claim.epoch
    if not on_record:
        epoch.advance(vm.path, replace(given, epoch=given.epoch + 1))
    heard = 0

    async def compared() -> bool:
        nonlocal heard
        heard += 1
        return heard > 20 if on_record else said == ["ended web"]

    await follow(store, vm, compared)
    assert said == ([] if on_record else ["ended web"])
    if on_record:  # c finds that the images refuse it, and lets go: b is entered
        await registry.release(given)

        async def entered() -> bool:
            return (await registry.find("web")).owner == "b"

        await follow(store, vm, entered)
        assert said == []
