"""The fence, by proof: what each storage can, and what counts as seen."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sempervirt.disk.image_lock import Holder, ImageLock, try_lock
from sempervirt.disk.storage import Mount
from sempervirt.host import ending
from sempervirt.host.procfs import ProcessId, identify
from sempervirt.host.reservations import PREEMPT_ABORT, REGISTER, RESERVE, Reservations, Status
from sempervirt.standby import proof
from sempervirt.standby.fence_command import FenceCommand, Ran, judge_command, run_fence
from sempervirt.standby.means import (
    Ability,
    Impossible,
    Means,
    NotYet,
    Proven,
    Storage,
    Where,
    ability_of,
    storage_can,
    together,
)
from sempervirt.standby.proof import (
    Fence,
    Target,
    hold_by_reservation,
    key_of,
    prove_by_reservation,
)
from tests.revoking_server import revoking_server
from tests.standby.split_brain import DEADLINE_S, REVOKING, Vm
from tests.standby.writer import BLOCK_BYTES, BLOCKS

HERE = Ability(Means.LOCK_HERE, "it ran here")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of a few blocks."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(BLOCKS * BLOCK_BYTES))
    return path


@contextmanager
def writing(image: Path) -> Iterator[Vm]:
    """A process that has the lock of the image, and writes."""
    vm = Vm(image, 1, "lock")
    try:
        vm.wait_said("pass")
        yield vm
    finally:
        vm.end()


def identity(vm: Vm) -> ProcessId:
    """Of its process."""
    found = identify(vm.process.pid)
    assert found is not None
    return found


# One host


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_process_here_is_killed_and_seen_to_end(image: Path, stopped: bool) -> None:
    with writing(image) as vm:
        if stopped:
            vm.signal(signal.SIGSTOP)
        first = Target("web", Where.HERE, (identity(vm),))
        fence = Fence(first, {"root": (image, HERE)})
        proved = await fence.prove()
        assert isinstance(proved, Proven), proved
        assert vm.process.wait(DEADLINE_S) == -signal.SIGKILL
        assert isinstance(try_lock(image), Holder), "the fence has let go before it was told to"
        fence.let_go()
        taken = try_lock(image)
        assert isinstance(taken, ImageLock)
        taken.close()


async def test_a_writer_that_nobody_knew_of_is_named(image: Path) -> None:
    """The control: what was to be killed is dead, and the image is written all the same."""
    with writing(image) as vm:
        fence = Fence(Target("web", Where.HERE), {"root": (image, HERE)})
        proved = await fence.prove()
        assert isinstance(proved, NotYet)
        assert f"(pid {vm.process.pid})" in proved.why
        vm.end()
        assert isinstance(await fence.prove(), Proven)
        fence.let_go()


QEMU_WRITES = """
import fcntl, struct, sys, time
file = open(sys.argv[1], "r+b")
lock = struct.pack("hhxxxxqqixxxx", fcntl.F_RDLCK, 0, 201, 1, 0)
fcntl.fcntl(file.fileno(), 37, lock)  # F_OFD_SETLK: a QEMU that shares no write permission
print("locked", flush=True)
time.sleep(60)
"""


def test_a_qemu_that_has_the_image_is_named_and_not_whoever_looks(image: Path) -> None:
    argv = [sys.executable, "-c", QEMU_WRITES, str(image)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        try:
            assert qemu.stdout.readline() == b"locked\n"
            found = try_lock(image)
            assert isinstance(found, Holder)
            assert found.pid == qemu.pid
        finally:
            qemu.kill()
    taken = try_lock(image, DEADLINE_S)
    assert isinstance(taken, ImageLock)
    taken.close()


async def test_a_process_that_does_not_end_proves_nothing(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits in the kernel for a disk survives SIGKILL; here the signal is kept from it."""
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    monkeypatch.setattr(proof, "kill_and_see", lambda one: ending.kill_and_see(one, 0.1))
    with writing(image) as vm:
        fence = Fence(Target("web", Where.HERE, (identity(vm),)), {"root": (image, HERE)})
        proved = await fence.prove()
        assert isinstance(proved, NotYet)
        assert "has not ended" in proved.why
        fence.let_go()


async def test_a_number_that_is_another_processs_is_left_alone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # noqa: ASYNC220
    try:
        real = identify(child.pid)
        assert real is not None
        assert await ending.kill_and_see(replace(real, start_ticks=real.start_ticks + 1))
        assert await ending.kill_and_see(replace(real, boot_id="another boot"))
        assert child.poll() is None, "another process was killed"
        assert await ending.kill_and_see(real)
    finally:
        child.communicate()
    assert child.returncode == -signal.SIGKILL


