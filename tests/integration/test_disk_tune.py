"""Calibration with real backends and a real load; the command; a VM that runs with the result."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sempervirt.agent import Agent, AgentConfig
from sempervirt.core.errors import ImageLocked, InvalidRequest, StateConflict, Unavailable
from sempervirt.core.queue_map import DeviceType
from sempervirt.disk import takeover
from sempervirt.disk.backend import Blkd
from sempervirt.disk.fingerprint import fingerprint
from sempervirt.disk.presets import Preset, PresetStore
from sempervirt.disk.storage import StorageKey, storage_key
from sempervirt.disk.tuning.candidates import Candidate
from sempervirt.disk.tuning.preparation import Request, prepare
from sempervirt.disk.tuning.report import TuneReport
from sempervirt.disk.tuning.scratch import check_room, scratch_image
from sempervirt.disk.tuning.tune import Tuning, Watch, alone
from sempervirt.host.procfs import command_name, find_by_argument
from sempervirt.qemu.features import find_qemu
from sempervirt.qemu.spec import VmSpec

MIB = 1 << 20
DEADLINE_S = 240.0
RACES = 3
POLL_S = 0.01
PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on tmpfs."""
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A directory on a disk."""
    places = [Path("/tmp"), Path("/var/tmp"), PROJECT]
    place = next(p for p in places if not storage_key(p, direct=False).in_memory)
    with tempfile.TemporaryDirectory(prefix="sv-", dir=place) as directory:
        yield Path(directory)


def request(config: AgentConfig, *targets: Path, **keys: Any) -> Request:
    """A calibration in its short form: what needs more time is left out."""
    values: dict[str, Any] = {
        "blkd": Blkd().binary(),
        "qemu": find_qemu(),
        "state_dir": config.state_dir,
        "devices": ("vhost-user-blk",),
        "queues": 2,
        "seconds": 1.0,
        "size_bytes": 8 * MIB,
        "limit": lambda c: (c.queues_per_thread, c.poll_us) == (2, 0),
        **keys,
    }
    return Request(targets=targets, **values)


async def tune(asked: Request, watch: Watch | None = None) -> TuneReport:
    return await Tuning(await prepare(asked)).run(watch or Watch())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Recorder(Watch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []
        self.turns: list[tuple[int, int]] = []
        self.found: list[tuple[DeviceType, Preset]] = []

    def writing(self, where: Path, done_bytes: int, total_bytes: int) -> None:
        self.written.append((done_bytes, total_bytes))

    def racing(
        self, device: DeviceType, storage: StorageKey, done: int, total: int, candidate: str
    ) -> None:
        self.turns.append((done, total))

    def finished(self, device: DeviceType, storage: StorageKey, preset: Preset) -> None:
        self.found.append((device, preset))


async def test_a_race_on_tmpfs(config: AgentConfig, memory: Path) -> None:
    recorder = Recorder()
    report = await tune(request(config, memory), recorder)
    (site,) = report.storages
    (device,) = site.devices
    assert (site.storage, site.where, site.read_only) == (StorageKey(kind="tmpfs"), memory, False)
    assert {view.engine for view in device.candidates} == {"sync", "mmap"}
    assert device.candidates[0].verdict == "winner"
    for view in device.candidates:
        assert view.rounds >= 5
        assert {entry.load for entry in view.figures} == {"4k-d1", "4k-d32"}
        assert all(entry.iops > 0 and entry.cpu_us_per_request > 0 for entry in view.figures)
        assert view.reason
    assert names(memory) == []
    assert recorder.written[-1] == (8 * MIB, 8 * MIB)
    assert all(done < total for done, total in recorder.turns)
    assert [done for done, _ in recorder.turns] == list(range(len(recorder.turns)))
    found = PresetStore(config.state_dir).find("vhost-user-blk", site.storage, report.host)
    assert found == device.preset == recorder.found[0][1]
    assert (device.preset.source, device.preset.engine) == ("measured", device.candidates[0].engine)


async def test_devices_that_qemu_serves(config: AgentConfig, memory: Path) -> None:
    """virtio-blk by QEMU's own block layer where it can be; the rest by rules that say so."""
    report = await tune(
        request(
            config,
            memory,
            devices=("vhost-user-blk", "virtio-blk", "virtio-scsi", "virtio-net"),
            limit=lambda c: c.engine in ("sync", "threads") and c.poll_us == 0,
        )
    )
    presets = {d.preset.device: d.preset for site in report.storages for d in site.devices}
    ours, blk = presets["vhost-user-blk"], presets["virtio-blk"]
    assert (blk.engine, blk.source) == ("threads", "partly")
    assert blk.queues_per_thread == ours.queues_per_thread
    assert all(entry.iops > 0 for entry in blk.figures)
    scsi, net = presets["virtio-scsi"], presets["virtio-net"]
    assert (scsi.source, scsi.figures, scsi.engine) == ("rule", (), "threads")
    assert scsi.queues_per_thread == blk.queues_per_thread
    assert (net.source, net.storage.kind, net.queues_per_thread) == ("rule", "none", 1)
    assert len(PresetStore(config.state_dir).read().presets) == 4


