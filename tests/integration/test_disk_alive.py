"""What hangs is told as what it is, and holds up nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.client import EchoClient
from sempervirt.agent import Agent, AgentConfig, Vm
from sempervirt.api import routes, views
from sempervirt.core.errors import SempervirtError, StateConflict, Unavailable
from sempervirt.disk.backend import Blkd
from sempervirt.disk.backends import Backends
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import descriptors_of
from sempervirt.disk.liveness import DATA_THREAD
from sempervirt.disk.state import NOT_SERVED, Condition
from sempervirt.guest import ProbeClient
from sempervirt.host import descriptors, storage_call
from sempervirt.host.storage_call import HANGING_MAX, call_storage
from sempervirt.host.thread_states import threads_of
from sempervirt.qemu.spec import DiskSpec, VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.renewal import operations
from sempervirt.vm import launch
from tests.guest_network import GUEST, add_tap, own_network, with_tap
from tests.hanging_medium import HangingMedium, hanging_medium
from tests.silence import soon_silent
from tests.unharmed import assert_unharmed

log = logging.getLogger(__name__)
Spec = Callable[..., VmSpec]

MIB = 1 << 20
READY_S, BOOT_S = 90.0, 180.0
PAUSE = 100  # requests between two events


@pytest.fixture
def medium(place: Path) -> Iterator[HangingMedium]:
    """A file system that can be told to hang."""
    with hanging_medium(place, 8 * MIB) as made:
        yield made


async def directly(_path: Path, call: Callable[[], Any], _timeout_s: float = 0) -> Any:
    """What must not be done: the call, in the event loop."""
    return call()


@pytest.mark.parametrize("in_loop", [False, True], ids=["in a thread of its own", "control"])
async def test_an_image_that_hangs_stops_neither_the_agent_nor_another_disk(
    agent: Agent,
    firmware_spec: Spec,
    medium: HangingMedium,
    monkeypatch: pytest.MonkeyPatch,
    in_loop: bool,
) -> None:
    if in_loop:
        monkeypatch.setattr(views, "call_storage", directly)
    own = {"name": "data", "image": str(medium.image), "backend": "qemu"}
    await agent.run_vm(firmware_spec(name="hangs", disks=[own]))
    await agent.run_vm(firmware_spec())
    disk = agent.disks["web/root"]
    await disk.wait_spare_ready(READY_S)
    # An agent that waits for the medium goes on when that does: in the control soon.
    medium.hang_for(5.0 if in_loop else READY_S)
    asked = asyncio.create_task(routes.list_disks(agent))
    os.kill(active(disk), signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.restart_count == 1, timeout_s=READY_S, what="the take-over"
    )
    found = {view.name: view for view in await asked}
    assert medium.hangs is not in_loop
    if not in_loop:
        assert found["hangs/data"].size_bytes is None, "it was not told, and not waited for"
        medium.go_on()


async def save(agent: Agent, medium: HangingMedium, _spec: VmSpec) -> None:
    await agent.save_vm("web", medium.image.with_name("web.saved"))


async def boot_from(agent: Agent, medium: HangingMedium, spec: VmSpec) -> None:
    other = {"name": "other", "disks": (), "kernel": medium.image}
    await agent.run_vm(spec.model_copy(update=other))


@pytest.mark.parametrize("ask", [save, boot_from])
@pytest.mark.parametrize("in_loop", [False, True], ids=["in a thread of its own", "control"])
async def test_who_names_a_file_on_a_medium_that_hangs_is_refused_and_holds_nobody_up(
    agent: Agent,
    firmware_spec: Spec,
    medium: HangingMedium,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[Agent, HangingMedium, VmSpec], Awaitable[None]],
    in_loop: bool,
) -> None:
    if in_loop:
        monkeypatch.setattr(operations, "call_storage", directly)
        monkeypatch.setattr(launch, "call_storage", directly)
    await agent.run_vm(firmware_spec())
    await agent.disks["web/root"].wait_spare_ready(READY_S)
    # Who waits for the medium goes on when that does: in the control soon.
    medium.hang_for(5.0 if in_loop else READY_S)
    if in_loop:
        with contextlib.suppress(SempervirtError):
            await ask(agent, medium, firmware_spec())
        assert not medium.hangs
        return
    with pytest.raises(Unavailable, match="has not answered"):
        await ask(agent, medium, firmware_spec())
    assert medium.hangs
    medium.go_on()
    assert agent.vms["web"].run is Runstate.RUNNING
    assert set(agent.vms) == {"web"}


async def poll(reached: Callable[[], bool], timeout_s: float) -> None:
    """Returns when `reached()` holds."""
    for _ in range(round(timeout_s / 0.02)):
        if reached():
            return
        await asyncio.sleep(0.02)  # poll interval
    raise AssertionError(f"not within {timeout_s} s")


@asynccontextmanager
async def loaded(vm: Vm) -> AsyncIterator[ProbeClient]:
    """The probe of a VM, with sixteen writers on its disk; a request may take half a minute."""
    async with await ProbeClient.connect(vm.channel_path("probe"), deadline_s=BOOT_S) as client:
        await client.wait_hello(deadline_s=BOOT_S)
        await client.write_start("serial:loaded", writers=16, span_bytes=4 * MIB, hang_s=120)
        await completed(client, PAUSE)
        yield client


async def completed(client: ProbeClient, more: int, device: str = "serial:loaded") -> None:
    """Waits until the writers of a disk have completed `more` requests."""
    before = (await client.stats(device=device)).completions
    await client.wait_stats(lambda stats: stats.completions >= before + more, device=device)


def active(disk: Disk) -> int:
    """The pid of the backend that serves."""
    assert disk.active_pid is not None
    return disk.active_pid


# So long a silent backend is waited for there: what else it takes is little beside that.
ANSWER_S = 4.0


async def test_a_backend_that_is_silent_is_told_as_such_and_not_waited_for(
    agent: Agent, firmware_spec: Spec, disk_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "ANSWER_S", ANSWER_S)
    for number in range(3):
        image = disk_image.with_name(f"d{number}.raw")
        image.touch()
        os.truncate(image, MIB)
        await agent.run_vm(
            firmware_spec(name=f"v{number}", disks=[{"name": "d", "image": str(image)}])
        )
    stopped = [active(agent.disks[f"v{number}/d"]) for number in (0, 1)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        found = await routes.list_disks(agent)
        took_s = time.monotonic() - begun
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert took_s < 2 * ANSWER_S, "one deadline for all, and not one after the other"
    assert [bool(view.silence) for view in found] == [True, True, False]
    assert str(stopped[0]) in found[0].silence
    assert found[2].backend is not None


async def test_calls_that_hang_do_not_add_up(medium: HangingMedium) -> None:
    assert (await call_storage(medium.image, medium.image.stat)).st_size == 8 * MIB
    with pytest.raises(FileNotFoundError):
        await call_storage(medium.image, medium.image.with_name("absent").stat)
    medium.hang()
    for _ in range(HANGING_MAX):
        with pytest.raises(Unavailable, match=f"{medium.image} has not answered"):
            await call_storage(medium.image, medium.image.stat, 0.1)
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="has not answered"):
        await call_storage(medium.image, medium.image.stat, READY_S)
    assert time.monotonic() - begun < READY_S, "it was refused at once"
    medium.go_on()
    await poll(lambda: medium.image not in storage_call._hanging, READY_S)
    assert (await call_storage(medium.image, medium.image.stat)).st_size == 8 * MIB


# With a guest that writes and verifies all the time

FOUND_S = 90.0  # STALL_S, a question or two that are not answered, and a busy machine
HANGS_S = 12.0
# How long a medium hangs after that was found out.
MEDIUM_S = float(os.environ.get("SEMPERVIRT_MEDIUM_S", "5"))

# Stops one thread of a process as a debugger does, until that process has ended.
STOP_THREAD = """
import ctypes, os, sys
libc, tid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
SEIZE, INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
for request in (SEIZE, INTERRUPT):
    if libc.ptrace(request, tid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
print("stopped", flush=True)
while os.WIFSTOPPED(os.waitpid(tid, WALL)[1]):
    pass
"""


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def stop_data_thread(pid: int) -> None:
    """The control socket goes on to answer."""
    tid = next(thread.tid for thread in threads_of(pid) if thread.name.startswith(DATA_THREAD))
    argv = [sys.executable, "-c", STOP_THREAD, str(tid)]
    stopper = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert stopper.stdout is not None
    assert stopper.stdout.readline() == b"stopped\n"


@pytest.mark.guest
@pytest.mark.parametrize("stop", [stop_process, stop_data_thread])
async def test_a_backend_that_hangs_under_load_is_replaced_and_nothing_is_lost(
    agent: Agent, guest_spec: Spec, stop: Callable[[int], None]
) -> None:
    vm = await agent.run_vm(guest_spec(serial="loaded"))
    disk = agent.disks["web/root"]
    async with loaded(vm) as client:
        await disk.wait_spare_ready(READY_S)
        hung, spare = active(disk), disk.spare_pid
        begun = time.monotonic()
        stop(hung)
        await disk.changes.wait_until(
            lambda: disk.active_pid == spare, timeout_s=FOUND_S, what="the take-over"
        )
        assert time.monotonic() - begun >= disk.setup.policy.stall_s / 2
        await completed(client, PAUSE)
        assert_unharmed(await client.write_stop())
    noted = disk.journal.last("stall")
    assert noted is not None
    assert "the backend hangs" in noted.message
    assert "because it hung" in disk.reason
    assert disk.restart_count == 1


@pytest.mark.guest
async def test_control_without_evidence_a_backend_that_hangs_stands_as_guarded(
    config: AgentConfig, guest_spec: Spec
) -> None:
    patient = replace(config, policy=replace(config.policy, stall_s=1e6))
    async with Agent.open(patient) as agent:
        vm = await agent.run_vm(guest_spec(serial="loaded"))
        disk = agent.disks["web/root"]
        async with loaded(vm) as client:
            await disk.wait_spare_ready(READY_S)
            hung = active(disk)
            os.kill(hung, signal.SIGSTOP)
            with pytest.raises(Unavailable):
                await disk.changes.wait_until(
                    lambda: disk.active_pid != hung, timeout_s=HANGS_S, what="a take-over"
                )
            assert disk.condition is Condition.GUARDED
            os.kill(hung, signal.SIGCONT)
            await completed(client, PAUSE)
            assert_unharmed(await client.write_stop())


@pytest.mark.guest
@pytest.mark.parametrize("engine", ["auto", "sync", "uring"])
async def test_a_medium_that_hangs_is_told_as_such_and_nothing_is_killed(
    agent: Agent, guest_spec: Spec, medium: HangingMedium, engine: str
) -> None:
    vm = await agent.run_vm(guest_spec(serial="loaded", image=str(medium.image), engine=engine))
    disk = agent.disks["web/root"]
    async with loaded(vm) as client:
        await disk.wait_spare_ready(READY_S)
        pids = (disk.active_pid, disk.spare_pid)
        medium.hang()
        await disk.changes.wait_until(
            lambda: disk.condition is Condition.MEDIUM_HANGS, timeout_s=FOUND_S, what="the finding"
        )
        assert disk.ailment.startswith("disk web/root is medium-hangs: the medium hangs, since")
        with pytest.raises(Unavailable):
            await disk.changes.wait_until(
                lambda: (disk.active_pid, disk.spare_pid) != pids,
                timeout_s=MEDIUM_S,
                what="a death",
            )
        assert disk.condition is Condition.MEDIUM_HANGS
        medium.go_on()
        await disk.wait_spare_ready(READY_S)
        await completed(client, PAUSE)
        assert_unharmed(await client.write_stop())
    assert disk.restart_count == 0
    assert (disk.active_pid, disk.spare_pid) == pids


async def test_a_spare_that_hangs_is_replaced(agent: Agent, firmware_spec: Spec) -> None:
    await agent.run_vm(firmware_spec())
    disk = agent.disks["web/root"]
    await disk.wait_spare_ready(READY_S)
    hung, served = disk.spare_pid, active(disk)
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    await disk.changes.wait_until(
        lambda: disk.spare_pid not in (hung, None), timeout_s=FOUND_S, what="another spare"
    )
    await disk.wait_spare_ready(READY_S)
    assert active(disk) == served


# A disk that has no backend at all, beside one that has

FAILS_S = float(os.environ.get("SEMPERVIRT_FAILS_S", "12"))
# What waits for that disk waits until the end; what is only slow, on a busy machine, does not.
SLOW_S = FAILS_S / 2

WRAPPER = """#!/bin/sh
case "$*" in
*--serial=data*)
    if [ -e {gone} ]; then echo "semper-blkd: error: {gone} is there" >&2; exit 4; fi ;;
