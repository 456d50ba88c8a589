"""A network namespace in which an agent, its QEMUs and the peer of their guest live. Needs root.

peer 10.9.0.1 ── bridge br0 ── tap0 ── 10.9.0.2 guest
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

from lab.namespaces import CLONE_NEWNET, Cleaner, enter, ip
from sempervirt.qemu.spec import VmSpec

GUEST, PEER = "10.9.0.2", "10.9.0.1"
_numbers = itertools.count(1)


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a namespace with a bridge until the block is left."""
    tag = f"svr{os.getpid()}.{next(_numbers)}"
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    cleaner = Cleaner(tag)
    try:
        ip("netns", "add", f"{tag}-x")
        enter(f"{tag}-x")
        ip("link", "set", "lo", "up")
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", f"{PEER}/24", "dev", "br0")
        ip("link", "set", "br0", "up")
        yield
    finally:
        assert ctypes.CDLL(None).setns(home, CLONE_NEWNET) == 0
        os.close(home)
        cleaner.end()


def add_tap(*kind: str) -> None:
    """The tap, on the bridge."""
    ip("tuntap", "add", "tap0", "mode", "tap", *kind)
    ip("link", "set", "tap0", "master", "br0", "up")


def with_tap(spec: VmSpec, queues: int = 1) -> VmSpec:
    """`spec` with its card on the tap."""
    nic = {"type": "tap", "tap": "tap0", "queues": queues}
    return VmSpec.model_validate({**spec.model_dump(mode="json"), "nics": [nic]})
