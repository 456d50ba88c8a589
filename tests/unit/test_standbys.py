"""The standbys of a host: enabled, removed, and what a former agent has left of them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.api.schemas import FailoverRequest
from sempervirt.api.standby import failover_standby
from sempervirt.core.errors import NotFound, StateConflict, Unavailable
from sempervirt.core.names import is_name
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby import decide
from sempervirt.standby import standbys as standbys_module
from sempervirt.standby.adapters import LiveGenerations
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.ports import Ports
from sempervirt.standby.record import Guest, StandbyRecord, record_of, write_guest
from sempervirt.standby.standbys import Kept, Standbys, rehearsals_due
from sempervirt.standby.state import First, Generation, Life, Standby, Step, TakeOver
from sempervirt.standby.values import Policy, Tier
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.house import Adopted
from sempervirt.vm.vm import Vm


@dataclass
class Holding:
    """Generations that are removed when the test says so."""

    free: asyncio.Event = field(default_factory=asyncio.Event)

    async def remove(self, _number: int) -> None:
        """See the class."""
        await self.free.wait()


@pytest.fixture
def standbys(tmp_path: Path) -> Standbys:
    """Of a host without VMs."""
    config = AgentConfig(tmp_path / "s", tmp_path / "r")
    house: Any = SimpleNamespace(config=config, vms={}, unknown={}, host=None)
    nobody: Any = None
    return Standbys(house, nobody, nobody)


def keep(standbys: Standbys, holding: Holding) -> StandbyDriver:
    """VM web has one standby."""
    state = Standby("web", Policy(), generations=(Generation(1, Life.READY),), last=1)
    record: Any = SimpleNamespace(write=lambda _state: None)
    first: Any = SimpleNamespace(let_go=lambda: None)
    driver = StandbyDriver(state, Ports(first, cast("Any", holding), record))
    driver.start()
    watching = asyncio.ensure_future(asyncio.Event().wait())
    standbys.kept["web"] = Kept(driver, cast("Any", holding), first, cast("Any", watching))
    return driver


async def test_nobody_leaves_standbys_behind_that_another_one_removes(standbys: Standbys) -> None:
    """Who came second once let go of the owner, and the processes of the standby ran on."""
    holding = Holding()
    driver = keep(standbys, holding)
    removing = asyncio.ensure_future(standbys.disable("web"))
    async with asyncio.timeout(90):
        await driver.changes.wait_until(lambda: driver.state.closing, timeout_s=90, what="it")
        with pytest.raises(StateConflict, match="are being removed"):
            await standbys.disable("web")
        vm = cast("Vm", SimpleNamespace(name="web", freed=False, spec=VmSpec(name="web")))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(standbys_module, "require_possible", lambda _vm: None)
            with pytest.raises(StateConflict, match="are being removed"):
                await standbys.enable(vm, Policy())
        assert not removing.done()
        holding.free.set()
        await removing
    assert not standbys.kept


async def test_standbys_are_not_removed_under_a_rehearsal(standbys: Standbys) -> None:
    driver = keep(standbys, Holding())
    standbys._rehearsing.add("web")
    with pytest.raises(StateConflict, match="a rehearsal"):
        await standbys.disable("web")
    assert not driver.state.closing
    await standbys.kept["web"].detach()


async def test_a_vm_that_has_ended_gets_none(standbys: Standbys) -> None:
    """Nothing would ever be made of it, and whoever waits would wait for ever."""
    with pytest.raises(StateConflict, match="has ended"):
        await standbys.enable(cast("Vm", SimpleNamespace(name="web", freed=True)), Policy())


@pytest.mark.parametrize("known", [True, False])
async def test_of_a_vm_that_was_forgotten_no_standby_takes_over(*, known: bool) -> None:
    """The take-over would wait for a proof that nobody can have."""
    asked: list[bool] = []

    async def failover(*, force: bool, word: str) -> None:
        assert not word
        asked.append(force)
        raise Unavailable("enough was seen")

    def vm(name: str) -> None:
        if not known:
            raise NotFound(f"there is no VM {name}")

    driver = SimpleNamespace(failover=failover)
    agent: Any = SimpleNamespace(
        standbys=SimpleNamespace(require=lambda _name: driver, is_here=lambda _name: True), vm=vm
    )
    with pytest.raises(Unavailable if known else NotFound):
        await failover_standby(agent, "web", FailoverRequest(force=True))
    assert asked == [True] * known


# What a former agent has left


def left(tmp_path: Path, number: int) -> Path:
    """A generation that has an image of its own."""
    image = tmp_path / f"web.raw.standby-{number}"
    image.touch()
    directory = tmp_path / f"s/standby/web/{number}"
    directory.mkdir(parents=True)
    spec = {"name": "web", "disks": [{"name": "root", "image": str(image)}]}
    write_guest(directory, Guest(VmSpec.model_validate(spec), {}))
    return image


def adopting(standbys: Standbys, found: Callable[[], Adopted]) -> None:
    """In place of what runs on the host."""

    async def adopt_all(_config: object) -> Adopted:
        return found()

    standbys._adopt = adopt_all


async def test_without_the_record_no_image_is_removed(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message about a damaged record says to move it away: one of these may be the VM."""
    adopting(standbys, Adopted)
    image = left(tmp_path, 2)
    await standbys.open()
    assert image.exists()
    # The control: of a generation that a record does not know, and of a rehearsal, nothing stays.
    tried = left(tmp_path, 900_000_002)
    await standbys.open()
    assert image.exists()
    assert not tried.exists()
    record_of(tmp_path / "s", "web").write(decide.begin("web", Policy()))
    await standbys.open()
    assert not image.exists()
    await standbys.close(keep=True)


