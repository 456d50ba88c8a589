"""The host that comes back, and finds that its VM was given to another one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.host import tap as taps
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.store.registry import Claim, Registry
from sempervirt.store.sqlite import SqliteStore
from sempervirt.vm.fencing import follow_claims

Spec = Callable[..., VmSpec]
DEADLINE_S = 90.0
# In a network namespace of its own: a tap on a bridge, and one on none.
IN_A_NAMESPACE = """
mount -t sysfs sysfs /sys
ip link add br0 type bridge
for tap in t0 t1; do ip tuntap add $tap mode tap; done
ip link set t0 master br0
exec "$0" -c '
from sempervirt.host import tap as taps
before = taps.bridge_of("t0")
taps.leave("t0", before)
print(before, taps.bridge_of("t0"), taps.bridge_of("t1"))
'
"""


# In a network namespace of its own: what comes in through a tap, of a guest that asks or does not.
ASKS = """
ip tuntap add t0 mode tap
ip link set t0 up
exec "$0" -c '
import fcntl, os, struct
from sempervirt.host.dhcp import Requests
from tests.unit.test_dhcp import frame
guest = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(guest, 0x400454CA, struct.pack("16sH22x", b"t0", 0x1002))  # TUNSETIFF, a tap
heard = Requests("t0")
os.write(guest, frame(port=53).ljust(60, bytes(1)))
before = heard.seen()
os.write(guest, frame().ljust(60, bytes(1)))
print(before, heard.seen(), heard.seen())
'
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces")
def test_a_guest_that_asks_for_an_address_is_heard() -> None:
    argv = ["unshare", "--net", "sh", "-ec", ASKS, sys.executable]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout == "False True False\n"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make network namespaces")
def test_a_tap_leaves_its_bridge() -> None:
    argv = ["unshare", "--net", "--mount", "sh", "-ec", IN_A_NAMESPACE, sys.executable]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout == "br0 None None\n"


async def test_a_vm_that_was_given_away_is_ended_and_leaves_the_network_first(
    agent: Agent, firmware_spec: Spec, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore.open(place / "store.db")
    registry = Registry(store)
    vm = await agent.run_vm(firmware_spec())
    claim = await registry.claim("web", "a")
    vm.set_claim(claim)
    running: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(taps, "bridge_of", lambda tap: f"bridge of {tap}")
    monkeypatch.setattr(
        taps,
        "leave",
        lambda tap, bridge: running.append((tap, bridge, vm.run is Runstate.RUNNING)),
    )
    nic = {"type": "tap", "tap": "t0", "queues": 1}
    tapped = VmSpec.model_validate({**vm.spec.model_dump(), "nics": [nic]})
    monkeypatch.setattr(vm.machine, "spec", tapped)
    following = asyncio.ensure_future(
        follow_claims(store, "a", agent.config.run_dir, lambda: agent.vms, lambda: None)
    )
    try:
        # The control: what is still this host's is left alone.
        await registry.check(claim)
        assert vm.run is Runstate.RUNNING
        assert not running
        await _given_to(registry, claim, "b")
        await vm.wait_ended(DEADLINE_S)
    finally:
        following.cancel()
        await asyncio.wait([following])
        await store.close()
    assert running == [("t0", "bridge of t0", True)], "the network comes before the end of QEMU"
    noted = [event.message for event in vm.machine.journal.events]
    assert "given to b: ended here" in noted
    assert any("tap t0 was taken from the bridge" in text for text in noted)


async def _given_to(registry: Registry, claim: Claim, host: str) -> None:
    await registry.mark_unknown(claim, "the host is silent")
    await registry.resolve(claim.vm, host, "the fence was proved")
