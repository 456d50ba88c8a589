"""The guard of a real agent, asked over the API and by `semper guard`; the module is built for
real.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.server import serving
from sempervirt.core.errors import StateConflict
from sempervirt.evacuation.guarding import guarded
from sempervirt.guard.presets import Meaning
from sempervirt.guard.signs import SignId
from sempervirt.guard.state import Action, Phase
from sempervirt.guard.watch import Standing
from tests.guard.machine import KERNELS, available

DEADLINE_S = 90.0
PROGRAM = str(Path(sys.executable).with_name("semper"))


class Semper:
    """The command line with the directories of this test."""

    def __init__(self, config: AgentConfig) -> None:
        self._environment = {
            **os.environ,
            "SEMPERVIRT_STATE_DIR": str(config.state_dir),
            "SEMPERVIRT_RUN_DIR": str(config.run_dir),
            "COLUMNS": "200",
        }

    async def __call__(self, *words: str, code: int = 0) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            [PROGRAM, *words],
            capture_output=True,
            text=True,
            check=False,
            env=self._environment,
            timeout=DEADLINE_S * 4,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture
def semper(config: AgentConfig) -> Semper:
    return Semper(config)


@pytest.fixture
def operators(place: Path) -> Path:
    """An operator's presets: what this machine itself shows meanwhile moves nothing."""
    file = place / "guard.toml"
    signs = "\n".join(f'"{sign.value}" = "ignore"' for sign in SignId if not sign.of_module)
    file.write_text(f"version = 1\n[signs]\n{signs}\n")
    return file


@pytest.fixture
async def client(config: AgentConfig, agent: Agent, operators: Path) -> AsyncIterator[Client]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(agent, config.socket))
        await stack.enter_async_context(guarded(agent, operators))
        yield await stack.enter_async_context(Client.connect(config.socket))


async def test_the_guard_tells_how_it_stands(client: Client, operators: Path) -> None:
    view = await client.guard()
    assert view.phase is Phase.WATCHING
    assert view.presets == ["presets.toml", str(operators)]
    assert view.presets_trouble == ""
    assert {rule.sign for rule in view.rules} == set(SignId)
    names = {source.name for source in view.sources}
    assert {"module", "kernel log", "taint", "logind", "rasdaemon", "SMART"} <= names
    assert not view.module
    assert await client.guard_events() == []


async def test_the_module_is_absent_and_its_source_says_so(client: Client) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            sources = {one.name: one for one in (await client.guard()).sources}
            if sources["module"].standing is Standing.ABSENT:
                break
            await asyncio.sleep(0.02)  # poll interval
    why = sources["module"].why
    assert "semper guard install" in why or "there is no module for kernel" in why


async def test_to_simulate_does_nothing_and_to_act_evacuates(client: Client) -> None:
    told = await client.simulate_sign(SignId.MODULE_PANIC, act=False)
    assert [one.action for one in told.decisions] == [Action.EVACUATES]
    assert (await client.guard()).phase is Phase.WATCHING
    done = await client.simulate_sign(SignId.MODULE_PANIC, act=True)
    assert done.acted
    async with asyncio.timeout(DEADLINE_S):
        while (await client.guard()).phase is not Phase.EMPTY:  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # poll interval
    events = await client.guard_events()
    assert [one.action for one in events] == [Action.EVACUATES, Action.EVACUATED]
    assert all(one.simulated for one in events)
    assert events[-1].evidence == ["there was no VM to move"]


async def test_an_agent_of_a_command_guards_no_host(config: AgentConfig, agent: Agent) -> None:
    async with serving(agent, config.socket), Client.connect(config.socket) as client:
        with pytest.raises(StateConflict, match="started by a command"):
            await client.guard()


async def test_wrong_presets_are_told_and_the_shipped_ones_are_in_force(
    config: AgentConfig, agent: Agent, operators: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = 'version = 1\n[signs]\n"log.oops" = "panic"\n'
    await asyncio.to_thread(operators.write_text, text)
    async with (
        serving(agent, config.socket),
        guarded(agent, operators),
        Client.connect(config.socket) as client,
    ):
        view = await client.guard()
    rules = {rule.sign: rule.meaning for rule in view.rules}
    assert rules[SignId.LOG_OOPS] is Meaning.EVACUATE
    assert "signs.\"log.oops\": 'panic' is none of" in view.presets_trouble
    assert "'panic' is none of" in caplog.text


async def test_the_command_line_shows_it(client: Client, semper: Semper) -> None:
    del client
    shown = await semper("guard", "status", "--rules")
    assert "a panic of this kernel is the end of its VMs" in shown
    assert "module.panic" in shown
    assert json.loads(await semper("guard", "status", "--output", "json"))["phase"] == "watching"
    assert "nothing was seen" in await semper("guard", "events")
    simulated = await semper("guard", "simulate", "module.panic")
    assert "evacuates" in simulated
    assert "nothing was done" in simulated
    refused = await semper("guard", "simulate", "module.panick", code=2)
    assert 'did you mean "module.panic"?' in refused


async def test_all_that_is_missing_for_the_module_is_said(semper: Semper, place: Path) -> None:
    said = await semper(
        "guard", "install", "--check", "--no-load", "--release", "6.1.0-1-none",
        "--headers", str(place), "--source", str(place), "--output", "json", code=5,
    )  # fmt: skip
    # The refusal is a second document, on stderr.
    document: dict[str, Any] = json.JSONDecoder().raw_decode(said)[0]
    assert document["remedies"] == ["apt-get install linux-headers-6.1.0-1-none"]
    assert "there are no kernel headers" in document["missing"][0]


async def test_the_module_is_built_and_installed_for_another_kernel(
    semper: Semper, place: Path
) -> None:
    assert available(), "no kernels; run scripts/guard-kernels"
    series = available()[0]
    release = (KERNELS / series / "release").read_text().strip()
    modules = place / "lib/modules"
    (modules / release).mkdir(parents=True)
    said = await semper(
        "guard", "install", "--no-load", "--release", release,
        "--headers", str(KERNELS / series / "build"), "--modules", str(modules),
        "--output", "json",
    )  # fmt: skip
    document = json.loads(said)
    module = Path(document["module"])
    assert module == modules / release / "updates/semper_guard.ko"
    assert f"vermagic={release} ".encode() in await asyncio.to_thread(module.read_bytes)
    dependencies = await asyncio.to_thread((modules / release / "modules.dep").read_text)
    assert dependencies.startswith("updates/semper_guard.ko:")
    assert not document["loaded"]
