"""Records, run directories and pids that are damaged or gone: nobody is lost, nobody runs twice."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.agent import AgentConfig
from sempervirt.api.client import Client
from sempervirt.api.schemas import DiskView, VmView
from sempervirt.core.errors import StateConflict
from sempervirt.disk.backend import PROGRAM
from sempervirt.disk.running import PEER_FILE_VARIABLE
from sempervirt.disk.state import Condition
from sempervirt.host.peers import write_peers
from sempervirt.host.procfs import ProcessId, find_by_argument, identify, start_ticks
from sempervirt.host.programs import find_program
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate

Spec = Callable[..., VmSpec]
Semperd = Callable[[], AbstractAsyncContextManager["subprocess.Popen[bytes]"]]

DEADLINE_S = 90.0
POLL_S = 0.05


async def wait_for(client: Client, condition: Callable[[DiskView], bool]) -> DiskView:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for view in await client.disks():
                if condition(view):
                    return view
            await asyncio.sleep(POLL_S)  # poll interval


async def guarded(client: Client, but: int | None = None) -> DiskView:
    """The disk, once a spare stands by; its active process is another one than `but`."""
    return await wait_for(
        client, lambda view: view.condition is Condition.GUARDED and view.active_pid != but
    )


def qemus(config: AgentConfig) -> list[int]:
    """Every QEMU of this test, by its arguments."""
    return find_by_argument(
        re.compile(rf"socket,id=monitor,path={re.escape(str(config.run_dir))}.*"), of_all=True
    )


def empty_record(config: AgentConfig) -> None:
    (config.vm_state_dir("web") / "vm.json").write_bytes(b"")


def no_records(config: AgentConfig) -> None:
    shutil.rmtree(config.vm_state_dir("web"))


def another_pid(config: AgentConfig) -> None:
    path = config.vm_state_dir("web") / "vm.json"
    path.write_text(re.sub(r'"pid": \d+', '"pid": 4194000', path.read_text()))


def pipe_for_a_record(config: AgentConfig) -> None:
    path = config.vm_state_dir("web") / "vm.json"
    path.unlink()
    os.mkfifo(path)


def half_a_disk_record(config: AgentConfig) -> None:
    path = config.vm_state_dir("web") / "disk-root.json"
    path.write_bytes(path.read_bytes()[:100])


def no_disk_record(config: AgentConfig) -> None:
    (config.vm_state_dir("web") / "disk-root.json").unlink()


def no_run_directory(config: AgentConfig) -> None:
    shutil.rmtree(config.vm_run_dir("web"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (empty_record, "vm.json cannot be read"),
        (no_records, "vm.json, is gone"),
        (another_pid, "names a QEMU that is gone, pid 4194000"),
        (pipe_for_a_record, "no regular file"),
        (half_a_disk_record, "disk-root.json cannot be read"),
        (no_disk_record, "disk-root.json is gone"),
        (no_run_directory, "r/vm/web is gone"),
    ],
)
async def test_nobody_is_lost_and_nobody_runs_twice(
    config: AgentConfig,
    firmware_spec: Spec,
    semperd: Semperd,
    damage: Callable[[AgentConfig], None],
    reason: str,
) -> None:
    async with Client.connect(config.socket) as client:
        async with semperd():
            before = await client.run_vm(firmware_spec())
            disk = await guarded(client)
        damage(config)
        async with semperd():
            (view,) = await client.vms()
            assert (view.name, view.state, view.pid) == ("web", Runstate.UNKNOWN, before.pid)
            assert reason in view.why
            assert (await client.vm("web")).state is Runstate.UNKNOWN
            with pytest.raises(StateConflict, match="VM web is unknown"):
                await client.run_vm(firmware_spec())
            assert qemus(config) == [before.pid]
            # The disk is looked after as before: its backend dies, and the spare takes over.
            now = await guarded(client)
            assert now.image == disk.image
            assert now.active_pid is not None
            os.kill(now.active_pid, signal.SIGKILL)
            await guarded(client, but=now.active_pid)
            ended = await client.kill_vm("web")
            assert ended.state.is_end
            assert qemus(config) == []
            again = await client.run_vm(firmware_spec())
            assert again.state is Runstate.RUNNING
            await client.kill_vm("web")
            await client.forget_vm("web")
            assert await client.vms() == []


async def test_sound_records_raise_no_doubt(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    """The control of the test above."""
    async with Client.connect(config.socket) as client:
        async with semperd():
            before = await client.run_vm(firmware_spec())
            await guarded(client)
        async with semperd(), asyncio.timeout(DEADLINE_S):
            while (view := await client.vm("web")).state is Runstate.UNKNOWN:
                assert view.why == "adopted, and not asked yet"
                await asyncio.sleep(POLL_S)  # poll interval
            assert (view.state, view.why, view.pid) == (Runstate.RUNNING, "", before.pid)
            await client.kill_vm("web")


async def test_what_is_removed_under_a_living_agent(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    async with Client.connect(config.socket) as client, semperd():
        before = await client.run_vm(firmware_spec())
        record = config.vm_state_dir("web") / "vm.json"
        text = record.read_bytes()
        record.unlink()
        no_run_directory(config)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                view = await client.vm("web")
                if view.state is Runstate.UNKNOWN:
                    break
                await asyncio.sleep(POLL_S)  # poll interval
        assert "qmp.sock is gone" in view.why
        assert view.pid == before.pid
        assert record.read_bytes() == text
        await client.kill_vm("web")


def made_anew(view: DiskView, before: DiskView) -> bool:
    """Whether none of the processes is one of those before, and a spare stands by."""
    old = {before.active_pid, before.spare_pid}
    return view.condition is Condition.GUARDED and not {view.active_pid, view.spare_pid} & old


async def test_a_disk_is_served_on_when_its_sockets_were_removed(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    """Two at a time die afterwards, so QEMU has to find the socket by its path. Nobody is killed
    for a control socket that somebody else has removed. The control is the test without upkeep in
    test_disk_supervision.py.
    """
    async with Client.connect(config.socket) as client, semperd():
        await client.run_vm(firmware_spec())
        before = await guarded(client)
        no_run_directory(config)
        now = await wait_for(client, lambda view: made_anew(view, before))
        assert now.restarts[-1].planned
        for pid in (now.spare_pid, now.active_pid):
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        last = await wait_for(
            client,
            lambda view: (
                made_anew(view, now)
                and view.backend is not None
                and view.backend["state"] == "running"
            ),
        )
        assert last.backend is not None
        assert [restart.reason for restart in last.restarts if "hung" in restart.reason] == []
        await client.kill_vm("web")


async def test_an_unknown_vm_whose_guest_powers_off(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    """Its QEMU ends by itself: the image is free then, and the name is not, until it is settled."""
    async with Client.connect(config.socket) as client:
        async with semperd():
            before = await client.run_vm(firmware_spec())
            await guarded(client)
        empty_record(config)
        async with semperd():
            await guarded(client)
            assert before.pid is not None
            os.kill(before.pid, signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    view = await client.vm("web")
                    if view.pid is None and not await client.disks():
                        break
                    await asyncio.sleep(POLL_S)  # poll interval
            assert "no QEMU of it was found" in view.why
            with pytest.raises(StateConflict, match="unknown"):
                await client.run_vm(firmware_spec())
        async with semperd():  # also for the next agent
            assert [view.state for view in await client.vms()] == [Runstate.UNKNOWN]
            await client.kill_vm("web")
            await client.forget_vm("web")
        async with semperd():
            assert await client.vms() == []


async def test_a_qemu_that_nobody_knows_of_stands_in_the_way(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    """It is found by a start, while the agent runs: nothing is unlinked, and nothing started."""
    async with Client.connect(config.socket) as client, semperd():
        monitor = config.vm_run_dir("web") / "qmp.sock"
        monitor.parent.mkdir(parents=True)
        stranger = subprocess.Popen(  # noqa: ASYNC220
            ["python3", "-c", "input()", f"socket,id=monitor,path={monitor},server=on,wait=off"],
            stdin=subprocess.PIPE,
        )
        try:
            monitor.touch()
            with pytest.raises(StateConflict, match=rf"QEMU \(pid {stranger.pid}\)"):
                await client.run_vm(firmware_spec())
            assert monitor.exists()
            view: VmView = await client.vm("web")
            assert (view.state, view.pid, view.spec) == (Runstate.UNKNOWN, stranger.pid, None)
            await client.kill_vm("web")
            assert stranger.wait(DEADLINE_S) == -signal.SIGKILL
        finally:
            stranger.kill()
            stranger.wait()
        assert (await client.run_vm(firmware_spec())).state is Runstate.RUNNING
        await client.kill_vm("web")


# VHOST_USER_GET_FEATURES of version 1, without content.
GET_FEATURES = struct.pack("=III", 1, 1, 0)


def is_listened_at(path: Path) -> bool:
    """Whether connections wait there: a socket has its path a moment before."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.setblocking(False)
        try:
            connection.connect(str(path))
        except BlockingIOError:  # nobody is let in, and the queue is full
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def is_served(path: Path) -> bool:
    """Whether a backend answers this process."""
    with socket.socket(socket.AF_UNIX) as connection:
        # As QEMU does: waits, while the backend lets nobody in.
        connection.setblocking(True)
        connection.connect(str(path))
        connection.settimeout(DEADLINE_S)
        try:
            connection.sendall(GET_FEATURES)
            return len(connection.recv(100)) == 20
        except ConnectionError:
            return False


