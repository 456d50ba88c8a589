"""Passed-through devices in the VM file and on QEMU's command line, and what stops their move."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sempervirt.core.errors import InvalidRequest, SpecError, Unavailable
from sempervirt.host.answers import AnswerNotUnderstood, read_answer
from sempervirt.migration.messages import DeviceConfiguration, DeviceState
from sempervirt.migration.obstacles import HostSide, ImageSeen, obstacles
from sempervirt.passthrough.answers import STATE_MAX, Configured, Exported, Round, Table
from sempervirt.passthrough.leaving import Moved
from sempervirt.passthrough.mediator import DeviceFiles, DeviceOptions, DeviceSetup
from sempervirt.qemu.command_line import (
    PCI_SLOTS,
    DeviceSockets,
    Features,
    build,
    device_slot,
    shim_slot,
)
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import PASSTHROUGH_MAX, PassthroughSpec, VmSpec
from sempervirt.qemu.spec_file import parse_spec
from sempervirt.qemu.state import Runstate

FEATURES = Features(
    version="11.1.3",
    machines=frozenset({"q35", "pc"}),
    devices=frozenset({"virtio-rng-pci", "vfio-user-pci"}),
    netdevs=frozenset({"user"}),
)
RUN = Path("/run/vm/web")


def spec(*names: str, **keys: Any) -> VmSpec:
    devices = [{"name": name, "image": f"/images/{name}.raw"} for name in names]
    return VmSpec.model_validate({"name": "web", "passthrough": devices, **keys})


def argv(vm: VmSpec, features: Features = FEATURES) -> list[str]:
    sockets = {
        device.name: DeviceSockets(RUN / f"{device.name}.sock", RUN / f"{device.name}-shim.sock")
        for device in vm.passthrough
    }
    return build(
        vm,
        features,
        qemu="qemu",
        accel="tcg",
        files=VmFiles(RUN),
        disk_sockets={},
        plans={},
        memory_fd=9,
        device_sockets=sockets,
    )


def devices_of(vm: VmSpec) -> list[dict[str, Any]]:
    return [json.loads(word) for word in argv(vm) if word.startswith('{"driver"')]


def test_a_device_and_its_shim_have_slots_of_their_own() -> None:
    device, shim, other, its_shim = devices_of(spec("nvme", "cache"))
    assert device == {
        "driver": "vfio-user-pci",
        "id": "device-nvme",
        "bus": "pcie.0",
        "addr": "1e.0",
        "socket": {"type": "unix", "path": "/run/vm/web/nvme.sock"},
    }
    assert (shim["id"], shim["addr"]) == ("shim-nvme", "1d.0")
    assert shim["socket"]["path"] == "/run/vm/web/nvme-shim.sock"
    assert (other["addr"], its_shim["addr"]) == ("1c.0", "1b.0")
    used = {slot(index) for index in range(PASSTHROUGH_MAX) for slot in (device_slot, shim_slot)}
    assert len(used) == 2 * PASSTHROUGH_MAX
    assert max(used) == PCI_SLOTS


@pytest.mark.parametrize(
    ("version", "devices", "good"),
    [
        ("11.1.0", {"vfio-user-pci"}, True),
        ("12.0.0", {"vfio-user-pci"}, True),
        ("10.2.2", {"vfio-user-pci"}, False),
        ("11.0.50", {"vfio-user-pci"}, False),
        ("11.1.0", {"vfio-pci"}, False),
        ("?.?.?", {"vfio-user-pci"}, False),
    ],
)
def test_an_older_qemu_is_refused_with_the_reason(
    version: str, devices: set[str], good: bool
) -> None:
    features = replace(FEATURES, version=version, devices=frozenset(devices))
    assert features.passes_through is good
    assert argv(spec(), features)
    if good:
        assert argv(spec("nvme"), features)
        return
    with pytest.raises(
        Unavailable, match=r"cannot hand the device nvme .* QEMU 11\.1 has it"
    ) as no:
        argv(spec("nvme"), features)
    assert "trixie-backports" in no.value.remedy


def test_slots_that_devices_take_are_counted() -> None:
    nics = [{"mac": f"52:54:00:00:00:{number:02x}"} for number in range(28)]
    with pytest.raises(
        InvalidRequest, match="28 network cards and 1 passed-through device; 29 fit"
    ):
        argv(spec("nvme", nics=nics))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"machine": "pc"}, 'need machine = "q35"'),
        (
            {"disks": [{"name": "nvme", "image": "/images/other.raw"}]},
            'two disks or devices are called "nvme"',
        ),
        (
            {"disks": [{"name": "root", "image": "/images/nvme.raw"}]},
            "two disks write to the same image",
        ),
    ],
)
def test_what_does_not_fit_together(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        spec("nvme", **keys)
    with pytest.raises(ValidationError):
        spec(*(f"d{number}" for number in range(PASSTHROUGH_MAX + 1)))


def test_the_vm_file_names_images_beside_it_and_keys_by_line() -> None:
    text = 'name = "web"\n[[passthrough]]\nname = "nvme"\nimage = "nvme.raw"\n'
    found = parse_spec(text, Path("/srv/web.toml"))
    device = found.device("nvme")
    assert isinstance(device, PassthroughSpec)
    assert device.image == Path("/srv/nvme.raw")
    assert found.files == (Path("/srv/nvme.raw"),)
    with pytest.raises(SpecError) as wrong:
        parse_spec(text + 'kind = "gpu"\n', Path("/srv/web.toml"))
    assert (wrong.value.line, wrong.value.key) == (5, "passthrough[0].kind")


def test_the_command_line_of_a_mediator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPERVIRT_VFIOD", "/usr/bin/semper-vfiod")
    setup = DeviceSetup(
        name="web/nvme",
        files=DeviceFiles(RUN, "nvme"),
        options=DeviceOptions(Path("/images/nvme.raw"), serial="n1", direct=True),
        slot=30,
        shim_slot=29,
        title=("--epoch-file=/images/nvme.raw.epoch", "--holder=b"),
        incoming=True,
    )
    words = setup.argv(7, 8)
    assert words == [
        "/usr/bin/semper-vfiod",
        "--fd=7",
        "--shim-fd=8",
        "--control-socket=/run/vm/web/device-nvme.ctl",
        "--session-socket=/run/vm/web/device-nvme.session",
        "--kind=nvme",
        "--blk-file=/images/nvme.raw",
        "--queues=4",
        "--engine=auto",
        "--serial=n1",
        "--direct",
        "--epoch-file=/images/nvme.raw.epoch",
        "--holder=b",
        "--incoming",
    ]
    # A title that awaits its claim says so itself.
    awaits = replace(setup, title=(*setup.title, "--incoming", "--await-claim"))
    assert awaits.argv(7, 8).count("--incoming") == 1


HERE = HostSide(
    name="a",
    accelerator="tcg",
    qemu_version="11.1.3",
    memory_available=1 << 40,
    vm_state=Runstate.RUNNING,
    images={"nvme": ImageSeen(id="11")},
    passes_through=True,
)
THERE = replace(HERE, name="b", vm_state=None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"passes_through": False}, "QEMU 11.1.3 of b cannot take the passed-through device nvme"),
        ({"images": {"nvme": ImageSeen(id="22")}}, "is another image"),
        ({"images": {}}, "nothing is known of it"),
    ],
)
def test_what_stops_the_move_of_a_device(changes: dict[str, Any], reason: str) -> None:
    found = obstacles(spec("nvme"), "tcg", HERE, replace(THERE, **changes))
    assert [reason in one.what for one in found] == ([True] if reason else [])


def test_what_the_hosts_say_of_a_device_comes_back_whole() -> None:
    configured = Configured(
        config="00ff",
        before=[(0x10, 4, 0xFEBF0004)],
        after=[(0x42, 2, 0x8004)],
        msix_table=Table(bar=0, offset=0x2000, vectors=5, address=0xFEBF2000, table="00" * 80),
    )
    assert DeviceConfiguration.of(configured).configured() == configured
    moved = Moved(configured, "[]", "{}")
    state = DeviceState.model_validate_json(DeviceState.of(moved).model_dump_json())
    assert state.moved() == moved
    with pytest.raises(ValidationError):
        DeviceConfiguration.model_validate(
            DeviceConfiguration.of(configured).model_dump() | {"table": "0g"}
        )


@pytest.mark.parametrize("write", [(0x10, 3, 0), (0x100, 4, 0), (-1, 4, 0), (0x10, 4, 1 << 32)])
def test_a_host_cannot_have_another_write_what_no_configuration_has(write: Any) -> None:
    """QEMU's monitor has no access of three bytes: it was a KeyError in the agent."""
    told: dict[str, Any] = {"config": "00", "table_bar": 0, "table_offset": 0, "vectors": 1}
    DeviceConfiguration.model_validate(told | {"before": [(0x10, 4, 0)], "after": []})
    with pytest.raises(ValidationError):
        DeviceConfiguration.model_validate(told | {"before": [write], "after": []})


def test_a_state_that_no_message_holds_is_an_error_of_its_mediator() -> None:
    """And none of the agent, which would end by it (`host.owner`)."""
    longest = {"state": "x" * STATE_MAX, "bytes": STATE_MAX}
    state = read_answer(Exported, longest, "semper-vfiod", "export").state
    configured = Configured(
        config="", before=[], after=[], msix_table=Table(bar=0, offset=0, vectors=1)
    )
    assert DeviceState.of(Moved(configured, "[]", state)).state == state
    with pytest.raises(AnswerNotUnderstood, match="a wrong `state`"):
        read_answer(Exported, longest | {"state": state + "x"}, "semper-vfiod", "export")
    with pytest.raises(AnswerNotUnderstood, match="a wrong `writes`"):
        read_answer(Round, {"writes": state + "x", "count": 1}, "semper-vfiod", "round")
