"""The network of two hosts, in four namespaces. Nothing of it is in the machine's own.

    TAG-a ── mig0 ─────── the link between the hosts ─────── mig0 ── TAG-b
      │ store0                                                store0 │
      ├────────────── bridge store ── 10.78.0.254 (etcd) ────────────┤
      │ up0              in TAG-net                              up0 │
      └─ br0 ──────── bridge lan ──── 10.79.0.254 (outside) ── br0 ──┘
          └ tap0                                                └ tap0

The hosts are 10.77.0.1 and 10.77.0.2 on their link; the guest is 10.79.0.10 wherever it runs.
A link with a delay is a pair of TUN devices with a relay between them (`delay`), for the
kernels of test machines often have no netem; the rate is limited by tbf in any case.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.namespaces import Cleaner, inside, ip, pids, within

OUTSIDE = "10.79.0.254"
STORE = "10.78.0.254"
GUEST = "10.79.0.10"
TAP = "tap0"
# Of the outside's route to the guest: by default TCP waits for 200 ms and then twice as long
# each time, and a client would measure that instead of the blackout.
RTO_MIN = "20ms"
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Link:
    """How the hosts are joined. `delay_ms` is of each packet, in each direction."""

    name: str
    rate: str = ""
    delay_ms: float = 0.0


UNLIMITED = Link("unlimited")
GIGABIT = Link("1 Gbit/s", "1gbit")
FAR = Link("100 Mbit/s, 20 ms", "100mbit", 20.0)


class Network:
    """Made at once; `close` removes everything."""

    def __init__(self, link: Link, *directories: Path) -> None:
        self.link = link
        self.tag = f"sv{os.getpid()}.{next(_numbers)}"
        self.net = f"{self.tag}-net"
        self._cleaner = Cleaner(self.tag, *directories)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def host(self, name: str) -> str:
        """The namespace of host "a" or "b"."""
        return f"{self.tag}-{name}"

    @staticmethod
    def address(name: str) -> str:
        """Of a host, on the link between them."""
        return f"10.77.0.{'ab'.index(name) + 1}"

    def close(self) -> None:
        """Kills what runs in it."""
        self._cleaner.end()

    # How it is made

    def _build(self) -> None:
        for namespace in (self.net, self.host("a"), self.host("b")):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        for bridge, address in (("lan", OUTSIDE), ("store", STORE)):
            self._bridge(self.net, bridge)
            ip("-n", self.net, "address", "add", f"{address}/24", "dev", bridge)
        ip("-n", self.net, "route", "change", "10.79.0.0/24", "dev", "lan", "rto_min", RTO_MIN)
        for name in "ab":
            host = self.host(name)
            self._bridge(host, "br0")
            self._cable(host, "up0", f"lan-{name}", "lan")
            ip("-n", host, "link", "set", "up0", "master", "br0")
            ip("-n", host, "tuntap", "add", TAP, "mode", "tap")
            ip("-n", host, "link", "set", TAP, "master", "br0", "up")
            self._cable(host, "store0", f"store-{name}", "store")
            store = self.address(name).replace("10.77.", "10.78.")
            ip("-n", host, "address", "add", f"{store}/24", "dev", "store0")
        self._join()

    def _bridge(self, namespace: str, name: str) -> None:
        ip("-n", namespace, "link", "add", name, "type", "bridge")
        ip("-n", namespace, "link", "set", name, "up")

    def _cable(self, host: str, here: str, there: str, bridge: str) -> None:
        """From a host to a bridge of the switch."""
        peer = ("peer", "name", there, "netns", self.net)
        ip("-n", host, "link", "add", here, "type", "veth", *peer)
        ip("-n", host, "link", "set", here, "up")
        ip("-n", self.net, "link", "set", there, "master", bridge, "up")

    def _join(self) -> None:
        """The link between the hosts."""
        a, b = self.host("a"), self.host("b")
        if self.link.delay_ms:
            argv = [sys.executable, "-m", "lab.delay", str(self.link.delay_ms), a, b]
            root = Path(__file__).resolve().parents[1]
            # It is killed with the rest: it ends when its devices go.
            relay = subprocess.Popen(argv, cwd=root, stdout=subprocess.PIPE)
            assert relay.stdout is not None
            assert relay.stdout.readline() == b"ready\n", "the relay did not start"
        else:
            peer = ("peer", "name", "mig0", "netns", b)
            ip("-n", a, "link", "add", "mig0", "type", "veth", *peer)
        for name in "ab":
            host = self.host(name)
            ip("-n", host, "address", "add", f"{self.address(name)}/24", "dev", "mig0")
            ip("-n", host, "link", "set", "mig0", "up")
            if self.link.rate:
                burst = ("burst", "256kb", "latency", "50ms")
                limit = ("qdisc", "add", "dev", "mig0", "root", "tbf", "rate", self.link.rate)
                subprocess.run(within(host, "tc", *limit, *burst), check=True)

    # What happens to it

    def cut(self, what: str) -> None:
        """Cuts "link" (between the hosts), "store-a" or "store-b"; nobody is told."""
        namespace, device = self._cable_of(what)
        ip("-n", namespace, "link", "set", device, "down")

    def heal(self, what: str) -> None:
        """Undoes `cut`."""
        namespace, device = self._cable_of(what)
        ip("-n", namespace, "link", "set", device, "up")

    def _cable_of(self, what: str) -> tuple[str, str]:
        return (self.host("a"), "mig0") if what == "link" else (self.net, what)

    def sent(self) -> int:
        """Bytes that went over the link, in both directions, with all headers."""
        return sum(self._transmitted(self.host(name)) for name in "ab")

    @staticmethod
    def _transmitted(namespace: str) -> int:
        def read() -> int:
            for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
                name, _, figures = line.partition(":")
                if name.strip() == "mig0":
                    return int(figures.split()[8])
            raise AssertionError(f"{namespace} has no mig0")

        return inside(namespace, read)

    def pids(self, name: str) -> list[int]:
        """The processes of a host."""
        return pids(self.host(name))
