"""A control group for each VM: what its processes cannot have of the host, and can have without.

The programs that take what they can are put into a group as a VM's are; the control is the same
program in no group.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.processes import processor_ns
from sempervirt.agent import AgentConfig
from sempervirt.api.client import Client
from sempervirt.cli.audit import audit
from sempervirt.host.groups import (
    VARIABLE,
    Controller,
    Groups,
    Limits,
    find_base,
    is_of_a_vm,
    tag_of,
)
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.groups import limits_of

BASE = find_base()
pytestmark = [
    pytest.mark.skipif(
        set(BASE.places) != set(Controller) or bool(BASE.unified),
        reason="no control groups of version 1 can be made here",
    ),
    pytest.mark.timeout(120),
]
Spec = Callable[..., VmSpec]
Semperd = Callable[[], AbstractAsyncContextManager[Any]]
MIB = 1 << 20
LIMITS = Limits(weight=100, memory_bytes=64 * MIB, tasks=20)
DEADLINE_S = 60.0

# Each says "go" when it may begin, and what came of it.
MEMORY = "taken = b'x' * (128 << 20)"
THREADS = """
import threading, time
for _ in range(40):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""
HEAD = "import os, sys\nsys.stdin.readline()\n"
END = "\nprint('done', flush=True)\nos._exit(0)"


@pytest.fixture
def held(place: Path) -> Iterator[Groups]:
    """Groups of this test alone."""
    made = Groups(BASE, tag_of(place))
    try:
        yield made
    finally:
        deadline = time.monotonic() + DEADLINE_S
        while left(place) and time.monotonic() < deadline:
            made.remove_all_but(())
            time.sleep(0.01)  # poll interval
        assert not left(place)


def left(run_dir: Path) -> list[Path]:
    """Groups of VMs that are there."""
    names = f"semper-{tag_of(run_dir)}-*-*"
    return [group for place in BASE.places.values() for group in place.glob(names)]


@contextmanager
def waiting(program: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `program` when it is told a line."""
    argv = [sys.executable, "-c", HEAD + program + END]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def came_of(program: str, groups: Groups | None) -> str:
    """What the program said in a group of these limits, or in none."""
    with waiting(program) as process:
        if groups is not None:
            groups.hold("web", [process.pid], [], LIMITS)
        said, _ = process.communicate("go\n", timeout=DEADLINE_S)
    return said


@pytest.mark.parametrize("program", [MEMORY, THREADS])
def test_a_program_takes_no_more_than_its_vm_may(held: Groups, program: str) -> None:
    assert "done" not in came_of(program, held)
    assert "done" in came_of(program, None), "the control"


def turns(processes: list[subprocess.Popen[str]]) -> list[int]:
    """The time of a processor that each has had, in nanoseconds."""
    return [processor_ns(one.pid) for one in processes]


def share(weight: int | None, held: Groups) -> float:
    """What one busy process has of a processor beside eight others, which are a VM's if they have a
    `weight`, and then the one has a hundred times that of a usual group.
    """
    busy = "\nwhile True: pass"
    with waiting(busy) as one:
        others = [waiting(busy) for _ in range(8)]
        started = [other.__enter__() for other in others]
        try:
            for process in (one, *started):
                os.sched_setaffinity(process.pid, {0})
            if weight is not None:
                mine = Limits(10_000, 1 << 30, 100)
                held.hold("agent", [one.pid], [], mine)
                limits = Limits(weight, 1 << 30, 100)
                held.hold("web", [process.pid for process in started], [], limits)
            for process in (one, *started):
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            deadline = time.monotonic() + DEADLINE_S
            while sum(turns([one, *started])) < 1_000_000_000 and time.monotonic() < deadline:
                time.sleep(0.05)  # poll interval
            had = turns([one, *started])
            return had[0] / sum(had)
        finally:
            for other, process in zip(others, started, strict=True):
                process.kill()
                other.__exit__(None, None, None)


def test_what_supervises_gets_its_turn_before_guests(held: Groups) -> None:
    assert share(100, held) > 0.5
    assert share(None, held) < 0.4, "the control"


def groups_of(pid: int) -> list[str]:
    return [
        line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if is_of_a_vm(line)
    ]


async def test_an_agent_puts_its_vms_into_groups(
    config: AgentConfig, firmware_spec: Spec, semperd: Semperd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    spec = firmware_spec()
    async with Client.connect(config.socket) as client:
        async with semperd() as agent:
            view = await client.run_vm(spec)
            host = await client.host()
            assert not [wall for wall in host.missing_walls if "limits" in wall]
            disk = (await client.disks())[0]
            assert view.pid is not None
            pids = [view.pid, disk.active_pid, disk.spare_pid]
            async with asyncio.timeout(DEADLINE_S):
                while not all(pid is not None and groups_of(pid) for pid in pids):
                    await asyncio.sleep(0.05)  # poll interval
                    disk = (await client.disks())[0]
                    pids = [view.pid, disk.active_pid, disk.spare_pid]
            name = f"semper-{tag_of(config.run_dir)}-vm-web"
            limit = BASE.places[Controller.MEMORY] / name / "memory.limit_in_bytes"
            assert int(limit.read_text()) == limits_of(spec).memory_bytes
            assert not groups_of(agent.pid)
            found = audit(config).processes
            assert {one.pid for one in found if one.limited} >= {view.pid, disk.active_pid}
        # The next agent finds them there, and leaves nothing when the VM has ended.
        async with semperd() as agent:
            await client.kill_vm("web")
            async with asyncio.timeout(DEADLINE_S):
                while left(config.run_dir):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)  # poll interval
            agent.terminate()
            await asyncio.to_thread(agent.wait, DEADLINE_S)
    gone = [place / f"semper-{tag_of(config.run_dir)}-agent" for place in BASE.places.values()]
    assert not any(group.exists() for group in gone)
