"""A host goes down and comes up: what its VMs' files say is done with them."""

from __future__ import annotations

import asyncio
import grp
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.peers import LocalProtocol, SharedProtocol
from sempervirt.api.server import serving
from sempervirt.cli.program import app
from sempervirt.core.errors import StateConflict
from sempervirt.host.places import RUN_VARIABLE, STATE_VARIABLE
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.vm.autostart import Settled, is_idle, kept_state, start_all
from tests.integration.conftest import Spec


def semper(config: AgentConfig, *words: str) -> tuple[int, str]:
    places = {STATE_VARIABLE: str(config.state_dir), RUN_VARIABLE: str(config.run_dir)}
    ended = CliRunner().invoke(app, [*words], env=places)
    return ended.exit_code, ended.output


async def test_vms_end_as_their_files_say_and_are_there_again(
    config: AgentConfig, firmware_spec: Spec
) -> None:
    def named(name: str, wish: str, priority: int, *, autostart: bool = True) -> VmSpec:
        ha = {"priority": priority}
        return firmware_spec(name=name, on_host_shutdown=wish, ha=ha, autostart=autostart, disks=[])

    async with Agent.open(config) as agent, serving(agent, config.socket):
        for spec in (
            named("db", "save", 90),
            named("web", "move", 50),  # to nowhere: this host has no cluster
            named("play", "power-off", 10, autostart=False),
        ):
            await agent.run_vm(spec)
        shown = await asyncio.to_thread(semper, config, "host", "down", "--dry-run")
        assert [shown[1].index(name) for name in ("play", "web", "db")] == sorted(
            shown[1].index(name) for name in ("play", "web", "db")
        )
        # The firmware does not hear of it, so both are ended after their time.
        code, said = await asyncio.to_thread(semper, config, "host", "down", "--grace", "0.2")
        assert code == 0, said
        assert "db is saved" in said
        assert all(vm.freed for vm in agent.vms.values())
        assert agent.vms["play"].machine.journal.events[-1].time < (
            agent.vms["web"].machine.journal.events[-1].time
        )
        assert kept_state(config.state_dir, "db").exists()
    async with Agent.open(config) as agent:  # the host is up again
        known = lambda: [  # noqa: E731
            (vm.spec, is_idle(vm.record, freed=vm.freed)) for vm in agent.vms.values()
        ]
        failed = await start_all(known, agent.start_vm, Settled(config.state_dir, "next"))
        assert not failed
        assert agent.vm("web").run is agent.vm("db").run is Runstate.RUNNING
        assert any(event.kind == "restore" for event in agent.vm("db").machine.journal.events)
        assert not kept_state(config.state_dir, "db").exists()
        assert agent.vm("play").freed


async def test_a_known_vm_is_started_again_and_a_state_that_cannot_be_is_not_lost(
    agent: Agent, firmware_spec: Spec
) -> None:
    spec = firmware_spec()
    await agent.run_vm(spec)
    with pytest.raises(StateConflict, match="running"):
        await agent.start_vm("web")
    await agent.kill_vm("web")
    assert (await agent.start_vm("web")).run is Runstate.RUNNING
    kept = kept_state(agent.config.state_dir, "web")
    kept.parent.mkdir()
    await agent.save_vm("web", kept)
    image = spec.disks[0].image
    image.write_bytes(b"somebody has written to it".ljust(32 << 20))
    with pytest.raises(StateConflict) as refused:
        await agent.start_vm("web")
    assert f"rm {kept}" in str(refused.value)
    assert kept.exists()
    await agent.run_vm(spec)  # which says to boot
    assert not kept.exists()
    await agent.vm("web").kill()


async def test_a_user_who_may_not_ask_is_told_how_to_become_one_who_may(
    config: AgentConfig, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user without a right; the control is a member of the group, who has bounds."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    nobody, group = 65534, grp.getgrgid(1)
    config.run_dir.parent.chmod(0o755)
    monkeypatch.setattr("sempervirt.api.server.share_with_group", _share_with(group.gr_name))
    async with serving(agent, config.socket):
        refused = await asyncio.to_thread(_ask_as, config.socket, nobody, nobody)
        assert "usermod -aG sempervirt nobody" in refused
        assert await asyncio.to_thread(_ask_as, config.socket, nobody, group.gr_gid) == "0 VMs\n"
        assert "nobody names a program" in await asyncio.to_thread(
            _ask_as, config.socket, nobody, group.gr_gid, "/tmp/program"
        )


def _share_with(group: str) -> object:
    from sempervirt.host.sockets import share_with_group

    return lambda path: share_with_group(path, group)


_ASKING = """
import asyncio, os, sys
from pathlib import Path
from sempervirt.api.client import Client
from sempervirt.core.errors import NotAllowed

async def ask(socket, program):
    async with Client.connect(Path(socket)) as client:
        try:
            if program:
                await client.restart_qemu("none", Path(program))
            print(len(await client.vms()), "VMs")
        except NotAllowed as error:
            print(error)

os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
asyncio.run(ask(sys.argv[3], sys.argv[4]))
"""


def _ask_as(socket: Path, uid: int, gid: int, program: str = "") -> str:
    """What a client of that user is told."""
    argv = [sys.executable, "-c", _ASKING, str(uid), str(gid), str(socket), program]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_only_a_socket_of_a_group_takes_others_in() -> None:
    assert SharedProtocol.shared
    assert not LocalProtocol.shared
