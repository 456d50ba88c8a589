"""How the queues of each device are served: VM file before preset before default, and why."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.core.errors import Unavailable
from sempervirt.core.queue_map import Binding, DevicePlan, DeviceType, check_map
from sempervirt.disk.backend import Blkd
from sempervirt.disk.fingerprint import HostFingerprint, fingerprint
from sempervirt.disk.presets import Preset, PresetStore, Stale
from sempervirt.disk.storage import NO_STORAGE, StorageKey, storage_key
from sempervirt.disk.threads import Wish, plan
from sempervirt.qemu.command_line import Features
from sempervirt.qemu.spec import NicSpec, VmSpec
from sempervirt.vm import planning
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.planning import (
    Offer,
    offer_of,
    plan_devices,
    plan_nic,
    plans_of_record,
)

HOST = HostFingerprint(cpu="Z80", cpus=8, kernel="6.1")
FEATURES = Features(
    version="10.0.2",
    mapped_devices=frozenset({"virtio-blk", "virtio-scsi"}),
    aio=frozenset({"threads", "native", "io_uring"}),
)
NAMED = "preset of 2026-11-23"


def preset(device: DeviceType, engine: str, per_thread: int = 2, poll_us: int = 9) -> Preset:
    return Preset.model_validate(
        {
            "device": device,
            "storage": NO_STORAGE,
            "engine": engine,
            "queues_per_thread": per_thread,
            "poll_us": poll_us,
            "source": "measured",
            "why": "the best",
            "measured_at": datetime(2026, 11, 23, tzinfo=UTC),
            "host": HOST,
        }
    )


def offer(
    *found: Preset | Stale, features: Features = FEATURES, processors: int = 8, vhost: bool = True
) -> Offer:
    """A host with these presets, whatever the storage."""

    def find(device: DeviceType, _storage: StorageKey) -> Preset | Stale | None:
        for item in found:
            if (item.preset if isinstance(item, Stale) else item).device == device:
                return item
        return None

    return Offer(find, features, processors, vhost)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(512))
    return path


@pytest.fixture
def spec(image: Path) -> Any:
    def make(*, vcpus: int = 4, **disk: Any) -> VmSpec:
        disks = [{"name": "a", "image": str(image), **disk}]
        return VmSpec.model_validate({"name": "web", "vcpus": vcpus, "disks": disks})

    return make


def planned(spec: VmSpec, offered: Offer) -> DevicePlan:
    return plan_devices(spec, offered)["disk-a"]


OURS = preset("vhost-user-blk", "mmap")


@pytest.mark.parametrize(
    ("disk", "words"),
    [
        ({}, f"4 queues on 2 threads, engine mmap ({NAMED})"),
        ({"queues_per_thread": 4}, f"4 queues on 1 thread (VM file), engine mmap ({NAMED})"),
        (
            {"queues_per_thread": 1, "engine": "sync"},
            "4 queues on 4 threads, engine sync (VM file)",
        ),
        ({"thread_map": [0, 0, 1]}, f"3 queues on 2 threads (VM file), engine mmap ({NAMED})"),
        ({"queues": 40}, f"40 queues on 8 threads, engine mmap ({NAMED})"),
    ],
)
def test_the_vm_file_is_before_the_preset(spec: Any, disk: dict[str, Any], words: str) -> None:
    found = planned(spec(**disk), offer(OURS))
    assert str(found) == words
    assert (found.poll_us, found.poll_source) == (9, NAMED)
    found = planned(spec(**disk, poll_us=0), offer(OURS))
    assert (found.poll_us, found.poll_source) == (0, "VM file")


def test_an_explicit_map_is_taken_as_it_is(spec: Any) -> None:
    found = planned(spec(queues=4, thread_map=[1, 0, 0, 0]), offer(OURS))
    assert found.binding == Binding((1, 0, 0, 0), "VM file")


@pytest.mark.parametrize(
    ("queues", "processors", "threads"), [(1, 8, 1), (4, 8, 1), (5, 8, 2), (64, 8, 8), (64, 1, 1)]
)
def test_without_a_preset_the_default_spares_threads(
    spec: Any, queues: int, processors: int, threads: int
) -> None:
    found = planned(spec(queues=queues), offer(processors=processors))
    assert (found.binding.queues, found.binding.threads) == (queues, threads)
    assert (found.engine.value, found.poll_us) == ("auto", None)
    assert found.binding.source == found.engine.source == found.poll_source == "built-in default"


@given(
    st.integers(1, 64),
    st.none() | st.integers(1, 64),
    st.sampled_from([None, OURS, Stale(OURS, "the kernel changed")]),
    st.integers(1, 32),
)
def test_every_queue_has_a_thread_whoever_decides(
    queues: int, per_thread: int | None, found: Preset | Stale | None, processors: int
) -> None:
    wish = Wish("vhost-user-blk", queues, queues_per_thread=per_thread)
    binding = plan(wish, found, processors).binding
    assert check_map(binding.map, queues) == binding.map
    if per_thread is None:
        assert binding.threads <= processors, "nobody asked for more"
    else:
        assert binding.threads == -(-queues // per_thread), "as asked for"


def test_a_stale_preset_is_not_used_and_told(spec: Any) -> None:
    found = planned(spec(), offer(Stale(OURS, "the kernel was '6.1', is '6.6'")))
    assert found.engine.value == "auto"
    assert (
        found.binding.source
        == f"built-in default; the {NAMED} is stale: the kernel was '6.1', is '6.6'"
    )


def test_a_disk_of_qemu_has_the_preset_of_its_own_type(spec: Any) -> None:
    offered = offer(OURS, preset("virtio-blk", "io_uring"), preset("virtio-scsi", "threads", 1))
    found = planned(spec(backend="qemu"), offered)
    assert found.device == "virtio-blk"
    assert str(found) == f"4 queues on 2 threads, engine io_uring ({NAMED})"
    found = planned(spec(backend="qemu", bus="virtio-scsi"), offered)
    assert str(found) == f"4 queues on 4 threads, engine threads ({NAMED})"
    assert planned(spec(backend="qemu", engine="uring"), offered).engine.value == "io_uring"


@pytest.mark.parametrize(
    ("direct", "aio", "engine"),
    [
        (False, {"threads", "native"}, "threads"),
        (True, {"threads", "native"}, "native"),
        (True, {"threads", "io_uring"}, "threads"),
        (True, set(), "threads"),
    ],
)
def test_how_qemu_does_io_by_default(spec: Any, direct: bool, aio: set[str], engine: str) -> None:
    features = replace(FEATURES, aio=frozenset(aio))
    found = planned(spec(backend="qemu", direct=direct), offer(features=features))
    assert found.engine.value == engine


def test_native_io_needs_direct(spec: Any) -> None:
    offered = offer(preset("virtio-blk", "native"))
    found = planned(spec(backend="qemu"), offered)
    assert found.engine.value == "threads"
    assert found.binding.source == f"built-in default; the {NAMED} names native, which is not there"
    assert planned(spec(backend="qemu", direct=True), offered).engine.value == "native"


def test_a_qemu_without_io_uring(spec: Any) -> None:
    old = offer(features=replace(FEATURES, aio=frozenset({"threads", "native"})))
    with pytest.raises(Unavailable, match="disk a: this QEMU has no io_uring") as caught:
        planned(spec(backend="qemu", engine="uring"), old)
    assert 'engine = "sync"' in caught.value.remedy


@pytest.mark.parametrize("bus", ["virtio-blk", "virtio-scsi"])
def test_a_qemu_that_cannot_map_queues(spec: Any, bus: str) -> None:
    features = replace(FEATURES, mapped_devices=frozenset())
    old = offer(preset("virtio-blk", "io_uring", 1), features=features)
    found = planned(spec(backend="qemu", bus=bus, queues=8), old)
    assert found.binding.map == (0,) * 8
    assert found.binding.source == f"this QEMU has no iothread-vq-mapping for {bus}"
    for asked in ({"queues_per_thread": 2}, {"thread_map": [0, 1]}):
        with pytest.raises(Unavailable, match=rf"disk a: .*{bus} device to 2 threads") as caught:
            planned(spec(backend="qemu", bus=bus, **asked), old)
        assert "QEMU 9.0 (virtio-blk) or 10.0 (virtio-scsi)" in caught.value.remedy
    same = planned(spec(backend="qemu", bus=bus, thread_map=[0, 0]), old)
    assert same.binding == Binding((0, 0), "VM file")


NET = preset("virtio-net", "vhost")


@pytest.mark.parametrize(
    ("nic", "offered", "words"),
    [
        (
            {},
            offer(NET),
            "1 queue pair on 1 thread (QEMU's main loop), engine qemu (user-mode netw",
        ),
        (
            {"tap": "t", "queues": 3},
            offer(),
            "3 queue pairs on 3 threads (the kernel's threads), en",
        ),
        ({"tap": "t"}, offer(NET), f"thread (the kernel's threads), engine vhost ({NAMED})"),
        ({"tap": "t"}, offer(preset("virtio-net", "qemu")), f"main loop), engine qemu ({NAMED})"),
        ({"tap": "t", "vhost": False}, offer(NET), "(QEMU's main loop), engine qemu (VM file)"),
        ({"tap": "t"}, offer(NET, vhost=False), "engine qemu (/dev/vhost-net cannot be opened)"),
    ],
)
def test_network_cards(nic: dict[str, Any], offered: Offer, words: str) -> None:
    kind = "tap" if "tap" in nic else "user"
    assert words in str(plan_nic(NicSpec.model_validate({"type": kind, **nic}), offered))


def test_vhost_that_does_not_work() -> None:
    nic = NicSpec.model_validate({"type": "tap", "tap": "t", "vhost": True})
    with pytest.raises(Unavailable, match="network t: /dev/vhost-net cannot be opened"):
        plan_nic(nic, offer(vhost=False))


def test_a_vm_of_a_release_that_recorded_no_plans(spec: Any) -> None:
    plans = plans_of_record(spec(queues=3), {})
    assert plans["disk-a"].binding.map == (0, 0, 0)
    assert plans_of_record(spec(queues=3), {"disk-a": planned(spec(), offer(OURS))}) == {
        "disk-a": planned(spec(), offer(OURS))
    }


async def test_what_this_host_offers(
    tmp_path: Path, image: Path, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store that `semper disk tune` writes, with the fingerprint of the real program."""
    monkeypatch.setattr(planning, "VHOST_NET", tmp_path / "absent")
    config = AgentConfig(tmp_path / "s", tmp_path / "r", backend=Blkd())
    key = storage_key(image, direct=False)
    found = await offer_of(config, spec(), FEATURES)
    assert found.find("vhost-user-blk", key) is None
    assert not found.vhost_net
    host = await fingerprint(Blkd().binary(), FEATURES.version)
    fresh = OURS.model_copy(update={"storage": key, "host": host})
    PresetStore(config.state_dir).put([fresh])
    found = await offer_of(config, spec(), FEATURES)
    assert planned(spec(), found).engine.value == "mmap"
    other = replace(config, backend=Blkd(tmp_path / "absent"))
    found = await offer_of(other, spec(), FEATURES)
    assert "is stale: semper-blkd was" in planned(spec(), found).binding.source
