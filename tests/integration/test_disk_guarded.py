"""Disks of VMs that another manager runs: a QEMU that is not ours, as Proxmox VE starts one.

That a guest without tracked requests would notice such kills is shown by the same judge in
`tests/system`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.schemas import GuardRequest
from sempervirt.api.server import serving
from sempervirt.core.errors import ImageLocked, InvalidRequest, NotFound, StateConflict, Unavailable
from sempervirt.disk import sockets
from sempervirt.disk.answers import BackendState, Standing
from sempervirt.disk.client import BackendClient
from sempervirt.disk.driver import Disk
from sempervirt.guest import ProbeClient
from sempervirt.guest import image as guest_image
from sempervirt.host.procfs import arguments_of
from sempervirt.host.programs import find_program
from sempervirt.qemu.spec import DiskSpec
from sempervirt.renewal.snapshot import Consistency, Freezing
from sempervirt.vm import guarded
from sempervirt.vm.guarded import GuardedDisk
from sempervirt.vm.libvirt import Node, User
from tests.integration.conftest import Spec
from tests.integration.test_disk_under_load import BOOT_S, PAUSE, READY_S, completed, kill_active
from tests.unharmed import assert_unharmed

MIB = 1 << 20
NAME = "100/disk0"


def wanted(image: Path, **keys: object) -> GuardedDisk:
    disk = DiskSpec(name="disk0", image=image, queues=4, serial="loaded")
    return GuardedDisk.model_validate({"vm": "100", "disk": disk, **keys})


def qemu(place: Path, disk: Path) -> subprocess.Popen[bytes]:
    """A QEMU whose arguments for the disk are those of docs/proxmox.md."""
    guest = guest_image()
    documented = (
        "-object memory-backend-memfd,id=sempermem,size=256M,share=on "
        "-machine memory-backend=sempermem "
        f"-chardev socket,id=semper0,path={disk},reconnect-ms=100 "
        "-device vhost-user-blk-pci,chardev=semper0,num-queues=4"
    )
    argv = [
        *["qemu-system-x86_64", "-nodefaults", "-display", "none", "-m", "256M", "-smp", "2"],
        *["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-kernel", str(guest.kernel)],
        *["-initrd", str(guest.initrd), "-append", "console=ttyS0 quiet"],
        *["-serial", f"file:{place / 'console.log'}", *documented.split()],
        *["-chardev", f"socket,id=probe,path={place / 'probe.sock'},server=on,wait=off"],
        *["-device", "virtio-serial-pci", "-device"],
        "virtserialport,chardev=probe,name=org.sempervirt.probe",
    ]
    with (place / "qemu.log").open("wb") as output:
        return subprocess.Popen(argv, stdout=output, stderr=output)


@asynccontextmanager
async def loaded(probe: Path) -> AsyncIterator[ProbeClient]:
    async with await ProbeClient.connect(probe, deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        await client.write_start("serial:loaded", writers=16, span_bytes=8 * MIB)
        await completed(client, PAUSE)
        yield client


@pytest.mark.guest
async def test_a_guest_of_another_manager_notices_no_death(
    config: AgentConfig, disk_image: Path
) -> None:
    kept = replace(config, keep_vms=True)
    async with contextlib.AsyncExitStack() as stack:
        async with Agent.open(kept) as agent:
            disk = await agent.guard_disk(wanted(disk_image))
            process = qemu(config.run_dir.parent, disk.setup.files.socket)
            stack.callback(process.wait)
            stack.callback(process.kill)
            probe = loaded(config.run_dir.parent / "probe.sock")
            client = await stack.enter_async_context(probe)
            for _ in range(3):
                await kill_active(disk)
                await completed(client, PAUSE)
            await disk.wait_spare_ready(READY_S)
            await disk.upgrade()
            await completed(client, PAUSE)
            await agent.resize_disk(NAME, 48 * MIB)
            taken = await agent.snapshot_vm("100", ["disk0"], Freezing.AUTO)
            assert taken.consistency is Consistency.CRASH
            with pytest.raises(StateConflict, match="connected"):
                await agent.guarded.unguard(NAME)
        async with Agent.open(kept) as agent:  # the next one takes over
            disk = agent.disks[NAME]
            for _ in range(2):
                await kill_active(disk)
                await completed(client, PAUSE)
            assert_unharmed(await client.write_stop())
            assert disk.history.accounts.total.latency.total > 0
            process.kill()
            await _left(disk)
            await kill_active(disk)  # nobody is there to connect, and it is guarded all the same
            await disk.wait_spare_ready(READY_S)
            await agent.guarded.unguard(NAME, force=True)  # it has a snapshot
            assert not list(config.state_dir.glob("guarded/**/*.json"))
    async with Agent.open(kept) as agent:
        assert NAME not in agent.disks


async def _left(disk: Disk) -> None:
    """Waits until no front end is there."""
    async with asyncio.timeout(READY_S):
        while True:
            if (await disk.status()).state is BackendState.LISTENING:
                return
            await asyncio.sleep(0.02)  # poll interval


async def test_its_socket_is_for_those_that_were_named(config: AgentConfig, place: Path) -> None:
    image = place / "own.raw"
    image.touch()
    os.truncate(image, MIB)
    elsewhere = place / "theirs" / "front.sock"
    async with Agent.open(config) as agent:
        with pytest.raises(InvalidRequest, match="no group nobody-has-it"):
            await agent.guard_disk(wanted(image, group="nobody-has-it"))
        assert not agent.disks
        disk = await agent.guard_disk(wanted(image, mode=0o606))
        path = disk.setup.files.socket
        below = [one for one in reversed(path.parents) if one.is_relative_to(config.run_dir)]
        ways = [Node.of(one) for one in (*below, path)]
        stranger = User("stranger", 64055, frozenset({64055}))
        assert all(one.allows(stranger, 1) for one in ways[:-1])
        assert ways[-1].allows(stranger, 2)
        assert stat.S_IMODE(disk.setup.files.directory.stat().st_mode) == 0o700
        with pytest.raises(StateConflict, match="guarded already"):
            await agent.guard_disk(wanted(image))
        with pytest.raises(NotFound):
            await agent.guarded.unguard("100/other")
        await agent.guarded.unguard(NAME)
        assert not path.exists()
        elsewhere.parent.mkdir()
        elsewhere.write_text("somebody's")
        with pytest.raises(StateConflict, match="no socket"):
            await agent.guard_disk(wanted(image, socket=str(elsewhere)))
        assert elsewhere.read_text() == "somebody's"
        elsewhere.unlink()
        disk = await agent.guard_disk(wanted(image, socket=str(elsewhere)))
        assert elsewhere.is_socket()
        await agent.guarded.unguard(NAME)
        assert elsewhere.parent.is_dir()


async def test_an_image_that_is_not_the_disk_alone_is_not_given_back_unawares(
    agent: Agent, disk_image: Path
) -> None:
    await agent.guard_disk(wanted(disk_image))
    await agent.snapshot_vm("100", ["disk0"], Freezing.AUTO)
    with pytest.raises(StateConflict, match="an old state for the disk") as refused:
        await agent.guarded.unguard(NAME)
    assert NAME in agent.disks
    await agent.guarded.unguard(NAME, force=True)
    command = str(refused.value).partition("semper-blkd ")[2].split()
    merge = [find_program("semper-blkd"), *command]
    await asyncio.to_thread(subprocess.run, merge, check=True)
    await agent.guard_disk(wanted(disk_image))
    await agent.guarded.unguard(NAME)  # it is a plain image again


async def test_names_are_either_ours_or_theirs(agent: Agent, firmware_spec: Spec) -> None:
    spec = firmware_spec()
    vm = await agent.run_vm(spec)
    mine = GuardedDisk(vm="web", disk=spec.disks[0])
    with pytest.raises(StateConflict, match="a VM of this host"):
        await agent.guard_disk(mine)
    with pytest.raises(ImageLocked):  # two writers of one image
        await agent.guard_disk(GuardedDisk(vm="other", disk=spec.disks[0]))
    assert "other/root" not in agent.disks
    await vm.kill()
    await agent.forget_vm("web")
    await agent.guard_disk(mine)
    with pytest.raises(StateConflict, match="another manager"):
        await agent.run_vm(spec)
    await agent.guarded.unguard("web/root")


async def test_the_next_agent_takes_it_over_and_nobody_need_be_connected(
    config: AgentConfig, disk_image: Path
) -> None:
    kept = replace(config, keep_vms=True)
    async with Agent.open(kept) as agent:
        disk = await agent.guard_disk(wanted(disk_image))
        await kill_active(disk)
        await disk.wait_spare_ready(READY_S)
        pid = disk.active_pid
    async with Agent.open(kept) as agent:
        disk = agent.disks[NAME]
        assert disk.active_pid == pid
        await kill_active(disk)
        await disk.wait_spare_ready(READY_S)
        await disk.upgrade()
        await agent.guarded.unguard(NAME)
        assert not list(config.state_dir.glob("guarded/**/*.json"))


async def test_directories_that_somebody_removes_are_made_again_with_the_sockets(
    agent: Agent, disk_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "AGAIN_S", 0.2)
    monkeypatch.setattr(sockets, "LOOK_S", 0.2)
    disk = await agent.guard_disk(wanted(disk_image))
    await disk.wait_spare_ready(READY_S)
    pid, path = disk.active_pid, disk.setup.files.socket
    before = path.stat()
    shutil.rmtree(agent.config.run_dir / "guarded")
    shutil.rmtree(agent.config.run_dir / "disks")
    await disk.changes.wait_until(
        lambda: disk.upgrade_count == 1, timeout_s=3 * READY_S, what="the hand-over"
    )
    await disk.wait_spare_ready(READY_S)
    assert disk.active_pid != pid
    now = path.stat()
    assert (now.st_mode, now.st_uid, now.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert (await disk.status()).pid == disk.active_pid
    await agent.guarded.unguard(NAME)


async def test_a_read_only_disk_is_served_again_by_a_new_process(
    agent: Agent, disk_image: Path
) -> None:
    disk = DiskSpec(name="disk0", image=disk_image, read_only=True)
    served = await agent.guard_disk(GuardedDisk(vm="100", disk=disk))
    for _ in range(3):
        pid = served.active_pid
        assert pid is not None
        assert served.spare_pid is None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(READY_S):
            while True:
                if served.active_pid not in (None, pid):
                    break
                await asyncio.sleep(0.02)  # poll interval
        await served.wait_serving(READY_S)
        assert (await served.status()).read_only
    with pytest.raises(StateConflict, match="no spare"):
        await served.upgrade()
    await agent.guarded.unguard(NAME)


async def _boot(config: AgentConfig, pids: list[int]) -> None:
    """The host goes down: no process is there any more, and what is in /run is gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(READY_S):
        while True:
            if not any(any(arguments_of(pid)) for pid in pids):
                break
            await asyncio.sleep(0.02)  # poll interval
    shutil.rmtree(config.run_dir)


