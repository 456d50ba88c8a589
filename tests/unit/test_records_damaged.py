"""Every file that outlives a process, damaged in many ways: an agent begins all the same, no VM is
lost from its list, and nothing that runs is ended, or could be started once more.

The agent is a real one. What lives of the VM are real processes with the arguments of a QEMU and of
a backend, which do nothing else; the agent sees no others. `make records` tries 100,000 of each.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.agent.lock import agent_lock
from sempervirt.api.schemas import VmView
from sempervirt.api.views import vm_views
from sempervirt.cluster.certificate import read_standing
from sempervirt.cluster.cluster import (
    Settings,
    open_store,
    read_credentials,
    read_settings,
    write_credentials,
    write_settings,
)
from sempervirt.cluster.service import Service
from sempervirt.core.errors import SempervirtError, StateConflict
from sempervirt.core.queue_map import Binding, Choice, DevicePlan
from sempervirt.disk.backend import Blkd, DiskOptions, Launch
from sempervirt.disk.presets import PresetStore
from sempervirt.disk.record import DiskRecord, RecordedProcess, Role
from sempervirt.disk.state import Policy
from sempervirt.evacuation.decide import begin, recover
from sempervirt.evacuation.record import EvacuationRecord
from sempervirt.evacuation.state import Passage
from sempervirt.evacuation.values import Cause, EvacuationOrder, Fate
from sempervirt.guard.adapters import HeardRecord
from sempervirt.host import procfs
from sempervirt.host.procfs import ProcessId, boot_id, identify
from sempervirt.host.records import write_record
from sempervirt.host.users import FIRST, UserPool
from sempervirt.migration import moves
from sempervirt.qemu import features
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.command_line import Features
from sempervirt.qemu.link import Patience
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.qemu.state import End, Runstate, VmState
from sempervirt.standby import decide as standby_decide
from sempervirt.standby.lost import Loss, LostDisk, drop_lost, losses_of
from sempervirt.standby.record import (
    Guest,
    read_first,
    read_guest,
    read_taken,
    record_of,
    write_first,
    write_guest,
    write_taken,
)
from sempervirt.standby.state import First, Generation, Life, TakeOver
from sempervirt.standby.values import Policy as StandbyPolicy
from sempervirt.store import epoch
from sempervirt.store.etcd import Credentials
from sempervirt.store.port import Put
from sempervirt.store.records import Custody, Ownership, parse
from sempervirt.store.registry import Claim
from sempervirt.store.sqlite import SqliteStore
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import Identity, KeyRequest
from sempervirt.vm.autostart import Settled
from sempervirt.vm.guarded import Guarded, GuardedDisk
from sempervirt.vm.phases import Arrival
from sempervirt.vm.record import VmRecord
from sempervirt.vm.work import Arriving, Departing, Restarting, Restoring, Saving, Work
from tests.unit.mutations import MUTATIONS, clear, damage

pytestmark = pytest.mark.timeout(max(600, MUTATIONS))


DEADLINE_S = 90.0
MUTATIONS_LOGGED = 1000


@dataclass(frozen=True)
class Still(Blkd):
    """Arguments as those of semper-blkd, and a program that ends at once."""

    has_spare: bool = False

    def binary(self) -> str:
        """Whatever is started by mistake does nothing."""
        return "/bin/true"


@dataclass
class World:
    """A host with one VM, "web"."""

    config: AgentConfig
    proc: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def records(self) -> Path:
        """Where the records of the VM stand."""
        return self.config.vm_state_dir("web")

    def live(self, *arguments: str) -> ProcessId:
        """A process with these arguments that an agent can see."""
        process = subprocess.Popen(
            ["sh", "-c", "read forever", "sh", *arguments], stdin=subprocess.PIPE
        )
        self.started.append(process)
        (self.proc / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        identity = identify(process.pid)
        assert identity is not None
        return identity

    def live_qemu(self) -> ProcessId:
        """A process that an agent takes for the VM's QEMU."""
        monitor = self.config.vm_run_dir("web") / "qmp.sock"
        monitor.parent.mkdir(parents=True)
        monitor.touch()
        return self.live(f"socket,id=monitor,path={monitor},server=on,wait=off")

    def all_live(self) -> bool:
        """Whether nothing was ended."""
        return all(process.poll() is None for process in self.started)


