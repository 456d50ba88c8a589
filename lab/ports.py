"""TCP ports for servers that are started, ended and started again, each given once.

A port that the kernel chose and that was closed again may be chosen for somebody else before it is
used. So these lie outside the range from which the kernel chooses, and who has one says so with
an abstract socket, which is in the same network namespace and ends with the process.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

HERE = "127.0.0.1"
_FIRST = 10_240
_kept: list[socket.socket] = []


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens, and that nobody else gets while this process
    lives. Raises RuntimeError when there is none.
    """
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(_FIRST, last), last - _FIRST):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0sempervirt-test-port-{port}")
            socket.create_server((HERE, port)).close()
        except OSError:
            claim.close()
            continue
        _kept.append(claim)
        return port
    raise RuntimeError("every port is in use")


def free_address() -> str:
    """The same as "HOST:PORT"."""
    return f"{HERE}:{free_port()}"