esac
exec {program} "$@"
"""


class Fault:
    """While the file is there, no backend of the disk `data` starts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        self.path.touch()

    def end(self) -> None:
        self.path.unlink()


@pytest.fixture
def gone(place: Path) -> Fault:
    """The fault of a disk that cannot be served."""
    return Fault(place / "gone")


@pytest.fixture
async def breakable(config: AgentConfig, place: Path, gone: Fault) -> AsyncIterator[Agent]:
    """An agent whose backends of the disk `data` can be kept from starting."""
    wrapper = place / "blkd"
    wrapper.write_text(WRAPPER.format(gone=gone.path, program=Blkd().binary()))
    wrapper.chmod(0o755)
    async with Agent.open(replace(config, backend=Blkd(wrapper))) as opened:
        yield opened


async def lose_backends(disk: Disk, gone: Fault) -> None:
    """No backend serves the disk, and none starts."""
    await disk.wait_spare_ready(READY_S)
    gone.begin()
    for pid in (disk.spare_pid, disk.active_pid):
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    await disk.changes.wait_until(
        lambda: disk.condition in NOT_SERVED, timeout_s=READY_S, what="a disk that is not served"
    )


@pytest.fixture
def network() -> Iterator[None]:
    """A tap for a guest; to be asked for before an agent is."""
    with own_network():
        add_tap()
        yield


