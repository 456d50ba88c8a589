"""Real backends without a guest: take-overs, upgrades, crash loops, refusals, adoption."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import stat
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.durations import Backoff
from sempervirt.core.errors import ImageLocked, InvalidRequest, StateConflict, Unavailable
from sempervirt.disk import lifecycle, sockets
from sempervirt.disk.backend import Blkd, DiskOptions
from sempervirt.disk.driver import Disk
from sempervirt.disk.lifecycle import adopt_disk, start_disk, sweep_disk
from sempervirt.disk.record import Role, read_disk_record
from sempervirt.disk.running import DiskFiles
from sempervirt.disk.setup import DiskSetup
from sempervirt.disk.state import Condition, Policy
from sempervirt.disk.volume import inspect
from sempervirt.host import process
from sempervirt.host.procfs import identify, start_ticks

READY_S = 90.0


class Started:
    """Disks that are stopped at the end of a test, whatever became of it."""

    def __init__(self) -> None:
        self.disks: list[Disk] = []

    async def start(self, setup: DiskSetup) -> Disk:
        disk = await start_disk(setup)
        self.disks.append(disk)
        return disk

    async def adopt(self, setup: DiskSetup) -> Disk:
        """Lets go of the one disk, as an agent that ends, and adopts it again."""
        await self.disks.pop().detach()
        disk = await adopt_disk(setup)
        self.disks.append(disk)
        return disk


@pytest.fixture
async def started(place: Path) -> AsyncIterator[Started]:  # ended before `place` looks
    holder = Started()
    yield holder
    for disk in holder.disks:
        await disk.stop()


@pytest.fixture
def setup(place: Path, disk_image: Path) -> DiskSetup:
    return DiskSetup(
        name="web/root",
        volume=inspect(disk_image, read_only=False),
        options=DiskOptions(disk_image, serial="test"),
        command=Blkd(),
        policy=Policy(),
        files=DiskFiles(place, "root"),
        record=place / "disk.json",
    )


def program(path: Path, text: str) -> str:
    """A shell script at `path`."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def program_of(pid: int | None) -> Path:
    return Path(f"/proc/{pid}/exe").readlink()


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def kill_and_wait(pid: int | None) -> None:
    assert pid is not None
    identity = identify(pid)
    assert identity is not None
    watched = process.adopt(identity, lambda _end: None)
    assert watched is not None
    await watched.end(0)


async def wait_restarts(disk: Disk, count: int) -> None:
    await disk.changes.wait_until(
        lambda: len(disk.restarts) >= count, timeout_s=READY_S, what=f"{count} restarts"
    )


async def test_the_spare_takes_over_and_is_replaced(started: Started, setup: DiskSetup) -> None:
    disk = await started.start(setup)
    for count in range(1, 6):
        await disk.wait_spare_ready(READY_S)
        spare = disk.spare_pid
        kill(disk.active_pid)
        await wait_restarts(disk, count)
        assert disk.active_pid == spare
        await disk.wait_serving(READY_S)
    assert (await disk.status()).pid == disk.active_pid
    assert disk.restart_count == 5
    assert {restart.reason for restart in disk.restarts} == {"killed by SIGKILL"}
    assert len(setup.files.logs()) <= 6  # those of the last five, and of the present ones


async def test_without_a_spare_a_new_backend_starts_at_once(
    started: Started, setup: DiskSetup
) -> None:
    disk = await started.start(replace(setup, policy=Policy(spare=False)))
    first = disk.active_pid
    kill(first)
    await wait_restarts(disk, 1)
    assert disk.active_pid not in (None, first)
    await disk.wait_serving(READY_S)
    assert disk.spare_pid is None


async def test_both_backends_killed_together(started: Started, setup: DiskSetup) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    kill(disk.spare_pid)
    kill(disk.active_pid)
    await wait_restarts(disk, 1)
    await disk.wait_spare_ready(READY_S)


