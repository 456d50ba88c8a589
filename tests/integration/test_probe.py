"""The guest image, booted: the probe's writers find nothing wrong with QEMU's own disk, and find
every kind of damage that is done to it behind the guest's back."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.ports import free_port
from sempervirt.guest import ProbeClient, ProbeGone, ProbeRebooted, ProbeRefused, image
from sempervirt.guest.cpio import Archive

pytestmark = pytest.mark.guest

MIB = 1 << 20
BLOCK = 4096
DISK = 64 * MIB
SPAN = 4 * MIB
BOOT_DEADLINE_S = 180.0


@dataclass
class Machine:
    """A guest that runs: the channel of its probe, and the file under its disk."""

    probe: Path
    disk: Path
    serial: Path
    process: subprocess.Popen[bytes]

    def read(self, block: int) -> bytes:
        with self.disk.open("rb") as file:
            file.seek(block * BLOCK)
            return file.read(BLOCK)

    def write(self, block: int, data: bytes) -> None:
        with self.disk.open("r+b") as file:
            file.seek(block * BLOCK)
            file.write(data)


@dataclass
class Guest(Machine):
    """One whose probe has greeted."""

    client: ProbeClient

    async def wait_written(self, completions: int, *, device: str | None = None) -> None:
        """Waits until the writers have completed that many requests."""
        await self.client.wait_stats(lambda stats: stats.completions >= completions, device=device)


DEFAULT_DISK = ("-drive", "file={disk},if=none,id=disk,format=raw")
VIRTIO_BLK = ("-device", "virtio-blk-pci,drive=disk,serial=first")


@contextmanager
def started(
    place: Path, *devices: str, cmdline: str = "", extra_initrd: bytes = b""
) -> Iterator[Machine]:
    """The guest with a plain disk, or with other devices (`{disk}` is the disk's file)."""
    guest = image()
    initrd = place / "initrd.img"
    # An initramfs may be several archives; what comes later replaces what was before.
    packed = guest.initrd.read_bytes()
    initrd.write_bytes(packed + bytes(-len(packed) % 4) + extra_initrd)
    disk = place / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(DISK)
    sockets = Path(tempfile.mkdtemp(prefix="semper", dir="/tmp"))
    serial = place / "serial.log"
    command = [
        "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2",
        "-m", "256", "-nodefaults", "-display", "none", "-serial", f"file:{serial}",
        "-kernel", str(guest.kernel), "-initrd", str(initrd),
        "-append", f"{guest.cmdline} {cmdline}",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=probe,path={sockets}/probe,server=on,wait=off",
        "-device", "virtserialport,chardev=probe,name=org.sempervirt.probe",
        *(word.format(disk=disk) for word in devices or (*DEFAULT_DISK, *VIRTIO_BLK)),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        yield Machine(sockets / "probe", disk, serial, process)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(sockets)


@asynccontextmanager
async def greeted(machine: Machine) -> AsyncIterator[Guest]:
    """When the probe has greeted. What the console says is added to what goes wrong."""
    try:
        async with await ProbeClient.connect(machine.probe) as client:
            await client.wait_hello(deadline_s=BOOT_DEADLINE_S)
            yield Guest(machine.probe, machine.disk, machine.serial, machine.process, client)
    except BaseException as error:
        if machine.serial.exists():
            said = machine.serial.read_text(errors="replace")[-4000:]
            error.add_note(f"serial console: {said}")
        raise


@asynccontextmanager
async def boot(
    tmp_path: Path, *devices: str, cmdline: str = "", extra_initrd: bytes = b""
) -> AsyncIterator[Guest]:
    """A guest of one test."""
    with started(tmp_path, *devices, cmdline=cmdline, extra_initrd=extra_initrd) as machine:
        async with greeted(machine) as guest:
            yield guest


@dataclass
class Shared:
    """The guest of the tests that leave it as it was; `port` leads to its port 7."""

    machine: Machine
    port: int


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    port = free_port()
    nic = f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:7"
    card = ("-netdev", nic, "-device", "virtio-net-pci,netdev=net")
    with started(tmp_path_factory.mktemp("shared"), *DEFAULT_DISK, *VIRTIO_BLK, *card) as machine:
        yield Shared(machine, port)


async def test_writers_find_nothing_wrong(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        [device] = await guest.client.list_devices()
        assert (device.name, device.serial, device.size_bytes) == ("vda", "first", DISK)
        clock = await guest.client.measure_clock()
        assert clock.uncertainty_ns < 50_000_000
        started = await guest.client.write_start("serial:first", span_bytes=SPAN, flush_every=100)
        assert not started.continued
        await guest.wait_written(10_000)
        during = await guest.client.stats()
        assert during.running
        assert during.lanes_active == 16
        stats = await guest.client.write_stop()
        assert stats.is_clean
        assert stats.kernel_errors == []
        assert stats.completions >= 10_000
        assert stats.verified > 1000
        assert stats.flushes > 10
        assert stats.verified_final is not None
        assert stats.verified_final.blocks > 0
        total = stats.verified_final.blocks + stats.verified_final.untouched
        assert total == SPAN // BLOCK
        assert 0 < stats.latency_us.p50 <= stats.latency_us.p99 <= stats.latency_us.max
        timeline = await guest.client.timeline()
        assert sum(timeline.counts) == stats.completions
        gaps = await guest.client.gaps()
        assert gaps.open_since_ns is None
        assert all(end - start > 2_000_000 for start, end in gaps.gaps)


async def test_damage_behind_the_guest_is_found_and_named(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        await guest.client.write_start("vda", span_bytes=SPAN, mode="write")
        await guest.wait_written(4 * SPAN // BLOCK)
        clean = await guest.client.write_stop()
        assert clean.is_clean
        before = guest.disk.read_bytes()
        again = await guest.client.write_start("vda", span_bytes=SPAN, mode="write")
        assert again.continued
        await guest.wait_written(8 * SPAN // BLOCK)
        assert (await guest.client.write_stop()).is_clean

        def old(block: int) -> bytes:
            return before[block * BLOCK : (block + 1) * BLOCK]

        changed = [block for block in range(SPAN // BLOCK) if old(block) != guest.read(block)]
        lost, torn, misplaced, foreign = changed[:4]
        guest.write(lost, old(lost))
        guest.write(torn, old(torn)[: BLOCK // 2] + guest.read(torn)[BLOCK // 2 :])
        guest.write(misplaced, guest.read(changed[10]))
        guest.write(foreign, bytes(BLOCK))
        # The guest reads with O_DIRECT, QEMU through the page cache that the damage is in.
        stats = await guest.client.write_stop()
        assert not stats.is_clean
        found = {wrong.block: wrong.kind for wrong in stats.wrong_details}
        expected = {lost: "lost", torn: "torn", misplaced: "misplaced", foreign: "foreign"}
        assert found == expected
        counts = stats.wrong
        assert [counts.lost, counts.torn, counts.misplaced, counts.foreign] == [1, 1, 1, 1]
        assert (await guest.client.write_stop()).wrong == counts, "counted once"

        await guest.client.write_start("vda", span_bytes=SPAN, mode="read")
        await guest.client.wait_stats(lambda stats: stats.wrong == counts)
        await guest.client.write_stop()


async def test_overlapping_writes_are_judged(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        await guest.client.write_start("vda", mode="overlap")
        await guest.wait_written(5000)
        stats = await guest.client.write_stop()
        assert stats.is_clean
        assert stats.verified > 0
        before = guest.read(7)
        await guest.client.write_start("vda", mode="overlap", resume=True)
        await guest.wait_written(10_000)
        await guest.client.write_stop()
        guest.write(7, before)
        stats = await guest.client.write_stop()
        assert [stats.wrong.lost, stats.wrong.total] == [1, 1]


async def test_a_reboot_ends_the_writers_and_changes_the_nonce(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        first = await guest.client.wait_hello()
        await guest.client.write_start("vda", span_bytes=SPAN)
        await guest.wait_written(1000)
        second = await guest.client.reboot(deadline_s=BOOT_DEADLINE_S)
        assert second.nonce != first.nonce
        with pytest.raises(ProbeRefused, match="write_start comes first"):
            await guest.client.stats()
        # What the earlier boot wrote is no damage.
        await guest.client.write_start("vda", span_bytes=SPAN)
        await guest.wait_written(1000)
        assert (await guest.client.write_stop()).is_clean


async def test_a_device_reset_keeps_the_ledger(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        await guest.client.write_start("vda", span_bytes=SPAN)
        for turn in range(1, 4):
            await guest.wait_written(1000 * turn)
            await guest.client.write_stop(verify=False)
            await guest.client.unbind("vda")
            assert await guest.client.list_devices() == []
            assert await guest.client.bind("vda") == "vda"
            await guest.client.write_start("vda", span_bytes=SPAN, resume=True)
        await guest.wait_written(4000)
        await guest.client.wait_stats(lambda stats: stats.verified > 1000)
        stats = await guest.client.write_stop()
        assert stats.is_clean


async def test_a_device_that_goes_away_under_load_is_taken_up_again(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        await guest.client.write_start("vda", span_bytes=SPAN)
        await guest.wait_written(1000)
        await guest.client.unbind("vda")
        await guest.client.bind("vda")
        before = (await guest.client.stats()).completions
        await guest.wait_written(before + 1000)
        stats = await guest.client.write_stop()
        assert stats.wrong.total == 0
        assert stats.hung == 0
        assert stats.verified_final is not None
        assert stats.verified_final.complete


async def test_errors_of_the_disk_are_reported_and_leave_both_states_open(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text(
        '[inject-error]\nevent = "none"\niotype = "write"\nerrno = "5"\nsector = "80"\n'
    )
    drive = f"file=blkdebug:{rules}:{{disk}},if=none,id=disk,format=raw,werror=report"
    # QEMU would make one request of two neighbours, and the innocent one would fail as well.
    device = (VIRTIO_BLK[0], f"{VIRTIO_BLK[1]},request-merging=off")
    async with boot(tmp_path, "-drive", drive, *device) as guest:
        await guest.client.write_start("vda", span_bytes=SPAN, mode="write")
        # Blocks are chosen by chance, and the kernel's log is read as it comes.
        await guest.client.wait_stats(lambda stats: stats.io_error_count > 0)
        await guest.client.wait_stats(lambda stats: bool(stats.kernel_errors))
        stats = await guest.client.write_stop()
        assert stats.wrong.total == 0
        assert {(error.op, error.errno) for error in stats.io_errors} == {("write", 5)}
        assert {error.block for error in stats.io_errors} == {80 * 512 // BLOCK}
        assert [error.pattern for error in stats.kernel_errors] == ["I/O error"]
        assert not stats.is_clean


async def test_requests_that_do_not_come_back_are_hung_and_then_late(tmp_path: Path) -> None:
    drive = f"{DEFAULT_DISK[1]},throttling.iops-total=4"
    async with boot(tmp_path, "-drive", drive, *VIRTIO_BLK) as guest:
        await guest.client.write_start("vda", span_bytes=SPAN, hang_s=0.5)
        await guest.client.wait_stats(lambda stats: stats.hung >= 8)
        await guest.client.wait_stats(lambda stats: stats.late >= 4)
        stopped = await guest.client.write_stop(verify=False, stop_deadline_s=0.1)
        assert stopped.hung == stopped.lanes_active > 0
        with pytest.raises(ProbeRefused, match="did not come back"):
            await guest.client.write_start("vda", span_bytes=SPAN)
        patient = await guest.client.write_stop(verify=False, stop_deadline_s=30)
        assert patient.hung == patient.lanes_active == 0
        assert patient.wrong.total == 0


async def test_single_requests(shared: Shared) -> None:
    async with greeted(shared.machine) as guest:
        data = bytes(range(256)) * 16
        await guest.client.write_raw("vda", 8192, data)
        assert await guest.client.read_raw("vda", 8192, BLOCK) == data
        await guest.client.call("flush", device="vda")
        assert guest.read(2) == data
        await guest.client.call("fill", device="vda", offset=0, length=2 * BLOCK, byte=7)
        assert guest.read(1) == bytes([7]) * BLOCK
        await guest.client.call("write_zeroes", device="vda", offset=0, length=BLOCK)
        assert (guest.read(0), guest.read(1)) == (bytes(BLOCK), bytes([7]) * BLOCK)
        await guest.client.call("discard", device="vda", offset=MIB, length=MIB)
        with pytest.raises(ProbeRefused, match="multiples of 512"):
            await guest.client.read_raw("vda", 1, BLOCK)
        with pytest.raises(ProbeRefused, match="no block device"):
            await guest.client.read_raw("vdz", 0, BLOCK)


async def test_other_disks_are_driven_too(tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    with other.open("wb") as file:
        file.truncate(DISK)
    async with boot(
        tmp_path,
        *DEFAULT_DISK, "-drive", f"file={other},if=none,id=other,format=raw",
        "-device", "nvme,drive=disk,serial=an-nvme",
        "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=other,serial=a-scsi",
    ) as guest:  # fmt: skip
        devices = await guest.client.list_devices()
        assert {device.name for device in devices} == {"nvme0n1", "sda"}
        await guest.client.write_start("serial:an-nvme", span_bytes=SPAN, writers=4)
        await guest.client.write_start("sda", span_bytes=SPAN, writers=4)
        for name in ("nvme0n1", "sda"):
            await guest.wait_written(500, device=name)
        for name in ("nvme0n1", "sda"):
            stats = await guest.client.write_stop(device=name)
            assert (stats.device, stats.is_clean) == (name, True)


async def test_the_heart_beats(shared: Shared) -> None:
    async with greeted(shared.machine) as guest:
        events = guest.client.events()
        await guest.client.heartbeat_start(interval_ms=10)
        beats = []
        async with asyncio.timeout(60):
            async for event in events:
                if event.name == "beat":
                    beats.append(event.members)
                if len(beats) == 20:
                    break
        await guest.client.heartbeat_stop()
        assert [beat["seq"] for beat in beats] == list(range(1, 21))
        times = [beat["monotonic_ns"] for beat in beats]
        assert times == sorted(times)


async def test_the_network_echoes(shared: Shared) -> None:
    async with greeted(shared.machine) as guest:
        await guest.client.network_up("eth0", "10.0.2.15/24", gateway="10.0.2.2")
        await guest.client.echo_start(7)
        reader, writer = await asyncio.open_connection("127.0.0.1", shared.port)
        writer.write(b"hear me\n")
        assert await asyncio.wait_for(reader.readline(), 30) == b"hear me\n"
        writer.close()


async def test_another_host_is_greeted(shared: Shared) -> None:
    async with greeted(shared.machine) as guest:
        nonce = guest.client.nonce
        await guest.client.close()
        with pytest.raises(ProbeGone):
            await guest.client.call("ping")
        async with await ProbeClient.connect(guest.probe) as second:
            assert (await second.wait_hello(deadline_s=BOOT_DEADLINE_S)).nonce == nonce
            await second.call("ping")


async def test_a_shell_on_the_console(tmp_path: Path) -> None:
    async with boot(tmp_path, cmdline="semper.shell") as guest:
        async with asyncio.timeout(60):
            while "guest:" not in guest.serial.read_text(errors="replace"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # poll interval
        ran = await guest.client.execute("sh", "-c", "echo out; echo err >&2; exit 3")
        assert (ran.status, ran.stdout, ran.stderr) == (3, "out\n", "err\n")


async def test_a_guest_that_powers_off_is_gone(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        await guest.client.poweroff()
        assert await asyncio.to_thread(guest.process.wait, 60) == 0


async def test_a_panic_is_a_reboot_that_the_console_explains(tmp_path: Path) -> None:
    async with boot(tmp_path) as guest:
        first = guest.client.nonce
        with pytest.raises(ProbeRebooted):
            await guest.client.execute("sh", "-c", "echo c > /proc/sysrq-trigger", deadline_s=60)
        assert guest.client.nonce != first
        assert "Kernel panic" in guest.serial.read_text(errors="replace")


async def test_a_first_process_that_cannot_go_on_says_why(tmp_path: Path) -> None:
    damage = Archive()
    damage.file("sys", b"not a directory")
    with pytest.raises(ProbeGone):
        async with boot(tmp_path, extra_initrd=damage.to_bytes()):
            pytest.fail("the guest came up without /sys")
    console = (tmp_path / "serial.log").read_text(errors="replace")
    assert "semper-probe: cannot go on, powering off: mount /sys" in console
    assert "Kernel panic" not in console


async def test_the_kernel_says_when_a_task_hangs(shared: Shared) -> None:
    async with greeted(shared.machine) as guest:
        limits = await guest.client.execute(
            "sh", "-c", "cd /proc/sys/kernel; cat hung_task_timeout_secs hung_task_warnings"
        )
        assert limits.stdout.split() == ["30", "-1"]
        lines = await guest.client.dmesg()
        assert any("Linux version" in line.text for line in lines)
        last = lines[-1].seq
        await guest.client.execute("sh", "-c", "echo '<3>I/O error, dev none' > /dev/kmsg")
        # The kernel may have something of its own to say meanwhile.
        said = [(line.level, line.text) for line in await guest.client.dmesg(since=last + 1)]
        assert said.count((3, "I/O error, dev none")) == 1, said
