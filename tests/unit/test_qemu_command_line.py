"""The QEMU command line, in full for one VM and by what changes for others."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.queue_map import Binding, Choice, DevicePlan, Engine
from sempervirt.qemu.command_line import Features, build, disk_id, nic_id, plug
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec

FEATURES = Features(
    version="10.0.2",
    machines=frozenset({"q35", "pc"}),
    devices=frozenset({"virtio-rng-pci", "pvpanic"}),
    disk_properties=frozenset({"num-queues", "queue-size"}),
    chardev_options=frozenset({"reconnect", "reconnect-ms"}),
    netdevs=frozenset({"user", "tap"}),
    sandbox=True,
)

GOLDEN = """\
qemu
-name guest=web,debug-threads=on
-no-user-config
-nodefaults
-display none
-msg timestamp=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,memory-backend=memory
-accel tcg,thread=multi
-cpu max
-smp 2
-m 512M
-object memory-backend-file,id=memory,size=512M,share=on,mem-path=/proc/self/fd/9
-action reboot=reset,panic=pause,shutdown=poweroff
-chardev socket,id=monitor,path=/run/vm/web/qmp.sock,server=on,wait=off
-mon chardev=monitor,mode=control
-chardev socket,id=console,path=/run/vm/web/console.sock,server=on,wait=off,\
logfile=/run/vm/web/console.log,logappend=on
-serial chardev:console
-kernel /boot/vmlinuz
-initrd /boot/initrd.img
-append console=ttyS0 quiet
-chardev socket,id=char-disk-root,path=/run/vm/web/disk-root.sock,server=off,reconnect-ms=1
-device vhost-user-blk-pci,id=disk-root,chardev=char-disk-root,num-queues=2,queue-size=128
-netdev user,id=net0
-device virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56,romfile=
-netdev tap,id=net1,ifname=tap0,script=no,downscript=no
-device virtio-net-pci,netdev=net1,mac=52:54:00:12:34:57,romfile=
-device virtio-serial-pci,id=channels
-chardev socket,id=channel0,path=/run/vm/web/probe.sock,server=on,wait=off
-device virtserialport,bus=channels.0,chardev=channel0,name=org.sempervirt.probe
-device virtio-rng-pci
-device pvpanic
"""


def spec(**keys: Any) -> VmSpec:
    return VmSpec.model_validate(
        {
            "name": "web",
            "vcpus": 2,
            "kernel": "/boot/vmlinuz",
            "initrd": "/boot/initrd.img",
            "cmdline": "console=ttyS0 quiet",
            "disks": [{"name": "root", "image": "/images/web.raw", "queues": 2, "queue_size": 128}],
            "nics": [
                {"mac": "52:54:00:12:34:56"},
                {"type": "tap", "tap": "tap0", "mac": "52:54:00:12:34:57"},
            ],
            "channels": [{"name": "org.sempervirt.probe"}],
            **keys,
        }
    )


def plan(*thread_map: int, engine: Engine = "threads", poll_us: int | None = None) -> DevicePlan:
    return DevicePlan("virtio-blk", Binding(thread_map, "test"), Choice(engine, "test"), poll_us)


def command(
    vm: VmSpec,
    features: Features = FEATURES,
    accel: str = "tcg",
    tap_files: dict[int, list[int]] | None = None,
    absent: frozenset[str] = frozenset(),
    *,
    isolated: bool = False,
    **plans: DevicePlan,
) -> list[str]:
    files = VmFiles(Path("/run/vm/web"))
    sockets = {disk.name: files.directory / f"disk-{disk.name}.sock" for disk in vm.disks}
    usual = {disk_id(disk): plan(*(0,) * disk.queue_count(vm.vcpus)) for disk in vm.disks}
    usual |= {nic_id(index): plan(*(0,) * nic.queues) for index, nic in enumerate(vm.nics)}
    chosen = {name.replace("_", "-"): value for name, value in plans.items()}
    return build(
        vm,
        features,
        qemu="qemu",
        accel=accel,
        files=files,
        disk_sockets=sockets,
        plans=usual | chosen,
        memory_fd=9,
        block_devices={Path("/dev/sdz")},
        tap_files=tap_files,
        absent=absent,
        isolated=isolated,
    )


def documents(argv: list[str], option: str) -> list[dict[str, Any]]:
    """What stands in JSON behind `option`."""
    return [json.loads(text) for name, text in pairwise(argv) if name == option and text[0] == "{"]


def lines(argv: list[str]) -> str:
    """One option a line."""
    text = " ".join(argv)
    for option in {part for part in argv if part.startswith("-")}:
        text = text.replace(f" {option} ", f"\n{option} ")
        text = text.replace(f" {option}\n", f"\n{option}\n")
    return text + "\n"


def test_the_whole_command_line() -> None:
    assert lines(command(spec())) == GOLDEN


def test_a_disk_that_is_handed_over_has_a_port_into_which_it_can_be_plugged_later() -> None:
    vm = spec(
        disks=[
            {"name": "root", "image": "/images/web.raw"},
            {"name": "data", "image": "/images/data.raw", "keep": "latest"},
        ]
    )
    whole = command(vm)
    later = command(vm, absent=frozenset({"data"}))
    port = "pcie-root-port,id=port-data,chassis=2,slot=2"
    device = (
        "vhost-user-blk-pci,id=disk-data,chardev=char-disk-data,num-queues=2,queue-size=256,"
        "bus=port-data,addr=0x0"
    )
    assert port in whole
    assert device in whole
    # But for the disk itself the machine is the same.
    gone = [part for part in whole if part not in later]
    assert gone == [whole[whole.index(device) - 2], device]
    disk = vm.disk("data")
    chardev, plugged = plug(disk, plan(0, 0), FEATURES, Path("/run/data.sock"))
    assert chardev == (
        "chardev-add",
        {
            "id": "char-disk-data",
            "backend": {
                "type": "socket",
                "data": {
                    "addr": {"type": "unix", "data": {"path": "/run/data.sock"}},
                    "server": False,
                    "reconnect-ms": 1,
                },
            },
        },
    )
    command_line = ",".join(f"{key}={value}" for key, value in plugged[1].items())
    assert command_line == f"driver={device}"


def test_an_isolated_guest_reaches_nobody() -> None:
    assert "user,id=net0,restrict=on" in command(spec(), isolated=True)
    assert "user,id=net0" in command(spec())


def test_kvm_shows_the_host_processor() -> None:
    argv = command(spec(), accel="kvm")
    assert argv[argv.index("-accel") + 1] == "kvm"
    assert argv[argv.index("-cpu") + 1] == "host"
    assert "Haswell" in command(spec(cpu="Haswell"), accel="kvm")


def test_disks_boot_in_order_without_a_kernel() -> None:
    vm = spec(kernel=None, initrd=None, cmdline="", firmware="/fw.fd",
              disks=[{"name": n, "image": f"/{n}"} for n in ("a", "b")])  # fmt: skip
    argv = command(vm)
    assert argv[argv.index("-bios") + 1] == "/fw.fd"
    assert [arg[-11:] for arg in argv if "vhost-user-blk" in arg] == ["bootindex=0", "bootindex=1"]


def test_actions_follow_the_description() -> None:
    argv = command(spec(on_crash="poweroff", on_reboot="poweroff"))
    assert argv[argv.index("-action") + 1] == "reboot=shutdown,panic=shutdown,shutdown=poweroff"


def test_an_older_qemu_reconnects_in_whole_seconds() -> None:
    argv = command(spec(), replace(FEATURES, chardev_options=frozenset({"reconnect"})))
    assert any(arg.endswith("server=off,reconnect=1") for arg in argv)


def test_what_is_optional_is_left_out_where_it_is_missing() -> None:
    argv = command(spec(), replace(FEATURES, sandbox=False, devices=frozenset()))
    assert not {"-sandbox", "pvpanic", "virtio-rng-pci"} & set(argv)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"disk_properties": frozenset()}, "vhost-user-blk-pci"),
        ({"chardev_options": frozenset({"path"})}, "cannot reconnect"),
        ({"netdevs": frozenset({"user"})}, "network of type tap"),
        ({}, "device vmgenid"),
    ],
)
def test_what_is_needed_and_missing_is_named(lacking: dict[str, Any], message: str) -> None:
    with pytest.raises(Unavailable, match=message):
        command(spec().begun(generations=True), replace(FEATURES, **lacking))


def test_a_machine_keeps_its_uuid_and_has_a_generation_of_its_own() -> None:
    one, again = (spec().begun(generations=True) for _ in range(2))
    assert one.uuid == again.uuid
    assert one.generation_id != again.generation_id
    assert one.begun(generations=False).generation_id is None
    argv = command(one, replace(FEATURES, devices=frozenset({"vmgenid"})))
    assert argv[argv.index("-uuid") + 1] == str(one.uuid)
    assert f"vmgenid,guid={one.generation_id},id=generation" in argv
    chosen = VmSpec.model_validate({"name": "a", "uuid": "12345678-9abc-4def-8123-456789abcdef"})
    assert chosen.begun(generations=True).uuid == chosen.uuid
    other = VmSpec(name="other").begun(generations=True)
    assert other.uuid != one.uuid


def test_a_machine_that_qemu_lacks() -> None:
    with pytest.raises(InvalidRequest, match='no machine "pc"'):
        command(spec(machine="pc"), replace(FEATURES, machines=frozenset({"q35"})))


@pytest.mark.parametrize(("disks", "fits"), [(26, True), (27, False)])
def test_more_devices_than_pci_slots_are_refused_with_the_number(disks: int, fits: bool) -> None:
    """Two network cards, the channels and the generator of random numbers take slots as well."""
    many = [{"name": f"d{index}", "image": f"/images/{index}.raw"} for index in range(disks)]
    if fits:
        assert sum("vhost-user-blk-pci" in word for word in command(spec(disks=many))) == 26
        return
    with pytest.raises(InvalidRequest, match="27 disks and 2 network cards; 28 fit"):
        command(spec(disks=many))


def test_a_firmware_with_variables_is_in_two_flash_memories() -> None:
    split = spec(firmware="/f/OVMF_CODE.fd", firmware_vars="/f/OVMF_VARS.fd")
    argv = command(split)
    code, variables = documents(argv, "-blockdev")
    assert argv[argv.index("-machine") + 1].endswith(",pflash0=firmware-code,pflash1=firmware-vars")
    assert (code["file"]["filename"], code["read-only"]) == ("/f/OVMF_CODE.fd", True)
    assert (variables["file"]["filename"], variables["read-only"]) == ("/run/vm/web/vars.fd", False)
    assert "-bios" in command(spec(firmware="/f/OVMF.fd"))
    with pytest.raises(ValidationError, match=r"name that as well.*/f/OVMF_VARS\.fd"):
        spec(firmware="/f/OVMF_CODE.fd")
    with pytest.raises(ValidationError, match="firmware_vars needs the code"):
        spec(firmware_vars="/f/OVMF_VARS.fd")


def test_commas_in_paths_are_doubled() -> None:
    files = VmFiles(Path("/run/a,b"))
    bare = spec(disks=[], nics=[])
    argv = build(
        bare, FEATURES, qemu="q", accel="tcg", files=files, disk_sockets={}, plans={}, memory_fd=9
    )
    assert any("path=/run/a,,b/qmp.sock," in arg for arg in argv)


OWN = {"name": "root", "image": "/images/a, b.raw", "backend": "qemu", "serial": "s1"}


def test_a_disk_that_qemu_serves_on_one_thread() -> None:
    vm = spec(disks=[{**OWN, "queue_size": 64, "direct": True}])
    argv = command(vm, replace(FEATURES, disk_properties=frozenset()), disk_root=plan(0, 0))
    assert argv.count("iothread,id=disk-root-thread-0") == 1
    (image,) = documents(argv, "-blockdev")
    assert (image["driver"], image["node-name"], image["read-only"]) == ("raw", "disk-root", False)
    assert image["file"]["driver"] == "file"
    assert image["file"]["filename"] == "/images/a, b.raw"
    assert image["file"]["aio"] == "threads"
    assert image["file"]["cache"] == {"direct": True, "no-flush": False}
    assert "locking" not in image["file"], "locking is QEMU's default"
    (device,) = documents(argv, "-device")
    assert device == {
        "driver": "virtio-blk-pci",
        "id": "disk-root",
        "num-queues": 2,
        "queue-size": 64,
        "iothread": "disk-root-thread-0",
        "drive": "disk-root",
        "serial": "s1",
        "rerror": "report",
        "werror": "report",
    }


def test_a_disk_that_qemu_serves_on_several_threads() -> None:
    disk = {**OWN, "image": "/dev/sdz", "read_only": True, "block_size": 4096}
    vm = spec(disks=[disk], kernel=None, initrd=None, cmdline="")
    argv = command(vm, disk_root=plan(0, 1, 0, 1, 2, engine="io_uring", poll_us=7))
    threads = [f"iothread,id=disk-root-thread-{n},poll-max-ns=7000" for n in range(3)]
    assert [text for text in argv if text.startswith("iothread")] == threads
    (image,) = documents(argv, "-blockdev")
    assert (image["file"]["driver"], image["file"]["aio"]) == ("host_device", "io_uring")
    assert image["read-only"]
    (device,) = documents(argv, "-device")
    assert "iothread" not in device
    assert device["iothread-vq-mapping"] == [
        {"iothread": "disk-root-thread-0", "vqs": [0, 2]},
        {"iothread": "disk-root-thread-1", "vqs": [1, 3]},
        {"iothread": "disk-root-thread-2", "vqs": [4]},
    ]
    assert (device["bootindex"], device["logical_block_size"]) == (0, 4096)


def test_a_scsi_disk_has_its_threads_at_the_controller() -> None:
    argv = command(spec(disks=[{**OWN, "bus": "virtio-scsi"}]), disk_root=plan(0, 1))
    controller, unit = documents(argv, "-device")
    assert controller["driver"] == "virtio-scsi-pci"
    assert controller["num_queues"] == 2
    assert [entry["vqs"] for entry in controller["iothread-vq-mapping"]] == [[0], [1]]
    assert (unit["driver"], unit["bus"], unit["drive"]) == (
        "scsi-hd",
        "disk-root-bus.0",
        "disk-root",
    )
    assert "iothread-vq-mapping" not in unit


def test_a_card_with_several_queues_and_kernel_threads() -> None:
    nic = {"type": "tap", "tap": "tap0", "queues": 4}
    argv = command(spec(nics=[nic]), net0=plan(0, 1, 2, 3, engine="vhost"))
    netdev = argv[argv.index("-netdev") + 1]
    assert netdev == "tap,id=net0,ifname=tap0,script=no,downscript=no,vhost=on,queues=4"
    device = next(text for text in argv if text.startswith("virtio-net"))
    assert device.endswith(",romfile=,mq=on,vectors=10")


def test_a_card_whose_tap_was_opened_for_it() -> None:
    nic = {"type": "tap", "tap": "tap0"}
    for queues, files, expected in (
        (1, [7], "tap,id=net0,fd=7,vhost=on"),
        (3, [7, 8, 9], "tap,id=net0,fds=7:8:9,vhost=on"),
    ):
        argv = command(
            spec(nics=[{**nic, "queues": queues}]),
            net0=plan(*range(queues), engine="vhost"),
            tap_files={0: files},
        )
        assert argv[argv.index("-netdev") + 1] == expected
