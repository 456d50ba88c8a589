"""Tap interfaces, and the files of /dev/net/tun that serve them.

    TUNSETIFF        a file begins to serve an interface; a new one is made if need be
    TUNGETIFF        which one it serves; EBADFD when none
    RTM_DELLINK      an interface goes away; its files stay open and serve none

A file that serves none can be made to serve another interface. An interface without
`multi_queue` has one file at a time. Constants: include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from sempervirt.host.packets import HEADER_BYTES
from sempervirt.host.procfs import PROC

NAME_BYTES = 16
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETQUEUE = 0x400454D9
_TUNGETVNETHDRSZ, _TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
_IFREQ = struct.Struct("16sH22x")
_INT = struct.Struct("i")

MULTI_QUEUE, PERSISTENT = 0x0100, 0x0800
_TAP, _NO_HEADER, _VNET_HEADER = 0x0002, 0x1000, 0x4000
_DETACH_QUEUE = 0x0400
_KIND = _TAP | _NO_HEADER | _VNET_HEADER | MULTI_QUEUE
# What QEMU asks for by itself.
ORDINARY = _TAP | _NO_HEADER | _VNET_HEADER

_SIOCGIFFLAGS, _UP, _RUNNING = 0x8913, 0x01, 0x40
_PACKET_BYTES = 68 << 10
_RTM_DELLINK, _REQUEST_ACK = 17, 5
_RTM_NEWLINK, _RTM_GETLINK, _NLMSG_ERROR, _REQUEST = 16, 18, 2, 1
_IFLA_MASTER = 10
_TUNSETPERSIST = 0x400454CB
_SIOCSIFFLAGS, _SIOCBRADDIF, _SIOCBRDELIF = 0x8914, 0x89A2, 0x89A3
_INDEX = struct.Struct("16si20x")
_LINK = struct.Struct("=IHHIIBxHiII")
_ACK = struct.Struct("=16xi")


@dataclass(frozen=True)
class Served:
    """What a file serves. `header` is the size of what stands before each packet.

    A queue that is not `enabled` belongs to the interface, and gets no packets.
    """

    interface: str
    flags: int
    header: int
    enabled: bool

    @property
    def persistent(self) -> bool:
        """Whether the interface stays when no file serves it any more."""
        return bool(self.flags & PERSISTENT)


def open_file() -> int:
    """A file that serves no interface yet. Raises OSError."""
    return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def serve(file: int, interface: str, like: int) -> str:
    """Lets `file`, which serves none, serve `interface`; gives its name.

    `like` are the flags of a file that serves such an interface. A name with "%d" makes a new
    interface. Raises OSError: EEXIST when the file serves one, EBUSY when another file does.
    """
    request = _IFREQ.pack(interface.encode(), like & _KIND)
    return _name(fcntl.ioctl(file, _TUNSETIFF, request))


def served(file: int) -> Served | None:
    """What `file` serves, None when nothing. Raises OSError."""
    try:
        answer = fcntl.ioctl(file, _TUNGETIFF, bytes(_IFREQ.size))
        header = fcntl.ioctl(file, _TUNGETVNETHDRSZ, bytes(_INT.size))
    except OSError as error:
        if error.errno == errno.EBADFD:
            return None
        raise
    flags = _IFREQ.unpack(answer)[1]
    return Served(_name(answer), flags, _INT.unpack(header)[0], not flags & _DETACH_QUEUE)


def unread(file: int, header: int) -> list[bytes]:
    """Takes what waits in a file that serves an interface, as `packets.Kept` sends it."""
    found: list[bytes] = []
    while True:
        try:
            packet = os.read(file, _PACKET_BYTES)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EBADFD):
                return found
            raise
        found.append(packet[:HEADER_BYTES] + packet[header:])


def set_header(file: int, size: int) -> None:
    """Sets the size of what stands before each packet, for the whole interface."""
    fcntl.ioctl(file, _TUNSETVNETHDRSZ, _INT.pack(size))


def disable(file: int) -> None:
    """Lets a queue of a `multi_queue` interface get no packets."""
    fcntl.ioctl(file, _TUNSETQUEUE, _IFREQ.pack(b"", _DETACH_QUEUE))


def _name(request: bytes) -> str:
    return request[:NAME_BYTES].split(b"\0")[0].decode()


def stands_still(interface: str) -> bool:
    """Whether packets to `interface` are thrown away, although it is up.

    The kernel may notice only later that nobody serves it, or that somebody does again.
    Raises OSError.
    """
    with _any_socket() as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(interface.encode(), 0))
    flags = _IFREQ.unpack(answer)[1]
    return bool(flags & _UP and not flags & _RUNNING)


def files_of(pid: int, interface: str) -> list[int]:
    """The descriptors by which process `pid` serves `interface`. Raises OSError."""
    line = re.compile(rf"^iff:\t{re.escape(interface)}$", re.MULTILINE)
    found = []
    for entry in (PROC / str(pid) / "fdinfo").iterdir():
        try:
            if line.search(entry.read_text()):
                found.append(int(entry.name))
        except FileNotFoundError:  # closed meanwhile
            continue
    return sorted(found)


def make(interface: str, *, several: bool) -> None:
    """Makes a tap that stays without a file that serves it, and brings it up.

    With `several` queues; the host itself says nothing on it (no IPv6). Raises OSError.
    """
    file = open_file()
    try:
        serve(file, interface, ORDINARY | (MULTI_QUEUE if several else 0))
        quiet = Path("/proc/sys/net/ipv6/conf") / interface / "disable_ipv6"
        if quiet.exists():
            quiet.write_text("1")
        fcntl.ioctl(file, _TUNSETPERSIST, 1)
        with _any_socket() as any_socket:
            flags = _IFREQ.pack(interface.encode(), _UP)
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, flags)
    finally:
        os.close(file)


def join(interface: str, bridge: str) -> None:
    """Makes an interface a port of a bridge; from now on it is one of no other. Raises OSError."""
    with _any_socket() as any_socket:
        if (before := bridge_of(interface)) not in (None, bridge):
            leave(interface, str(before))
        request = _INDEX.pack(bridge.encode(), socket.if_nametoindex(interface))
        try:
            fcntl.ioctl(any_socket, _SIOCBRADDIF, request)
        except OSError as error:
            if error.errno != errno.EBUSY or before != bridge:
                raise


def leave(interface: str, bridge: str) -> None:
    """Takes an interface from a bridge. Raises OSError."""
    with _any_socket() as any_socket:
        request = _INDEX.pack(bridge.encode(), socket.if_nametoindex(interface))
        fcntl.ioctl(any_socket, _SIOCBRDELIF, request)


def bridge_of(interface: str) -> str | None:
    """The bridge that an interface is a port of. Raises OSError when there is no such interface."""
    index = socket.if_nametoindex(interface)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as link:
        link.send(_LINK.pack(_LINK.size, _RTM_GETLINK, _REQUEST, 1, 0, 0, 0, index, 0, 0))
        answer = link.recv(64 << 10)
    length, kind = struct.unpack_from("=IH", answer)
    if kind == _NLMSG_ERROR or kind != _RTM_NEWLINK:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), interface)
    at = _LINK.size
    while at + 4 <= length:
        size, attribute = struct.unpack_from("=HH", answer, at)
        if attribute == _IFLA_MASTER:
            return socket.if_indextoname(struct.unpack_from("=I", answer, at + 4)[0])
        at += max(4, (size + 3) & ~3)
    return None


def packets_from(interface: str) -> int:
    """How many packets came from whoever serves a tap. Raises OSError."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, colon, figures = line.partition(":")
        if colon and name.strip() == interface:
            return int(figures.split()[1])
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), interface)


def _any_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


class Remover:
    """Removes one interface. Made in the thread, and so in the network namespace, of the agent."""

    def __init__(self, interface: str) -> None:
        self._index = socket.if_nametoindex(interface)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)

    def remove(self) -> None:
        """Removes the interface. Takes some 20 ms; for the first few of these the files go on
        serving the interface. Raises OSError.
        """
        with self._socket as link:
            link.send(
                _LINK.pack(_LINK.size, _RTM_DELLINK, _REQUEST_ACK, 1, 0, 0, 0, self._index, 0, 0)
            )
            error = -_ACK.unpack_from(link.recv(4096))[0]
        if error not in (0, errno.ENODEV):
            raise OSError(error, os.strerror(error))