@asynccontextmanager
async def heard(client: ProbeClient) -> AsyncIterator[EchoClient]:
    """Speaks to the guest over its network all the time."""
    await client.network_up("eth0", f"{GUEST}/24")
    await client.echo_start(7)
    async with EchoClient.connected("", GUEST) as echo:
        yield echo


def with_data_disk(spec: VmSpec, place: Path) -> VmSpec:
    """`spec` with a second disk."""
    image = place / "data.raw"
    image.touch()
    os.truncate(image, 8 * MIB)
    data = DiskSpec(name="data", image=image, serial="data")
    return spec.model_copy(update={"disks": (*spec.disks, data)})


@pytest.mark.root
@pytest.mark.guest
async def test_while_one_disk_has_no_backend_the_rest_of_the_vm_goes_on(
    network: None, breakable: Agent, guest_spec: Spec, place: Path, gone: Fault
) -> None:
    vm = await breakable.run_vm(with_tap(with_data_disk(guest_spec(serial="loaded"), place)))
    data = breakable.disks["web/data"]
    async with loaded(vm) as client, heard(client) as echo:
        await client.write_start("serial:data", writers=2, span_bytes=4 * MIB, hang_s=120)
        await lose_backends(data, gone)
        lost = time.monotonic()
        begun = await client.measure_clock()
        since_ns = begun.to_guest(time.monotonic_ns())
        give_up = time.monotonic() + FAILS_S
        slowest_s = 0.0
        while time.monotonic() < give_up:
            asked = time.monotonic()
            await vm.machine.execute("query-status")
            await completed(client, 1, "serial:loaded")
            slowest_s = max(slowest_s, time.monotonic() - asked)
        gaps = await client.gaps(since_ns=since_ns, device="serial:loaded")
        assert vm.run is Runstate.RUNNING
        assert slowest_s < SLOW_S
        assert gaps.longest_ms() < SLOW_S * 1e3
        assert echo.alive, echo.problem
        silence_ms = echo.silence_ms(lost)
        log.info(
            "for %g s: the other disk's longest gap %.0f ms, slowest answer %.0f ms, network "
            "silent for %.0f ms",
            *(FAILS_S, gaps.longest_ms(), slowest_s * 1e3, silence_ms),
        )
        assert silence_ms < SLOW_S * 1e3
        shown = views.vm_view(vm).why
        assert "disk web/data is" in shown
        assert f"{gone.path} is there" in shown
        gone.end()
        await completed(client, 5, "serial:data")
        for device in ("serial:data", "serial:loaded"):
            assert_unharmed(await client.write_stop(device=device))


