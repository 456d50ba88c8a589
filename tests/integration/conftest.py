"""What tests with real processes share: short directories, images, agents, VM descriptions."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.layers import laid
from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.core.errors import AgentUnavailable
from sempervirt.disk.backend import Blkd
from sempervirt.disk.state import Policy
from sempervirt.guest import image as guest_image
from sempervirt.host.procfs import find_by_argument
from sempervirt.qemu.link import Patience
from sempervirt.qemu.spec import VmSpec
from tests.faults import trial_backend

MIB = 1 << 20
AGENT_START_S = 120.0
# A process that was killed is there until all of its threads have come to that.
ENDING_S = 10.0
Spec = Callable[..., VmSpec]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for unix sockets. No process may outlive the test."""
    directory = Path(tempfile.mkdtemp(prefix="sv-", dir="/tmp"))
    directory.chmod(0o711)  # users of VMs go through
    try:
        yield directory
    finally:
        pattern = re.compile(rf".*{re.escape(str(directory))}/.*", re.DOTALL)
        give_up = time.monotonic() + ENDING_S
        while (left := find_by_argument(pattern, of_all=True)) and time.monotonic() < give_up:
            time.sleep(0.05)  # poll interval
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"processes were left behind: {left}"


@pytest.fixture
def disk_image(place: Path) -> Path:
    """A raw image of 32 MiB."""
    path = place / "disk.raw"
    path.touch()
    os.truncate(path, 32 * MIB)
    return laid(path)


@pytest.fixture
def patience() -> Patience:
    """Of agents with QEMUs on a busy machine; `soon_silent` is for tests of silence."""
    return Patience(connect_s=30, command_s=30, heartbeat_s=1)


@pytest.fixture
def config(place: Path, patience: Patience) -> AgentConfig:
    """An agent of this test alone."""
    return AgentConfig(place / "s", place / "r", policy=Policy(), patience=patience)


@pytest.fixture
async def agent(config: AgentConfig) -> AsyncIterator[Agent]:
    """An open agent; it kills its VMs at the end."""
    async with Agent.open(config) as opened:
        yield opened


@pytest.fixture
async def faulty_agent(config: AgentConfig) -> AsyncIterator[Agent]:
    """As `agent`, with backends that `tests.faults.inject_fault` can have fail."""
    backend = Blkd(await asyncio.to_thread(trial_backend))
    async with Agent.open(replace(config, backend=backend)) as opened:
        yield opened


@pytest.fixture
def semperd(config: AgentConfig) -> Callable[[], AbstractAsyncContextManager[Any]]:
    """Makes a real agent process, which has answered; killed when its block is left."""

    @asynccontextmanager
    async def run() -> AsyncIterator[subprocess.Popen[bytes]]:
        program = str(Path(sys.executable).with_name("semperd"))
        argv = [program, f"--state-dir={config.state_dir}", f"--run-dir={config.run_dir}"]
        with (config.run_dir.parent / "semperd.log").open("ab") as log:
            process = subprocess.Popen(argv, stderr=log)  # noqa: ASYNC220
        try:
            await _answers(config.socket)
            yield process
        finally:
            process.kill()
            process.wait()

    return run


async def _answers(socket: Path) -> None:
    async with Client.connect(socket) as client, asyncio.timeout(AGENT_START_S):
        while True:
            try:
                await client.agent()
            except AgentUnavailable:
                await asyncio.sleep(0.05)  # poll interval
            else:
                return


@pytest.fixture
def firmware_spec(disk_image: Path) -> Spec:
    """A VM that gets no further than its firmware; keys of the VM file as arguments."""

    def make(**keys: Any) -> VmSpec:
        disk = {"name": "root", "image": str(disk_image)}
        return VmSpec.model_validate({"name": "web", "memory": "64M", "disks": [disk], **keys})

    return make


@pytest.fixture
def guest_spec(disk_image: Path) -> Spec:
    """A VM that boots the test guest; keys of its one disk as arguments."""

    def make(**disk: Any) -> VmSpec:
        guest = guest_image()
        return VmSpec.model_validate(
            {
                "name": "web",
                "memory": "256M",
                "kernel": str(guest.kernel),
                "initrd": str(guest.initrd),
                "cmdline": "console=ttyS0 quiet",
                "disks": [{"name": "root", "image": str(disk_image), **disk}],
                "channels": [{"name": "org.sempervirt.probe"}],
            }
        )

    return make
