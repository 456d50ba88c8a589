"""Configuration space by I/O ports, on a model of a machine whose guest uses the same ports."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sempervirt.core.errors import Unavailable
from sempervirt.passthrough.ports import PortSpace

_OUT = re.compile(r"o /([bhw]) (0x[0-9a-f]+) (0x[0-9a-f]+)")
_IN = re.compile(r"i /x([bhw]) (0x[0-9a-f]+)")
_SIZES = {"b": 1, "h": 2, "w": 4}


class Machine:
    """QEMU's monitor: two ports, and the configuration space of every slot behind them."""

    def __init__(self, *, running: bool = True) -> None:
        self.running = running
        self.address = 0
        self.space: dict[int, bytearray] = {}
        self.said: list[str] = []
        self.runstates: list[bool] = []
        self.broken = ""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        match command:
            case "query-status":
                return {"running": self.running}
            case "stop" | "cont":
                self.running = command == "cont"
                self.runstates.append(self.running)
                return {}
            case "human-monitor-command":
                assert arguments is not None
                self.said.append(arguments["command-line"])
                return self.broken or self._say(arguments["command-line"])
            case _:
                raise AssertionError(command)

    def _say(self, line: str) -> str:
        if (out := _OUT.fullmatch(line)) is not None:
            self._write(int(out[2], 0), _SIZES[out[1]], int(out[3], 0))
            return ""
        read = _IN.fullmatch(line)
        assert read is not None, line
        port, size = int(read[2], 0), _SIZES[read[1]]
        value = self.address
        if port != 0xCF8:
            register = self.bytes_at(self.address)
            offset = (self.address & 0xFC) + port - 0xCFC
            value = int.from_bytes(register[offset : offset + size], "little")
        return f"port{read[1]}[{port:#06x}] = {value:#x}\r\n"

    def _write(self, port: int, size: int, value: int) -> None:
        if port == 0xCF8:
            assert size == 4
            self.address = value
            return
        assert port >= 0xCFC
        assert port + size <= 0xD00
        offset = (self.address & 0xFC) + port - 0xCFC
        self.bytes_at(self.address)[offset : offset + size] = value.to_bytes(size, "little")

    def bytes_at(self, address: int) -> bytearray:
        assert address >> 31, "the address is not enabled"
        assert address >> 16 & 0xFF == 0, "another bus than 0"
        return self.space.setdefault(address >> 11 & 0x1F, bytearray(256))


async def test_registers_of_every_size_and_place() -> None:
    machine = Machine()
    space = PortSpace(machine.execute)
    writes = [(0x04, 2, 0x0406), (0x10, 4, 0xFEBF0004), (0x3C, 1, 11), (0x42, 2, 0x8007)]
    await space.write(30, writes)
    await space.write(29, [(0x07, 1, 0xAA)])
    for offset, size, value in writes:
        assert await space.read(30, offset, size) == value
        assert machine.space[30][offset : offset + size] == value.to_bytes(size, "little")
    assert await space.read(29, 0x04, 4) == 0xAA000000
    assert await space.read(28, 0x00, 4) == 0


@pytest.mark.parametrize("running", [True, False])
async def test_the_guest_stands_still_and_finds_its_address_again(running: bool) -> None:
    """A guest that was stopped between its own two accesses has to go on with the second."""
    machine = Machine(running=running)
    machine.address = 0x80000810
    space = PortSpace(machine.execute)
    async with space.standing_still():
        assert machine.runstates == ([False] if running else [])
        await space.write(30, [(0x04, 2, 6)])
        assert machine.address != 0x80000810
    assert machine.address == 0x80000810
    assert machine.runstates == ([False, True] if running else [])


async def test_the_guest_goes_on_whatever_fails() -> None:
    machine = Machine()
    machine.address = 0x80000810
    with pytest.raises(ZeroDivisionError):
        async with PortSpace(machine.execute).standing_still():
            raise ZeroDivisionError
    assert (machine.running, machine.address) == (True, 0x80000810)


async def test_what_qemu_does_not_do_is_said() -> None:
    machine = Machine()
    machine.broken = "unknown command: 'o'\r\n"
    space = PortSpace(machine.execute)
    with pytest.raises(Unavailable, match="does not write I/O port 0xcf8: unknown command"):
        await space.write(30, [(4, 2, 0)])
    machine.broken = ""
    assert await space.read(30, 4, 2) == 0
    machine.broken = "nonsense"
    with pytest.raises(Unavailable, match="does not write"):
        await space.read(30, 4, 2)
