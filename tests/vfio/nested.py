"""A guest in a guest: QEMU with a stock Linux inside of the emulated host, on a real PCI device.

    this process ──TCP──► bridge ──► QMP, mediators, probe     in the emulated host
    LeavingDevices, ArrivingDevices: as agents have them        QEMU ── semper-vfiod ── nvme, twice

    python -m tests.vfio.nested [--moves N] [--player-moves N]

Everything is emulated twice, so a boot takes minutes; what is shown is that it works, and no time.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.guest import NEWER_QEMU, NVME
from lab.plain_qemu import wait_running
from lab.ports import free_port
from sempervirt.core.errors import SempervirtError
from sempervirt.guest import ProbeClient
from sempervirt.guest import image as guest_image
from sempervirt.guest.reports import Stats
from sempervirt.host.programs import find_program
from sempervirt.migration import stream
from sempervirt.passthrough.arriving import ArrivingDevices
from sempervirt.passthrough.client import MediatorClient
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.leaving import LeavingDevices
from sempervirt.passthrough.mediator import DeviceFiles, DeviceSetup, PciOptions
from sempervirt.passthrough.ports import PortSpace
from sempervirt.qemu.command_line import (
    DeviceSockets,
    device_slot,
    passthrough_arguments,
    shim_slot,
)
from sempervirt.qemu.qmp import Monitor
from sempervirt.qemu.spec import PciSpec
from tests.guard.machine import ROOT, Image
from tests.vfio.outer import CONTROLLERS, Outer, build

MODULES = ("failover", "net_failover", "virtio_net")
QEMU_TREE = ROOT / ".cache/qemu/root"
MEMORY = "128M"
BOOT_S = 1500.0
STEP_S = 120.0
MOVE_S = 600.0
WAY = Path("/tmp/stream")
LOAD: dict[str, Any] = {"writers": 2, "span_bytes": 1 << 20, "flush_every": 16}
SOCKETS = ("qmp", "ctl", "probe")
# Fails as a whole, not only as what it is piped into.
PLAYER = f"set -o pipefail; vfio_guest /bin/semper-vfiod {' '.join(CONTROLLERS)}"


class InnerDevice(Device):
    """A device whose mediator is in the emulated host, behind a bridge."""

    @property
    def pid(self) -> int:
        """Not of this host, and so nothing to look at."""
        return 1

    @property
    def client(self) -> MediatorClient:
        """Of whoever is at the bridge's other end."""
        return MediatorClient(self.setup.files.control)


@dataclass
class Side:
    """A QEMU in the emulated host, and its mediator."""

    name: str
    device: InnerDevice
    monitor: Monitor
    probe_socket: Path

    @property
    def execute(self) -> stream.Execute:
        """Runs a command of the monitor."""
        return self.monitor.execute_within(STEP_S)


def _qemu(name: str, *, incoming: bool) -> str:
    """The command line of a QEMU in the emulated host."""
    sockets = DeviceSockets(Path(f"/tmp/{name}.sock"), Path(f"/tmp/{name}.shim"))
    spec = PciSpec(name="nvme", pci=CONTROLLERS[0])
    devices = passthrough_arguments(0, spec, sockets)
    devices = [f"'{word}'" if word != "-device" else word for word in devices]
    return " ".join(
        [
            "/q/ld.so --library-path /q /q/qemu -L /q -nodefaults -no-user-config -display none",
            f"-cpu qemu64 -accel tcg,thread=single,tb-size=64 -m {MEMORY}",
            "-machine q35,memory-backend=memory,hpet=off",
            f"-object memory-backend-memfd,id=memory,size={MEMORY},share=on",
            "-kernel /q/vmlinuz -initrd /q/initrd",
            "-append 'console=ttyS0 no_timer_check mitigations=off nokaslr tsc=reliable'",
            f"-serial file:/tmp/{name}.console -qmp unix:/tmp/{name}.qmp,server=on,wait=off",
            f"-chardev socket,id=probe,path=/tmp/{name}.probe,server=on,wait=off",
            "-device virtio-serial-pci",
            "-device virtserialport,chardev=probe,name=org.sempervirt.probe",
            *devices,
            "-S -incoming defer" if incoming else "",
        ]
    )


async def _stats(probe: ProbeClient) -> Stats:
    """Of the writers; an answer may take long."""
    return Stats.model_validate(await probe.ask("stats", {"device": NVME}, deadline_s=BOOT_S))


async def wait_migration(side: Side, status: str) -> None:
    """Waits for a state of the migration, for as long as that takes here."""
    async with asyncio.timeout(MOVE_S):
        while True:
            told = await side.execute("query-migrate")
            assert told.get("status") != "failed", told
            if told.get("status") == status:
                return
            await asyncio.sleep(0.1)  # poll interval


