"""A VM whose QEMU lives and whose service does not: a standby takes over when the VM file says so,
after the first VM was ended and its end was proved; what that has lost is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.disk.image_lock import Holder, try_lock
from sempervirt.guest import ProbeClient
from sempervirt.host.ending import pidfd_of
from sempervirt.qemu.spec import StandbySpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.state import Step
from sempervirt.standby.values import Policy, Tier

pytestmark = pytest.mark.guest
Spec = Callable[..., VmSpec]
BOOT_S, READY_S, OVER_S = 180.0, 400.0, 120.0
NEVER_S = 86400.0
CHANNEL = "org.sempervirt.probe"


def standby(service: str, after: float | str) -> StandbySpec:
    """Of a VM whose service is asked."""
    return StandbySpec.model_validate(
        {
            "initialised": "channel",
            "channel": CHANNEL,
            "marker": "hello",
            "service": service,
            "take_over": {"service_silent": after},
        }
    )


async def wait(driver: StandbyDriver, what: str, condition: Callable[[], bool], s: float) -> None:
    """Until a condition on the standbys holds."""
    await driver.changes.wait_until(condition, timeout_s=s, what=what)


async def test_a_silent_service_is_taken_over_when_the_vm_file_says_so(
    agent: Agent, guest_spec: Spec, disk_image: Path
) -> None:
    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    spec = guest_spec(serial="root").model_copy(
        update={"standby": standby(f"127.0.0.1:{port}", "never")}
    )
    first = await agent.run_vm(spec)
    path = first.channel_path("probe")
    async with await ProbeClient.connect(path, deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
    driver = await agent.standbys.enable(first, Policy(NEVER_S, 1, Tier.FILE))
    await wait(
        driver, "a standby", lambda: bool(driver.state.ready or driver.state.trouble), READY_S
    )
    assert driver.state.ready, driver.state.trouble
    assert not await agent.standbys.losses("web")
    qemu = first.machine.identity
    assert qemu is not None
    server.close()
    await server.wait_closed()
    # The control: it is silent, and the VM file says never.
    watch = agent.standbys.kept["web"].first.watch
    async with asyncio.timeout(OVER_S):
        while True:
            judged = watch.look()
            if judged.verdict.kind == "suspected":
                break
            await asyncio.sleep(0.05)  # poll interval
    assert driver.state.take_over is None
    assert first.run is Runstate.RUNNING
    # Its owner says otherwise now.
    first.machine.spec = spec.model_copy(update={"standby": standby(f"127.0.0.1:{port}", 1.0)})
    await wait(driver, "the take-over", lambda: driver.state.past is not None, OVER_S)
    assert driver.state.past is not None
    assert driver.state.past.step is Step.DONE, driver.state.past
    assert driver.state.past.cause.startswith("service silent for more than 1 s")
    with pidfd_of(qemu) as living:
        assert living is None, "the first QEMU lives"
    assert first.state.why == "a standby takes over"
    vm = agent.vms["web"]
    assert vm is not first
    assert vm.run is Runstate.RUNNING
    # What it had written since is where it was, and nobody has it open.
    async with asyncio.timeout(OVER_S):
        while True:
            losses = await agent.standbys.losses("web")
            if losses:
                break
            await asyncio.sleep(0.05)  # poll interval
    assert [[one.image for one in loss.disks] for loss in losses] == [[disk_image]]
    assert losses[0].since < losses[0].ended
    taken = try_lock(disk_image)
    assert not isinstance(taken, Holder), taken
    taken.close()
