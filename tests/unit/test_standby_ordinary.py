"""A VM that came from a standby is an ordinary one afterwards: its claim, disks, files and taps."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.agent import Agent, AgentConfig, adoption
from sempervirt.cluster.cluster import Cluster, begin_cluster
from sempervirt.cluster.leaving import leave_cluster
from sempervirt.core.errors import StateConflict
from sempervirt.host import tap as taps
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.standby import network
from sempervirt.standby.adapters import LiveGenerations, config_of
from sempervirt.standby.record import Guest, generation_places, read_guest, write_guest
from sempervirt.standby.state import Generation, Life, Standby
from sempervirt.standby.values import Policy
from sempervirt.store.records import Custody
from sempervirt.store.registry import Claim, Registry
from sempervirt.vm import claims
from sempervirt.vm.record import VmRecord, record_path
from sempervirt.vm.setup import adopted_setups
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Standing

ENDED = VmState(run=Runstate.STOPPED, why="done", end=End("done", 0))
NUMBER = 3


@pytest.fixture
async def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AgentConfig:
    """Of host a, the only one of its cluster."""
    short = tmp_path_factory.mktemp("r")  # of a socket's path
    config = AgentConfig(tmp_path / "state", short)
    config.state_dir.mkdir()
    await begin_cluster(config, "lab", "a", "127.0.0.1:7443", [])
    return config


def described(tmp_path: Path) -> VmSpec:
    """With a disk that is copied for standbys, one that is handed over, and one that is read."""
    for name in ("root", "data", "cd"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    disks = [
        {"name": "root", "image": str(tmp_path / "root")},
        {"name": "data", "image": str(tmp_path / "data"), "keep": "latest"},
        {"name": "cd", "image": str(tmp_path / "cd"), "read_only": True},
    ]
    return VmSpec.model_validate({"name": "web", "disks": disks})


def record_of(spec: VmSpec, claim: Claim | None = None) -> VmRecord:
    return VmRecord(spec, Accelerator("tcg", ""), 0.0, claim=claim)


async def custody(config: AgentConfig) -> Custody:
    async with Cluster.opened(config) as cluster:
        return (await Registry(cluster.store).find("web")).custody


# What is the host's


async def test_its_end_gives_its_claim_back(config: AgentConfig, tmp_path: Path) -> None:
    async with Cluster.opened(config) as cluster:
        claim = await Registry(cluster.store).claim("web", "a", [])
    own = config_of(config, "web", NUMBER)
    path = record_path(own.vm_state_dir("web"))
    path.parent.mkdir(parents=True)
    record = replace(record_of(described(tmp_path), claim), end=ENDED)
    # The control: one whose whole directory is the generation's belongs to no cluster.
    places = generation_places(config, "web", NUMBER)
    alone = replace(config, state_dir=places.state_dir, run_dir=places.run_dir)
    assert not await claims.release(alone, claim)
    assert await custody(config) is Custody.OWNED
    vm = adoption.remembered(own, record, path)
    await vm.wait_freed()
    assert vm.record.claim is None
    assert await custody(config) is Custody.FREE
    await vm.detach()


def test_only_records_and_sockets_are_elsewhere(tmp_path: Path) -> None:
    config = AgentConfig(tmp_path / "state", tmp_path / "run")
    own, places = config_of(config, "web", NUMBER), generation_places(config, "web", NUMBER)
    assert own.vm_run_dir("web") == places.vm_run_dir("web") != config.vm_run_dir("web")
    assert own.vm_state_dir("web") == places.vm_state_dir("web") != config.vm_state_dir("web")
    host = ("state_dir", "run_dir", "socket", "cluster_file", "trust_dir", "wire_trust_dir")
    assert [getattr(own, one) for one in host] == [getattr(config, one) for one in host]


async def test_a_host_with_such_a_vm_does_not_leave_its_cluster(config: AgentConfig) -> None:
    path = record_path(config_of(config, "web", NUMBER).vm_state_dir("web"))
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(StateConflict, match="on record here: web"):
        await leave_cluster(config, force=True)
    path.unlink()
    await leave_cluster(config, force=True)


# Its disks


@pytest.mark.parametrize("cluster", [True, False])
async def test_an_agent_that_adopts_a_standby_knows_which_disks_await_their_claim(
    config: AgentConfig, tmp_path: Path, *, cluster: bool
) -> None:
    """In a cluster the copies as well: one that got no claim would hang the guest for ever."""
    if not cluster:
        await leave_cluster(config, force=True)
    record = replace(record_of(described(tmp_path)), work=Standing("a"))
    setups = await adopted_setups(config_of(config, "web", NUMBER), record)
    awaits = {one.short_name for one in setups if one.title is not None}
    assert awaits == ({"root", "data"} if cluster else {"data"})
    assert all(one.title.epoch is None for one in setups if one.title is not None)
    # The control: those of a VM without a claim that runs await nothing.
    setups = await adopted_setups(config, record_of(described(tmp_path)))
    assert not [one for one in setups if one.title is not None]


@dataclass
class Served:
    """A disk that awaited its claim: as much of `Disk` as that has spares again."""

    thawed: int = 0

    def thaw(self) -> None:
        self.thawed += 1


@dataclass
class Taken:
    """A VM that has its disks by a claim."""

    claim: Claim | None
    disks: dict[str, Served] = field(default_factory=lambda: {"root": Served(), "data": Served()})
    set: list[Claim] = field(default_factory=list)
    spec: VmSpec = field(default_factory=lambda: VmSpec(name="web"))

    @property
    def record(self) -> Any:
        return SimpleNamespace(claim=self.claim)

    def set_claim(self, claim: Claim) -> None:
        self.set.append(claim)


@pytest.mark.parametrize("cluster", [True, False])
async def test_its_disks_have_spares_again(tmp_path: Path, *, cluster: bool) -> None:
    """They were frozen while they awaited their claim, and in a cluster nobody ended that: the
    death of a backend was the end of the guest's disk.
    """
    claim = Claim("web", "a", 8, "c" * 32, ())
    vm = Taken(claim if cluster else None)
    nobody: Any = None
    made = LiveGenerations(
        AgentConfig(tmp_path, tmp_path), "web", nobody, nobody, nobody, "a", nobody
    )
    made.vms[NUMBER] = cast("Vm", vm)
    await made.settle_served(NUMBER)
    assert vm.set == [claim] * cluster
    # The control: on one host the disks that were handed over are thawed when the lock is theirs.
    assert [disk.thawed for disk in vm.disks.values()] == [int(cluster)] * 2


# Its files


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """That knows of web, which came from a standby and has ended."""
    agent = Agent(AgentConfig(tmp_path / "state", tmp_path / "run"))
    own = config_of(agent.config, "web", NUMBER)
    path = record_path(own.vm_state_dir("web"))
    path.parent.mkdir(parents=True)
    own.vm_run_dir("web").mkdir(parents=True)
    record = replace(record_of(VmSpec(name="web")), end=ENDED)
    record.write(path)
    write_guest(generation_places(agent.config, "web", NUMBER).state_dir, Guest(record.spec, {}))
    agent.vms["web"] = adoption.remembered(own, record, path)
    await agent.vms["web"].wait_freed()
    yield agent
    for vm in agent.vms.values():
        await vm.detach()


async def launched(agent: Agent, monkeypatch: pytest.MonkeyPatch, *, starts: bool) -> None:
    """It is started, where ordinary VMs have their files; or not."""

    async def launch(config: AgentConfig, *_: object) -> Vm:
        if not starts:
            raise StateConflict("enough was seen")
        path = record_path(config.vm_state_dir("web"))
        path.parent.mkdir(parents=True)
        record = replace(record_of(VmSpec(name="web")), end=ENDED)
        record.write(path)
        return adoption.remembered(config, record, path)

    async def nothing(*_: object) -> None:
        """It has started."""

    monkeypatch.setattr("sempervirt.agent.agent.launch", launch)
    monkeypatch.setattr("sempervirt.agent.agent.wait_started", nothing)
    monkeypatch.setattr(agent, "host", nothing)
    await agent.start_vm("web")


async def test_once_started_anew_it_is_on_record_once(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who forgot it then had it back with the next agent."""
    before = agent.vms["web"].ledger.path
    await launched(agent, monkeypatch, starts=True)
    assert agent.vms["web"].ledger.path != before
    assert not before.exists()
    assert (await adoption.adopt_all(config_of(agent.config, "web", NUMBER))).vms == {}
    # The images that the standby was made with are still the VM's, and known.
    read_guest(generation_places(agent.config, "web", NUMBER).state_dir)


