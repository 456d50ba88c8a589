"""Volumes, command lines, control sockets, records and timelines of disks."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import (
    ImageLocked,
    InvalidRequest,
    OutcomeUnknown,
    SempervirtError,
    Unavailable,
)
from sempervirt.core.queue_map import Binding
from sempervirt.disk import takeover
from sempervirt.disk.answers import Status, Timeline
from sempervirt.disk.backend import PROGRAM, Blkd, DiskOptions, ImageTitle, Launch
from sempervirt.disk.record import DiskRecord, RecordedProcess, Role, read_disk_record
from sempervirt.disk.running import LOGS_KEPT, DiskFiles
from sempervirt.disk.setup import supervised
from sempervirt.disk.state import Policy
from sempervirt.disk.volume import inspect, require_raw
from sempervirt.host.control import LINE_MAX_BYTES, ControlSocket
from sempervirt.host.process import Exit
from sempervirt.host.procfs import ProcessId
from sempervirt.host.records import RecordDamaged
from sempervirt.host.refusals import describe_end, refusal
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.setup import inspect_images


def make(path: Path, content: bytes = b"", size: int = 1 << 20) -> Path:
    path.write_bytes(content)
    os.truncate(path, size)
    return path


def test_a_raw_image(tmp_path: Path) -> None:
    volume = inspect(make(tmp_path / "a.raw"), read_only=False)
    assert (volume.size_bytes, volume.block_device, volume.read_only) == (1 << 20, False, False)


@pytest.mark.parametrize(
    ("magic", "name"),
    [(b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"QED\0", "qed")],
)
async def test_what_looks_like_another_format_is_refused_unless_it_is_said_to_be_raw(
    tmp_path: Path, magic: bytes, name: str
) -> None:
    image = make(tmp_path / f"a.{name}", magic)
    disk = {"name": "a", "image": str(image)}
    spec = VmSpec.model_validate({"name": "web", "disks": [disk]})
    with pytest.raises(InvalidRequest) as caught:
        await inspect_images(spec, used=False)
    assert f"begins as one of the format {name} does" in caught.value.message
    assert 'set format = "raw"' in caught.value.remedy
    assert f"qemu-img convert -f {name} -O raw {image} {tmp_path}/a.raw" in caught.value.remedy
    assert (await inspect_images(spec, used=True))["a"].size_bytes == 1 << 20
    said = VmSpec.model_validate({"name": "web", "disks": [{**disk, "format": "raw"}]})
    assert (await inspect_images(said, used=False))["a"].size_bytes == 1 << 20


def test_the_remedy_for_another_format_destroys_nothing(tmp_path: Path) -> None:
    """As it is given, with qemu-img: the image stays, and nothing that is there is replaced."""
    image, other = tmp_path / "a b.raw", tmp_path / "a b1.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    other.write_bytes(b"another disk")
    before = image.read_bytes()
    with pytest.raises(InvalidRequest) as caught:
        require_raw(image)
    _, _, command = caught.value.remedy.rpartition(": ")
    subprocess.run(shlex.split(command), check=True)
    assert (image.read_bytes(), other.read_bytes()) == (before, b"another disk")
    assert inspect(tmp_path / "a b2.raw", read_only=False).size_bytes == 1 << 20


@pytest.mark.parametrize("size", [0, 511, 513, (1 << 20) + 1])
def test_a_truncated_image_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidRequest, match=f"has {size} bytes.*truncated"):
        inspect(make(tmp_path / "a.raw", size=size), read_only=False)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="does not exist"):
        inspect(tmp_path / "absent.raw", read_only=False)
    with pytest.raises(InvalidRequest, match="neither a file nor a block device"):
        inspect(Path("/dev/null"), read_only=False)
    with pytest.raises(InvalidRequest, match="cannot be opened for writing"):
        inspect(tmp_path, read_only=False)


def test_the_command_line_of_a_backend(tmp_path: Path) -> None:
    options = DiskOptions(
        tmp_path / "a.raw", queues=4, engine="uring", direct=True, serial="s1", poll_us=0
    )
    launch = Launch(
        "/bin/blkd",
        options,
        7,
        tmp_path / "c",
        wait_for_lock=True,
        thread_map=(0, 1, 0, 1),
        touched=tmp_path / "t",
    )
    assert Blkd(extra=("--x",)).argv(launch) == [
        "/bin/blkd",
        "--fd=7",
        f"--blk-file={tmp_path}/a.raw",
        "--num-queues=4",
        f"--control-socket={tmp_path}/c",
        "--engine=uring",
        "--thread-map=0,1,0,1",
        f"--map-file={tmp_path}/t",
        "--poll-us=0",
        "--serial=s1",
        "--direct",
        "--spare",
        "--x",
    ]
    first = Launch("b", DiskOptions(Path("i"), read_only=True, block_size=4096), 3, Path("c"),
                   wait_for_lock=False, thread_map=(0, 0))  # fmt: skip
    argv = Blkd().argv(first)
    assert {"--read-only", "--block-size=4096"} <= set(argv)
    assert "--spare" not in argv
    assert not any("thread" in argument or "poll" in argument for argument in argv)
    # Its successor has no lock to wait for, and would be refused with --spare.
    assert Blkd().argv(replace(first, wait_for_lock=True)) == argv
    policy = supervised(Policy(), Blkd(), read_only=True)
    assert (policy.spare, supervised(Policy(), Blkd(), read_only=False).spare) == (False, True)


def test_the_title_of_a_backend(tmp_path: Path) -> None:
    def argv(title: ImageTitle | None, **options: Any) -> set[str]:
        launch = Launch("b", DiskOptions(Path("i"), **options), 3, Path("c"),
                        wait_for_lock=False, title=title)  # fmt: skip
        return set(Blkd().argv(launch))

    record = {f"--epoch-file={tmp_path}/i.epoch", "--holder=a"}
    plain = argv(None)
    awaiting = ImageTitle(tmp_path / "i.epoch", "a")
    assert argv(awaiting) - plain == record | {"--incoming", "--await-claim"}
    claimed = replace(awaiting, epoch=7, claim="11" * 16)
    assert argv(claimed) - plain == record | {"--epoch=7", f"--claim={'11' * 16}"}
    assert argv(claimed, read_only=True) - plain == {"--read-only"}


def test_where_the_backend_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Blkd(Path("/a/b")).binary() == "/a/b"
    monkeypatch.setenv("SEMPERVIRT_BLKD", "/chosen")
    assert Blkd().binary() == "/chosen"
    monkeypatch.delenv("SEMPERVIRT_BLKD")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(Unavailable, match="not installed"):
        Blkd().binary()


Handler = Callable[[bytes], bytes | None]


@asynccontextmanager
async def control_socket(path: Path, answer: Handler) -> AsyncIterator[Path]:
    """A backend's control socket; `answer` may be None to close instead."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reply = answer(await reader.readline())
        if reply is not None:
            writer.write(reply)
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield path


