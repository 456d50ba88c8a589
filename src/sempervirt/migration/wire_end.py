"""This host's end of the wire of one migration, beside the VM's QEMU and backends."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from pathlib import Path

from sempervirt.core.errors import Unavailable
from sempervirt.migration.wire import Wire, WireDisk, WireFiles, sweep
from sempervirt.migration.wire_status import WireState, WireStatus
from sempervirt.vm.vm import Vm

ADDRESS_S = 10.0


class WireEnd:
    """One process of semper-wired at a time. `trust` holds this host's key and certificate,
    `migration` is the id of the migration, `peer` the name of the other host.
    """

    def __init__(self, vm: Vm, trust: Path, migration: str, peer: str) -> None:
        self.files = WireFiles(vm.machine.files.directory, vm.workplace)
        self._vm = vm
        self._trust = trust
        self._migration = migration
        self._peer = peer
        self._wire: Wire | None = None

    @property
    def status(self) -> WireStatus | None:
        """What the process told last; None before."""
        return self._wire.status if self._wire is not None else None

    @property
    def bandwidth(self) -> int | None:
        """What the link carries of the stream, in bytes per second; None before that is known."""
        status = self.status
        return None if status is None else status.switchover_bandwidth

    @property
    def failure(self) -> str:
        """Why the process ended without having carried everything, "" while it works."""
        return self._wire.failure if self._wire is not None else ""

    async def start_source(self, address: str) -> None:
        """Starts it anew, towards the destination's end at `address`. Raises Unavailable."""
        await self._anew()
        self._wire = Wire.source(
            self.files, self._trust, self._migration, self._peer, address, self._disks()
        )

    async def start_destination(self, listen: str) -> str:
        """Starts it anew, at this host's address "HOST:PORT"; gives where it listens.

        Raises Unavailable. QEMU listens for it already: what was there before is gone.
        """
        digits = await asyncio.to_thread(_digits, listen)
        self._wire = Wire.destination(
            self.files, self._trust, self._migration, self._peer, f"{digits}:0", self._disks()
        )
        return await self._wire.wait(lambda status: status.address, ADDRESS_S)

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until both ends are ready for the stream. Raises as `Wire.wait`."""
        if self._wire is None:
            raise Unavailable("semper-wired was not started")
        await self._wire.wait(lambda status: status.state is WireState.READY or None, timeout_s)

    async def ask(self) -> None:
        """Renews `status`."""
        if self._wire is not None:
            await self._wire.ask()

    async def end(self) -> None:
        """Ends it, whatever it does."""
        if self._wire is not None:
            await self._wire.end()

    async def sweep(self) -> None:
        """Ends a process that an earlier agent left."""
        await sweep(self.files)

    def forget(self) -> None:
        """Leaves it running."""
        if self._wire is not None:
            self._wire.forget()

    async def _anew(self) -> None:
        await self.end()
        await sweep(self.files)

    def _disks(self) -> list[WireDisk]:
        return [
            WireDisk(
                name,
                disk.setup.options.image,
                disk.setup.options.direct,
                disk.setup.files.control(disk.generation),
            )
            for name, disk in self._vm.disks.items()
        ]


def _digits(address: str) -> str:
    """The host part of "HOST:PORT" as digits. Raises Unavailable when it has no address."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise Unavailable(f"{host} has no address: {error.strerror}") from error
    return f"[{found}]" if ipaddress.ip_address(found).version == 6 else str(found)