async def test_one_that_does_not_start_is_known_where_it_was(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = agent.vms["web"]
    with pytest.raises(StateConflict, match="enough was seen"):
        await launched(agent, monkeypatch, starts=False)
    after = agent.vms["web"]
    assert after.freed
    assert after.ledger.path == before.ledger.path
    assert after.ledger.path.exists()
    assert after.machine.files.directory == before.machine.files.directory


async def test_what_is_merged_after_its_end_has_a_place(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AgentConfig] = []

    async def merge(config: AgentConfig, *_: object) -> Any:
        asked.append(config)
        return SimpleNamespace(merged=(), layers=0)

    disk = {"name": "root", "image": "/srv/web.raw"}
    spec = VmSpec.model_validate({"name": "web", "disks": [disk]})
    monkeypatch.setattr(agent.vms["web"].machine, "spec", spec)
    monkeypatch.setattr("sempervirt.agent.agent.merge_ended", merge)
    await agent.merge_layers("web/root", None, None)
    assert [one.vm_run_dir("web").is_dir() for one in asked] == [True]


# Its taps


@pytest.mark.parametrize("life", [Life.SERVING, Life.LOST])
async def test_its_taps_are_there_when_it_is_started(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, life: Life
) -> None:
    """Also after a start of the host: nobody but a standby makes them."""
    done: list[object] = []
    monkeypatch.setattr(taps, "make", lambda tap, *, several: done.append((tap, several)))
    monkeypatch.setattr(taps, "join", lambda tap, bridge: done.append((tap, bridge)))
    ours = network.tap_of("web", NUMBER, 1)
    nics = [{"type": "tap", "tap": tap} for tap in ("t0", ours)]
    spec = VmSpec.model_validate({"name": "web", "nics": nics})
    places = generation_places(agent.config, "web", NUMBER)
    write_guest(places.state_dir, Guest(spec, {ours: "br0"}))
    state = Standby("web", Policy(), generations=(Generation(NUMBER, life),), last=NUMBER)
    kept: Any = SimpleNamespace(
        driver=SimpleNamespace(state=state), generations=SimpleNamespace(places=lambda _n: places)
    )
    agent.standbys.kept["web"] = kept
    agent.standbys.prepare_start(spec)
    assert done == ([(ours, False), (ours, "br0")] if life is Life.SERVING else [])