@pytest.fixture
def address() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        yield Path(directory) / "ctl"


async def test_a_question_and_its_answer(address: Path) -> None:
    asked: list[Any] = []

    def answer(line: bytes) -> bytes:
        asked.append(json.loads(line))
        return b'{"id": 1, "ok": {"state": "running"}}\n'

    async with control_socket(address, answer):
        assert await ControlSocket(address, PROGRAM).ask("dance", step=None) == {"state": "running"}
    assert asked == [{"id": 1, "cmd": "dance", "step": None}]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b'{"id": 1, "error": {"kind": "invalid", "message": "no"}}\n', InvalidRequest),
        (b'{"id": 1, "error": {"kind": "unavailable", "message": "no"}}\n', Unavailable),
        (b'{"id": 1}\n', OutcomeUnknown),
        (b"{\n", OutcomeUnknown),
        (b"\xff\n", OutcomeUnknown),
        (b"[" * 100_000 + b"\n", OutcomeUnknown),
        (b"x" * (LINE_MAX_BYTES + 1), OutcomeUnknown),
        (b'{"id": 1, "ok": []}\n', OutcomeUnknown),
        (None, OutcomeUnknown),
    ],
)
async def test_answers_that_are_errors(
    address: Path, reply: bytes | None, error: type[SempervirtError]
) -> None:
    async with control_socket(address, lambda _: reply):
        with pytest.raises(error):
            await ControlSocket(address, PROGRAM).ask("status")


async def test_nobody_listens_or_nobody_answers(address: Path) -> None:
    with pytest.raises(Unavailable, match="semper-blkd does not listen"):
        await ControlSocket(address, PROGRAM).ask("status")

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(silent, address):
        with pytest.raises(
            OutcomeUnknown, match=r"semper-blkd did not answer status on .*: no answer in time"
        ):
            await ControlSocket(address, PROGRAM).ask("status", timeout_s=0.5)


