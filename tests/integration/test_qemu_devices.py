"""Devices that QEMU itself serves: their queues are on the threads that were asked for."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.server import serving
from sempervirt.core.errors import ImageLocked, InvalidRequest, Unavailable
from sempervirt.core.queue_map import Binding
from sempervirt.disk.state import Condition
from sempervirt.guest import ProbeClient
from sempervirt.qemu.facts import HostFacts, HostProbe
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.vm import Vm

Spec = Callable[..., VmSpec]
MIB = 1 << 20
BOOT_S = 180.0
REQUESTS = 300


@pytest.fixture
def image(place: Path) -> Callable[[str], str]:
    """Makes raw images of 32 MiB."""

    def make(name: str) -> str:
        path = place / f"{name}, raw"
        path.touch()
        os.truncate(path, 32 * MIB)
        return str(path)

    return make


@pytest.fixture
async def client(agent: Agent, config: AgentConfig) -> AsyncIterator[Client]:
    async with serving(agent, config.socket), Client.connect(config.socket) as connected:
        yield connected


async def mapping(vm: Vm, device: str) -> dict[str, list[int]]:
    """What QEMU says of a device: the queues of each thread."""
    found = await vm.machine.execute(
        "qom-get", {"path": f"/machine/peripheral/{device}", "property": "iothread-vq-mapping"}
    )
    return {item["iothread"]: item["vqs"] for item in found}


def run_time_ns(thread: int) -> int:
    return int(Path(f"/proc/{thread}/schedstat").read_text().split()[0])


async def busy_ns(vm: Vm) -> dict[str, int]:
    """How long each of QEMU's iothreads has run."""
    return {
        item["id"]: run_time_ns(item["thread-id"])
        for item in await vm.machine.execute("query-iothreads")
    }


async def loaded(client: ProbeClient, device: str) -> None:
    """Writes to a disk from all processors of the guest, and reads everything back."""
    await client.write_start(device, writers=8, span_bytes=8 * MIB)
    await client.wait_stats(lambda stats: stats.completions > REQUESTS)
    stats = await client.write_stop()
    assert (stats.io_error_count, stats.hung, stats.wrong.total) == (0, 0, 0), stats
    assert stats.verified_final is not None
    assert stats.verified_final.wrong == 0


@pytest.mark.guest
async def test_queues_are_on_the_threads_that_the_vm_file_names(
    agent: Agent, guest_spec: Spec, image: Callable[[str], str]
) -> None:
    blk = {"name": "a", "image": image("a"), "serial": "blk", "queues_per_thread": 2}
    scsi = {"name": "b", "image": image("b"), "bus": "virtio-scsi", "thread_map": [1, 0, 0]}
    one = {"name": "c", "image": image("c"), "serial": "one", "direct": True, "poll_us": 0}
    disks = [{**disk, "backend": "qemu"} for disk in (blk, scsi, one)]
    spec = VmSpec.model_validate(
        {**guest_spec().model_dump(mode="json"), "vcpus": 4, "disks": disks, "nics": [{}]}
    )
    vm = await agent.run_vm(spec)
    assert await mapping(vm, "disk-a") == {
        "disk-a-thread-0": [0, 2],
        "disk-a-thread-1": [1, 3],
    }
    assert await mapping(vm, "disk-b-bus") == {
        "disk-b-thread-0": [1, 2],
        "disk-b-thread-1": [0],
    }
    assert {name: str(plan) for name, plan in vm.plans.items()} == {
        "disk-a": "4 queues on 2 threads (VM file), engine threads (built-in default)",
        "disk-b": "3 queues on 2 threads (VM file), engine threads (built-in default)",
        "disk-c": "4 queues on 1 thread, engine native (built-in default)",
        "net0": "1 queue pair on 1 thread (QEMU's main loop), "
        "engine qemu (user-mode networking has no other)",
    }
    threads = await vm.machine.execute("query-iothreads")
    polls = {item["id"]: item["poll-max-ns"] for item in threads}
    assert polls["disk-c-thread-0"] == 0
    before = await busy_ns(vm)
    assert len(before) == 5
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
        await probe.wait_hello(deadline_s=BOOT_S)
        for device in ("serial:blk", "sda", "serial:one"):
            await loaded(probe, device)
    assert vm.state.gone == frozenset(), "the guest has unplugged nothing, whatever has an id"
    after = await busy_ns(vm)
    assert all(after[name] > before[name] for name in before), (before, after)


async def test_such_a_disk_has_no_spare_and_says_so(
    agent: Agent, client: Client, firmware_spec: Spec, image: Callable[[str], str]
) -> None:
    own = {"name": "own", "image": image("a"), "backend": "qemu", "queues": 2}
    ours = {"name": "ours", "image": image("b")}
    vm = await agent.run_vm(firmware_spec(disks=[own, ours]))
    views = {view.name: view for view in await client.disks()}
    assert sorted(views) == ["web/ours", "web/own"]
    view = await client.disk("web/own")
    assert view == views["web/own"]
    assert (view.condition, view.active_pid, view.spare_pid) == (Condition.QEMU, vm.pid, None)
    assert view.size_bytes == 32 * MIB
    assert view.queues is not None
    assert view.queues.summary == "2 queues on 1 thread, engine threads (built-in default)"
    for refused in (client.upgrade_disk("web/own", None), client.move_queues("web/own",
                    thread_map=[0, 1])):  # fmt: skip
        with pytest.raises(InvalidRequest, match="web/own is served by QEMU itself"):
            await refused
    # QEMU's lock and ours are the same.
    with pytest.raises(ImageLocked, match=rf"qemu-system-x86\S* \(pid {vm.pid}\)"):
        await agent.run_vm(firmware_spec(name="other", disks=[{**own, "backend": "blkd"}]))
    with pytest.raises(Unavailable, match='Failed to get "write" lock'):
        await agent.run_vm(firmware_spec(name="other", disks=[{**ours, "backend": "qemu"}]))
    await vm.kill()
    assert await client.disks() == []


