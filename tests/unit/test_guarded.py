"""Records of guarded disks: what was asked for is asked for again, and damage loses no other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent
from sempervirt.api.openmetrics import render
from sempervirt.api.views import waiting_disk_view
from sempervirt.core.errors import NotFound, StateConflict, Unavailable
from sempervirt.core.queue_map import Binding, Choice, DevicePlan
from sempervirt.qemu.spec import DiskSpec
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.guarded import Guarded, GuardedDisk

PLAN = DevicePlan("vhost-user-blk", Binding((0, 0, 1), "a test"), Choice("sync", "a test"))


def asked(name: str, tmp_path: Path) -> GuardedDisk:
    disk = DiskSpec(name=name, image=tmp_path / f"{name}.raw", queues=3, direct=True)
    return GuardedDisk(vm="web", disk=disk, socket=tmp_path / "s", group="kvm", mode=0o600)


def test_what_was_asked_for_is_on_record(tmp_path: Path) -> None:
    guarded = Guarded(AgentConfig(tmp_path / "s", tmp_path / "r"))
    wanted = asked("vda", tmp_path)
    guarded._write(wanted, PLAN)
    assert guarded._on_record() == [wanted]
    assert guarded._read_plan(wanted) == PLAN


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"version": 1}',
        b'{"version": 1, "disk": {}, "plan": {}}',
        b"a name of another disk",
        b"a map of nothing",
    ],
)
def test_a_damaged_record_keeps_no_other_disk_from_being_served(
    tmp_path: Path, damage: bytes
) -> None:
    guarded = Guarded(AgentConfig(tmp_path / "s", tmp_path / "r"))
    sound, broken = asked("vda", tmp_path), asked("vdb", tmp_path)
    for one in (sound, broken):
        guarded._write(one, PLAN)
    path = tmp_path / "s" / "guarded" / "web" / "vdb.json"
    content = json.loads(path.read_text())
    if damage == b"a name of another disk":
        content["disk"]["disk"]["name"] = "vda"
        damage = json.dumps(content).encode()
    if damage == b"a map of nothing":
        content["plan"]["binding"]["map"] = []
        damage = json.dumps(content).encode()
    path.write_bytes(damage)
    assert guarded._on_record() == [sound]
    assert path.read_bytes() == damage  # it is left, for whoever mends it


def test_a_name_is_taken_by_what_is_wanted(tmp_path: Path) -> None:
    guarded = Guarded(AgentConfig(tmp_path / "s", tmp_path / "r"))
    wanted = asked("vda", tmp_path)
    guarded.wanted[wanted.name] = wanted
    guarded.require_no_vm("other")
    with pytest.raises(StateConflict, match="semper disk unguard web/vda"):
        guarded.require_no_vm("web")


async def no_features() -> Any:
    """None are needed."""
    raise Unavailable("there is no QEMU")


def on_record(
    tmp_path: Path, start: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> Agent:
    """An agent that is to serve web/vda after a boot, by `start`."""
    agent = Agent(AgentConfig(tmp_path / "s", tmp_path / "r"))
    agent.guarded._write(asked("vda", tmp_path), PLAN)
    monkeypatch.setattr(agent.guarded, "_start", start)
    monkeypatch.setattr("sempervirt.vm.guarded.AGAIN_S", 0.01)
    return agent


async def test_one_that_cannot_be_served_ends_no_agent_and_is_shown_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> Any:
        raise OSError(28, "No space left on device")

    agent = on_record(tmp_path, full, monkeypatch)

    async def features() -> Any:
        raise OSError(28, "No space left on device")

    await agent.guarded.open(features)
    try:
        view = waiting_disk_view(agent.guarded, "web/vda")
        assert (view.condition.value, view.image) == ("failing", tmp_path / "vda.raw")
        assert "No space left" in view.reason
        told = (await render(agent)).decode()
        assert 'semper_disk_condition{condition="failing",disk="web/vda"} 1.0' in told or (
            'semper_disk_condition{disk="web/vda",condition="failing"} 1.0' in told
        )
        assert 'semper_disks{condition="failing"} 1.0' in told
    finally:
        await agent.guarded.close(keep=True)


async def test_an_agent_waits_some_time_for_storage_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def features() -> Any:
        begun.set()
        await asyncio.Event().wait()

    agent = on_record(tmp_path, no_features, monkeypatch)
    monkeypatch.setattr("sempervirt.vm.guarded.OPEN_S", 0.05)
    await agent.guarded.open(features)
    await asyncio.wait_for(begun.wait(), 10)
    with pytest.raises(Unavailable, match="being looked at"):
        agent.disk("web/vda")
    await agent.guarded.close(keep=True)


async def test_what_is_given_up_while_it_is_tried_is_not_served_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may = asyncio.Event(), asyncio.Event()

    async def features() -> Any:
        begun.set()
        await may.wait()
        raise Unavailable("not yet")

    agent = on_record(tmp_path, no_features, monkeypatch)
    monkeypatch.setattr("sempervirt.vm.guarded.OPEN_S", 0.05)
    await agent.guarded.open(features)
    await begun.wait()
    giving_up = asyncio.create_task(agent.guarded.unguard("web/vda"))
    await asyncio.sleep(0.05)  # poll interval
    assert not giving_up.done()
    may.set()
    await giving_up
    assert not agent.guarded.waiting
    with pytest.raises(NotFound):
        await agent.guarded.unguard("web/vda")
    assert not list((tmp_path / "s").glob("guarded/**/*.json"))
    await agent.guarded.close(keep=True)


def test_a_socket_of_another_disk_or_a_file_is_no_place_for_one(tmp_path: Path) -> None:
    guarded = Guarded(AgentConfig(tmp_path / "s", tmp_path / "r"))
    first, second = asked("vda", tmp_path), asked("vdb", tmp_path)
    guarded._require_place(first)
    guarded.wanted[first.name] = first
    guarded._require_place(first)
    with pytest.raises(StateConflict, match="the socket of disk web/vda"):
        guarded._require_place(second)
    (tmp_path / "s").write_text("an image")
    with pytest.raises(StateConflict, match="is no socket"):
        guarded._require_place(first)


def test_one_that_fails_takes_no_directory_from_one_that_begins(tmp_path: Path) -> None:
    guarded = Guarded(AgentConfig(tmp_path / "state", tmp_path / "run"))
    begins, fails = asked("vda", tmp_path), asked("vdb", tmp_path)
    directory = guarded._files(begins).directory
    directory.mkdir(parents=True)
    guarded._guarding = {begins.name: begins, fails.name: fails}
    guarded._remove(fails)
    assert directory.is_dir()
    with pytest.raises(StateConflict, match="another manager"):
        guarded.require_no_vm("web")
    guarded._guarding = {}
    guarded._remove(begins)
    assert not directory.exists()