async def test_an_agent_begins_on_a_full_disk_and_begins_no_standbys_there(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopting(standbys, Adopted)
    monkeypatch.setattr(standbys_module, "require_possible", lambda _vm: None)
    record_of(tmp_path / "s", "web").write(decide.begin("web", Policy()))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StandbyRecord, "write", full)
    await standbys.open()
    assert "web" in standbys.kept
    vm = cast("Vm", SimpleNamespace(name="db", freed=False, spec=VmSpec(name="db")))
    with pytest.raises(Unavailable, match="No space left"):
        await standbys.enable(vm, Policy())
    assert "db" not in standbys.kept
    await standbys.close(keep=True)


async def test_an_agent_begins_although_a_standby_cannot_be_removed(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopting(standbys, Adopted)
    image = left(tmp_path, 2)
    image.unlink()
    image.mkdir()  # which unlink refuses
    record_of(tmp_path / "s", "web").write(decide.begin("web", Policy()))
    await standbys.open()
    assert "web" in standbys.kept
    await standbys.close(keep=True)


@pytest.mark.parametrize("life", [Life.SERVING, Life.READY])
async def test_a_standby_that_is_the_vm_and_cannot_be_adopted_runs_on(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: Life
) -> None:
    killed = []

    class Unknown:
        async def kill(self) -> None:
            """Notes that."""
            killed.append(1)

        async def detach(self) -> None:
            """Nothing is kept."""

    adopting(standbys, lambda: Adopted(unknown={"web": cast("Any", Unknown())}))
    left(tmp_path, 1)
    state = Standby("web", Policy(), generations=(Generation(1, life),), last=1)
    record_of(tmp_path / "s", "web").write(state)
    await standbys.open()
    assert bool(killed) is (life is Life.READY)
    assert ("web" in standbys._house.unknown) is (life is Life.SERVING)
    await standbys.close(keep=True)


@pytest.mark.parametrize(("tier", "life"), [(Tier.FILE, Life.READY), (Tier.READY, Life.RETIRING)])
async def test_a_standby_in_a_file_outlives_the_agent_although_nothing_of_it_runs(
    standbys: Standbys, tmp_path: Path, tier: Tier, life: Life
) -> None:
    """The record of what booted for it says that it has ended, and once counted for all of it."""
    detached = []

    class Ended:
        """As much of a `Vm` as is left of it."""

        run = Runstate.STOPPED

        async def kill(self, _why: str) -> None:
            """It has ended."""

        async def detach(self) -> None:
            """Notes that."""
            detached.append(1)

    adopting(standbys, lambda: Adopted(vms={"web": cast("Any", Ended())}))
    left(tmp_path, 1)
    (tmp_path / "s/standby/web/1/memory").touch()
    state = Standby("web", Policy(), generations=(Generation(1, Life.READY, tier),), last=1)
    record_of(tmp_path / "s", "web").write(state)
    await standbys.open()
    (one,) = standbys.require("web").state.generations
    assert one.life is life
    assert detached == [1]
    await standbys.close(keep=True)


@pytest.mark.parametrize("there", [True, False])
async def test_what_a_take_over_had_claimed_is_released_when_nothing_of_it_runs(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    """As after the death of the host: it would keep the first VM from its own disks."""
    asked: list[int] = []

    async def release_left(_self: object, number: int) -> None:
        asked.append(number)

    monkeypatch.setattr(LiveGenerations, "release_left", release_left)
    adopting(standbys, Adopted)
    if there:
        left(tmp_path, 1)
    over = TakeOver(1, "killed", 5.0, 5.0, step=Step.CLAIMING, loaded=True, fenced=True)
    generations = (Generation(1, Life.READY),)
    state = Standby("web", Policy(), generations=generations, last=1, take_over=over)
    record_of(tmp_path / "s", "web").write(state)
    await standbys.open()
    assert asked == [1]
    assert standbys.require("web").state.take_over is None
    await standbys.close(keep=True)


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({}, True),
        ({"tested": 1000.0 - 59.0}, False),
        ({"policy": Policy()}, False),
        ({"first": First.AWAY}, False),
        ({"generations": ()}, False),
        ({"closing": True}, False),
    ],
)
def test_rehearsals_are_due(changes: dict[str, Any], due: bool) -> None:
    state = Standby(
        "web",
        Policy(test_every_s=60.0),
        first=First.RUNNING,
        generations=(Generation(1, Life.READY),),
        tested=1000.0 - 60.0,
    )
    kept: Any = SimpleNamespace(driver=SimpleNamespace(state=replace(state, **changes)))
    assert rehearsals_due({"web": kept}, 1000.0) == ["web"] * due


def test_what_runs_for_standbys_is_in_no_group_of_the_agents(standbys: Standbys) -> None:
    """Which goes before all VMs: what boots beside one took the processors from it."""
    vms = {number: cast("Vm", SimpleNamespace(name="web")) for number in (1, 2, 3, 900_000_002)}
    lives = {1: Life.SERVING, 2: Life.READY, 3: Life.BOOTING}
    state = Standby("web", Policy(), generations=tuple(Generation(n, lives[n]) for n in lives))
    kept: Any = SimpleNamespace(
        driver=SimpleNamespace(state=state), generations=SimpleNamespace(vms=vms)
    )
    standbys.kept["web"] = kept
    standbys._house.vms["web"] = vms[1]
    assert [(one.vm, one.group, one.gives_way) for one in standbys.beside()] == [
        (vms[2], "web@2", False),
        (vms[3], "web@3", True),
        (vms[900_000_002], "web@900000002", True),
    ]
    assert not any(is_name(one.group) for one in standbys.beside())
    standing = replace(state, generations=(Generation(3, Life.STANDING),))
    kept.driver.state = standing
    assert [one.gives_way for one in standbys.beside() if one.vm is vms[3]] == [False]