# Locks of a server


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
async def test_an_attempt_that_nobody_waits_for_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "LOCK_ANSWER_S", 0.1)
    with revoking_server(tmp_path, ("a", "b"), lease_s=60.0) as server:
        (server.backing / "disk.raw").write_bytes(bytes(BLOCK_BYTES))
        image = server.mount("a") / "disk.raw"
        ability = await storage_can(image, Where.ELSEWHERE, revoking=REVOKING)
        assert ability.means is Means.LOCK_REVOKED
        server.cut("a")
        fence = Fence(Target("web", Where.ELSEWHERE), {"root": (image, ability)})
        proved = await fence.prove()
        assert isinstance(proved, NotYet)
        assert "has not answered" in proved.why
        server.restore("a")
        async with asyncio.timeout(DEADLINE_S):
            while True:
                taken = try_lock(server.mount("b") / "disk.raw")
                if isinstance(taken, ImageLock):
                    break
                await asyncio.sleep(0.02)  # poll interval
        taken.close()


# What a storage can


@pytest.mark.parametrize(
    ("mount", "means"),
    [
        (
            Mount("nfs4", "server:/vms", frozenset({"vers=4.2", "local_lock=none"})),
            Means.LOCK_REVOKED,
        ),
        (Mount("nfs4", "server:/vms", frozenset({"rw", "local_lock=all"})), None),
        (Mount("nfs", "server:/vms", frozenset({"rw", "vers=3"})), None),
        (Mount("ceph", "mon:/", frozenset()), Means.LOCK_REVOKED),
        (Mount("gfs2", "/dev/vg/lv", frozenset()), Means.LOCK_REVOKED),
        (Mount("ext4", "/dev/vda", frozenset()), None),
        (Mount("fuse.sshfs", "host:/", frozenset()), None),
        (Mount(), None),
    ],
)  # fmt: skip
def test_what_a_file_system_can(mount: Mount, means: Means | None) -> None:
    storage = Storage(block_device=False, mount=mount)
    found = ability_of(storage, Where.ELSEWHERE, command=False)
    assert found.means is means
    assert found.why
    # With a command there is always a way; on this host there is one without.
    fenced = ability_of(storage, Where.ELSEWHERE, command=True).means
    assert fenced is (means or Means.COMMAND)
    assert ability_of(storage, Where.HERE, command=False).means is Means.LOCK_HERE


@pytest.mark.parametrize(
    ("reserves", "means"), [(True, Means.RESERVATION), (False, None), (None, None)]
)
def test_what_a_block_device_can(reserves: bool | None, means: Means | None) -> None:
    storage = Storage(block_device=True, reserves=reserves)
    assert ability_of(storage, Where.ELSEWHERE, command=False).means is means


async def test_what_cannot_be_looked_at_proves_nothing(tmp_path: Path) -> None:
    found = await storage_can(tmp_path / "gone.raw", Where.ELSEWHERE)
    assert found.means is None
    assert "gone.raw" in found.why


async def test_where_the_storage_can_nothing_only_an_operator_can(image: Path) -> None:
    ability = Ability(None, "nothing is known of its locks")
    asked = Target("web", Where.ELSEWHERE)
    assert isinstance(await Fence(asked, {"root": (image, ability)}).prove(), Impossible)
    told = replace(asked, word="I have pulled the plug")
    proved = await Fence(told, {"root": (image, ability)}).prove()
    assert isinstance(proved, Proven)
    assert proved.means is Means.OPERATOR
    assert "pulled the plug" in proved.evidence


def test_all_disks_or_none() -> None:
    proven, not_yet = Proven(Means.LOCK_HERE, "seen"), NotYet("locked")
    assert isinstance(together("web", {"a": proven, "b": proven}), Proven)
    assert isinstance(together("web", {"a": proven, "b": not_yet}), NotYet)
    assert isinstance(together("web", {"a": not_yet, "b": Impossible("no")}), Impossible)
    assert isinstance(together("web", {}), Impossible)


# The operator's command


def ran(exit_code: int | None, *output: str) -> Ran:
    """Of some command."""
    return Ran("fence_test", exit_code, output)


@pytest.mark.parametrize(
    ("off", "status", "proven"),
    [
        (ran(0, "Success: Powered OFF"), ran(2, "Status: OFF"), True),
        (ran(1, "Chassis is already off"), ran(0, "Chassis Power is off"), True),
        (ran(None, "timed out"), ran(2, "Status: OFF"), True),
        # "Fenced" by the first command's word alone, as others do:
        (ran(0, "Success: Powered OFF"), ran(0, "Status: ON"), False),
        (ran(0, "Success: Powered OFF"), ran(None, "connection timed out"), False),
        (ran(0, "Success: Powered OFF"), ran(1, "Status: OFF"), False),
        (ran(0, "Success: Powered OFF"), ran(0), False),
        (ran(0), ran(0, "it is not off"), False),
        (ran(0), ran(0, "Status: OFF", "but the second supply is on"), False),
    ],
)
def test_only_a_host_that_was_seen_to_be_off_is_off(off: Ran, status: Ran, proven: bool) -> None:
    judged = judge_command(off, status)
    assert isinstance(judged, Proven) == proven, judged
    assert "fence_test" in (judged.evidence if isinstance(judged, Proven) else judged.why)