def test_a_backend_serves_the_process_that_is_noted(place: Path, disk_image: Path) -> None:
    path, peers = place / "s", place / "qemu.peers"
    me = identify(os.getpid())
    assert me is not None
    write_peers(peers, [replace(me, start_ticks=me.start_ticks + 1)])
    argv = [find_program(PROGRAM), f"--socket-path={path}", f"--blk-file={disk_image}"]
    with (place / "log").open("wb") as log:
        backend = subprocess.Popen(
            argv, stderr=log, env={**os.environ, PEER_FILE_VARIABLE: str(peers)}
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not is_listened_at(path):
            assert time.monotonic() < deadline
            time.sleep(POLL_S)  # poll interval
        assert not is_served(path)
        while "is not the QEMU of this VM" not in (said := (place / "log").read_text()):
            assert time.monotonic() < deadline, said
            time.sleep(POLL_S)  # poll interval
        assert f"pid {os.getpid()} (" in said
        write_peers(peers, [ProcessId(1, 1, ""), me])
        assert is_served(path)
        peers.unlink()  # what it said last counts
        assert is_served(path)
    finally:
        backend.kill()
        backend.wait()


async def test_qemu_is_noted_and_connects_again(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd
) -> None:
    """Both backends are killed at once, so QEMU has to connect anew, to a third one."""
    async with Client.connect(config.socket) as client, semperd():
        view = await client.run_vm(firmware_spec())
        assert view.pid is not None
        noted = (config.vm_run_dir("web") / "qemu.peers").read_text()
        assert noted == f"{view.pid} {start_ticks(view.pid)}\n"
        disk = await guarded(client)
        assert disk.active_pid is not None
        assert disk.spare_pid is not None
        for pid in (disk.spare_pid, disk.active_pid):
            os.kill(pid, signal.SIGKILL)
        now = await wait_for(
            client,
            lambda view: (
                view.condition is Condition.GUARDED
                and view.active_pid not in {disk.active_pid, disk.spare_pid}
                and view.backend is not None
                and view.backend["state"] == "running"
            ),
        )
        assert now.backend is not None
        assert now.backend["counters"]["protocol_errors"] == 0
        await client.kill_vm("web")


async def test_a_state_directory_that_is_read_only(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd, place: Path
) -> None:
    """The next agent starts all the same, and looks after what runs."""
    async with Client.connect(config.socket) as client:
        async with semperd():
            before = await client.run_vm(firmware_spec())
            await guarded(client)
        sealed = ["mount", "--bind", str(config.state_dir), str(config.state_dir)]
        subprocess.run(sealed, check=True)  # noqa: ASYNC221
        try:
            subprocess.run(  # noqa: ASYNC221
                ["mount", "-o", "remount,bind,ro", str(config.state_dir)], check=True
            )
            async with semperd():
                now = await guarded(client)
                assert now.active_pid is not None
                os.kill(now.active_pid, signal.SIGKILL)
                await guarded(client, but=now.active_pid)
                assert (await client.vm("web")).pid == before.pid
                with pytest.raises(StateConflict):
                    await client.run_vm(firmware_spec())
                await client.kill_vm("web")
        finally:
            subprocess.run(["umount", "--lazy", str(config.state_dir)], check=True)  # noqa: ASYNC221
