"""Packets on their way out through one interface, kept to be sent again.

A packet socket sees what the host sends, and can send it: each packet with the header that says
what the kernel has left to do (checksum, segmentation).
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterator, Sequence

_ALL = 0x0003
_SOL_PACKET, _AUXDATA, _VNET_HEADER = 263, 8, 15
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
# A program for the socket's filter, of one instruction: no packet is kept.
_NOTHING = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
_KEEP_NOTHING = struct.pack("HP", 1, ctypes.addressof(_NOTHING))
_KEPT_BYTES = 8 << 20
# struct virtio_net_hdr.
HEADER_BYTES = 10
_PACKET_BYTES = HEADER_BYTES + (64 << 10) + 256
# struct tpacket_auxdata, of which only the status matters.
_STATUS, _AUX_BYTES, _VLAN_VALID = struct.Struct("=I"), 20, 0x10


class Kept:
    """What is sent through `interface` from now on, up to some MB. Raises OSError."""

    def __init__(self, interface: str) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._interface = interface
        self._socket = socket.socket(socket.AF_PACKET, kind, 0)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KEPT_BYTES)
            self._socket.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
            self._socket.setsockopt(_SOL_PACKET, _AUXDATA, 1)
            self._socket.bind((interface, _ALL))
        except OSError:
            self._socket.close()
            raise

    def send_again(self, unread: Sequence[bytes]) -> int:
        """Sends `unread`, and after it what was kept; keeps no more. Gives how many packets.

        Not those with a VLAN tag, which the kernel hands out without it. (The socket stays open:
        to close it would take the kernel 10 ms.)
        """
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _KEEP_NOTHING)
        kept = list(self._read())
        known = {packet[HEADER_BYTES:] for packet in kept}
        kept = [packet for packet in unread if packet[HEADER_BYTES:] not in known] + kept
        for packet in kept:
            with contextlib.suppress(OSError):  # the interface's queue is full
                self._socket.sendto(packet, (self._interface, 0))
        return len(kept)

    def _read(self) -> Iterator[bytes]:
        room = socket.CMSG_SPACE(_AUX_BYTES)
        while True:
            try:
                packet, extra, _, address = self._socket.recvmsg(_PACKET_BYTES, room)
            except BlockingIOError:
                return
            tagged = any(_STATUS.unpack_from(data)[0] & _VLAN_VALID for *_, data in extra)
            if address[2] == socket.PACKET_OUTGOING and not tagged:
                yield packet

    def close(self) -> None:
        """Forgets all packets."""
        self._socket.close()