async def test_a_command_is_bounded_in_time(tmp_path: Path) -> None:
    script = tmp_path / "fence"
    script.write_text(
        "#!/bin/sh\ncase $1 in off) exec sleep 60;; *) echo Status: $2; exit 2;; esac\n"
    )
    script.chmod(0o755)
    command = FenceCommand((str(script), "off"), (str(script), "status", "OFF"), timeout_s=2.0)
    proved = await run_fence(command)
    assert isinstance(proved, Proven)
    assert "no end in time" in proved.evidence
    assert isinstance(
        await run_fence(replace(command, status=(str(script), "status", "ON"))), NotYet
    )
    absent = replace(command, off=("/no/such/agent",), status=("/no/such/agent",))
    assert isinstance(await run_fence(absent), NotYet)


# Reservations. No device of this machine has any, so they are tried on a model of SPC-4.


@dataclass
class Device:
    """A disk with persistent reservations, write exclusive."""

    keys: dict[str, int] = field(default_factory=dict)
    holder: str | None = None
    aborted: list[str] = field(default_factory=list)

    def writes(self, host: str) -> bool:
        """Whether a write of that host is taken."""
        return self.holder in (None, host)


@dataclass
class Nexus:
    """A host's way to the device; `loses` the answer of the next preemption."""

    device: Device
    host: str
    loses: bool = False

    def register(self, key: int) -> Status:
        """See `Reservations`."""
        self.device.keys[self.host] = key
        return Status.DONE

    def reserve(self, key: int) -> Status:
        """See `Reservations`."""
        device = self.device
        if device.keys.get(self.host) != key or device.holder not in (None, self.host):
            return Status.CONFLICT
        device.holder = self.host
        return Status.DONE

    def preempt_abort(self, old: int, key: int) -> Status:
        """See `Reservations`."""
        device = self.device
        if device.keys.get(self.host) != key or old not in device.keys.values():
            return Status.CONFLICT
        for host in [host for host, its in device.keys.items() if its == old and host != self.host]:
            del device.keys[host]
            device.aborted.append(host)
            if device.holder == host:
                device.holder = self.host
        if self.loses:
            self.loses = False
            return Status.FAILED
        return Status.DONE


def test_a_reservation_is_taken_from_the_first_host() -> None:
    device, a, b = Device(), key_of("a", "1"), key_of("b", "2")
    assert hold_by_reservation(Nexus(device, "a"), a)
    assert not device.writes("b")
    proved = prove_by_reservation(Nexus(device, "b"), a, b)
    assert isinstance(proved, Proven), proved
    assert not device.writes("a")
    assert device.writes("b")
    assert device.aborted == ["a"]


def test_a_preemption_of_which_the_answer_was_lost_is_asked_for_again() -> None:
    device, a, b = Device(), key_of("a", "1"), key_of("b", "2")
    assert hold_by_reservation(Nexus(device, "a"), a)
    nexus = Nexus(device, "b", loses=True)
    assert isinstance(prove_by_reservation(nexus, a, b), NotYet)
    assert isinstance(prove_by_reservation(nexus, a, b), Proven)


def test_a_third_host_that_has_the_reservation_is_seen() -> None:
    device, a, b, c = Device(), key_of("a", "1"), key_of("b", "2"), key_of("c", "3")
    assert hold_by_reservation(Nexus(device, "c"), c)
    proved = prove_by_reservation(Nexus(device, "b"), a, b)
    assert isinstance(proved, NotYet)
    assert device.writes("c")


def test_a_host_that_never_reserved_cannot_be_fenced_so() -> None:
    """Its requests that are on the way would still arrive."""
    proved = prove_by_reservation(Nexus(Device(), "b"), None, key_of("b", "2"))
    assert isinstance(proved, Impossible)


def test_the_requests_are_those_of_the_kernel() -> None:
    """Worked out by hand from include/uapi/linux/pr.h."""
    assert REGISTER == 0x401870C8
    assert RESERVE == 0x401070C9
    assert PREEMPT_ABORT == 0x401870CC


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has loop devices")
def test_a_device_without_reservations_says_so(image: Path) -> None:
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        reservations = Reservations.open(Path(device))
        assert not reservations.supported()
        reservations.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