class Nest:
    """The emulated host, and the way to the sockets in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = ("a", "b")
        self.ports = [free_port() for _ in range(len(self.names) * len(SOCKETS))]
        forwards = ",".join(f"hostfwd=tcp:127.0.0.1:{port}-:{port}" for port in self.ports)
        self.outer = Outer(
            _image(folder),
            folder / "host",
            options=("-netdev", f"user,id=net,{forwards}", "-device", "virtio-net-pci,netdev=net"),
            memory="1536M",
        )

    def ends(self) -> list[tuple[int, str]]:
        """Each port, and the socket that it leads to."""
        names = [f"{name}.{end}" for name in self.names for end in SOCKETS]
        return list(zip(self.ports, names, strict=True))

    def begin(self) -> None:
        """Network, bridge, controllers."""
        self.outer.bind()
        for module in MODULES:
            self.outer.do(f"insmod /modules/{module}.ko")
        self.outer.do("ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up")
        ends = " ".join(f"{port}=/tmp/{name}" for port, name in self.ends())
        self.outer.do(f"bridge {ends} >/tmp/bridge.log 2>&1 &")

    def start(self, number: int, controller: str, *, incoming: bool) -> None:
        """A mediator and its QEMU, the older ones of that name being gone."""
        name = self.names[number]
        group = f"$(basename $(readlink /sys/bus/pci/devices/{controller}/iommu_group))"
        self.outer.do(
            f"rm -f /tmp/{name}.*; semper-vfiod --kind=pci --pci={controller} --vfio-group-fd=3 "
            f"--vfio-container-fd=4 --socket-path=/tmp/{name}.sock "
            f"--shim-socket-path=/tmp/{name}.shim --control-socket=/tmp/{name}.ctl "
            f"{'--incoming' if incoming else ''} 3<>/dev/vfio/{group} 4<>/dev/vfio/vfio "
            f">/tmp/{name}.log 2>&1 &"
        )
        self.outer.do(
            f"n=0; while [ ! -S /tmp/{name}.shim ] && [ $n -lt 300 ]; do n=$((n+1)); "
            f"usleep 100000; done; [ -S /tmp/{name}.shim ] || {{ cat /tmp/{name}.log; exit 1; }}"
        )
        self.outer.do(f"{_qemu(name, incoming=incoming)} >/tmp/{name}.qemu 2>&1 &")


def _image(folder: Path) -> Image:
    """The image of the emulated host, with QEMU and the inner guest under /q."""
    qemu = QEMU_TREE / "usr/bin/qemu-system-x86_64"
    library = QEMU_TREE.resolve() / "usr/lib/x86_64-linux-gnu"
    loader = library / "ld-linux-x86-64.so.2"
    said = subprocess.run(
        [loader, "--library-path", library, "--list", qemu],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    needed = [Path(words[2]) for line in said.splitlines() if len(words := line.split()) > 2]
    guest = guest_image()
    data = QEMU_TREE / "usr/share"
    files = {
        "q/qemu": qemu,
        "q/ld.so": loader,
        "q/vmlinuz": guest.kernel,
        "q/initrd": guest.initrd,
        "q/bios-256k.bin": data / "seabios/bios-256k.bin",
        "q/linuxboot_dma.bin": data / "qemu/linuxboot_dma.bin",
        "q/kvmvapic.bin": data / "qemu/kvmvapic.bin",
        **{f"q/{path.name}": path for path in needed},
    }
    examples = [ROOT / "target/debug/examples" / name for name in ("bridge", "vfio_guest")]
    programs = [Path(find_program("semper-vfiod")), *examples]
    return build(folder, programs, modules=MODULES, files=files)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def bridged(port: int, path: Path) -> AsyncIterator[None]:
    """A socket here that is the one in the emulated host."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()


