"""Whether somebody behind an interface asks for an address by DHCP: looks, and answers nothing.

A packet socket keeps what comes in from the first packet on, as far as its buffer reaches; requests
for an address are among the first. RFC 2131 4.1: they are UDP datagrams to port 67.
"""

from __future__ import annotations

import socket
import struct

_IPV4 = 0x0800
_ETHERNET_BYTES, _UDP = 14, 17
_PORT = struct.Struct(">H")
_SERVER_PORT = 67
_PACKET_BYTES = 2048


class Requests:
    """Those that come in through `interface` from now on. Raises OSError."""

    def __init__(self, interface: str) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self.interface = interface
        self._socket = socket.socket(socket.AF_PACKET, kind, socket.htons(_IPV4))
        try:
            self._socket.bind((interface, _IPV4))
        except OSError:
            self._socket.close()
            raise

    def seen(self) -> bool:
        """Whether there was one since the last question."""
        found = False
        while True:
            try:
                packet = self._socket.recv(_PACKET_BYTES)
            except OSError:  # nothing is left, or the interface is down
                return found
            found = found or is_request(packet)

    def close(self) -> None:
        """Looks no more."""
        self._socket.close()


def is_request(packet: bytes) -> bool:
    """Whether an Ethernet frame is a datagram to a DHCP server. Whatever a guest writes."""
    if len(packet) <= _ETHERNET_BYTES or packet[12:14] != b"\x08\x00":
        return False
    header = packet[_ETHERNET_BYTES:]
    at = (header[0] & 0xF) * 4
    if header[0] >> 4 != 4 or len(header) < max(at, 20) + 4 or header[9] != _UDP:
        return False
    port: int = _PORT.unpack_from(header, at + 2)[0]
    return port == _SERVER_PORT