@pytest.fixture(autouse=True)
def unlogged() -> Iterator[None]:
    """What is logged is kept by pytest until the end of a test, with the errors and all that these
    lead to: 100 KB for each agent, 10 GB for a campaign.
    """
    logging.disable(logging.CRITICAL if MUTATIONS > MUTATIONS_LOGGED else logging.NOTSET)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    place = Path(tempfile.mkdtemp(prefix="sv-", dir="/tmp"))
    proc = place / "proc"
    proc.mkdir()
    for name in ("self", "sys"):
        (proc / name).symlink_to(f"/proc/{name}")
    boot_id()
    monkeypatch.setattr(procfs, "PROC", proc)
    config = AgentConfig(
        place / "s",
        place / "r",
        keep_vms=True,
        qemu="/bin/true",
        backend=Still(),
        policy=Policy(spare=False),
        patience=Patience(),
    )
    world = World(config, proc)
    world.records.mkdir(parents=True)
    try:
        yield world
    finally:
        for process in world.started:
            process.kill()
            process.communicate()
        shutil.rmtree(place)


def record(qemu: ProcessId | None, work: Work | None = None, *, backend: str = "qemu") -> VmRecord:
    disk = {"name": "root", "image": "/nonexistent/image", "backend": backend}
    plan = DevicePlan("virtio-blk", Binding((0, 0), "VM file"), Choice("native", "built in"))
    return VmRecord(
        VmSpec.model_validate({"name": "web", "disks": [disk]}),
        Accelerator("tcg", "no device"),
        1795384877.9,
        qemu=qemu,
        plans={"disk-root": plan},
        claim=Claim("web", "a", 7, "c" * 32, ("i" * 32,)),
        work=work,
    )


def sound(path: Path, records: Sequence[VmRecord]) -> list[bytes]:
    texts = []
    for one in records:
        one.write(path)
        texts.append(path.read_bytes())
    return texts


async def found(world: World) -> tuple[VmView, bool]:
    """What a new agent says of the VM, and whether it would start another one of that name."""
    async with Agent.open(world.config) as agent:
        await moves.resume_all(agent)
        for vm in agent.vms.values():
            if vm.pid is None:
                await vm.wait_ended(timeout_s=DEADLINE_S)
        views = vm_views(agent)
        for view in views:
            view.model_dump_json()
        (web,) = [view for view in views if view.name == "web"]
        try:
            agent._require_free("web")
            await agent._require_absent("web")
        except StateConflict:
            return web, False
        return web, True


async def test_the_record_of_a_vm_that_runs(world: World) -> None:
    qemu = world.live_qemu()
    path = world.records / "vm.json"
    away = Departing("d" * 32, "b", "10.0.0.2:7443", running=True)
    texts = sound(path, [record(qemu), record(None), record(qemu, away), record(world_gone(qemu))])
    taken_over = 0
    for seed in range(MUTATIONS):
        what = damage(path, texts, seed)
        web, startable = await found(world)
        assert web.pid == qemu.pid, what
        assert not startable, what
        assert world.all_live(), what
        taken_over += web.spec is not None
    # The control: records that only look different are still records.
    assert 0 < taken_over < MUTATIONS


def world_gone(qemu: ProcessId) -> ProcessId:
    """A QEMU that was there before, with the pid of the present one."""
    return replace(qemu, start_ticks=1)


