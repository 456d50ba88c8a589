"""What QEMU's answers mean, and the tiny guest that tries an accelerator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sempervirt.core.errors import CommandFailed, Unavailable
from sempervirt.qemu import accel, accel_rom, features
from sempervirt.qemu.accel import Accelerator, choose
from sempervirt.qemu.features import judge

SCHEMA = [
    {"name": "1", "meta-type": "object", "members": [{"name": "server"}, {"name": "tls-creds"}]},
    {
        "name": "2",
        "meta-type": "object",
        "members": [{"name": "logappend"}, {"name": "addr"}, {"name": "reconnect-ms"}],
    },
    {
        "name": "3",
        "meta-type": "object",
        "members": [{"name": "type"}],
        "variants": [{"case": "hubport", "type": "4"}, {"case": "user", "type": "5"}],
    },
    {"name": "6", "meta-type": "enum", "members": [{"name": "on"}], "values": ["on"]},
    {"name": "7", "meta-type": "enum", "values": ["threads", "native"]},
]


def only_file(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def test_answers_become_features() -> None:
    found = judge(
        {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "Debian"},
            "machines": [{"name": "pc-q35-10.0", "alias": "q35"}, {"name": "none"}],
            "devices": [{"name": "pvpanic"}],
            "disk": [{"name": "num-queues", "type": "uint16"}],
            "blk": [{"name": "iothread-vq-mapping", "type": "any"}],
            "scsi": [{"name": "iothread"}],
            "schema": SCHEMA,
            "sandbox": True,
        }
    )
    assert found.version == "10.0.2"
    assert found.machines == {"pc-q35-10.0", "q35", "none"}
    assert found.chardev_options == {"logappend", "addr", "reconnect-ms"}
    assert found.netdevs == {"hubport", "user"}
    assert found.disk_properties == {"num-queues"}
    assert found.mapped_devices == {"virtio-blk"}
    assert found.aio == {"threads", "native"}
    assert found.sandbox


def test_what_was_not_answered_is_not_there() -> None:
    found = judge({})
    assert not found.sandbox
    assert found.disk_properties == found.netdevs == frozenset()
    assert found.version == "?.?.?"


async def test_the_installed_qemu_is_asked_once(tmp_path: Path) -> None:
    qemu = features.find_qemu()
    found = await features.probe(qemu, tmp_path)
    assert found.disk_properties >= {"num-queues", "queue-size", "chardev"}
    assert found.chardev_options & {"reconnect", "reconnect-ms"}
    assert "threads" in found.aio
    cache = only_file(tmp_path)
    before = cache.stat().st_mtime_ns
    assert await features.probe(qemu, tmp_path) == found
    assert cache.stat().st_mtime_ns == before
    cache.write_text("{}")  # damaged: asked again
    assert await features.probe(qemu, tmp_path) == found


async def test_a_program_that_is_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed):
        await features.probe(str(shutil.which("false")), tmp_path)
    with pytest.raises(Unavailable, match="cannot be used"):
        await features.probe("/nonexistent/qemu", tmp_path)


def test_the_rom_is_what_its_source_says(tmp_path: Path) -> None:
    assembler, objcopy = shutil.which("as"), shutil.which("objcopy")
    assert assembler, "binutils are part of the set-up"
    assert objcopy
    (tmp_path / "rom.S").write_text(accel_rom.SOURCE)
    subprocess.run([assembler, "rom.S", "-o", "rom.o"], cwd=tmp_path, check=True)
    extract = [objcopy, "-O", "binary", "-j", ".text", "rom.o", "rom.bin"]
    subprocess.run(extract, cwd=tmp_path, check=True)
    assert (tmp_path / "rom.bin").read_bytes() == accel_rom.CODE
    rom = accel_rom.rom()
    assert len(rom) == accel_rom.ROM_BYTES
    assert rom.startswith(accel_rom.CODE)


async def test_the_tiny_guest_runs_under_tcg() -> None:
    await accel.run_tiny_guest(features.find_qemu(), "tcg")


async def test_an_accelerator_that_is_not_there_fails() -> None:
    with pytest.raises(CommandFailed):
        await accel.run_tiny_guest(features.find_qemu(), "nonesuch")


async def test_without_a_device_kvm_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "KVM_DEVICE", tmp_path / "kvm")
    found = await accel.probe("/nonexistent/qemu")
    assert (found.kind, found.reason) == ("tcg", f"{tmp_path / 'kvm'} does not exist")


def test_the_choice_of_an_accelerator() -> None:
    kvm, tcg = Accelerator("kvm", "it ran"), Accelerator("tcg", "no device")
    assert choose("auto", kvm) is kvm
    assert choose("auto", tcg) is tcg
    assert choose("tcg", kvm).kind == "tcg"
    assert choose("kvm", kvm) is kvm
    with pytest.raises(Unavailable, match="KVM does not work here: no device"):
        choose("kvm", tcg)
