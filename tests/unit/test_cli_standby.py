"""A switchover goes where the standbys are, with the VM's own memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.cli import migrate, standby, vm
from sempervirt.cli.output import Output


@pytest.mark.parametrize(
    ("kept", "asked"),
    [("here", ["restart web"]), ("b", ["web to b"]), ("", ["restart web"])],
)
def test_a_switchover_goes_where_the_standbys_are(
    monkeypatch: pytest.MonkeyPatch, kept: str, asked: list[str]
) -> None:
    """On this host, on another one, or on one that belongs to no cluster."""
    done: list[str] = []

    class Client:
        """Of the agent of the VM's host."""

        async def standbys(self) -> list[Any]:
            names = ["db", "web"] if kept == "here" else ["db"]
            return [SimpleNamespace(vm=name) for name in names]

        async def standby(self, _name: str) -> Any:
            assert kept != "here"
            return SimpleNamespace(host=kept)

    monkeypatch.setattr(standby, "ask_agent", lambda ask: asyncio.run(ask(Client())))
    monkeypatch.setattr(
        migrate, "migrate", lambda name, *, to, output: done.append(f"{name} to {to}")
    )
    monkeypatch.setattr(vm, "restart_qemu", lambda name, *, output: done.append(f"restart {name}"))
    standby.switchover("web", Output.TABLE)
    assert done == asked