async def test_the_record_of_a_vm_that_does_not_run(world: World) -> None:
    path = world.records / "vm.json"
    gone = ProcessId(4711, 1, boot_id())
    works: tuple[Work | None, ...] = (
        None,
        Restarting(2, resume=True, switched=True, qemu=gone),
        Saving(resume=False),
        Restoring(),
        Departing("d" * 32, "b", "10.0.0.2:7443", running=True),
        Arriving("d" * 32, "a", False, 7, ("i" * 32,), Arrival.PROMISED),
    )
    ended = VmState(run=Runstate.CRASHED, why="it died", end=End("it died", None, 11))
    texts = sound(path, [*(record(gone, work) for work in works), record(gone).ended(ended)])
    DiskRecord(2, "/bin/true#", 0, ()).write(world.records / "disk-root.json")
    states = set()
    for seed in range(MUTATIONS):
        what = damage(path, texts, seed)
        web, startable = await found(world)
        assert web.pid is None, what
        assert startable is web.state.is_end, what
        states.add(web.state)
        DiskRecord(2, "/bin/true#", 0, ()).write(world.records / "disk-root.json")
    assert states >= {Runstate.UNKNOWN, Runstate.CRASHED}


async def test_the_record_of_a_disk_that_is_served(world: World) -> None:
    qemu = world.live_qemu()
    options = DiskOptions(Path("/nonexistent/image"))
    control = world.config.vm_run_dir("web") / "disk-root-5.ctl"
    argv = Still().argv(Launch("/bin/true", options, 9, control, wait_for_lock=False))
    backend = world.live(*argv[1:])
    path = world.records / "disk-root.json"
    DiskRecord(
        6,
        "/bin/true#",
        3,
        (RecordedProcess(Role.ACTIVE, 5, "/bin/true#", 9, backend),),
        Binding((0,), "VM file"),
    ).write(path)
    texts = [path.read_bytes()]
    record(qemu, backend="blkd").write(world.records / "vm.json")
    for seed in range(MUTATIONS):
        what = damage(path, texts, seed)
        async with Agent.open(world.config) as agent:
            (web,) = vm_views(agent)
            assert web.pid == qemu.pid, what
            if "web" in agent.vms:  # otherwise the record may be that of a later release
                assert agent.disks["web/root"].active_pid == backend.pid, what
            with pytest.raises(StateConflict):
                agent._require_free("web")
        assert world.all_live(), what
        for aside in world.records.glob("*.damaged-*"):
            clear(aside)


async def test_the_controls(world: World) -> None:
    """A sound record is believed, and a QEMU that runs without one stands in the way."""
    path = world.records / "vm.json"
    record(ProcessId(4711, 1, boot_id())).write(path)
    web, startable = await found(world)
    assert (web.state, startable) == (Runstate.CRASHED, True)
    qemu = world.live_qemu()
    record(qemu).write(path)
    web, startable = await found(world)
    assert (web.pid, web.why, startable) == (qemu.pid, "adopted, and not asked yet", False)
    shutil.rmtree(world.records)
    web, startable = await found(world)
    assert (web.pid, web.state, startable) == (qemu.pid, Runstate.UNKNOWN, False)


# Files of the host as a whole: whoever reads them gets an error that says what is wrong.

Read = Callable[[AgentConfig], Awaitable[None]]
AT = 1795384877.9
# A number of a VM's user, which is taken.
USER = FIRST + 17


async def _settings(config: AgentConfig) -> None:
    settings = read_settings(config)
    if settings is not None:
        await open_store(config, replace(settings, store=settings.store[:1])).close()


async def _store(config: AgentConfig) -> None:
    store = SqliteStore.open(config.state_dir / "store.db")
    try:
        for key, entry in (await store.read("vms/")).entries.items():
            parse(Ownership, key, entry.value)
    finally:
        await store.close()


async def _trust(config: AgentConfig) -> None:
    Identity(config.trust_dir).server_context()


async def _epoch(config: AgentConfig) -> None:
    epoch.read_epoch(config.state_dir / "image.epoch")


async def _presets(config: AgentConfig) -> None:
    PresetStore(config.state_dir).read()