async def test_after_a_boot_it_is_served_once_its_image_is_there(
    config: AgentConfig, disk_image: Path
) -> None:
    kept = replace(config, keep_vms=True)
    async with Agent.open(kept) as agent:
        disk = await agent.guard_disk(wanted(disk_image))
        await disk.wait_spare_ready(READY_S)
        pids = [pid for pid in (disk.active_pid, disk.spare_pid) if pid]
    await _boot(config, pids)
    away = disk_image.with_suffix(".away")
    os.rename(disk_image, away)  # noqa: PTH104
    async with Agent.open(kept) as agent:
        assert NAME not in agent.disks
        with pytest.raises(InvalidRequest, match="does not exist"):
            agent.disk(NAME)
        os.rename(away, disk_image)  # noqa: PTH104
        async with asyncio.timeout(30):
            while True:
                if NAME in agent.disks:
                    break
                await asyncio.sleep(0.05)  # poll interval
        await agent.disks[NAME].wait_serving(READY_S)
        await agent.guarded.unguard(NAME)


async def test_after_a_boot_each_disk_of_a_vm_is_what_is_at_its_path(
    config: AgentConfig, disk_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices have other numbers after a boot, as a copy in the image's place has."""
    monkeypatch.setattr("sempervirt.vm.guarded.AT_ONCE", 1)
    kept = replace(config, keep_vms=True)
    second = disk_image.with_suffix(".second")
    shutil.copy(disk_image, second)
    other = GuardedDisk(vm="100", disk=DiskSpec(name="disk1", image=second))
    async with Agent.open(kept) as agent:
        disks = [await agent.guard_disk(wanted(disk_image)), await agent.guard_disk(other)]
        for disk in disks:
            await disk.wait_spare_ready(READY_S)
        pids = [pid for disk in disks for pid in (disk.active_pid, disk.spare_pid) if pid]
    await _boot(config, pids)
    for image in (disk_image, second):
        shutil.copy(image, image.with_suffix(".copy"))
        image.with_suffix(".copy").rename(image)
    async with Agent.open(kept) as agent:
        for name in (NAME, "100/disk1"):
            await agent.disks[name].wait_serving(READY_S)
            await agent.guarded.unguard(name)


# Without an agent: semper-disk@.socket, semper-disk@.service, semper-disk-spare@.service


async def test_two_processes_of_a_service_manager_serve_by_turns(
    place: Path, disk_image: Path
) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(place / "front.sock"))
        listener.listen(16)
        notified = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notified.bind(str(place / "notify"))
        notified.settimeout(READY_S)
        processes = {}
        for name in ("one", "other"):
            command = (
                "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "
                f"{find_program('semper-blkd')} --spare --blk-file={disk_image} "
                f"--session-socket={place / 'session'} --control-socket={place / name}.ctl"
            )
            processes[name] = subprocess.Popen(  # noqa: ASYNC220
                ["/bin/sh", "-c", command],
                stdin=listener.fileno(),
                env={**os.environ, "NOTIFY_SOCKET": str(place / "notify")},
            )
            stack.callback(processes[name].wait)
            stack.callback(processes[name].kill)
            assert b"READY=1" in await asyncio.to_thread(notified.recv, 256)
        await _holds(place / "one.ctl", processes["one"].pid)
        processes["one"].kill()
        await _holds(place / "other.ctl", processes["other"].pid)


async def _holds(control: Path, pid: int) -> None:
    """Waits until that process has the image."""
    client = BackendClient(control, pid)
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(Unavailable):
                if (await client.status()).standing is Standing.HELD:
                    return
            await asyncio.sleep(0.02)  # poll interval


async def test_it_is_guarded_over_the_api(config: AgentConfig, disk_image: Path) -> None:
    async with (
        Agent.open(config) as agent,
        serving(agent, config.socket),
        Client.connect(config.socket) as client,
    ):
        view = await client.guard_disk("web/vda", GuardRequest(image=disk_image, mode=0o600))
        assert view.socket == config.run_dir / "disks" / "web" / "vda.sock"
        assert [one.name for one in await client.disks()] == ["web/vda"]
        lines = (await client.metrics()).splitlines()
        assert 'semper_disk_size_bytes{disk="web/vda"} 3.3554432e+07' in lines
        assert sum('disk="web/vda"' in line for line in lines) == 49  # as is documented
        await client.unguard_disk("web/vda", force=False)
        assert await client.disks() == []
