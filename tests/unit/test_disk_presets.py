"""The preset store: what is found, what is stale, and that nothing unread is ever lost."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.disk import storage
from sempervirt.disk.fingerprint import HostFingerprint, fingerprint, this_host
from sempervirt.disk.presets import LoadFigures, Preset, PresetStore, Stale
from sempervirt.disk.storage import NO_STORAGE, StorageKey, storage_key
from sempervirt.host.records import RecordDamaged, RecordNewer

HOST = HostFingerprint(cpu="Z80", cpus=2, kernel="6.1", blkd="0.1.0", qemu="10.0.2")
TMPFS = StorageKey(kind="tmpfs")
DIRECT = StorageKey(kind="ext4", device="disk-1", direct=True)


def preset(**keys: Any) -> Preset:
    values: dict[str, Any] = {
        "device": "vhost-user-blk",
        "storage": TMPFS,
        "engine": "mmap",
        "queues_per_thread": 2,
        "poll_us": 20,
        "source": "measured",
        "why": "the best",
        "figures": (LoadFigures(load="4k-d1", iops=1.5, p99_us=9.0, cpu_us_per_request=2.0),),
        "measured_at": datetime(2026, 11, 23, tzinfo=UTC),
        "host": HOST,
    }
    return Preset.model_validate({**values, **keys})


@pytest.fixture
def store(tmp_path: Path) -> PresetStore:
    return PresetStore(tmp_path / "state")


def test_what_was_put_is_found_by_device_and_storage(store: PresetStore) -> None:
    assert store.find("vhost-user-blk", TMPFS, HOST) is None
    ours, others = preset(), preset(storage=DIRECT, engine="uring")
    assert store.put([ours, others]) == []
    assert store.find("vhost-user-blk", TMPFS, HOST) == ours
    assert store.find("vhost-user-blk", DIRECT, HOST) == others
    assert store.find("virtio-blk", TMPFS, HOST) is None
    assert store.find("vhost-user-blk", DIRECT.model_copy(update={"direct": False}), HOST) is None


def test_a_new_preset_replaces_its_own_kind_only(store: PresetStore) -> None:
    store.put([preset(), preset(device="virtio-blk", engine="native")])
    store.put([preset(engine="sync")])
    found = store.read().presets
    assert sorted((p.device, p.engine) for p in found) == [
        ("vhost-user-blk", "sync"),
        ("virtio-blk", "native"),
    ]
    assert store.read().warnings == ()


@pytest.mark.parametrize(
    ("device", "change", "words"),
    [
        ("vhost-user-blk", {"cpu": "6502"}, "the processor was 'Z80', is '6502'"),
        ("vhost-user-blk", {"cpus": 4}, "the number of processors was 2, is 4"),
        ("vhost-user-blk", {"kernel": "6.2"}, "the kernel was '6.1', is '6.2'"),
        ("vhost-user-blk", {"blkd": "0.2.0"}, "semper-blkd was '0.1.0', is '0.2.0'"),
        ("vhost-user-blk", {"qemu": "11.0.0"}, ""),
        ("virtio-blk", {"qemu": "11.0.0"}, "QEMU was '10.0.2', is '11.0.0'"),
        ("virtio-scsi", {"qemu": ""}, "QEMU was '10.0.2', is 'unknown'"),
        ("virtio-net", {"cpus": 1}, "the number of processors was 2, is 1"),
        ("virtio-blk", {"blkd": "0.2.0"}, ""),
    ],
)
def test_stale_is_what_the_device_depends_on(
    store: PresetStore,
    caplog: pytest.LogCaptureFixture,
    device: Any,
    change: dict[str, Any],
    words: str,
) -> None:
    kept = preset(device=device)
    store.put([kept])
    found = store.find(device, TMPFS, HOST.model_copy(update=change))
    assert found == (Stale(kept, words) if words else kept)
    assert ("semper disk tune" in caplog.text) == bool(words)
    assert words in caplog.text


def test_every_change_is_named(store: PresetStore) -> None:
    store.put([preset()])
    found = store.find("vhost-user-blk", TMPFS, HostFingerprint(cpu="?", cpus=9, kernel="?"))
    assert isinstance(found, Stale)
    assert found.reason.count(";") == 3


@given(
    queues=st.integers(1, 64),
    each=st.integers(1, 70),
)
def test_threads_are_as_few_as_the_queues_need(queues: int, each: int) -> None:
    threads = preset(queues_per_thread=each).threads_for(queues)
    assert threads >= 1
    assert threads * each >= queues
    assert (threads - 1) * each < queues


@pytest.mark.parametrize("cut", [0, 1, 40, 200])
def test_a_truncated_file_is_a_warning_and_is_kept(store: PresetStore, cut: int) -> None:
    store.put([preset()])
    damaged = store.path.read_bytes()[:cut]
    store.path.write_bytes(damaged)
    assert store.find("vhost-user-blk", TMPFS, HOST) is None
    (warning,) = store.read().warnings
    assert str(store.path) in warning
    assert store.path.read_bytes() == damaged
    (moved,) = store.put([preset(engine="sync")])
    aside = store.path.with_name("presets.json.damaged-1")
    assert str(aside) in moved
    assert aside.read_bytes() == damaged
    assert [p.engine for p in store.read().presets] == ["sync"]


def test_files_moved_aside_do_not_replace_each_other(store: PresetStore) -> None:
    for number in range(3):
        store.path.parent.mkdir(exist_ok=True)
        store.path.write_text(f"{{{number}")
        store.put([preset()])
    names = sorted(path.name for path in store.path.parent.glob("*.damaged-*"))
    assert names == [f"presets.json.damaged-{number}" for number in (1, 2, 3)]


@pytest.mark.parametrize("content", ["[]", "{}", '{"version": 1}', '{"version": 0}', "null"])
def test_what_is_no_record_is_moved_aside(store: PresetStore, content: str) -> None:
    store.path.parent.mkdir()
    store.path.write_text(content)
    assert store.read().warnings
    assert store.put([preset()])
    assert store.path.with_name("presets.json.damaged-1").read_text() == content


def test_the_file_of_a_later_release_is_not_touched(store: PresetStore) -> None:
    store.path.parent.mkdir()
    later = '{"version": 2, "presets": {"vhost-user-blk": "…"}}'
    store.path.write_text(later)
    assert store.find("vhost-user-blk", TMPFS, HOST) is None
    assert "version 2" in store.read().warnings[0]
    for attempt in (store.check, lambda: store.put([preset()])):
        with pytest.raises(RecordNewer, match="use the release that wrote it"):
            attempt()
    assert store.path.read_text() == later
    assert [path.name for path in store.path.parent.glob("*.damaged*")] == []


def test_entries_that_are_not_understood_are_carried_along(store: PresetStore) -> None:
    store.put([preset()])
    document = json.loads(store.path.read_text())
    strange = [{**document["presets"][0], "engine": "quantum"}, {"device": "nvme"}, 7]
    document["presets"] += strange
    store.path.write_text(json.dumps(document))
    assert "3 of 4 presets" in store.read().warnings[0]
    assert store.find("vhost-user-blk", TMPFS, HOST) == preset()
    store.put([preset(engine="sync")])
    kept = json.loads(store.path.read_text())["presets"]
    assert [entry for entry in kept if entry in strange] == strange
    assert len(kept) == 4


def test_a_directory_in_the_way_is_an_error_and_no_damage(store: PresetStore) -> None:
    store.path.mkdir(parents=True)
    with pytest.raises(RecordDamaged, match="cannot be read"):
        store.put([preset()])
    assert store.path.is_dir()


def test_a_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = PresetStore(tmp_path / "file" / "state")
    for attempt in (blocked.check, lambda: blocked.put([preset()])):
        with pytest.raises(Unavailable, match="cannot be written"):
            attempt()


def test_storage_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path.stat()
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    mounts = tmp_path / "mounts"
    monkeypatch.setattr(storage, "MOUNTS", mounts)
    monkeypatch.setattr(storage, "SYS_BLOCK", tmp_path / "sys")
    disk = tmp_path / "devices/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "sda1/partition").write_text("1")
    mounts.write_text(
        f"1 0 {number} / / rw - ext4 /dev/x rw\n"
        f"2 1 0:99 / {tmp_path} rw - hidden nothing rw\n"
        f"3 1 {number} / /elsewhere rw - xfs /dev/x rw\n"
    )
    assert str(storage_key(tmp_path, direct=False)) == "ext4 cached on /dev/x"

    (tmp_path / "sys").mkdir()
    (tmp_path / "sys" / number).symlink_to(disk / "sda1")
    assert str(storage_key(tmp_path, direct=True)) == "ext4 direct on sda"
    (disk / "serial").write_text(" S3RIAL  7 \n")
    assert storage_key(tmp_path, direct=True).device == "S3RIAL 7"
    (disk / "wwid").write_text("naa.5000\n")
    assert storage_key(tmp_path, direct=True).device == "naa.5000"
    (disk / "loop").mkdir()
    (disk / "loop/backing_file").write_text("/srv/a.raw\n")
    assert storage_key(tmp_path, direct=True).device == "/srv/a.raw"

    mounts.write_text(f"1 0 {number} / / rw - tmpfs tmpfs rw\n")
    assert storage_key(tmp_path, direct=False) == TMPFS
    assert str(storage_key(tmp_path, direct=True)) == "tmpfs direct"
    assert str(NO_STORAGE) == "none"
    with pytest.raises(InvalidRequest, match="No such file"):
        storage_key(tmp_path / "absent", direct=False)


def test_blanks_in_mount_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with blank"
    folder.mkdir()
    status = folder.stat()
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    mounts = tmp_path / "mounts"
    mounts.write_text(f"1 0 {number} / {tmp_path}/with\\040blank rw - zfs tank/a rw\n")
    monkeypatch.setattr(storage, "MOUNTS", mounts)
    monkeypatch.setattr(storage, "SYS_BLOCK", tmp_path)
    assert storage_key(folder, direct=False) == StorageKey(kind="zfs", device="tank/a")


def test_the_real_memory_and_the_real_disk() -> None:
    assert storage_key(Path("/dev/shm"), direct=False) == TMPFS
    here = storage_key(Path(__file__), direct=True)
    assert (here.kind != "unknown", here.direct) == (True, True)


async def test_the_fingerprint_of_this_host(tmp_path: Path) -> None:
    program = tmp_path / "blkd"
    program.write_text("#!/bin/sh\necho semper-blkd 7.8.9\n")
    program.chmod(stat.S_IRWXU)
    found = await fingerprint(str(program), "11.0.0")
    assert (found.blkd, found.qemu) == ("7.8.9", "11.0.0")
    assert found.kernel == os.uname().release
    assert found.cpu
    assert found.differences(this_host(), ("cpu", "cpus", "kernel")) == []
