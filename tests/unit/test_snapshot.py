"""A snapshot of a VM's disks: what is frozen is thawed, and nothing is called more than it is."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.core.errors import (
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    RollbackFailed,
    StateConflict,
    Unavailable,
)
from sempervirt.core.events import Journal
from sempervirt.disk.answers import (
    Layers,
    LayerState,
    QueuesResumed,
    Quiesced,
    SnapshotTaken,
    Undone,
)
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import GUEST_AGENT_CHANNEL, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.renewal import snapshot as module
from sempervirt.renewal.snapshot import Consistency, Freezing, Thawing, snapshot_disks
from sempervirt.vm.ledger import Ledger
from sempervirt.vm.record import VmRecord, read_vm_record
from sempervirt.vm.vm import Vm
from sempervirt.vm.work import Snapshotting

Behaviour = Callable[[], Awaitable[None]]


@dataclass
class FakeDisk:
    """A disk whose backend does as it is told; `log` is what all disks were asked, in order."""

    name: str
    log: list[str]
    behaviour: dict[str, Behaviour] = field(default_factory=dict)
    held: bool = True
    states: list[LayerState] = field(default_factory=lambda: [LayerState.SEALED])
    last_error: str | None = None
    upgrade_available: bool = False
    taken: bool = False
    fails_before: bool = True  # or nobody knows whether there is a layer
    setup: Any = field(
        default_factory=lambda: SimpleNamespace(command=SimpleNamespace(has_control=1))
    )

    def active(self) -> FakeDisk:
        return self

    async def _do(self, what: str) -> None:
        self.log.append(f"{what} {self.name}")
        if what in self.behaviour:
            await self.behaviour[what]()

    async def snapshot(self, *, frozen: bool, timeout_s: float) -> SnapshotTaken:
        assert timeout_s > 0
        self.taken = not self.fails_before
        await self._do("snapshot frozen" if frozen else "snapshot")
        self.taken = True
        return SnapshotTaken(snapshot=3, state=LayerState.OPENED, pause_us=1500)

    async def quiesce(self, for_ms: int, *, timeout_s: float) -> Quiesced:
        await self._do("quiesce")
        return Quiesced(quiesced=True, for_ms=for_ms)

    async def undo(self, snapshot: int, *, timeout_s: float) -> Undone:
        assert snapshot == 3
        await self._do("undo")
        self.taken = False
        return Undone(taken_back=True)

    async def resume(self) -> QueuesResumed:
        await self._do("resume")
        return QueuesResumed(held=self.held)

    async def layers(self) -> Layers:
        state, number = LayerState.SEALED, 2
        if self.taken:
            state, number = self.states.pop(0) if len(self.states) > 1 else self.states[0], 3
        layer = {"id": number, "state": state.value, "epoch": 1, "time": 1.0, "frozen": False}
        layer |= {"size_bytes": 4096, "data_bytes": 0, "writes": True}
        content = {
            "layers": [layer],
            "kept": 0,
            "limit": 4,
            "map_bytes": 0,
            "pins": [],
            "task": None,
        }
        return Layers.model_validate_json(json.dumps({**content, "last_error": self.last_error}))


class FakeVm:
    """What a snapshot sees of a VM with two disks."""

    def __init__(self, place: Path, *, agent: bool = True) -> None:
        channels = [{"name": GUEST_AGENT_CHANNEL}] if agent else []
        disks: list[dict[str, Any]] = [
            {"name": name, "image": f"/x/{name}"} for name in ("root", "data")
        ]
        disks += [{"name": "cd", "image": "/x/cd", "read_only": True}]
        self.spec = VmSpec.model_validate({"name": "web", "disks": disks, "channels": channels})
        record = VmRecord(self.spec, Accelerator("tcg", "no device"), 12.5)
        self.ledger = Ledger(record, place / "vm.json")
        self.ledger.create()
        self.name, self.run, self.pid = "web", Runstate.RUNNING, os.getpid()
        self.log: list[str] = []
        self.disks = {name: FakeDisk(f"web/{name}", self.log) for name in ("root", "data", "cd")}
        self.machine = SimpleNamespace(files=VmFiles(place), journal=Journal())
        self.begin, self.advance = self.ledger.begin, self.ledger.advance
        self.end_work = self.ledger.end_work
        self.place = place

    def employ(self, worker: object) -> None:
        self.worker = worker

    def has_ejected(self, _: str) -> bool:
        return False

    def on_record(self) -> Any:
        record = read_vm_record(self.place / "vm.json")
        assert record is not None
        return record.work


def taken_of(vm: FakeVm, *names: str, freezing: Freezing = Freezing.AUTO) -> Awaitable[Any]:
    return snapshot_disks(cast(Vm, vm), names, freezing)


@asynccontextmanager
async def guest(vm: FakeVm, **answers: Any) -> AsyncIterator[dict[str, Any]]:
    """The guest's agent: `answers` by command, "-" as "_"; None: no answer."""
    state: dict[str, Any] = {"frozen": False, "freezes": 0, "thaws": 0}

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            request = json.loads(line.removeprefix(b"\xff"))
            command = request["execute"]
            vm.log.append(command.removeprefix("guest-")) if "fsfreeze" in command else None
            told: Any = {"return": {}}
            match command:
                case "guest-sync-delimited":
                    told = {"return": request["arguments"]["id"]}
                case "guest-fsfreeze-freeze":
                    state["frozen"], state["freezes"] = True, state["freezes"] + 1
                    state["record"] = vm.on_record()
                    told = {"return": 2}
                case "guest-fsfreeze-status":
                    told = {"return": "frozen" if state["frozen"] else "thawed"}
                case "guest-fsfreeze-thaw":
                    state["frozen"], state["thaws"] = False, state["thaws"] + 1
                    told = {"return": 2}
                case _:
                    pass
            key = command.removeprefix("guest-").replace("-", "_")
            told = answers.get(key, told)
            if told is not None:
                writer.write(b"\xff" * (command == "guest-sync-delimited"))
                writer.write(json.dumps(told).encode() + b"\n")
        writer.close()

    server = await asyncio.start_unix_server(talk, vm.place / "agent.sock")
    try:
        yield state
    finally:
        server.close()


