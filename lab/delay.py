"""A link with a delay: `python -m lab.delay MILLISECONDS NAMESPACE NAMESPACE`.

It makes a TUN device `mig0` in each namespace and carries every packet from one to the other,
that much later. What either kernel would send on a real link goes through it: every connection,
its handshakes and its losses. The rate is limited before it, by a queue on the devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

from lab.namespaces import enter, ip

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
# Large packets: one process in Python has to carry 100 Mbit/s beside everything else.
MTU = 9000
PACKET_MAX = 65536
# A link that is down says so by an error for each packet; then there is nothing to do but wait.
DOWN_S = 0.01

Queue = deque[tuple[float, bytes]]


def open_tun(namespace: str) -> int:
    """The device `mig0` in a namespace, which this thread enters for that."""
    enter(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"mig0", IFF_TUN | IFF_NO_PI))
    ip("link", "set", "mig0", "mtu", str(MTU))
    return descriptor


def take(descriptor: int, queue: Queue, delay_s: float) -> None:
    """Everything that waits at a device, into the queue of the other one."""
    with contextlib.suppress(BlockingIOError):
        while True:
            packet = os.read(descriptor, PACKET_MAX)
            queue.append((time.monotonic() + delay_s, packet))


def give(descriptor: int, queue: Queue) -> None:
    """Everything that has waited long enough, to a device; one that is down loses it."""
    while queue and queue[0][0] <= time.monotonic():
        _, packet = queue.popleft()
        with contextlib.suppress(OSError):
            os.write(descriptor, packet)


def relay(ends: tuple[int, int], delay_s: float) -> None:
    """Until a device is gone."""
    queues: tuple[Queue, Queue] = (deque(), deque())
    poller = select.poll()
    for end in ends:
        poller.register(end, select.POLLIN)
    while True:
        due = [queue[0][0] for queue in queues if queue]
        wait_ms = max(0.0, min(due) - time.monotonic()) * 1000 if due else None
        for end, events in poller.poll(wait_ms):
            if events & select.POLLIN:
                take(end, queues[1 - ends.index(end)], delay_s)
            elif events:
                end_if_gone(end)
        for end, queue in zip(ends, queues, strict=True):
            give(end, queue)


def end_if_gone(end: int) -> None:
    """A device that is down reports an error for ever; one that was removed ends the relay."""
    try:
        os.read(end, PACKET_MAX)
    except BlockingIOError:
        pass
    except OSError as error:
        raise SystemExit(0) from error
    time.sleep(DOWN_S)  # poll interval


def main() -> int:
    """The program."""
    delay_ms, *namespaces = sys.argv[1:]
    here, there = (open_tun(namespace) for namespace in namespaces)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    with contextlib.suppress(subprocess.CalledProcessError, KeyboardInterrupt):
        relay((here, there), float(delay_ms) / 1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
