"""`semper host down`, whatever the agent and the guests do meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sempervirt.api.client import Client
from sempervirt.cli.down import _Leaving
from sempervirt.core.errors import AgentUnavailable, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate


class Host:
    """VMs, and what the agent answers to those that ask it for an end."""

    def __init__(self, **vms: Runstate) -> None:
        self.running = dict(vms)
        self.wishes: dict[str, str] = {}
        self.moving: set[str] = set()
        self.dies_at: set[str] = set()
        self.absent = 0
        self.asked: list[str] = []

    async def vms(self) -> list[Any]:
        if self.absent:
            self.absent -= 1
            raise AgentUnavailable("no agent answers")
        return [
            SimpleNamespace(
                name=name,
                state=state,
                end=None,
                spec=VmSpec.model_validate(
                    {"name": name, "on_host_shutdown": self.wishes.get(name, "power-off")}
                ),
                migration=SimpleNamespace(over=False) if name in self.moving else None,
            )
            for name, state in self.running.items()
        ]

    async def stop_vm(self, name: str, _grace_s: float) -> Any:
        self.asked.append(f"stop {name}")
        if name in self.dies_at:
            self.dies_at.remove(name)
            self.absent = 2
            raise OutcomeUnknown("the agent stopped answering")
        if self.running[name] is not Runstate.RUNNING or name in self.moving:
            raise StateConflict(f"VM {name} cannot be asked")
        del self.running[name]
        return SimpleNamespace(state=Runstate.STOPPED, why="it powered off")

    async def save_vm(self, name: str, _file: object) -> Any:
        self.asked.append(f"save {name}")
        self.running[name] = Runstate.PAUSED
        await asyncio.Event().wait()

    async def kill_vm(self, name: str) -> Any:
        self.asked.append(f"kill {name}")
        del self.running[name]


async def left(host: Host, monkeypatch: pytest.MonkeyPatch, deadline_s: float = 60) -> list[str]:
    monkeypatch.setattr("sempervirt.cli.down.POLL_S", 0.01)
    leaving = _Leaving(cast(Client, host), deadline_s, 0.05, json=True)
    return await leaving.run(clustered=False)


async def test_guests_that_can_be_asked_are_asked_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host(a=Runstate.RUNNING, b=Runstate.RUNNING)
    assert await left(host, monkeypatch) == []
    assert sorted(host.asked) == ["stop a", "stop b"]
    assert await left(Host(), monkeypatch) == []


async def test_an_agent_that_ends_meanwhile_is_followed_by_one_that_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host(a=Runstate.RUNNING, b=Runstate.RUNNING)
    host.dies_at = {"a"}
    assert await left(host, monkeypatch) == []
    assert host.asked.count("stop a") == 2
    monkeypatch.setattr("sempervirt.cli.down.PATIENCE_S", 0.0)
    gone = Host(a=Runstate.RUNNING)
    gone.absent = 99
    with pytest.raises(Unavailable, match="no agent"):
        await left(gone, monkeypatch)


async def test_who_cannot_be_asked_is_ended_and_who_moves_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = Host(
        paused=Runstate.PAUSED,
        panicked=Runstate.HALTED,
        unknown=Runstate.UNKNOWN,
        moving=Runstate.RUNNING,
        saving=Runstate.RUNNING,
    )
    host.wishes, host.moving = {"saving": "save"}, {"moving"}
    assert await left(host, monkeypatch, 1.5) == ["unknown", "moving"]
    assert {"kill paused", "kill panicked", "kill saving"} <= {*host.asked}
