"""Two agents of this machine: the guard of one decides, and its VM goes on with the other.

The guest is the counter of the guard's trial, which is there within a second.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from lab.etcd import Etcd
from lab.ports import free_address
from sempervirt.agent import AgentConfig
from sempervirt.api.client import Client
from sempervirt.cluster.cluster import Cluster, begin_cluster
from sempervirt.cluster.joining import join_cluster
from sempervirt.demo.guard import counter
from sempervirt.demo.guard.counter import Count
from sempervirt.guard.signs import SignId
from sempervirt.guard.state import Action, Phase
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.setup import prepare_directories

DEADLINE_S = 120.0
SERVES = "serve hosts"
COUNTS = 10
# What this machine itself shows meanwhile is not to move anything.
SIGNS = "".join(f'"{sign.value}" = "ignore"\n' for sign in SignId if not sign.of_module)
PRESETS = f"version = 1\n[signs]\n{SIGNS}[evacuation]\nretry_after_s = 1\n"


class Host:
    """An agent in a process of its own."""

    def __init__(self, place: Path, name: str) -> None:
        self.place, self.name = place, name
        self.config = AgentConfig(place / name / "s", place / name / "r")
        self.log = place / f"{name}.log"
        prepare_directories(self.config)

    @contextmanager
    def running(self) -> Iterator[None]:
        environment = {
            **os.environ,
            "SEMPERVIRT_STATE_DIR": str(self.config.state_dir),
            "SEMPERVIRT_RUN_DIR": str(self.config.run_dir),
            "SEMPERVIRT_IMAGE_ROOTS": str(self.place),
        }
        program = str(Path(sys.executable).with_name("semperd"))
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                [program, "--guard-presets", str(self.place / "guard.toml")],
                stderr=output,
                env=environment,
            )
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def console(self) -> Path | None:
        """Where the guest speaks, if it is here."""
        for folder in (self.config.vm_run_dir("web"), self.config.vm_state_dir("web")):
            path = folder / "console.log"
            if path.exists():
                return path
        return None

    def said(self) -> str:
        """What the guest has said here."""
        with suppress(FileNotFoundError):  # gone with the guest
            if (path := self.console()) is not None:
                return path.read_text(errors="replace")
        return ""

    def counts(self) -> list[Count]:
        return counter.read(self.said())


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up, what
        await asyncio.sleep(0.02)  # poll interval


@pytest.fixture
async def hosts(place: Path) -> AsyncIterator[tuple[Host, Host]]:
    (place / "guard.toml").write_text(PRESETS)
    (place / "counter.raw").write_bytes(counter.disk())
    a, b = Host(place, "a"), Host(place, "b")
    async with AsyncExitStack() as stack:
        etcd = stack.enter_context(Etcd.running())
        await begin_cluster(a.config, "trial", "a", free_address(), [etcd.url])
        stack.enter_context(a.running())
        await until(lambda: SERVES in a.log.read_text(), "a serves")
        async with Cluster.opened(a.config) as cluster:
            invitation = await cluster.invite("b", timedelta(hours=1))
        await join_cluster(b.config, invitation, free_address())
        stack.enter_context(b.running())
        await until(lambda: SERVES in b.log.read_text(), "b serves")
        yield a, b
        for host in (a, b):
            async with Client.connect(host.config.socket) as client:
                for vm in await client.vms():
                    await client.kill_vm(vm.name)


async def test_what_the_guard_decides_moves_the_vm_which_skips_nothing(
    hosts: tuple[Host, Host],
) -> None:
    a, b = hosts
    disk = {"name": "root", "image": str(a.place / "counter.raw"), "read_only": True}
    web = {"name": "web", "memory": "64M", "machine": "pc", "disks": [disk]}
    async with Client.connect(a.config.socket) as client:
        await client.run_vm(VmSpec.model_validate(web))
        await until(lambda: len(a.counts()) >= COUNTS, "the guest counts on a")
        console = a.console()
        assert console is not None
        told = await client.simulate_sign(SignId.MODULE_PANIC, act=False)
        assert [one.action for one in told.decisions] == [Action.EVACUATES]
        # The log goes with the VM, once that is elsewhere; who has it open can read all of it.
        with console.open(errors="replace") as log:
            await client.simulate_sign(SignId.MODULE_PANIC, act=True)
            await until(
                lambda: len(b.counts()) >= COUNTS,
                f"the guest counts on b\n{a.log.read_text()}\n{b.log.read_text()}",
            )
            assert counter.lost(log.read(), b.said()) == ""
        give_up = time.monotonic() + DEADLINE_S
        while (view := await client.guard()).phase is not Phase.EMPTY:
            assert time.monotonic() < give_up, view.phase
            await asyncio.sleep(0.02)  # poll interval
        events = await client.guard_events()
        assert [one.action for one in events] == [Action.EVACUATES, Action.EVACUATED]
        assert events[-1].evidence == ["moved: web"]
