"""What would stop a migration: each reason alone, and all of them together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sempervirt.migration.obstacles import HostSide, ImageSeen, obstacles
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate

GIB = 1 << 30
HERE = HostSide(
    name="a",
    accelerator="kvm",
    qemu_version="10.0.2",
    cpu_model="Fast",
    cpu_flags=frozenset({"sse2", "avx2"}),
    memory_available=GIB,
    vm_state=Runstate.RUNNING,
    images={"root": ImageSeen(id="11"), "iso": ImageSeen()},
)
THERE = replace(HERE, name="b", vm_state=None, qemu_version="11.1.0", memory_available=4 * GIB)


def spec(**keys: Any) -> VmSpec:
    disks = [
        {"name": "root", "image": "/srv/root.raw"},
        {"name": "iso", "image": "/srv/cd.iso", "read_only": True},
    ]
    return VmSpec.model_validate({"name": "web", "memory": "2G", "disks": disks, **keys})


def found(
    *, vm: VmSpec | None = None, runs_with: AcceleratorKind = "kvm", **changes: Any
) -> list[str]:
    there = replace(THERE, **changes)
    return [obstacle.what for obstacle in obstacles(vm or spec(), runs_with, HERE, there)]


def test_a_pci_device_of_the_host_stays_there() -> None:
    device = {"name": "nvme", "pci": "0000:01:00.0"}
    (only,) = found(vm=spec(passthrough=[device]), passes_through=True)
    assert "nvme is the PCI device 0000:01:00.0 of this host" in only


def test_nothing_stops_a_vm_between_two_hosts_that_fit() -> None:
    assert found() == []
    assert found(vm_state=Runstate.STOPPED, cpu_flags=frozenset({"sse2", "avx2", "avx512f"})) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vm_state": Runstate.RUNNING}, "a VM web of its own, which is running"),
        ({"vm_state": Runstate.UNKNOWN}, "which is unknown"),
        ({"memory_available": GIB}, "b has 1G of memory available, and the VM has 2G"),
        ({"accelerator": "tcg"}, "runs with kvm, and b offers tcg"),
        ({"cpu_flags": frozenset({"sse2"})}, "lacks avx2"),
        ({"qemu_version": "9.2.1"}, "QEMU 9.2.1, older than 10.0.2"),
        ({"missing": ("interface tap0",)}, "b has no interface tap0"),
        ({"images": {"root": ImageSeen(id="22"), "iso": ImageSeen()}}, "is another image"),
        ({"images": {"root": ImageSeen(), "iso": ImageSeen()}}, "is another image"),
        ({"images": {"root": ImageSeen(id="11")}}, "disk iso, on b: nothing is known"),
        (
            {"images": {"root": ImageSeen(problem="does not exist"), "iso": ImageSeen()}},
            "disk root, on b: does not exist",
        ),
    ],
)
def test_each_reason_is_named(changes: dict[str, Any], reason: str) -> None:
    (only,) = found(**changes)
    assert reason in only


def test_a_tcg_guest_needs_no_processor_of_its_own() -> None:
    assert found(runs_with="tcg", cpu_flags=frozenset()) == []
    assert found(vm=spec(cpu="qemu64"), cpu_flags=frozenset()) == []


def test_the_version_is_compared_as_numbers() -> None:
    assert found(qemu_version="10.0.10") == []


def test_disks_and_networks_that_cannot_move() -> None:
    own = {"name": "root", "image": "/srv/root.raw", "backend": "qemu"}
    (only,) = found(vm=spec(disks=[own]))
    assert "served by QEMU itself" in only
    (only,) = found(vm=spec(nics=[{"type": "user"}]))
    assert "user-mode networking" in only
    device = {"root": ImageSeen(id="", block_device=True), "iso": ImageSeen()}
    here = replace(HERE, images=device)
    (only,) = [o.what for o in obstacles(spec(), "kvm", here, replace(THERE, images=device))]
    assert "block device" in only


def test_all_of_them_are_found_at_once() -> None:
    everything = found(
        vm_state=Runstate.RUNNING,
        memory_available=0,
        accelerator="tcg",
        cpu_flags=frozenset(),
        qemu_version="7.2",
        images={},
        missing=("/boot/vmlinuz",),
    )
    assert len(everything) == 8