async def test_a_killed_spare_is_replaced_and_the_active_one_stays(
    started: Started, setup: DiskSetup
) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    active, spare = disk.active_pid, disk.spare_pid
    kill(spare)
    await disk.changes.wait_until(
        lambda: disk.spare_pid not in (spare, None), timeout_s=READY_S, what="a new spare"
    )
    assert disk.active_pid == active
    assert not disk.restarts


async def test_upgrade_serves_from_the_new_binary(
    started: Started, setup: DiskSetup, place: Path
) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    copy = shutil.copy2(setup.command.binary(), place / "new-blkd")
    await disk.upgrade(str(copy))
    assert disk.active_pid is not None
    assert program_of(disk.active_pid) == copy
    assert disk.upgrade_count == 1
    assert disk.restart_count == 0
    assert disk.restarts[-1].planned
    await disk.wait_spare_ready(READY_S)
    assert program_of(disk.spare_pid) == copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo broken >&2; exit 1", "broken"),
        ("echo nonsense", "does not say what it can do"),
        ("""echo '{"type": "gpu", "features": []}'""", "lacks"),
        # It looks like a backend, and ends as soon as it should be one.
        (
            """[ "$1" = --print-capabilities ] || exit 7
            echo '{"type": "block", "features": ["blk-file", "read-only", "session"]}'""",
            "exit code 7",
        ),
    ],
)
async def test_a_broken_binary_is_not_upgraded_to(
    started: Started, setup: DiskSetup, place: Path, text: str, message: str
) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    active = disk.active_pid
    with pytest.raises(Unavailable, match=message):
        await disk.upgrade(program(place / "broken", text))
    assert disk.active_pid == active
    assert not disk.restarts
    await disk.wait_spare_ready(READY_S)
    assert disk.binary == setup.command.binary()


async def test_a_replaced_file_does_not_become_the_backend_by_accident(
    started: Started, setup: DiskSetup, place: Path
) -> None:
    """The installed file is broken, in a way that only shows when it is the backend."""
    installed, new = place / "semper-blkd", place / "new"
    shutil.copy2(setup.command.binary(), installed)
    disk = await started.start(replace(setup, command=Blkd(installed)))
    await disk.wait_spare_ready(READY_S)
    text = """[ "$1" = --print-capabilities ] || exit 7
        echo '{"type": "block", "features": ["blk-file", "session"]}'"""
    program(new, text)
    new.replace(installed)
    assert disk.upgrade_available
    with pytest.raises(Unavailable, match="exit code 7"):
        await disk.upgrade()
    kill(disk.active_pid)  # with or without a spare: the old program serves
    await wait_restarts(disk, 1)
    await disk.wait_spare_ready(READY_S)
    kill(disk.spare_pid)
    kill(disk.active_pid)
    await wait_restarts(disk, 2)
    await disk.wait_spare_ready(READY_S)
    # So it does for the next agent.
    disk = await started.adopt(replace(setup, command=Blkd(installed)))
    kill(disk.spare_pid)
    kill(disk.active_pid)
    await wait_restarts(disk, 1)
    await disk.wait_spare_ready(READY_S)
    assert disk.upgrade_available


async def test_two_upgrades_at_once_conflict(
    started: Started, setup: DiskSetup, place: Path
) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    real, go = setup.command.binary(), place / "go"
    slow = program(
        place / "slow",
        f"""[ "$1" = --print-capabilities ] || while ! [ -e {go} ]; do sleep 0.01; done
        exec {real} "$@" """,
    )
    first = asyncio.create_task(disk.upgrade(slow))
    await disk.changes.wait_until(
        lambda: disk.state.upgrade is not None, timeout_s=READY_S, what="the first to begin"
    )
    with pytest.raises(StateConflict, match="another upgrade"):
        await disk.upgrade()
    go.touch()
    await first
    assert disk.binary == slow