@soon_silent
@pytest.mark.guest
async def test_control_a_front_end_that_is_let_in_to_nobody_stops_its_vm(
    breakable: Agent,
    guest_spec: Spec,
    place: Path,
    gone: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Backends, "turn_away", lambda _backends: None)
    vm = await breakable.run_vm(with_data_disk(guest_spec(serial="loaded"), place))
    data = breakable.disks["web/data"]
    async with loaded(vm):
        await lose_backends(data, gone)
        data.backends.listener.accept()[0].close()  # the plug: now there is room for QEMU
        await vm.wait_state(Runstate.UNKNOWN, timeout_s=FOUND_S)
        with pytest.raises(StateConflict) as caught:
            await vm.pause()
        assert "disk web/data is" in caught.value.message
        assert f"{gone.path} is there" in caught.value.message
        assert "semper disk show web/data" in caught.value.remedy
        assert "kill" not in str(caught.value)
        gone.end()
        await vm.wait_state(Runstate.RUNNING, timeout_s=FOUND_S)


async def test_a_vm_that_would_eat_up_the_reserve_of_descriptors_is_refused(
    agent: Agent, firmware_spec: Spec
) -> None:
    await agent.run_vm(firmware_spec(name="first"))
    disk = agent.disks["first/root"]
    await disk.wait_spare_ready(READY_S)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(descriptors_of(os.getpid()))
    other = disk_of(disk, "other.raw")
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + descriptors.RESERVE, limits[1]))
    try:
        with pytest.raises(Unavailable, match="takes 22 file descriptors") as caught:
            await agent.run_vm(firmware_spec(disks=[other]))
        assert "LimitNOFILE" in caught.value.remedy
        assert set(agent.vms) == {"first"}
        # What runs is supervised from the reserve.
        for count in range(1, 4):
            os.kill(active(disk), signal.SIGKILL)
            await disk.changes.wait_until(
                lambda: disk.restart_count == count,  # noqa: B023
                timeout_s=READY_S,
                what="the take-over",
            )
            await disk.wait_spare_ready(READY_S)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await agent.run_vm(firmware_spec(disks=[other]))


def disk_of(beside: Disk, name: str) -> dict[str, str]:
    """A disk with an image of its own."""
    image = beside.setup.options.image.with_name(name)
    image.touch()
    os.truncate(image, MIB)
    return {"name": "root", "image": str(image)}