async def _evacuation(config: AgentConfig) -> None:
    left = EvacuationRecord(config.state_dir / "evacuation.json").read()
    if left is not None:
        recover(left)


async def _service(config: AgentConfig) -> None:
    _ = Service.read(config.state_dir).why_not  # what cannot be read keeps a host out of service


async def _renewal(config: AgentConfig) -> None:
    read_standing(config)


async def _credentials(config: AgentConfig) -> None:
    read_credentials(config)


async def _heard(config: AgentConfig) -> None:
    assert HeardRecord(config.state_dir / "guard.json").ns >= 0


async def _autostart(config: AgentConfig) -> None:
    assert all(isinstance(name, str) for name in Settled(config.state_dir).names)


async def _guarded(config: AgentConfig) -> None:
    guarded = Guarded(config)
    for wanted in guarded._on_record():
        guarded._setup(wanted, guarded._read_plan(wanted), None)


async def _standby(config: AgentConfig) -> None:
    state = record_of(config.state_dir, "web").read()
    if state is not None:
        recovered, _ = standby_decide.recover(state, {}, 0.0)
        record_of(config.state_dir, "web").write(recovered)


async def _generation(config: AgentConfig) -> None:
    directory = config.state_dir / "standby/web"
    read_guest(directory / "3")


async def _beside_generations(config: AgentConfig) -> None:
    read_first(config.state_dir, "web")
    read_taken(config.state_dir, "web")


async def _lost(config: AgentConfig) -> None:
    image = config.state_dir / "web.raw.standby-2"
    losses_of(config.state_dir, "web").read()
    await drop_lost(config.state_dir, (image,), AT)
    assert image.exists(), "an image of a VM that runs was removed"


async def _users(config: AgentConfig) -> None:
    """Whatever stands there, another VM gets a number, which is nobody else's."""
    pool = UserPool(config.state_dir / "users", count=64)
    # Without its note a number is free, unless a process has it, and here none has.
    taken = await asyncio.to_thread(os.path.lexists, pool.registry / str(USER))
    number = pool.take(config.state_dir / "vm/other")
    assert number is not None
    assert not (taken and number == USER)
    pool.release(config.state_dir / "vm/other", ())


async def _lock(config: AgentConfig) -> None:
    with agent_lock(config.state_dir), pytest.raises(StateConflict):  # noqa: SIM117
        with agent_lock(config.state_dir):
            pass


async def _cache(config: AgentConfig) -> None:
    assert (await features.probe("/bin/true", config.state_dir / "cache")).version != ""