async def test_crash_loop_backs_off_says_why_and_recovers(
    started: Started, setup: DiskSetup, place: Path
) -> None:
    policy = Policy(active_backoff=Backoff(free=2, first_s=0.02, ceiling_s=0.2), steady_s=60)
    bad = place / "bad-luck"
    text = f"""[ -e {bad} ] || exec {setup.command.binary()} "$@"
        echo 'semper-blkd: error: no luck; try again' >&2; exit 1"""
    binary = Path(program(place / "semper-blkd", text))
    disk = await started.start(replace(setup, command=Blkd(binary), policy=policy))
    await disk.wait_spare_ready(READY_S)
    bad.touch()
    kill(disk.spare_pid)
    kill(disk.active_pid)
    await disk.changes.wait_until(
        lambda: disk.condition is Condition.FAILING,
        timeout_s=READY_S,
        what="the disk to be failing",
    )
    assert disk.reason == "exit code 1: no luck"
    bad.unlink()
    await disk.wait_spare_ready(READY_S)


async def test_a_locked_image_is_refused_with_its_holder(
    started: Started, setup: DiskSetup, place: Path
) -> None:
    disk = await started.start(setup)
    other = replace(
        setup, name="web/other", files=DiskFiles(place, "other"), record=place / "other.json"
    )
    with pytest.raises(ImageLocked, match=rf"in use by semper-blkd \(pid {disk.active_pid}\)"):
        await start_disk(other)
    assert other.files.find_processes() == []


async def test_an_image_that_vanished_before_the_start_is_refused(
    setup: DiskSetup, place: Path
) -> None:
    gone = replace(setup, options=DiskOptions(place / "gone.raw"))
    with pytest.raises(InvalidRequest, match=r"gone\.raw"):
        await start_disk(gone)


async def test_a_missing_program_is_refused(setup: DiskSetup, place: Path) -> None:
    with pytest.raises(Unavailable, match="cannot open the program"):
        await start_disk(replace(setup, command=Blkd(place / "absent")))


async def test_adopted_backends_are_supervised_as_before(
    started: Started, setup: DiskSetup
) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    pids = disk.active_pid, disk.spare_pid
    disk = await started.adopt(setup)
    assert (disk.active_pid, disk.spare_pid) == pids
    await disk.wait_spare_ready(READY_S)
    kill(disk.active_pid)
    await wait_restarts(disk, 1)
    assert disk.active_pid == pids[1]
    await disk.wait_spare_ready(READY_S)
    assert disk.spare_pid not in pids


async def test_the_spare_took_over_while_no_agent_ran(started: Started, setup: DiskSetup) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    active, spare = disk.active_pid, disk.spare_pid
    await kill_and_wait(active)  # nobody has seen it yet when the disk is adopted again
    disk = await started.adopt(setup)
    assert disk.active_pid == spare
    await disk.wait_spare_ready(READY_S)


async def test_all_backends_ended_while_no_agent_ran(started: Started, setup: DiskSetup) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    await kill_and_wait(disk.spare_pid)
    await kill_and_wait(disk.active_pid)
    disk = await started.adopt(setup)
    await disk.wait_spare_ready(READY_S)