class Trial:
    """The whole: a guest in the nest, its writers, and moves."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.begun = time.monotonic()

    def say(self, what: str) -> None:
        """What happens, and when."""
        sys.stdout.write(f"{time.monotonic() - self.begun:7.1f} s  {what}\n")
        sys.stdout.flush()

    async def side(self, number: int, controller: str, *, incoming: bool) -> Side:
        """A QEMU with its mediator, and the monitor of it."""
        await asyncio.to_thread(self.nest.start, number, controller, incoming=incoming)
        name, folder = self.nest.names[number], self.nest.folder
        files = DeviceFiles(folder / name, "nvme")
        setup = DeviceSetup(
            f"{name}/nvme", files, PciOptions(controller), device_slot(0), shim_slot(0)
        )
        monitor = None
        async with asyncio.timeout(STEP_S):
            while monitor is None:
                try:
                    monitor = await Monitor.connect(folder / f"{name}.qmp", name, STEP_S)
                except SempervirtError:  # not listening yet
                    await asyncio.sleep(1)  # poll interval
        return Side(name, InnerDevice(setup), monitor, folder / f"{name}.probe")

    async def run(self, moves: int) -> None:
        """Boots, works, moves, works."""
        async with AsyncExitStack() as stack:
            for port, name in self.nest.ends():
                path = self.nest.folder / name
                await stack.enter_async_context(bridged(port, path))
                if name.endswith(".ctl"):
                    files = DeviceFiles(self.nest.folder / name[0], "nvme")
                    files.directory.mkdir()
                    files.control.symlink_to(path)
            here = await self.side(0, CONTROLLERS[0], incoming=False)
            self.say("QEMU runs")
            nonce = await self.work(here, begin=True)
            for number in range(moves):
                controller = CONTROLLERS[(number + 1) % 2]
                there = await self.side((number + 1) % 2, controller, incoming=True)
                self.say("the destination waits")
                stood_s = await self.move(here, there)
                self.say(f"moved to {controller}, the guest stood still for {stood_s * 1e3:.0f} ms")
                await here.execute("quit")
                await here.monitor.close()
                assert await self.work(there, begin=False) == nonce, "the guest has booted anew"
                here = there
            status = await here.device.client.status()
            self.say(f"counters: {status.counters}")

    async def watch(self, side: Side) -> None:
        """Says from time to time how far the guest's console is."""
        while True:
            await asyncio.sleep(30)  # poll interval
            look = f"wc -c </tmp/{side.name}.console; tail -n 1 /tmp/{side.name}.console"
            _, said = await asyncio.to_thread(self.nest.outer.ask, look)
            self.say(f"waiting; console: {' '.join(said.split())[-90:]}")

    async def work(self, side: Side, *, begin: bool) -> str:
        """The guest's writers write and verify on the device; gives the nonce of its boot."""
        async with await ProbeClient.connect(side.probe_socket, deadline_s=BOOT_S) as probe:
            watch = asyncio.create_task(self.watch(side))
            try:
                hello = await probe.wait_hello(deadline_s=BOOT_S)
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
            self.say("the guest answers")
            if begin:
                await probe.write_start(NVME, **LOAD)
            before = 0 if begin else (await _stats(probe)).completions
            async with asyncio.timeout(BOOT_S):
                while True:
                    stats = await _stats(probe)
                    if stats.completions > before + 60:
                        break
                    await asyncio.sleep(1)  # poll interval
            self.say(f"{stats.completions} requests of verified writers have ended")
            assert stats.is_clean, stats
            return hello.nonce

    async def move(self, here: Side, there: Side) -> float:
        """A move as agents make it; gives for how long the guest stood still, in s."""
        leaving = LeavingDevices([here.device], here.execute)
        arriving = ArrivingDevices([there.device], PortSpace(there.execute))
        await stream.prepare_destination(there.execute, WAY, postcopy=False)
        await arriving.prepare(await leaving.configurations())
        await leaving.arm()
        self.say("captured")
        await stream.prepare_source(here.execute, postcopy=False)
        await stream.limit_blackout(here.execute, 5)
        await stream.start(here.execute, WAY)
        await wait_migration(here, "pre-switchover")
        begun = time.monotonic()
        moved = await leaving.move()
        await arriving.receive(moved)
        await stream.finish(here.execute)
        await wait_migration(there, "completed")
        await arriving.resume()
        await there.execute("cont")
        await wait_running(there.monitor)
        return time.monotonic() - begun


def main() -> None:
    """The trial; an exception is its failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=2, help="of the guest in a QEMU")
    parser.add_argument("--player-moves", type=int, default=10, help="of who plays both; 0: none")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    options = parser.parse_args()
    assert NEWER_QEMU.exists(), "no QEMU; run scripts/newer-qemu"
    folder = Path(tempfile.mkdtemp(prefix="sv-nest-"))
    nest = Nest(folder)
    try:
        with nest.outer as outer:
            nest.begin()
            trial = Trial(nest)
            trial.say("the emulated host is up")
            if options.player_moves:
                command = f"{PLAYER} --moves={options.player_moves} 2>&1 | grep -v INFO"
                sys.stdout.write(outer.do(command, BOOT_S) + "\n")
                trial.say("the player has moved")
            try:
                asyncio.run(trial.run(options.moves))
            except BaseException:
                for name in ("a", "b"):
                    for end in ("log", "qemu", "console"):
                        said = outer.ask(f"tail -n 12 /tmp/{name}.{end}")[1]
                        sys.stdout.write(f"--- {name}.{end}\n{said}\n")
                raise
            trial.say("shown")
    finally:
        if options.keep:
            sys.stdout.write(f"{folder}\n")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
