"""What tests with real processes share: short directories, images, agents, VM descriptions."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.disk.supervised import Policy
from sempervirt.guest import image as guest_image
from sempervirt.host.procfs import find_by_argument
from sempervirt.vm.link import Patience
from sempervirt.vm.spec import VmSpec

MIB = 1 << 20
Spec = Callable[..., VmSpec]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for unix sockets. No process may outlive the test."""
    directory = Path(tempfile.mkdtemp(prefix="sv-", dir="/tmp"))
    try:
        yield directory
    finally:
        left = find_by_argument(re.compile(rf".*{re.escape(str(directory))}/.*"))
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
    assert not left, f"processes were left behind: {left}"


@pytest.fixture
def disk_image(place: Path) -> Path:
    """A raw image of 32 MiB."""
    path = place / "disk.raw"
    path.touch()
    os.truncate(path, 32 * MIB)
    return path


@pytest.fixture
def config(place: Path) -> AgentConfig:
    """An agent of this test alone; its monitors count as silent after 3 s."""
    patience = Patience(connect_s=3, command_s=3, heartbeat_s=1)
    return AgentConfig(place / "s", place / "r", policy=Policy(), patience=patience)


@pytest.fixture
async def agent(config: AgentConfig) -> AsyncIterator[Agent]:
    """An open agent; it kills its VMs at the end."""
    async with Agent.open(config) as opened:
        yield opened


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
