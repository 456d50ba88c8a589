"""Many disks in one agent: a real semperd, guests that have started every queue, and no I/O."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.core.errors import AgentUnavailable
from sempervirt.core.queue_map import counted
from sempervirt.demo.trial import BOOT_ATTEMPTS, emulator_died
from sempervirt.disk.state import Condition
from sempervirt.guest import ProbeClient, ProbeGone, ProbeSilent
from sempervirt.guest import image as guest_image
from sempervirt.qemu.spec import VmSpec

PROBE = "org.sempervirt.probe"
MIB = 1 << 20
IMAGE_BYTES = 16 * MIB
AGENT_START_S = 120.0
BOOT_S = 240.0
GUARDED_S = 240.0
POLL_S = 0.02


class FleetError(Exception):
    """The disks did not come up as they should; the message says what is missing."""


class FleetWarning(UserWarning):
    """A guest had to be booted again."""


@dataclass(frozen=True)
class Shape:
    """How many VMs, disks for each, and queues for each disk. Each VM has a vCPU for each queue."""

    vms: int
    disks: int
    queues: int
    memory_mib: int = 160

    def __str__(self) -> str:
        queues = counted(self.queues, "queue")
        return f"{self.disks_total} disks of {queues} in {self.vms} guests of {self.memory_mib} MiB"

    @property
    def disks_total(self) -> int:
        """Over all VMs."""
        return self.vms * self.disks

    @property
    def queues_total(self) -> int:
        """Over all disks."""
        return self.disks_total * self.queues


@dataclass(frozen=True)
class Fleet:
    """What runs. Seconds count from the first request to the agent."""

    shape: Shape
    agent_pid: int
    disks: list[DiskView]
    served_s: float
    guarded_s: float
    booted_s: float

    @property
    def pids(self) -> dict[str, list[int]]:
        """The processes by kind: backends that serve, spares that wait, the agent."""
        return {
            "backend": [disk.active_pid for disk in self.disks if disk.active_pid is not None],
            "spare": [disk.spare_pid for disk in self.disks if disk.spare_pid is not None],
            "agent": [self.agent_pid],
        }


@asynccontextmanager
async def running(shape: Shape, **disk_keys: Any) -> AsyncIterator[Fleet]:
    """Run a fleet for the duration of the block; keys of the VM file's disks as arguments.

    When the block begins each disk is guarded by a spare and each queue was started by its guest.
    Raises FleetError otherwise.
    """
    async with AsyncExitStack() as stack:
        # A short path: a socket's may have 107 bytes.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sf-", dir="/tmp")))
        agent = stack.enter_context(_agent(folder))
        client = await stack.enter_async_context(Client.connect(folder / "r" / "agent.sock"))
        await _wait_answer(client)
        stack.push_async_callback(_kill_all, client)
        start = time.monotonic()
        specs = [_spec(shape, number, folder, disk_keys) for number in range(shape.vms)]
        views = await asyncio.gather(*(client.run_vm(spec) for spec in specs))
        served_s = time.monotonic() - start
        await _wait_guarded(client, shape)
        guarded_s = time.monotonic() - start
        for view in views:
            await _boot(client, view)
        booted_s = time.monotonic() - start
        await _wait_guarded(client, shape)
        disks = [await client.disk(disk.name) for disk in await client.disks()]
        _demand_queues(shape, disks)
        yield Fleet(shape, agent.pid, disks, served_s, guarded_s, booted_s)


@contextmanager
def _agent(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = str(Path(sys.executable).with_name("semperd"))
    argv = [program, f"--state-dir={folder / 's'}", f"--run-dir={folder / 'r'}"]
    with (folder / "semperd.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


async def _wait_answer(client: Client) -> None:
    async with asyncio.timeout(AGENT_START_S):
        while True:
            try:
                await client.agent()
            except AgentUnavailable:
                await asyncio.sleep(POLL_S)
            else:
                return


async def _kill_all(client: Client) -> None:
    for vm in await client.vms():
        await client.kill_vm(vm.name)


def _spec(shape: Shape, number: int, folder: Path, disk_keys: dict[str, Any]) -> VmSpec:
    guest = guest_image()
    disks = []
    for index in range(shape.disks):
        image = folder / f"{number}-{index}.raw"
        image.touch()
        os.truncate(image, IMAGE_BYTES)
        name = f"d{index}"
        disks.append({"name": name, "image": str(image), "queues": shape.queues, **disk_keys})
    return VmSpec.model_validate(
        {
            "name": f"vm{number}",
            "memory": f"{shape.memory_mib}M",
            "vcpus": shape.queues,
            "kernel": str(guest.kernel),
            "initrd": str(guest.initrd),
            "cmdline": guest.cmdline,
            "disks": disks,
            "channels": [{"name": PROBE}],
        }
    )


async def _wait_guarded(client: Client, shape: Shape) -> None:
    deadline = time.monotonic() + GUARDED_S
    while True:
        conditions = [disk.condition for disk in await client.disks()]
        if conditions.count(Condition.GUARDED) == shape.disks_total:
            return
        if time.monotonic() > deadline:
            words = sorted({found.value for found in conditions})
            raise FleetError(f"{GUARDED_S:.0f} s later the disks are {words}")
        await asyncio.sleep(POLL_S)


async def _boot(client: Client, vm: VmView, attempts: int = BOOT_ATTEMPTS) -> None:
    """Raises FleetError.

    QEMU's emulator of several processors falls over in some boots (`emulator_died`), and in rarer
    ones its guest stands still. If none of the guest's disks owes it anything it is booted again,
    with a warning.
    """
    try:
        async with await ProbeClient.connect(vm.channels[PROBE], deadline_s=BOOT_S) as probe:
            await probe.wait_hello(deadline_s=BOOT_S)
    except (ProbeGone, ProbeSilent) as error:
        vm = await client.vm(vm.name)
        queues = [queue for disk in await _disks_of(client, vm) for queue in _queues_of(disk)]
        owed = sum(queue["in_flight"] for queue in queues)
        kicks, started = (sum(queue[name] for queue in queues) for name in ("kicks", "enabled"))
        said = vm.console.with_suffix(".log").read_text(errors="replace")[-1000:]
        told = (
            f"{vm.name} ({vm.accelerator}) did not boot: {error}; of its {len(queues)} queues "
            f"{started} are started, with {kicks} wake-ups and {owed} requests in flight; it "
            f"said:\n{said}"
        )
        stands = vm.end is None and vm.accelerator == "tcg" and not owed
        died = emulator_died(vm.accelerator, vm.end.signal if vm.end else None)
        if attempts == 1 or not (stands or died):
            raise FleetError(told) from error
        warnings.warn(told, FleetWarning, stacklevel=2)
        if vm.end is None:
            await client.kill_vm(vm.name)
        await client.forget_vm(vm.name)
        assert vm.spec is not None
        await _boot(client, await client.run_vm(vm.spec), attempts - 1)


async def _disks_of(client: Client, vm: VmView) -> list[DiskView]:
    names = [disk.name for disk in await client.disks()]
    return [await client.disk(name) for name in names if name.startswith(f"{vm.name}/")]


def _queues_of(disk: DiskView) -> list[dict[str, Any]]:
    return list(disk.backend["queues"]) if disk.backend else []


def _demand_queues(shape: Shape, disks: list[DiskView]) -> None:
    for disk in disks:
        started = sum(queue["enabled"] for queue in _queues_of(disk))
        if started != shape.queues:
            raise FleetError(f"{disk.name} has {started} queues started, not {shape.queues}")
