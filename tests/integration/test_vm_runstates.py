"""A real QEMU through its runstates: requests, its end in every way, and a monitor that hangs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sempervirt.agent import Agent
from sempervirt.core.errors import (
    ImageLocked,
    OutcomeUnknown,
    StateConflict,
    Unavailable,
)
from sempervirt.guest import ProbeClient
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from tests.silence import soon_silent

Spec = Callable[..., VmSpec]
BOOT_S, READY_S = 180.0, 90.0


async def test_pause_and_resume(agent: Agent, firmware_spec: Spec) -> None:
    vm = await agent.run_vm(firmware_spec())
    assert vm.run.value == "running"
    await vm.pause()
    assert vm.run.value == "paused"
    assert (await vm.machine.execute("query-status"))["status"] == "paused"
    await vm.pause()  # twice is once
    with pytest.raises(StateConflict, match="resume it first"):
        await vm.stop()
    await vm.resume()
    assert (await vm.machine.execute("query-status"))["status"] == "running"
    await vm.kill()
    assert vm.run is Runstate.STOPPED
    assert vm.end is not None
    assert vm.end.reason == "killed on request"
    with pytest.raises(StateConflict):
        await vm.pause()


@pytest.mark.parametrize("machine", ["q35", "pc"])
async def test_everything_a_vm_file_can_say_is_understood_by_qemu(
    agent: Agent, firmware_spec: Spec, place: Path, machine: str
) -> None:
    images = [place / f"{name}, with a comma.raw" for name in ("a", "b")]
    for image in images:
        image.touch()
        os.truncate(image, 1 << 20)
    spec = firmware_spec(
        machine=machine,
        vcpus=2,
        nics=[{}, {"type": "user", "mac": "52:54:00:00:00:01"}],
        channels=[{"name": "org.example.one"}, {"name": "org.example.two"}],
        on_crash="poweroff",
        on_reboot="poweroff",
        disks=[
            {"name": "a", "image": str(images[0]), "queues": 2, "queue_size": 64, "serial": "s"},
            {"name": "b", "image": str(images[1]), "read_only": True, "block_size": 4096},
        ],
    )
    vm = await agent.run_vm(spec)
    assert vm.run is Runstate.RUNNING
    assert sorted(agent.disks) == ["web/a", "web/b"]
    assert (await agent.disks["web/b"].status()).read_only
    assert vm.channel_path("two").is_socket()


async def test_state_follows_what_others_do_to_the_monitor(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    await vm.machine.execute("stop")
    await vm.wait_state(Runstate.PAUSED, timeout_s=READY_S)
    await vm.machine.execute("cont")
    await vm.wait_state(Runstate.RUNNING, timeout_s=READY_S)
    await vm.machine.execute("system_reset")
    await vm.machine.changes.wait_until(
        lambda: vm.state.resets == 1, timeout_s=READY_S, what="a reset"
    )
    assert vm.run is Runstate.RUNNING


async def test_a_guest_that_ignores_the_power_button_is_cut_off(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    await vm.stop(grace_s=0.2)
    assert vm.run is Runstate.STOPPED
    assert vm.end is not None
    assert "cut off" in vm.end.reason
    assert vm.end.exit_code == 0


async def test_a_killed_qemu_is_a_crash_and_frees_its_disk(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGKILL)
    await vm.wait_ended(READY_S)
    assert vm.run is Runstate.CRASHED
    assert vm.end is not None
    assert vm.end.signal == signal.SIGKILL
    assert not agent.disks
    again = await agent.run_vm(firmware_spec())
    assert again.run is Runstate.RUNNING


async def test_sigterm_to_qemu_is_an_end_with_its_cause(agent: Agent, firmware_spec: Spec) -> None:
    vm = await agent.run_vm(firmware_spec())
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGTERM)
    await vm.wait_ended(READY_S)
    assert vm.run is Runstate.STOPPED
    assert "host-signal" in vm.state.why


@soon_silent
async def test_hung_monitor_makes_the_state_unknown_until_it_answers_again(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGSTOP)
    with pytest.raises(OutcomeUnknown):
        await vm.pause()
    assert vm.run is Runstate.UNKNOWN
    with pytest.raises(StateConflict, match="semper vm kill web"):
        await agent.run_vm(firmware_spec())
    with pytest.raises(StateConflict, match="semper vm kill web"):
        await vm.resume()
    os.kill(vm.pid, signal.SIGCONT)
    # The command may have been carried out or not: what QEMU says now is what counts.
    await vm.wait_state(Runstate.RUNNING, Runstate.PAUSED, timeout_s=READY_S)


@soon_silent
async def test_kill_settles_an_unknown_state(agent: Agent, firmware_spec: Spec) -> None:
    vm = await agent.run_vm(firmware_spec())
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGSTOP)
    await vm.wait_state(Runstate.UNKNOWN, timeout_s=READY_S)  # nobody asked: the heartbeat noticed
    await vm.kill()
    assert vm.run is Runstate.STOPPED
    assert (await agent.run_vm(firmware_spec())).run is Runstate.RUNNING


async def test_requests_at_the_same_time_do_not_mix(agent: Agent, firmware_spec: Spec) -> None:
    vm = await agent.run_vm(firmware_spec())
    results = await asyncio.gather(vm.pause(), vm.pause(), vm.resume(), return_exceptions=True)
    assert results[0] is None
    assert [type(result) for result in results[1:]] == [StateConflict, StateConflict]
    assert vm.run is Runstate.PAUSED


async def test_a_vm_that_cannot_start_says_why_and_leaves_nothing(
    agent: Agent, firmware_spec: Spec
) -> None:
    with pytest.raises(Unavailable, match=re.escape("unable to find CPU model 'nonesuch'")):
        await agent.run_vm(firmware_spec(cpu="nonesuch"))
    assert not agent.disks
    assert agent.vm("web").run is Runstate.CRASHED
    await agent.forget_vm("web")
    assert not agent.vms


async def test_the_same_image_in_two_vms_is_refused_with_its_holder(
    agent: Agent, firmware_spec: Spec
) -> None:
    vm = await agent.run_vm(firmware_spec())
    with pytest.raises(ImageLocked, match=rf"pid {agent.disks['web/root'].active_pid}"):
        await agent.run_vm(firmware_spec(name="other"))
    assert list(agent.vms) == ["web"]
    assert vm.run is Runstate.RUNNING


@pytest.mark.guest
async def test_guest_reboots_and_powers_off(agent: Agent, guest_spec: Spec) -> None:
    vm = await agent.run_vm(guest_spec())
    pid = vm.pid
    async with await ProbeClient.connect(vm.channel_path("probe")) as client:
        await client.wait_hello()
        await client.reboot()
        assert vm.state.resets >= 1
        assert vm.pid == pid
        await client.poweroff()
    await vm.wait_ended(BOOT_S)
    assert vm.run is Runstate.STOPPED
    assert vm.state.why == "the guest powered off"