async def until(condition: Callable[[], Any]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)  # poll interval


async def fails() -> None:
    raise Unavailable("no room")


async def test_all_disks_at_one_instant_while_the_file_systems_are_frozen(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path)
    async with guest(vm) as state:
        done = await taken_of(vm)
    assert (done.consistency, done.reason) == (Consistency.FILE_SYSTEMS, "")
    assert [one.disk for one in done.disks] == ["web/root", "web/data"]  # and not the read-only one
    assert vm.log == [
        "fsfreeze-freeze", "quiesce web/root", "quiesce web/data", "snapshot frozen web/root",
        "snapshot frozen web/data", "resume web/root", "resume web/data", "fsfreeze-status",
        "fsfreeze-thaw",
    ]  # fmt: skip
    before = {"web/root": 2, "web/data": 2}
    assert state["record"] == Snapshotting(frozen=True, newest=before)  # before it was done
    assert not state["frozen"]
    assert vm.on_record() is None


async def test_one_disk_is_an_instant_by_itself(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, agent=False)
    done = await taken_of(vm, "data")
    assert vm.log == ["snapshot web/data"]
    assert done.consistency is Consistency.CRASH
    assert done.reason == "the VM has no channel for a guest agent"
    assert done.frozen_ms is None


@pytest.mark.parametrize("freezing", [Freezing.AUTO, Freezing.REQUIRED])
@pytest.mark.parametrize(
    "answers",
    [
        {"fsfreeze_freeze": {"error": {"desc": "hook failed"}}},
        {"fsfreeze_freeze": None},
        {"fsfreeze_freeze": {"return": 0}},
        {"ping": {"error": {"desc": "disabled"}}},
        {"sync_delimited": {"return": 0}},
    ],
    ids=["refuses", "is silent", "freezes nothing", "has no ping", "is no agent"],
)
async def test_a_guest_that_does_not_freeze_is_thawed_and_the_answer_says_so(
    tmp_path: Path, answers: dict[str, Any], freezing: Freezing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FROZEN_S", 1.0)
    monkeypatch.setattr(module, "ANSWER_S", 1.0)
    vm = FakeVm(tmp_path)
    async with guest(vm, **answers) as state:
        if freezing is Freezing.REQUIRED:
            with pytest.raises(StateConflict, match="are not frozen"):
                await taken_of(vm, freezing=freezing)
            assert not any("snapshot" in entry for entry in vm.log)
        else:
            done = await taken_of(vm, freezing=freezing)
            assert done.consistency is Consistency.CRASH
            assert done.reason
            assert "snapshot web/root" in vm.log
    assert not state["frozen"]
    assert state["thaws"] == state["freezes"]
    assert vm.on_record() is None


@pytest.mark.parametrize("what", ["quiesce", "snapshot frozen"])
async def test_whatever_fails_the_guest_is_thawed_and_every_disk_resumed(
    tmp_path: Path, what: str
) -> None:
    vm = FakeVm(tmp_path)
    vm.disks["data"].behaviour[what] = fails
    async with guest(vm) as state:
        with pytest.raises(Unavailable, match="disk web/data: no room"):
            await taken_of(vm)
    assert not state["frozen"]
    assert vm.log[-3:] == ["resume web/root", "resume web/data", "fsfreeze-thaw"]
    undone = ["undo web/root"] if what == "snapshot frozen" else []
    assert [entry for entry in vm.log if entry.startswith("undo")] == undone
    assert vm.on_record() is None


async def test_a_snapshot_of_which_nobody_knows_is_undone_as_well(tmp_path: Path) -> None:
    async def silent() -> None:
        raise OutcomeUnknown("no answer")

    vm = FakeVm(tmp_path, agent=False)
    vm.disks["data"].behaviour["snapshot"] = silent
    vm.disks["data"].fails_before = False
    with pytest.raises(OutcomeUnknown, match="no answer"):
        await taken_of(vm)
    assert vm.log[-4:] == ["undo web/root", "undo web/data", "resume web/root", "resume web/data"]
    assert not vm.disks["root"].taken


async def test_snapshots_that_cannot_be_undone_are_named(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, agent=False)
    vm.disks["data"].behaviour["snapshot"] = fails
    vm.disks["root"].behaviour["undo"] = fails
    with pytest.raises(RollbackFailed, match=r"no room.*some of the disks: web/root \(no room\)"):
        await taken_of(vm)


async def test_the_next_agent_undoes_what_only_some_disks_may_have(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, agent=False)
    work = Snapshotting(newest={"web/root": 2, "web/data": 2})
    vm.begin(work)
    vm.disks["root"].taken = True
    thawing = Thawing(cast(Vm, vm), work)
    async with asyncio.timeout(90):
        await until(lambda: thawing.over)
    assert vm.log == ["undo web/root"]
    assert vm.on_record() is None


async def test_disks_that_went_on_by_themselves_are_not_one_instant(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, agent=False)
    vm.disks["data"].held = False
    with pytest.raises(Unavailable, match="not of one instant: web/data took requests"):
        await taken_of(vm)
    assert vm.log[-2:] == ["undo web/root", "undo web/data"]


async def test_a_guest_that_thawed_by_itself_is_not_called_frozen(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path)
    async with guest(vm, fsfreeze_status={"return": "thawed"}):
        done = await taken_of(vm)
    assert done.consistency is Consistency.CRASH
    assert "thawed them before" in done.reason


async def test_a_guest_that_nobody_thaws_is_told(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path)
    async with guest(vm, fsfreeze_thaw={"error": {"desc": "no"}}):
        with pytest.raises(OutcomeUnknown, match="may still be frozen"):
            await taken_of(vm)
    assert "may still be frozen" in vm.machine.journal.events[-1].message


async def test_a_snapshot_is_there_when_it_is_sealed(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, agent=False)
    vm.disks["root"].states = [LayerState.OPENED] * 3 + [LayerState.SEALED]
    await taken_of(vm, "root")
    assert vm.disks["root"].states == [LayerState.SEALED]


async def test_a_snapshot_that_a_death_came_before_is_not_there(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path, agent=False)
    vm.disks["root"].states = [LayerState.OPENED, LayerState.LAPSED]
    with pytest.raises(Unavailable, match="ended before it was sealed"):
        await taken_of(vm, "root")
    vm.disks["root"].states, vm.disks["root"].last_error = [LayerState.OPENED], "EIO of a flush"
    with pytest.raises(Unavailable, match="EIO of a flush"):
        await taken_of(vm, "root")


async def test_a_flush_that_does_not_end_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = FakeVm(tmp_path, agent=False)
    vm.disks["root"].states, vm.disks["root"].taken = [LayerState.OPENED], True
    with pytest.raises(OutcomeUnknown, match="may come to be"):
        await module.wait_sealed(cast(Any, vm.disks["root"]), 3, 0.2)


async def test_what_cannot_be_in_a_snapshot_is_refused(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path)
    with pytest.raises(NotFound, match="no disk rot"):
        await taken_of(vm, "rot")
    with pytest.raises(InvalidRequest, match="read-only"):
        await taken_of(vm, "cd")
    del vm.disks["data"]
    with pytest.raises(InvalidRequest, match="served by QEMU itself"):
        await taken_of(vm)
    assert vm.log == []


async def test_a_backend_of_another_release_says_what_to_do(tmp_path: Path) -> None:
    async def unknown() -> None:
        raise InvalidRequest("there is no command snapshot")

    vm = FakeVm(tmp_path, agent=False)
    vm.disks["root"].behaviour["snapshot"] = unknown
    vm.disks["root"].upgrade_available = True
    with pytest.raises(InvalidRequest) as raised:
        await taken_of(vm, "root")
    assert raised.value.remedy.endswith("semper disk upgrade web/root")


async def test_one_work_at_a_time(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path)
    vm.begin(Snapshotting())
    with pytest.raises(StateConflict, match="a snapshot of its disks is under way"):
        await taken_of(vm)


@pytest.mark.parametrize("frozen", [True, False])
async def test_the_next_agent_thaws_what_may_be_frozen(tmp_path: Path, frozen: bool) -> None:
    vm = FakeVm(tmp_path)
    vm.begin(Snapshotting(frozen=frozen))
    async with guest(vm) as state:
        state["frozen"] = frozen
        thawing = Thawing(cast(Vm, vm), Snapshotting(frozen=frozen))
        async with asyncio.timeout(90):
            await until(lambda: thawing.over)
    assert state["thaws"] == frozen
    assert not state["frozen"]
    assert vm.on_record() is None


async def test_an_agent_that_leaves_leaves_nothing_frozen(tmp_path: Path) -> None:
    vm = FakeVm(tmp_path)
    vm.disks["root"].states = [LayerState.OPENED]  # for ever
    async with guest(vm) as state:
        asked = asyncio.ensure_future(taken_of(vm))
        async with asyncio.timeout(90):
            await until(lambda: state["freezes"])
            await cast(Any, vm.worker).detach()
            with pytest.raises(OutcomeUnknown):
                await asked
        assert not state["frozen"]
    assert vm.on_record() is None