async def test_without_the_storage_daemon_it_is_a_rule(
    config: AgentConfig, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(config, memory, devices=("virtio-blk",))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    report = await tune(asked)
    (device,) = report.storages[0].devices
    assert device.candidates == ()
    assert device.preset.source == "rule"
    assert "qemu-storage-daemon is not installed" in device.preset.why


@pytest.fixture
def partly_broken(place: Path) -> Path:
    """A semper-blkd that cannot do mmap."""
    program = place / "blkd"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--engine=mmap*) echo "semper-blkd: error: no" >&2; exit 1;; '
        f'esac\nexec {Blkd().binary()} "$@"\n'
    )
    program.chmod(stat.S_IRWXU)
    return program


async def test_a_candidate_that_does_not_work_is_out(
    config: AgentConfig, memory: Path, partly_broken: Path
) -> None:
    report = await tune(request(config, memory, blkd=str(partly_broken)))
    (device,) = report.storages[0].devices
    verdicts = {view.engine: (view.verdict, view.reason) for view in device.candidates}
    assert verdicts["sync"][0] == "winner"
    assert verdicts["mmap"] == ("failed", "semper-blkd: error: no")


async def test_when_no_candidate_works_nothing_is_stored(
    config: AgentConfig, memory: Path, partly_broken: Path
) -> None:
    asked = request(config, memory, blkd=str(partly_broken), limit=lambda c: c.engine == "mmap")
    with pytest.raises(Unavailable, match=r"no candidate could be measured: .* error: no"):
        await tune(asked)
    assert PresetStore(config.state_dir).read().presets == ()
    assert names(memory) == []


@pytest.mark.root
async def test_a_block_device_is_only_read(
    config: AgentConfig, loop_device: Path, on_disk: Path
) -> None:
    image = on_disk / "disk.raw"
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    asked = request(config, loop_device, direct=True, limit=lambda c: c.engine == "uring")
    report = await tune(asked)
    (site,) = report.storages
    assert (site.storage.kind, site.storage.direct, site.read_only) == ("block", True, True)
    assert site.where == loop_device
    assert all(entry.iops > 0 for entry in site.devices[0].preset.figures)
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before


@pytest.fixture
def loop_device(on_disk: Path) -> Iterator[Path]:
    image = on_disk / "disk.raw"
    image.write_bytes(os.urandom(8 * MIB))
    command = ["losetup", "--find", "--show", str(image)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(name)
    subprocess.run(["losetup", "--detach", name], check=True)


@asynccontextmanager
async def held(image: Path, place: Path) -> AsyncIterator[int]:
    """Somebody serves the image."""
    socket = place / "holder.sock"
    process = await asyncio.create_subprocess_exec(
        Blkd().binary(), f"--socket-path={socket}", f"--blk-file={image}"
    )
    try:
        await wait_until(socket.exists)
        yield process.pid
    finally:
        process.terminate()
        await process.wait()


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)  # poll interval