async def test_a_stale_socket_is_bound_again_and_handed_over(
    started: Started, setup: DiskSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel does not allow taking the listening socket back."""
    monkeypatch.setattr(lifecycle, "borrow_listener", lambda *_: None)
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    active, spare = disk.active_pid, disk.spare_pid
    assert spare is not None
    disk = await started.adopt(setup)
    assert start_ticks(spare) is None  # it would have listened where no path leads
    await disk.changes.wait_until(
        lambda: disk.upgrade_count == 1, timeout_s=READY_S, what="the hand-over"
    )
    assert disk.active_pid not in (active, spare)
    await disk.wait_spare_ready(READY_S)


def is_found(disk: Disk) -> bool:
    """Whether somebody who comes by the path gets to the processes of now."""
    assert disk.active_pid is not None
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.settimeout(READY_S)
        try:
            front_end.connect(str(disk.setup.files.socket))
            front_end.sendall(struct.pack("=III", 1, 1, 0))  # VHOST_USER_GET_FEATURES
            return len(front_end.recv(100)) == 20
        except OSError:
            return False


@pytest.mark.parametrize(
    ("what", "kept"),
    [
        ("front", True),
        ("control of the active", True),
        ("control of the spare", True),
        ("front", False),
        ("control of the active", False),
    ],
    ids=["front", "active", "spare", "control", "control, which kills nobody"],
)
async def test_a_socket_that_somebody_removes_is_made_again(
    started: Started, setup: DiskSetup, monkeypatch: pytest.MonkeyPatch, what: str, *, kept: bool
) -> None:
    monkeypatch.setattr(sockets, "LOOK_S", 0.2 if kept else 1e6)
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    active, spare = disk.active_pid, disk.spare_pid
    assert disk.state.spare is not None
    removed = {
        "front": setup.files.socket,
        "control of the active": setup.files.control(disk.generation),
        "control of the spare": setup.files.control(disk.state.spare.generation),
    }[what]
    removed.unlink()
    if not kept:
        if what == "front":
            assert not is_found(disk)
        else:
            # Nobody is taken for hung because somebody else has removed a socket.
            with pytest.raises(Unavailable):
                await disk.changes.wait_until(
                    lambda: (disk.active_pid, disk.spare_pid) != (active, spare),
                    timeout_s=2 * setup.policy.stall_s,
                    what="a death",
                )
        return
    await disk.changes.wait_until(
        lambda: disk.upgrade_count == 1, timeout_s=READY_S, what="the hand-over"
    )
    await disk.wait_spare_ready(READY_S)
    assert not {disk.active_pid, disk.spare_pid} & {active, spare}
    assert is_found(disk)
    assert disk.restart_count == 0
    assert (await disk.status()).pid == disk.active_pid
    noted = disk.journal.last("restart")
    assert noted is not None
    assert noted.message.startswith(f"{removed} was removed")


async def test_sockets_that_were_removed_while_no_agent_ran_are_made_again(
    started: Started, setup: DiskSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "LOOK_S", 0.2)
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    before = disk.active_pid, disk.spare_pid
    for path in setup.files.directory.glob("disk-root*.ctl"):
        path.unlink()
    disk = await started.adopt(setup)
    await disk.changes.wait_until(
        lambda: disk.condition is Condition.GUARDED and disk.active_pid not in before,
        timeout_s=3 * READY_S,
        what="backends that can be asked",
    )
    assert is_found(disk)


@pytest.mark.parametrize("failed", [True, False], ids=["failed", "control"])
async def test_word_of_a_failed_flush_outlives_the_run_directory(
    started: Started, setup: DiskSetup, *, failed: bool
) -> None:
    """Nobody is connected, so that no in-flight region tells the next backend of it."""
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    status = await disk.status()
    assert not status.flush_failed
    for _ in range(2):  # the second time somebody has removed it
        disk.seen(disk.generation, status.model_copy(update={"flush_failed": failed}))
        assert disk.flush_failed is failed
        setup.files.flush_failed.unlink(missing_ok=True)
    disk.seen(disk.generation, status.model_copy(update={"flush_failed": failed}))
    kill(disk.active_pid)
    await wait_restarts(disk, 1)
    await disk.wait_spare_ready(READY_S)
    assert (await disk.status()).flush_failed is failed


async def test_an_unrecorded_backend_is_killed_at_adoption(
    started: Started, setup: DiskSetup
) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    active, spare = disk.active_pid, disk.spare_pid
    assert active is not None
    assert spare is not None
    written = read_disk_record(setup.record)
    assert written is not None
    known = tuple(item for item in written.processes if item.role is Role.ACTIVE)
    replace(written, next_generation=9, processes=known).write(setup.record)
    disk = await started.adopt(setup)
    assert start_ticks(spare) is None
    assert disk.active_pid == active
    await disk.wait_spare_ready(READY_S)
    assert disk.spare_pid != spare


async def test_sweep_ends_everything(started: Started, setup: DiskSetup) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    started.disks.clear()
    await disk.detach()
    await sweep_disk(setup)
    assert setup.files.find_processes() == []
    assert not setup.record.exists()
    assert not setup.files.socket.exists()


async def test_stop_leaves_nothing(started: Started, setup: DiskSetup) -> None:
    disk = await started.start(setup)
    await disk.wait_spare_ready(READY_S)
    started.disks.clear()
    await disk.stop()
    assert setup.files.find_processes() == []
    assert not setup.record.exists()
