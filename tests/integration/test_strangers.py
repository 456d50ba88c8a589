"""What strangers and local users could do to an agent, with the attacks as they succeeded once."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.etcd import Etcd
from lab.ports import free_address
from sempervirt.api.client import Client
from sempervirt.cluster.cluster import begin_cluster
from sempervirt.core.errors import SempervirtError
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.config import AgentConfig
from tests.integration.test_hosts import Served, served

DEADLINE_S = 180.0
STRANGERS = 1_100
Spec = Callable[..., VmSpec]


@pytest.fixture
def etcd() -> Iterator[Etcd]:
    with Etcd.running() as server:
        yield server


@pytest.fixture
async def first(place: Path, etcd: Etcd) -> AsyncIterator[Served]:
    config = AgentConfig(place / "s", place / "r")
    config.state_dir.mkdir(parents=True)
    await begin_cluster(config, "lab", "a", free_address(), [etcd.url])
    async with served(config) as host:
        yield host


async def is_answered(host: Served) -> bool:
    tls = host.cluster.identity.client_context()
    try:
        async with Client.connect_host(host.address, "a", tls) as client:
            await client.agent()
    except SempervirtError:
        return False
    return True


async def test_eleven_hundred_who_say_nothing_stop_neither_the_api_nor_supervision(
    first: Served,
) -> None:
    """They ended the API, and nobody supervised anything for a minute."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    host, _, port = first.address.rpartition(":")
    turns, over = 0, asyncio.Event()

    async def supervise() -> None:
        """As the agent's loop does, in which this test is."""
        nonlocal turns
        while not over.is_set():
            turns += 1
            await asyncio.sleep(0.01)  # poll interval

    supervising = asyncio.create_task(supervise())
    with ExitStack() as stack:
        for _ in range(STRANGERS):
            stranger = stack.enter_context(socket.socket())
            stranger.setblocking(False)
            stranger.connect_ex((host, int(port)))
        before = turns
        # They hold the places of their address for as long as TLS may take, and no longer.
        async with asyncio.timeout(DEADLINE_S):
            while not await is_answered(first):  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # poll interval
            while turns < before + 10:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # poll interval
    over.set()
    await supervising


def _is_open(path: Path, users: set[int]) -> bool:
    """Whether anybody else than the agent and the users of its VMs gets at it. A directory that can
    only be gone through shows nothing.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:  # a record that was being written
        return False
    allowed = 0o070 if status.st_gid in users else 0
    if stat.S_ISDIR(status.st_mode):
        allowed |= 0o011
    return bool(status.st_mode & 0o077 & ~allowed)


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root is no other user to an agent")
async def test_no_other_user_reads_what_an_agent_writes_whatever_its_umask(
    place: Path, firmware_spec: Spec
) -> None:
    """Records with kernel command lines were 0644."""
    config = AgentConfig(place / "s", place / "r")
    program = str(Path(sys.executable).with_name("semperd"))
    argv = [program, f"--state-dir={config.state_dir}", f"--run-dir={config.run_dir}"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(argv, stderr=log, umask=0)  # noqa: ASYNC220
    try:
        async with Client.connect(config.socket) as client, asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await client.agent()
                except SempervirtError:
                    await asyncio.sleep(0.05)  # poll interval
                else:
                    break
            await client.run_vm(firmware_spec())
            found = [*config.state_dir.rglob("*"), *config.run_dir.rglob("*")]
            names = {path.name for path in found}
            assert {"vm.json", "qemu.log", "console.log", "qmp.sock"} <= names
            users = {int(path.name) for path in (config.state_dir / "users").iterdir()}
            open_to_others = {
                str(path): oct(path.lstat().st_mode) for path in found if _is_open(path, users)
            }
            assert open_to_others == {}
            await client.kill_vm("web")
    finally:
        process.kill()
        process.wait()
