"""What a user of the host can do to a VM's disk who may read its image: hold a lock on it.

The kernel gives read locks to whoever may read, and no backend that writes can have its own beside
some of those. So nobody else may read an image, and `semper host audit` says where that is not so.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.cli.audit import audit
from sempervirt.core.errors import SempervirtError
from sempervirt.disk.answers import Status
from sempervirt.disk.backend import PROGRAM, Blkd
from sempervirt.host.control import ControlSocket
from sempervirt.host.exposure import readers
from sempervirt.host.places import Places
from sempervirt.qemu.accel import Accelerator
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.record import VmRecord, record_path

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user"),
]
NOBODY = 65534
DEADLINE_S = 90.0
IN_USE = 3
GATE = 0x5356
# Bytes of QEMU that our backend looks at, by its name for them (crates/block/src/lock.rs).
SPOILT = {"used: write": 101, "used: resize": 103, "unshared: read": 200, "unshared: write": 201}
# Holds a read lock on a byte of a file, and says so.
OUTSIDER = """
import fcntl, os, struct, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, int(sys.argv[2]), 1, 0)
fcntl.fcntl(file, 37, lock)  # F_OFD_SETLK
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def image(place: Path) -> Path:
    """An image that everybody may read, as a careless administrator has it."""
    path = place / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0o644)
    place.chmod(0o755)
    return path


@contextmanager
def outsider(image: Path, byte: int) -> Iterator[str]:
    """Another user with a read lock on a byte of the image; what that process says of it."""
    command = ["/usr/bin/python3", "-c", OUTSIDER, str(image), str(byte)]
    with subprocess.Popen(
        command,
        user=NOBODY,
        group=NOBODY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            yield process.stdout.readline().strip() or process.stderr.read()
        finally:
            process.kill()


class Backend:
    """A process of semper-blkd."""

    def __init__(self, process: subprocess.Popen[str], control: Path) -> None:
        self.process = process
        self._control = ControlSocket(control, PROGRAM)

    async def wait_standing(self, standing: str) -> None:
        """Waits for how it stands to the image; fails when the process has ended."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                assert self.process.poll() is None, await self.refusal()
                try:
                    if (await self._control.ask_for(Status, "status")).standing.value == standing:
                        return
                except SempervirtError:
                    pass  # it does not listen yet
                await asyncio.sleep(0.02)  # poll interval

    async def refusal(self) -> str:
        """Why it has ended, which it has to do."""
        code = await asyncio.to_thread(self.process.wait, DEADLINE_S)
        assert self.process.stderr is not None
        said = await asyncio.to_thread(self.process.stderr.read)
        return f"{code}: {said}"


@asynccontextmanager
async def backend(image: Path, number: int, *options: str) -> AsyncIterator[Backend]:
    """One of the image; killed in the end."""
    control = image.with_name(f"control-{number}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(image.with_name(f"front-{number}")))
        listener.listen()
        argv = [
            Blkd().binary(),
            f"--fd={listener.fileno()}",
            f"--blk-file={image}",
            f"--control-socket={control}",
            *options,
        ]
        process = subprocess.Popen(  # noqa: ASYNC220
            argv, pass_fds=[listener.fileno()], stderr=subprocess.PIPE, text=True
        )
        try:
            yield Backend(process, control)
        finally:
            process.kill()
            process.wait()


@asynccontextmanager
async def active_and_spare(image: Path) -> AsyncIterator[tuple[Backend, Backend]]:
    """One that serves the image, and one that was begun when it did, and waits."""
    async with backend(image, 1) as serving:
        await serving.wait_standing("held")
        async with backend(image, 2, "--spare") as spare:
            await spare.wait_standing("waiting")
            yield serving, spare


def audited(image: Path) -> list[str]:
    """What the audit of a host with a VM of that image says of it."""
    places = Places(image.parent / "s", image.parent / "r")
    directory = places.vm_state_dir("web")
    directory.mkdir(parents=True, exist_ok=True)
    disk = {"name": "root", "image": str(image)}
    spec = VmSpec.model_validate({"name": "web", "disks": [disk]})
    VmRecord(spec, Accelerator("tcg", ""), 1.0).write(record_path(directory))
    return [one.finding for one in audit(places).images]


@pytest.mark.parametrize("byte", [GATE, *SPOILT.values()])
async def test_an_outsider_who_may_read_an_image_keeps_its_vm_from_starting(
    image: Path, byte: int
) -> None:
    with outsider(image, byte) as said:
        assert said == "held"
        async with backend(image, 1) as refused:
            why = await refused.refusal()
        assert why.startswith(f"{IN_USE}: ")
        assert "is in use by python3" in why  # so it is told who
    async with backend(image, 2) as serving:
        await serving.wait_standing("held")


@pytest.mark.parametrize("byte", SPOILT.values())
async def test_and_the_spare_of_one_that_runs_from_taking_over(image: Path, byte: int) -> None:
    async with active_and_spare(image) as (serving, spare):
        with outsider(image, byte) as said:
            assert said == "held"
            serving.process.kill()
            assert (await spare.refusal()).startswith(f"{IN_USE}: ")


async def test_what_the_audit_asks_for_keeps_outsiders_away(image: Path) -> None:
    (finding,) = audited(image)
    assert finding.startswith("everybody may read it, and whoever reads it may lock it")
    assert f"chmod o-r,g-r {image}" in finding
    subprocess.run(["chmod", "o-r,g-r", image], check=True)  # noqa: ASYNC221
    assert audited(image) == []
    async with active_and_spare(image) as (serving, spare):
        for byte in (GATE, *SPOILT.values()):
            with outsider(image, byte) as said:
                assert "Permission denied" in said
        serving.process.kill()
        await spare.wait_standing("held")


def test_a_directory_above_that_is_closed_does_as_well(image: Path) -> None:
    assert readers(image) == ["everybody"]
    image.parent.chmod(0o700)
    assert readers(image) == []
    image.parent.chmod(0o755)
    image.chmod(0o640)
    os.chown(image, 0, NOBODY)
    (said,) = readers(image)
    assert said.startswith("the group ")
    assert "nobody" in said
    os.chown(image, NOBODY, 0)  # whose only member is root
    assert readers(image) == []
    image.unlink()
    assert readers(image) == []


def chmod(modes: Mapping[Path, int]) -> None:
    for path, mode in modes.items():
        path.chmod(mode)


async def test_who_runs_a_vm_is_told_at_its_start(
    agent: Agent, firmware_spec: Callable[..., VmSpec], disk_image: Path, place: Path
) -> None:
    chmod({place: 0o755, disk_image: 0o644})
    vm = await agent.run_vm(firmware_spec())
    (said,) = [event.message for event in vm.machine.journal.events if event.kind == "image"]
    assert said.startswith(f"image {disk_image}: everybody may read it")
    await vm.kill()
    chmod({disk_image: 0o600})
    vm = await agent.run_vm(firmware_spec())
    assert [event for event in vm.machine.journal.events if event.kind == "image"] == []
