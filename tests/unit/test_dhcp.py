"""Who asks for an address is seen, and whatever else a guest sends is none of that."""

from __future__ import annotations

import random
import struct

import pytest

from sempervirt.host.dhcp import is_request


def frame(*, port: int = 67, protocol: int = 17, options: int = 0, kind: int = 0x0800) -> bytes:
    """Of a guest that has no address yet."""
    ethernet = b"\xff" * 6 + b"\x52\x54\x00\x12\x34\x56" + struct.pack(">H", kind)
    head = 20 + options
    ip = bytes([0x40 | head // 4, 0]) + struct.pack(">HHHBBH", head + 8, 0, 0, 64, protocol, 0)
    ip += bytes(4) + b"\xff" * 4 + bytes(options)
    return ethernet + ip + struct.pack(">HHHH", 68, port, 8, 0)


@pytest.mark.parametrize("options", [0, 4, 40])
def test_a_request_is_seen(options: int) -> None:
    assert is_request(frame(options=options))


@pytest.mark.parametrize(
    "packet", [frame(port=68), frame(protocol=6), frame(kind=0x86DD), b"", frame()[:37]]
)
def test_nothing_else_is_one(packet: bytes) -> None:
    assert not is_request(packet)


def test_no_packet_ends_whoever_looks() -> None:
    dice = random.Random(1)
    for _ in range(20_000):
        packet = bytearray(frame(options=dice.choice([0, 4])))
        for _ in range(dice.randrange(4)):
            packet[dice.randrange(len(packet))] = dice.randrange(256)
        is_request(bytes(packet[: dice.randrange(len(packet) + 1)]))