def test_a_record_and_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.json"
    process = RecordedProcess(Role.ACTIVE, 3, "/bin/blkd", 9, ProcessId(4711, 123, "boot"))
    record = DiskRecord(next_generation=5, binary="/bin/blkd", restarts=2, processes=(process,))
    record.write(path)
    assert read_disk_record(path) == record
    bound = replace(record, binding=Binding((0, 1, 1), "semper disk threads"))
    bound.write(path)
    assert read_disk_record(path) == bound
    content = json.loads(path.read_text())
    del content["binding"]  # as an earlier release wrote it
    path.write_text(json.dumps(content))
    assert read_disk_record(path) == record
    path.write_text(json.dumps({**content, "binding": {"map": [0, 2], "source": "?"}}))
    with pytest.raises(RecordDamaged, match="not the record of a disk"):
        read_disk_record(path)
    path.write_text('{"version": 1, "next_generation": "x"}')
    with pytest.raises(RecordDamaged, match="not the record of a disk"):
        read_disk_record(path)


def test_why_a_backend_would_not_start() -> None:
    words = "semper-blkd: error: image a.raw is in use by qemu-img (pid 7); stop that first"
    locked = refusal("disk web/root", "the backend", Exit(code=3), words)
    assert isinstance(locked, ImageLocked)
    assert locked.message == "disk web/root: image a.raw is in use by qemu-img (pid 7)"
    assert locked.remedy == "stop that first"
    assert isinstance(
        refusal("disk d", "the backend", Exit(code=4), "semper-blkd: error: gone"), InvalidRequest
    )
    crashed = refusal("disk d", "the backend", Exit(signal=11), "thread panicked")
    assert type(crashed) is Unavailable
    assert "killed by SIGSEGV" in crashed.message
    assert "thread panicked" in crashed.message
    assert describe_end(Exit(code=1), words).startswith("exit code 1: image a.raw")
    assert describe_end(Exit(signal=9), "INFO serving") == "killed by SIGKILL"


def test_the_logs_of_old_backends_go(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path, "a")
    other = DiskFiles(tmp_path, "a-1")
    for generation in range(1, 13):
        files.log(generation).touch()
        files.control(generation).touch()
    other.log(1).touch()
    files.prune(3)
    assert [path.name for path in files.logs()] == [f"disk-a-{g}.log" for g in range(8, 13)]
    assert len(files.logs()) == LOGS_KEPT
    assert other.logs() == [other.log(1)]
    assert not files.control(3).exists()
    assert files.control(4).exists()


GOLDEN = Path(__file__).parents[2] / "crates/control/golden"


def status(name: str, state: str | None = None, **timeline: int | None) -> Status:
    """The status of a golden file, with another state and other milestones."""
    content = json.loads((GOLDEN / f"blkd-status-{name}.json").read_text())["ok"]
    content["timeline_ns"] |= timeline
    content["state"] = state or content["state"]
    return Status.model_validate_json(json.dumps(content))


def test_what_a_status_says() -> None:
    assert takeover.is_prepared(status("spare"))
    assert not takeover.is_prepared(status("spare", spare_ready=None))
    assert takeover.is_prepared(status("incoming"))
    assert not takeover.holds_image(status("spare"))
    assert takeover.has_progressed(status("active"))
    assert not takeover.has_progressed(status("spare"))
    active = status("active")
    assert active.thread_map == tuple(queue.thread for queue in active.queues)
    listening = status("unclaimed")
    assert takeover.serves(listening, connection_expected=False)
    assert not takeover.serves(listening, connection_expected=True)
    connected = status("unclaimed", state="connected")
    assert takeover.serves(connected, connection_expected=True)
    assert not takeover.serves(status("spare"), connection_expected=False)
    assert not takeover.serves(status("active", state="draining"), connection_expected=False)


def test_milestones_count_from_when_the_end_was_seen() -> None:
    nothing = dict.fromkeys(Timeline.model_fields)
    timeline = Timeline(**nothing | {"lock_acquired": 9_500_000, "accepted": 11_000_000})
    assert takeover.milestones(timeline, 10_000_000) == {
        "lock_acquired": -0.5,
        "accepted": 1.0,
        "started": None,
        "replayed": None,
        "first_completion": None,
    }
