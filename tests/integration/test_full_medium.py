"""What fills the run directory: a console that is written to without an end.

A real VM, with a process that writes to its console's log as QEMU does (O_APPEND) for a guest.
First nobody keeps the log within bounds, until the medium is full; VM, disk and agent go on all the
same. Then the agent makes room.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.host import process
from sempervirt.qemu import driver
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate

pytestmark = pytest.mark.root
Spec = Callable[..., VmSpec]
KIB = 1 << 10
LIMIT, ROOM = 64 * KIB, 256 * KIB
DEADLINE_S = 120.0


@contextmanager
def small_medium(directory: Path) -> Iterator[None]:
    directory.mkdir(mode=0o700)
    options = f"size={2 * ROOM},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)  # a process may still end


@contextmanager
def flood(log: Path) -> Iterator[None]:
    """Writes to a log without an end, and takes no notice when nothing more fits."""
    script = 'while :; do cat /proc/kallsyms >> "$1"; done 2>/dev/null'
    writer = subprocess.Popen(["sh", "-c", script, "-", log], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()


def free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


async def wait_until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # poll interval


async def test_a_console_that_is_written_to_without_an_end_fills_nothing(
    config: AgentConfig, firmware_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound_log, bounded = process.bound_log, False

    def bound(path: Path, limit_bytes: int) -> None:
        if bounded:
            bound_log(path, limit_bytes)

    monkeypatch.setattr(process, "bound_log", bound)
    monkeypatch.setattr(driver, "LOG_LIMIT_BYTES", LIMIT)
    monkeypatch.setattr(driver, "HOUSEKEEPING_S", 0.05)
    with small_medium(config.run_dir):
        async with Agent.open(config) as agent:
            vm = await agent.run_vm(firmware_spec())
            disk, console = agent.disks["web/root"], vm.machine.files.console_log
            log_of_disk = next(console.parent.glob("disk-root-*.log"))

            async def take_over() -> None:
                await disk.wait_spare_ready(DEADLINE_S)
                pid, count = disk.active_pid, disk.restart_count
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await disk.changes.wait_until(
                    lambda: disk.restart_count > count, timeout_s=DEADLINE_S, what="a take-over"
                )

            with flood(console):
                await wait_until(lambda: free(config.run_dir) == 0)  # the control
                await take_over()
                assert vm.run is Runstate.RUNNING
                bounded = True
                # There is no room for a copy before the log gives up its own.
                kept = console.with_name("console.log.1")
                await wait_until(kept.exists)
                assert kept.stat().st_size <= LIMIT
            await wait_until(lambda: console.stat().st_size <= LIMIT)
            await wait_until(lambda: free(config.run_dir) > ROOM)
            with flood(log_of_disk):
                await wait_until(log_of_disk.with_name(log_of_disk.name + ".1").exists)
            await wait_until(lambda: log_of_disk.stat().st_size <= LIMIT)
            await take_over()
            await disk.wait_spare_ready(DEADLINE_S)
            assert vm.run is Runstate.RUNNING
            await vm.kill()
