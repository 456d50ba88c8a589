"""A guest with a card on a tap: its standby is heard by nobody, and answers when it goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from lab.client import EchoClient
from lab.namespaces import ip
from sempervirt.agent import Agent
from sempervirt.core.errors import InvalidRequest
from sempervirt.guest import ProbeClient
from sempervirt.host import tap as taps
from sempervirt.qemu.spec import StandbySpec, VmSpec
from sempervirt.standby.network import tap_of
from sempervirt.standby.values import Policy, Tier
from tests.guest_network import GUEST, add_tap, own_network, with_tap
from tests.integration.test_standby import CHANNEL, NEVER_S, wait_ready, wait_taken_over

pytestmark = [pytest.mark.root, pytest.mark.guest]
Spec = Callable[..., VmSpec]
ANSWER_S = 90.0


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """This thread, and what it starts, in a namespace with a bridge."""
    with own_network():
        yield


async def test_the_tap_of_a_standby_leads_nowhere_until_it_takes_over(
    agent: Agent, guest_spec: Spec
) -> None:
    add_tap()
    up = StandbySpec(initialised="channel", channel=CHANNEL, marker="hello")
    first = await agent.run_vm(with_tap(guest_spec()).model_copy(update={"standby": up}))
    ip("link", "set", "tap0", "nomaster")
    with pytest.raises(InvalidRequest, match="no port of a bridge"):
        await agent.standbys.enable(first, Policy())
    ip("link", "set", "tap0", "master", "br0")
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.READY))
    await wait_ready(driver)
    own = tap_of("web", 1, 0)
    assert taps.bridge_of(own) is None
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    vm = await wait_taken_over(agent, driver, first)
    assert taps.bridge_of(own) == "br0"
    assert vm.spec.nics[0].tap == own
    async with await ProbeClient.connect(vm.channel_path("probe")) as probe:
        await probe.wait_hello()
        await probe.network_up("eth0", f"{GUEST}/24")
        await probe.echo_start(7)
        async with asyncio.timeout(ANSWER_S), EchoClient.connected("", GUEST) as client:
            await client.wait_heard()
            assert client.alive, client.problem
    await agent.standbys.disable("web")
