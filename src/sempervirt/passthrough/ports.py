"""PCI configuration space of a running QEMU, by the I/O ports 0xCF8 and 0xCFC and its monitor.

QEMU knows no command for this, and a write to the memory that mirrors the space waits for the very
mediator that would make the write. Should QEMU's vfio-user client come to move devices by itself,
this is the module that goes: `ConfigSpace` is all that others know of it.

The guest uses the same two ports, one after the other. So they are used only while the guest stands
still, and the address that the guest may have written last is put back (`standing_still`).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from sempervirt.core.errors import Unavailable

Execute = Callable[..., Awaitable[Any]]
# Offset, size in bytes (1, 2 or 4), value.
Write = tuple[int, int, int]

_ADDRESS, _DATA = 0xCF8, 0xCFC
_ENABLED = 1 << 31
_FORMATS = {1: "b", 2: "h", 4: "w"}
_VALUE = re.compile(r"=\s*(0x[0-9a-fA-F]+|\d+)\s*$")


class ConfigSpace(Protocol):
    """The configuration of the devices of one QEMU, by their slots on bus 0."""

    async def read(self, slot: int, offset: int, size: int) -> int:
        """The value of a register. Raises as a monitor command does; Unavailable."""

    async def write(self, slot: int, writes: Sequence[Write]) -> None:
        """Writes registers in that order. Raises as `read`."""


class PortSpace:
    """`ConfigSpace` by I/O ports; `execute` runs a command of QEMU's monitor."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute

    async def read(self, slot: int, offset: int, size: int) -> int:
        """See `ConfigSpace.read`."""
        await self._select(slot, offset)
        return await self._in(_DATA + (offset & 3), size)

    async def write(self, slot: int, writes: Sequence[Write]) -> None:
        """See `ConfigSpace.write`."""
        for offset, size, value in writes:
            await self._select(slot, offset)
            await self._out(_DATA + (offset & 3), size, value)

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """Has the guest stand still, and keeps what it has written to the address port."""
        runs = bool((await self._execute("query-status"))["running"])
        if runs:
            await self._execute("stop")
        try:
            kept = await self._in(_ADDRESS, 4)
            try:
                yield
            finally:
                await self._out(_ADDRESS, 4, kept)
        finally:
            if runs:
                await self._execute("cont")

    async def _select(self, slot: int, offset: int) -> None:
        await self._out(_ADDRESS, 4, _ENABLED | slot << 11 | (offset & 0xFC))

    async def _in(self, port: int, size: int) -> int:
        answer = await self._say(f"i /x{_FORMATS[size]} {port:#x}")
        found = _VALUE.search(answer)
        if found is None:
            raise Unavailable(f"QEMU does not read I/O port {port:#x}: {answer.strip()[:80]}")
        return int(found[1], 0)

    async def _out(self, port: int, size: int, value: int) -> None:
        answer = await self._say(f"o /{_FORMATS[size]} {port:#x} {value:#x}")
        if answer.strip():
            raise Unavailable(f"QEMU does not write I/O port {port:#x}: {answer.strip()[:80]}")

    async def _say(self, line: str) -> str:
        return str(await self._execute("human-monitor-command", {"command-line": line}))