async def test_an_image_in_use_is_refused(
    config: AgentConfig, disk_image: Path, place: Path
) -> None:
    async with held(disk_image, place) as pid:
        with pytest.raises(ImageLocked, match=rf"is in use by semper-blkd \(pid {pid}\)"):
            await prepare(request(config, disk_image))
    prepared = await prepare(request(config, disk_image))
    assert [site.where for site in prepared.sites] == [place] * len(prepared.sites)


async def test_an_image_of_another_kind_is_refused(config: AgentConfig, place: Path) -> None:
    for target, words in (
        (place / "absent.raw", "No such file"),
        (Path("/dev/null"), "neither a regular file nor a block device"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            await prepare(request(config, target))
    with pytest.raises(InvalidRequest, match="no storage is named"):
        await prepare(request(config))
    with pytest.raises(InvalidRequest, match="lies in memory"):
        await prepare(request(config, Path("/dev/shm"), direct=True))


async def test_an_image_is_not_written_to(config: AgentConfig, on_disk: Path) -> None:
    image = on_disk / "precious.raw"
    image.write_bytes(os.urandom(MIB))
    before = image.read_bytes(), image.stat().st_mtime_ns
    await tune(request(config, image, direct=False, limit=lambda c: str(c) == SIMPLEST))
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    assert names(on_disk) == [image.name]


SIMPLEST = str(Candidate("sync", 2, 0))


async def test_targets_of_one_storage_are_measured_once(config: AgentConfig, memory: Path) -> None:
    other = memory / "other"
    other.mkdir()
    prepared = await prepare(request(config, memory, other))
    assert len(prepared.sites) == 1


def test_too_little_room(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"has .* free; the scratch image takes 1P") as caught:
        check_room(memory, 1 << 50)
    assert "--size" in caught.value.remedy
    with pytest.raises(InvalidRequest, match="not a directory"):
        check_room(memory / "absent", 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InvalidRequest, match="cannot be written to"):
        check_room(memory, 1)


@pytest.mark.root
async def test_a_disk_that_becomes_full(place: Path) -> None:
    full = place / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80M", "tmpfs", full], check=True)  # noqa: ASYNC221
    try:

        def somebody_else_writes(done_bytes: int) -> None:
            if done_bytes == 4 * MIB:
                with (full / "other").open("wb") as other:
                    os.posix_fallocate(other.fileno(), 0, 70 * MIB)

        with pytest.raises(Unavailable, match=r"full is full: No space left on device"):
            async with scratch_image(full, 12 * MIB, somebody_else_writes):
                pass
        assert [path.name for path in full.iterdir()] == ["other"]
    finally:
        subprocess.run(["umount", full], check=True)  # noqa: ASYNC221


async def test_a_file_system_without_nameless_files(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_WRONLY)  # what an old file system makes of it
    async with scratch_image(memory, 8 * MIB) as ground:
        assert ground.path.stat().st_size == 8 * MIB
        assert names(memory) == []


async def test_a_busy_machine_is_told_of(
    config: AgentConfig, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for load, words in ((0.0, ()), (300.0, ("the machine was busy (load average 300.0",))):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        report = await tune(request(config, memory, limit=lambda c: str(c) == SIMPLEST))
        assert len(report.warnings) == len(words)
        assert all(w in said for w, said in zip(words, report.warnings, strict=True))


def test_two_at_a_time_are_refused(place: Path) -> None:
    with alone(place), pytest.raises(StateConflict, match="is running"), alone(place):
        pass
    with alone(place):
        pass


@pytest.mark.slow
async def test_two_storages_have_different_winners_and_a_vm_runs_with_them(
    config: AgentConfig, memory: Path, on_disk: Path
) -> None:
    """The goal of it all: tmpfs is best mapped, a disk behind O_DIRECT wants io_uring. Where the
    machine is so busy that the difference is lost in the noise, they race again, for longer.
    """
    limit: Callable[[Candidate], bool] = lambda c: c.poll_us in (0, 20)  # noqa: E731
    presets = []
    for folder, direct, engine in ((memory, False, "mmap"), (on_disk, True, "uring")):
        races: list[Preset] = []
        while len(races) < RACES and not (races and races[-1].engine == engine):
            seconds = 12.0 * 2 ** len(races)
            asked = request(config, folder, seconds=seconds, limit=limit, direct=direct)
            report = await tune(asked)
            races.append(report.storages[0].devices[0].preset)
        assert races[-1].engine == engine, races
        presets.append(races[-1])

    disks = []
    for name, folder in (("fast", memory), ("safe", on_disk)):
        image = folder / f"{name}.raw"
        image.touch()
        os.truncate(image, 8 * MIB)
        disks.append({"name": name, "image": str(image), "queues": 2, "direct": name == "safe"})
    spec = VmSpec.model_validate({"name": "web", "memory": "64M", "disks": disks})
    async with Agent.open(config) as agent:
        await agent.run_vm(spec)
        for name, preset in zip(("fast", "safe"), presets, strict=True):
            status = await agent.disk(f"web/{name}").status()
            shown = {
                key: getattr(status, key) for key in ("engine", "threads", "poll_us", "direct")
            }
            assert shown == {
                "engine": preset.engine,
                "threads": preset.threads_for(2),
                "poll_us": preset.poll_us,
                "direct": name == "safe",
            }
            threads = list(status.thread_map)
            assert threads == [queue % preset.threads_for(2) for queue in range(2)]


async def test_a_stale_preset_is_not_used_and_is_warned_of(
    config: AgentConfig,
    disk_image: Path,
    firmware_spec: Callable[..., VmSpec],
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = await fingerprint(Blkd().binary(), "")
    valid = Preset(
        device="vhost-user-blk",
        storage=storage_key(disk_image, direct=False),
        engine="sync",
        queues_per_thread=1,
        poll_us=7,
        source="measured",
        why="for this test",
        measured_at=datetime.now(UTC),
        host=host,
    )
    stale = valid.model_copy(update={"host": host.model_copy(update={"kernel": "2.4.0"})})
    store = PresetStore(config.state_dir)
    for name, preset, is_used in (("new", valid, True), ("old", stale, False)):
        caplog.clear()
        store.put([preset])
        async with Agent.open(config) as agent:  # ends its VM when it is closed
            await agent.run_vm(firmware_spec(name=name))
            disk = agent.disk(f"{name}/root")
            status = await disk.status()
        assert ((status.engine, status.poll_us) == ("sync", 7)) is is_used
        assert ("preset stale" in caplog.text) is not is_used
        assert ("the kernel was '2.4.0'" in caplog.text) is not is_used
        assert ("stale" in str(disk.plan)) is not is_used


async def test_a_vm_starts_beside_the_presets_of_a_later_release(
    config: AgentConfig, firmware_spec: Callable[..., VmSpec], caplog: pytest.LogCaptureFixture
) -> None:
    config.state_dir.mkdir()
    file = PresetStore(config.state_dir).path
    file.write_text('{"version": 9}')
    async with Agent.open(config) as agent:
        await agent.run_vm(firmware_spec())
        assert takeover.is_connected(await agent.disk("web/root").status())
    assert "has version 9" in caplog.text
    assert file.read_text() == '{"version": 9}'


@dataclass
class Answer:
    """What `semper disk tune` printed, and how it ended. `err` has no line breaks."""

    code: int
    out: str
    err: str


@asynccontextmanager
async def started(
    config: AgentConfig, *arguments: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("semper")),
        *("disk", "tune", "--size=8M", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "SEMPERVIRT_STATE_DIR": str(config.state_dir),
            "TMPDIR": str(config.state_dir.parent),
            "TERM": "dumb",
        },
        # Tests that run in the background have it ignored, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def semper(config: AgentConfig, *arguments: str) -> Answer:
    async with started(config, *arguments) as process, asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate()
        assert process.returncode is not None
        return Answer(process.returncode, out.decode(), " ".join(err.decode().split()))


async def test_the_command(config: AgentConfig, memory: Path) -> None:
    arguments = (str(memory), "--device=vhost-user-blk", "--seconds=1", "--queues=1")
    shown = await semper(config, *arguments, "--dry-run")
    assert shown.code == 0, shown.err
    assert "tmpfs" in shown.out
    assert "mmap, 1 queue a thread, no polling" in shown.out
    assert "nothing was written" in shown.out
    assert not config.state_dir.exists()
    assert names(memory) == []
    assert "no presets" in (await semper(config, "--show")).out

    ran = await semper(config, *arguments)
    assert ran.code == 0, ran.err
    for words in ("★", "REQ/CPU-S", "P99 4K-D32", "stored in", "6 candidates"):
        assert words in ran.out, ran.out
    assert "vhost-user-blk on tmpfs: " in ran.err

    listed = await semper(config, "--show")
    assert "in use" in listed.out
    stored = config.state_dir / "presets.json"
    stored.write_text(stored.read_text().replace('"kernel": "', '"kernel": "old-'))
    stale = await semper(config, "--show")
    assert "stale: the kernel was 'old-" in stale.out
    document = json.loads((await semper(config, "--show", "--output=json")).out)
    assert document["presets"][0]["stale"].startswith("the kernel was")


async def test_the_command_as_json_and_as_a_picture(
    config: AgentConfig, memory: Path, place: Path
) -> None:
    picture = place / "tune.svg"
    arguments = (str(memory), "--seconds=1", "--queues=1", "--output=json", f"--plot={picture}")
    planned = json.loads((await semper(config, *arguments, "--dry-run")).out)
    assert [race["device"] for race in planned["storages"][0]["races"]] == [
        "vhost-user-blk", "virtio-blk", "virtio-scsi", "virtio-net",
    ]  # fmt: skip
    ran = await semper(config, *arguments)
    assert ran.code == 0, ran.err
    report = TuneReport.model_validate_json(ran.out)
    devices = {device.preset.device: device for device in report.storages[0].devices}
    assert len(devices) == 4
    assert all(device.preset.why for device in devices.values())
    assert len(devices["vhost-user-blk"].candidates) == 6
    drawing = picture.read_text()
    assert "vhost-user-blk on tmpfs" in re.sub(r"<!--|-->", "", drawing)


async def test_refusals_are_one_clear_line(
    config: AgentConfig, memory: Path, disk_image: Path, place: Path
) -> None:
    for arguments, code, words in (
        ((str(memory), "--size=1M"), 2, "not between 8M and 16G"),
        ((str(memory), "--plot=x.doc"), 2, "no picture can be drawn as x.doc"),
        ((str(place / "absent"),), 2, "No such file"),
        ((), 2, "no storage is named"),
    ):
        answer = await semper(config, *arguments)
        assert (answer.code, words in answer.err) == (code, True), answer
    async with held(disk_image, place):
        answer = await semper(config, str(disk_image))
        assert answer.code == 5
        assert "is in use by semper-blkd (pid " in answer.err


def children_of_tune(pid: int) -> list[int]:
    """Backends that serve the scratch image of a tune."""
    found = find_by_argument(re.compile(rf"--blk-file=/proc/{pid}/fd/\d+"))
    return [child for child in found if command_name(child) == "semper-blkd"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
async def test_however_it_ends_nothing_is_left_behind(
    config: AgentConfig, memory: Path, number: signal.Signals, code: int
) -> None:
    async with started(config, str(memory), "--device=vhost-user-blk") as process:
        await wait_until(lambda: children_of_tune(process.pid))
        process.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            _, err = await process.communicate()
        assert process.returncode == code, err
        await wait_until(lambda: not children_of_tune(process.pid))
        # The load ends when it notices that its backend has.
        sockets = re.compile(rf".*{re.escape(str(config.state_dir.parent))}/.*")
        await wait_until(lambda: not find_by_argument(sockets))
    assert names(memory) == []
    assert not (config.state_dir / "presets.json").exists()
    assert b"Traceback" not in err
    if number is not signal.SIGKILL:  # which leaves the directory of the sockets
        assert [name for name in names(config.state_dir.parent) if "semper-tune" in name] == []
