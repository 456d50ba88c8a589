"""One host of a migration: QEMU and the backends of its disks, in a network namespace."""

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.migration.waiting import MoveError, until
from bench.processes import processor_ns
from lab.namespaces import within
from lab.network import TAP, Network
from sempervirt.core.errors import Unavailable
from sempervirt.guest import GuestImage
from sempervirt.qemu.qmp import Monitor

PROBE = "org.sempervirt.probe"
MAC = "52:54:00:4d:49:47"
START_S = 30.0
QMP_S = 20.0
LINE_MAX = 1 << 20


@dataclass(frozen=True)
class Hardware:
    """What the machine is at both ends. `disks` are images that both hosts can read, by name."""

    guest: GuestImage
    cmdline: str
    memory_mib: int
    disks: dict[str, Path]


def program(name: str) -> str:
    """One of our own programs."""
    return str(Path(sys.executable).with_name(name))


async def ask(socket: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """One request to the control socket of a program. Raises MoveError when it is refused."""
    reader, writer = await asyncio.open_unix_connection(str(socket), limit=LINE_MAX)
    writer.write(json.dumps({"id": 1, "cmd": command, **arguments}).encode() + b"\n")
    answer = json.loads(await reader.readline())
    writer.close()
    if not isinstance(answer.get("ok"), dict):
        raise MoveError(f"{socket.name} refuses {command}: {answer}")
    return dict(answer["ok"])


@dataclass
class End:
    """A host with all that runs on it; use as `with`. Sockets and logs are in `directory`."""

    name: str
    network: Network
    directory: Path
    hardware: Hardware
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.directory.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    @property
    def address(self) -> str:
        """On the link between the hosts."""
        return self.network.address(self.name)

    def path(self, name: str) -> Path:
        """A socket or a file of this host."""
        return self.directory / name

    def start(self, name: str, command: list[str]) -> None:
        """Start a program here."""
        argv = within(self.network.host(self.name), *command)
        with self.path(f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def said(self, name: str) -> str:
        """The last that a program wrote."""
        return self.path(f"{name}.log").read_text(errors="replace")[-1000:].strip()

    async def ended(self, name: str, deadline_s: float) -> None:
        """Wait until a program ended by itself. Its processor time can still be read."""
        pid = self._processes[name].pid

        def over() -> bool:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

        await until(over, f"the end of {name} on {self.name}", deadline_s)

    def processor_s(self) -> float:
        """Processor time of everything that ever ran here."""
        return sum(processor_ns(process.pid) for process in self._processes.values()) / 1e9

    def boot(self, *, incoming: bool) -> None:
        """Start the machine and its disks; `incoming`: it waits for one that moves here."""
        for name, image in self.hardware.disks.items():
            backend = [
                program("semper-blkd"),
                f"--socket-path={self.path(name)}",
                f"--control-socket={self.control(name)}",
                f"--blk-file={image}",
            ]
            self.start(f"blkd-{name}", [*backend, *(["--incoming"] if incoming else [])])
        self.start("qemu", [*self._machine(), *(["-incoming", "defer"] if incoming else [])])

    def control(self, disk: str) -> Path:
        """The control socket of a disk's backend."""
        return self.path(f"{disk}.control")

    def _machine(self) -> list[str]:
        hardware = self.hardware
        guest, size = hardware.guest, f"{hardware.memory_mib}M"
        command = f"""
            qemu-system-x86_64 -nodefaults -no-user-config -display none -cpu max
            -accel tcg,thread=multi -m {size} -machine q35,memory-backend=memory
            -object memory-backend-memfd,id=memory,size={size},share=on
            -kernel {guest.kernel} -initrd {guest.initrd}
            -serial file:{self.path("console.log")}
            -qmp unix:{self.path("qmp")},server=on,wait=off
            -netdev tap,id=net,ifname={TAP},script=no,downscript=no,vhost=off
            -device virtio-net-pci,netdev=net,mac={MAC}
            -chardev socket,id=probe,path={self.path("probe")},server=on,wait=off
            -device virtio-serial-pci
            -device virtserialport,chardev=probe,name={PROBE}
        """
        for name in hardware.disks:
            command += f"""
                -chardev socket,id={name},path={self.path(name)},reconnect-ms=1
                -device vhost-user-blk-pci,chardev={name}
            """
        return [*shlex.split(command), "-append", hardware.cmdline]

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Monitor]:
        """QEMU's monitor. Raises MoveError if it does not come up."""
        monitors: list[Monitor] = []

        async def greeted() -> bool:
            with suppress(Unavailable):  # not listening yet
                monitors.append(await Monitor.connect(self.path("qmp"), self.name, QMP_S))
            return bool(monitors)

        try:
            await until(greeted, f"the monitor of QEMU on {self.name}", START_S)
        except MoveError as error:
            raise MoveError(f"{error}: {self.said('qemu')}") from error
        try:
            yield monitors[0]
        finally:
            await monitors[0].close()
