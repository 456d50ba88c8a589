"""A real VM is watched: what counts as its death, what as silence, and what as neither; and it is
fenced, by proof, in whatever state it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.disk.image_lock import Holder, ImageLock, try_lock
from sempervirt.host import background
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import QemuEvent, Runstate
from sempervirt.standby.evidence import Alive, Dead, Death, Over, Suspected
from sempervirt.standby.local_fence import LocalFence
from sempervirt.standby.means import NotYet, Proven
from sempervirt.standby.rules import GoAhead, Judgement, Provable, Rules, Stay
from sempervirt.standby.watching import Watch
from sempervirt.vm.vm import Vm

Spec = Callable[..., VmSpec]
DEADLINE_S = 90.0
# Hundredths are what is seen; a busy machine has room.
SEEN_S = 10.0


@asynccontextmanager
async def watching(vm: Vm, rules: list[Rules]) -> AsyncIterator[Watch]:
    """Watches `vm` until the block is left, by the last of these rules."""
    watch = Watch(vm.name, lambda: vm, lambda: rules[-1], Provable.YES, monitor_s=3.0)
    task = background.start(watch.run(), "watch")
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])


async def judged(watch: Watch, what: Callable[[Judgement], bool]) -> Judgement:
    """The first judgement that is as awaited."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = watch.look()
            if what(found):
                return found
            await asyncio.sleep(0.02)  # poll interval


async def test_a_silent_monitor_is_a_suspicion_and_a_killed_qemu_a_proof(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    assert vm.pid is not None
    rules = [Rules(monitor_silent_s=2.0)]
    async with watching(vm, rules) as watch:
        await judged(watch, lambda found: isinstance(found.verdict, Alive))
        os.kill(vm.pid, signal.SIGSTOP)
        found = await judged(watch, lambda found: isinstance(found.permission, GoAhead))
        assert isinstance(found.verdict, Suspected)
        # By the rules that a VM has by itself, nothing is taken over for that.
        rules.append(Rules())
        assert isinstance(watch.look().permission, Stay)
        os.kill(vm.pid, signal.SIGCONT)
        await judged(watch, lambda found: isinstance(found.verdict, Alive))
        began = time.monotonic()
        os.kill(vm.pid, signal.SIGKILL)
        found = await judged(watch, lambda found: isinstance(found.permission, GoAhead))
        assert time.monotonic() - began < SEEN_S
        assert isinstance(found.verdict, Dead)
        assert found.verdict.proof.death is Death.QEMU_ENDED
        assert "signal 9" in found.verdict.proof.detail


async def test_what_is_asked_for_is_no_death(agent: Agent, firmware_spec: Spec) -> None:
    vm = await agent.run_vm(firmware_spec())
    async with watching(vm, [Rules(monitor_silent_s=0.0, service_silent_s=0.0)]) as watch:
        await judged(watch, lambda found: isinstance(found.verdict, Alive))
        await vm.pause()
        assert isinstance(watch.look().permission, Stay)
        await vm.resume()
        await vm.kill()
        found = watch.look()
        assert isinstance(found.verdict, Over), found
        assert isinstance(found.permission, Stay)


async def test_a_guest_that_panics_is_dead_until_it_begins_anew(
    agent: Agent, firmware_spec: Spec
) -> None:
    """The event comes from the test: a firmware does not panic."""
    vm = await agent.run_vm(firmware_spec())
    rules = [Rules()]
    async with watching(vm, rules) as watch:
        await judged(watch, lambda found: isinstance(found.verdict, Alive))
        vm.machine.post(QemuEvent("GUEST_PANICKED"))
        found = await judged(watch, lambda found: isinstance(found.verdict, Dead))
        assert isinstance(found.permission, GoAhead)
        rules.append(Rules(guest_panicked_s=None))
        assert isinstance(watch.look().permission, Stay)
        for event in ("RESET", "RESUME"):
            vm.machine.post(QemuEvent(event))
        await judged(watch, lambda found: isinstance(found.verdict, Alive))


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_vm_is_fenced_by_proof_whatever_it_does(
    agent: Agent, config: AgentConfig, firmware_spec: Spec, stopped: bool
) -> None:
    vm = await agent.run_vm(firmware_spec())
    image = vm.spec.disks[0].image
    disk = vm.disks["root"]
    await disk.wait_spare_ready(DEADLINE_S)
    assert isinstance(try_lock(image), Holder)
    if stopped:
        for pid in (vm.pid, disk.active_pid, disk.spare_pid):
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
    fence = LocalFence(vm, config)
    proof = await fence.prove()
    assert isinstance(proof, Proven), proof
    assert vm.run is Runstate.STOPPED
    assert isinstance(try_lock(image), Holder), "the lock is the fence's until it is let go"
    fence.let_go()
    taken = try_lock(image)
    assert isinstance(taken, ImageLock)
    # The control: whoever else has the image is found, and named.
    proof = await fence.prove()
    assert isinstance(proof, NotYet)
    assert "locked by" in proof.why
    taken.close()
    assert isinstance(await fence.prove(), Proven)
    fence.let_go()
