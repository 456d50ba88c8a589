"""Which PCI devices can be handed on, in trees made like the kernel's; what VM files say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, NotFound, SempervirtError, SpecError, Unavailable
from sempervirt.passthrough.mediator import DeviceFiles, DeviceSetup, PciOptions
from sempervirt.passthrough.pci import group_of, open_device
from sempervirt.qemu.command_line import DeviceSockets, passthrough_arguments
from sempervirt.qemu.spec import PciSpec, VmSpec
from sempervirt.qemu.spec_file import parse_spec

ADDRESS = "0000:01:00.0"


class Tree:
    """A `/sys` and a `/dev/vfio`."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.devices = at / "bus/pci/devices"
        self.vfio = at / "dev/vfio"
        for folder in (self.devices, self.vfio):
            folder.mkdir(parents=True)

    def add(self, address: str, group: str | None, driver: str | None) -> None:
        device = self.devices / address
        device.mkdir()
        if driver is not None:
            (self.at / "drivers" / driver).mkdir(parents=True, exist_ok=True)
            (device / "driver").symlink_to(self.at / "drivers" / driver)
        if group is not None:
            members = self.at / "kernel/iommu_groups" / group / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(device)
            (device / "iommu_group").symlink_to(members.parent)
            (self.vfio / group).touch()
            (self.vfio / "vfio").touch()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_bound_device_gives_its_group_and_both_handles(tree: Tree) -> None:
    tree.add(ADDRESS, "17", "vfio-pci")
    # Bridges, and what has no driver, leave the group to its user.
    tree.add("0000:00:01.0", "17", "pcieport")
    tree.add("0000:01:00.1", "17", None)
    assert group_of(ADDRESS, tree.devices) == "17"
    with open_device(ADDRESS, tree.devices, tree.vfio) as (group, container):
        assert Path(f"/proc/self/fd/{group}").readlink().name == "17"
        assert Path(f"/proc/self/fd/{container}").readlink().name == "vfio"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(group)


@pytest.mark.parametrize(
    ("devices", "error", "words"),
    [
        ([], NotFound, "has no PCI device 0000:01:00.0"),
        ([(ADDRESS, None, "vfio-pci")], Unavailable, "no IOMMU group"),
        ([(ADDRESS, "1", "nvme")], InvalidRequest, "not bound to vfio-pci, but to nvme"),
        ([(ADDRESS, "1", None)], InvalidRequest, "but to no driver"),
        (
            [(ADDRESS, "1", "vfio-pci"), ("0000:01:00.1", "1", "snd_hda_intel")],
            InvalidRequest,
            "shares its IOMMU group with 0000:01:00.1, which the host's driver snd_hda_intel has",
        ),
    ],
)
def test_what_cannot_be_handed_on_is_refused_with_a_remedy(
    tree: Tree,
    devices: list[tuple[str, str | None, str | None]],
    error: type[SempervirtError],
    words: str,
) -> None:
    for device in devices:
        tree.add(*device)
    with pytest.raises(error, match=words) as caught:
        group_of(ADDRESS, tree.devices)
    assert caught.value.remedy


def test_handles_that_are_not_there_are_told(tree: Tree) -> None:
    tree.add(ADDRESS, "3", "vfio-pci")
    (tree.vfio / "3").unlink()
    with pytest.raises(Unavailable, match=r"cannot open .*/3"):
        open_device(ADDRESS, tree.devices, tree.vfio).__enter__()


def test_a_vm_names_a_device_by_its_address(tmp_path: Path) -> None:
    spec = VmSpec.model_validate({"name": "v", "passthrough": [{"name": "n", "pci": ADDRESS}]})
    assert spec.passthrough == (PciSpec(name="n", pci=ADDRESS),)
    assert spec.imaged == () == spec.files
    sockets = DeviceSockets(tmp_path / "s", tmp_path / "m")
    argv = passthrough_arguments(0, spec.passthrough[0], sockets)
    assert all(json.loads(word)["x-msg-timeout"] > 5000 for word in argv[1::2])
    setup = DeviceSetup("v/n", DeviceFiles(tmp_path, "n"), PciOptions(ADDRESS), 30, 29)
    argv = setup.argv(3, 4, (5, 6))
    assert argv[4:] == [
        "--kind=pci",
        f"--pci={ADDRESS}",
        "--profile=nvme",
        "--vfio-group-fd=5",
        "--vfio-container-fd=6",
    ]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ('pci = "0000:01:00.0"\nprofil = "plain"', 'no such key.*"profile"'),
        ('image = "i.raw"\nserail = "x"', 'no such key.*"serial"'),
        ('pci = "1:0.0"', r":4: passthrough\[0\]\.pci: .*no PCI address.*lspci"),
    ],
)
def test_an_error_is_about_the_device_that_was_meant(
    tmp_path: Path, device: str, words: str
) -> None:
    text = f'name = "v"\n[[passthrough]]\nname = "n"\n{device}\n'
    with pytest.raises(SpecError) as caught:
        parse_spec(text, tmp_path / "v.toml")
    assert re.search(words, str(caught.value)), caught.value
    assert "device of" not in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([{"name": "n", "pci": "01:00.0"}], "pci"),
        ([{"name": "n", "pci": ADDRESS, "image": "/i.raw"}], "image"),
        ([{"name": "n", "pci": ADDRESS}, {"name": "m", "pci": ADDRESS}], "same PCI device"),
        ([{"name": "n", "pci": ADDRESS}, {"name": "n", "image": "/i.raw"}], "are called"),
    ],
)
def test_a_device_is_named_once_and_is_one_thing(devices: list[dict[str, str]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VmSpec.model_validate({"name": "v", "passthrough": devices})