async def test_a_later_agent_knows_how_the_queues_are_served(
    config: AgentConfig, firmware_spec: Spec, image: Callable[[str], str]
) -> None:
    own = {"name": "own", "image": image("a"), "backend": "qemu", "thread_map": [0, 1]}
    async with Agent.open(replace(config, keep_vms=True)) as agent:
        before = (await agent.run_vm(firmware_spec(disks=[own]))).plans
    async with Agent.open(config) as agent:
        assert agent.vm("web").plans == before
        assert before["disk-own"].binding == Binding((0, 1), "VM file")
        assert list(agent.own_disks) == ["web/own"]
        await agent.vm("web").kill()


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
async def test_a_qemu_that_knows_one_thread_for_each_device(
    agent: Agent,
    firmware_spec: Spec,
    image: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    bus: str,
) -> None:
    """As QEMU before 9.0 (virtio-blk) and 10.0 (virtio-scsi)."""
    facts = await agent.host()
    old = replace(facts, features=replace(facts.features, mapped_devices=frozenset()))

    async def of_old(_probe: HostProbe) -> HostFacts:
        return old

    monkeypatch.setattr(HostProbe, "facts", of_old)
    disk = {"name": "a", "image": image("a"), "backend": "qemu", "bus": bus, "queues": 8}
    with pytest.raises(Unavailable, match=f"cannot bind the queues of a {bus} device to 4 threads"):
        await agent.run_vm(firmware_spec(disks=[{**disk, "queues_per_thread": 2}]))
    vm = await agent.run_vm(firmware_spec(disks=[disk]))
    assert [item["id"] for item in await vm.machine.execute("query-iothreads")] == [
        "disk-a-thread-0"
    ]
    assert vm.plans["disk-a"].binding.map == (0,) * 8


def ip(*arguments: str) -> Any:
    """Runs `ip`, which needs the right to administer the network."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    done = subprocess.run([*sudo, "ip", *arguments], check=True, capture_output=True)
    return json.loads(done.stdout) if done.stdout else None


@pytest.fixture
def tap() -> Iterator[str]:
    """A tap interface that can have several queues."""
    name = f"sv{os.getpid()}"
    ip("tuntap", "add", name, "mode", "tap", "multi_queue", "user", str(os.geteuid()))
    yield name
    ip("link", "delete", name)


@pytest.mark.root
async def test_a_card_with_several_queues(agent: Agent, firmware_spec: Spec, tap: str) -> None:
    nic = {"type": "tap", "tap": tap, "queues": 3}
    vm = await agent.run_vm(firmware_spec(disks=[], nics=[nic]))
    (link,) = ip("-json", "-details", "link", "show", tap)
    # Its driver, which the firmware does not have, would enable the others.
    queues = link["linkinfo"]["info_data"]
    assert (queues["numqueues"], queues["numdisabled"]) == (1, 2)
    plan = vm.plans["net0"]
    assert plan.binding.queues == 3
    threads = {"vhost": 3, "qemu": 1}[plan.engine.value]
    assert plan.binding.threads == threads
    assert plan.engine.source


@pytest.mark.guest
async def test_a_disk_that_the_guest_ejects_is_told_as_ejected(
    config: AgentConfig, guest_spec: Spec, image: Callable[[str], str]
) -> None:
    """By an agent that saw it, and by the next one. The other disk, which stays, is the control.

    Another QEMU has the disk in its slot again, and the guest finds it when it looks.
    """
    other = {"name": "other", "image": image("b"), "backend": "qemu", "serial": "stays"}
    keys = guest_spec(serial="gone").model_dump(mode="json")
    keys["disks"].append(other)
    spec = VmSpec.model_validate({**keys, "machine": "pc"})  # whose slots a guest can switch off

    async def conditions(agent: Agent) -> dict[str, Condition]:
        async with serving(agent, config.socket), Client.connect(config.socket) as client:
            return {view.name: view.condition for view in await client.disks()}

    def ejected(agent: Agent) -> bool:
        return agent.vm("web").has_ejected("root")

    async with Agent.open(replace(config, keep_vms=True)) as agent:
        vm = await agent.run_vm(spec)
        async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
            await probe.wait_hello(deadline_s=BOOT_S)
            assert (await conditions(agent))["web/root"] is not Condition.EJECTED
            await probe.execute("/bin/sh", "-c", "echo 0 > /sys/bus/pci/slots/2/power")
            assert [device.serial for device in await probe.list_devices()] == ["stays"]
        await vm.machine.changes.wait_until(
            lambda: ejected(agent), timeout_s=BOOT_S, what="an event"
        )
        expected = {"web/root": Condition.EJECTED, "web/other": Condition.QEMU}
        assert await conditions(agent) == expected
        noted = vm.machine.journal.last("device")
        assert noted is not None
        assert noted.message == "disk-root was unplugged by the guest"
    async with Agent.open(config) as agent:
        vm = agent.vm("web")
        await vm.machine.changes.wait_until(
            lambda: ejected(agent), timeout_s=BOOT_S, what="an answer"
        )
        assert await conditions(agent) == expected
        await agent.restart_qemu("web")
        assert not ejected(agent)
        async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as probe:
            await probe.execute("/bin/sh", "-c", "echo 1 > /sys/bus/pci/rescan")
            async with asyncio.timeout(BOOT_S):
                while True:
                    found = {device.serial for device in await probe.list_devices()}
                    if found == {"gone", "stays"}:
                        break
                    await asyncio.sleep(0.05)  # poll interval