async def _make(config: AgentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of these files, sound."""

    async def ask(_: str) -> Features:
        return Features("9.0", frozenset({"q35"}))

    monkeypatch.setattr(features, "_ask", ask)
    config.state_dir.mkdir(exist_ok=True)
    write_settings(config, Settings("lab", "a", "10.0.0.1:7443", ("https://10.0.0.1:2379",)))
    authority, identity = Authority.create(config.trust_dir, "lab"), Identity(config.trust_dir)
    asked = KeyRequest.made("a")
    issued = authority.issue_host(asked.text, "a", "10.0.0.1:7443")
    identity.keep(asked, issued.pem, Issued(authority.certificate).pem)
    store = SqliteStore.open(config.state_dir / "store.db")
    owned = Ownership(vm="web", custody=Custody.OWNED, owner="a", epoch=7, claim="c" * 32)
    await store.commit([Put("vms/web", owned.text())], expect={"vms/web": 0})
    await store.close()
    epoch.advance(config.state_dir / "image.epoch", Claim("web", "a", 7, "c" * 32))
    (config.state_dir / "presets.json").write_text('{"version": 1, "presets": [{"device": "x"}]}')
    order = EvacuationOrder(Cause.GUARD, "its kernel dies", ("b",))
    begun, _ = begin(order, 1795384877.9, 4711.0)
    passages = (Passage("web", Fate.MOVES, "b", tried=("c",)), Passage("db", Fate.WAITS, "b"))
    EvacuationRecord(config.state_dir / "evacuation.json").write(replace(begun, passages=passages))
    await Service.read(config.state_dir).take_out("its kernel dies")
    with agent_lock(config.state_dir):
        pass
    await features.probe("/bin/true", config.state_dir / "cache")
    write_credentials(config, Credentials("a", "secret"))
    identity.keep_list(authority.revocation_list(["0" * 39 + "1"]))
    write_record(config.trust_dir / "renewal.json", 1, {"failure": "the host b does not answer"})
    HeardRecord(config.state_dir / "guard.json").keep(19775584000)
    Settled(config.state_dir).add("web")
    await _make_of_other_vms(config)


async def _make_of_other_vms(config: AgentConfig) -> None:
    """Of a guarded disk, of a VM's user, and of its standbys."""
    image = config.state_dir / "web.raw.standby-2"
    image.touch()
    os.utime(image, (1.0, 1.0))
    disk = DiskSpec(name="disk0", image=image)
    plan = DevicePlan("vhost-user-blk", Binding((0, 0), "preset"), Choice("sync", "preset"))
    Guarded(config)._write(GuardedDisk(vm="100", disk=disk), plan)
    (config.state_dir / "users").mkdir()
    (config.state_dir / f"users/{USER}").write_text(f"{config.state_dir}/vm/web")
    kept = standby_decide.begin("web", StandbyPolicy())
    one = Generation(3, Life.READY, snapshots=(("root", 5),), notes=("made",))
    over = TakeOver(3, "QEMU has ended", AT, 4711.0, steps=(("declared", 0.5),))
    record_of(config.state_dir, "web").write(
        replace(kept, first=First.AWAY, generations=(one,), last=3, past=over)
    )
    spec = VmSpec.model_validate({"name": "web", "disks": [disk]})
    (config.state_dir / "standby/web/3").mkdir(parents=True)
    write_guest(config.state_dir / "standby/web/3", Guest(spec, {"tap0": "br0"}))
    write_first(config.state_dir, spec)
    write_taken(config.state_dir, "web", {"root": 5})
    loss = Loss(2, AT - 8 * 86400.0, AT - 8 * 86400.0, (LostDisk("root", image),))
    losses_of(config.state_dir, "web").add(loss)


FILES: Mapping[str, Read] = {
    "cluster.json": _settings,
    "store.db": _store,
    "trust/host.pem": _trust,
    "trust/authority.crt": _trust,
    "image.epoch": _epoch,
    "presets.json": _presets,
    "evacuation.json": _evacuation,
    "service.json": _service,
    "guard.json": _heard,
    "autostart.json": _autostart,
    "guarded/100/disk0.json": _guarded,
    "standby/web.json": _standby,
    "standby/web/3/guest.json": _generation,
    "standby/web/first.json": _beside_generations,
    "standby/web/taken.json": _beside_generations,
    "lost/web.json": _lost,
    f"users/{USER}": _users,
    "trust/store.json": _credentials,
    "trust/renewal.json": _renewal,
    "trust/revoked.crl": _trust,
    "agent.lock": _lock,
    "cache/*.json": _cache,
}


# Damages that something did not withstand once: a certificate of a version that there is not (3955)
# and a QEMU without a version (2370).
FOUND = (2370, 2587, 3955)


@pytest.mark.parametrize("name", FILES)
async def test_a_file_of_the_host(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    await _make(world.config, monkeypatch)
    (path,) = world.config.state_dir.glob(name)
    text = path.read_bytes()
    await FILES[name](world.config)  # the control: the file is sound, and is read
    for seed in (*FOUND, *range(MUTATIONS)):
        what = damage(path, [text], seed)
        try:
            await FILES[name](world.config)
        except SempervirtError:
            pass
        except Exception as error:
            raise AssertionError(what) from error
        # A link in the file's place is not followed, to write elsewhere.
        assert not path.with_name(f"{path.name}.elsewhere").exists(), what
        await asyncio.sleep(0)
