"""The QEMU command line of a VM: a pure function of its description and QEMU's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.vm.files import VmFiles
from sempervirt.vm.spec import NicSpec, VmSpec

# How long QEMU waits before it connects to a disk's socket again. The socket stays open while
# backends change, so the first try succeeds, and this is the whole of the delay that QEMU
# adds to a take-over; 1 ms is the least that the option can say.
RECONNECT_MS = 1

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Features:
    """What the installed QEMU can do; see `features`."""

    version: str
    machines: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    disk_properties: frozenset[str] = frozenset()
    chardev_options: frozenset[str] = frozenset()
    netdevs: frozenset[str] = frozenset()
    memfd: bool = False
    sandbox: bool = False


def build(
    spec: VmSpec,
    features: Features,
    *,
    qemu: str,
    accel: str,
    files: VmFiles,
    disk_sockets: Mapping[str, Path],
) -> list[str]:
    """The argument vector. Raises Unavailable when this QEMU lacks something needed."""
    _require(spec, features)
    size_mib = spec.memory >> 20
    argv = [qemu, "-name", f"guest={spec.name},debug-threads=on"]
    argv += ["-no-user-config", "-nodefaults", "-display", "none", "-msg", "timestamp=on"]
    if features.sandbox:
        argv += ["-sandbox", SANDBOX]
    argv += ["-machine", f"{spec.machine},memory-backend=memory"]
    argv += ["-accel", "tcg,thread=multi" if accel == "tcg" else accel]
    argv += ["-cpu", spec.cpu or ("host" if accel == "kvm" else "max")]
    argv += ["-smp", str(spec.vcpus), "-m", f"{size_mib}M"]
    # Shared, because the backends read and write the guest's memory directly.
    argv += ["-object", f"memory-backend-memfd,id=memory,size={size_mib}M,share=on"]
    panic = "pause" if spec.on_crash == "pause" else "shutdown"
    reboot = "reset" if spec.on_reboot == "reset" else "shutdown"
    argv += ["-action", f"reboot={reboot},panic={panic},shutdown=poweroff"]
    argv += ["-chardev", f"socket,id=monitor,path={_quote(files.monitor)},server=on,wait=off"]
    argv += ["-mon", "chardev=monitor,mode=control"]
    argv += _console(files)
    argv += _boot(spec)
    argv += _disks(spec, features, disk_sockets)
    for index, nic in enumerate(spec.nics):
        argv += _nic(index, nic, spec.mac(index))
    argv += _channels(spec, files)
    if "virtio-rng-pci" in features.devices:
        argv += ["-device", "virtio-rng-pci"]
    if "pvpanic" in features.devices:
        argv += ["-device", "pvpanic"]
    return argv


def _require(spec: VmSpec, features: Features) -> None:
    remedy = "install a QEMU that has it"
    if not features.memfd:
        raise Unavailable("this QEMU has no memory-backend-memfd", remedy=remedy)
    if spec.disks and not features.disk_properties:
        raise Unavailable("this QEMU has no device vhost-user-blk-pci", remedy=remedy)
    if spec.disks and not features.chardev_options & {"reconnect-ms", "reconnect"}:
        raise Unavailable("this QEMU cannot reconnect a socket", remedy=remedy)
    if features.machines and spec.machine not in features.machines:
        raise InvalidRequest(
            f'this QEMU has no machine "{spec.machine}"', remedy='choose "q35" or "pc"'
        )
    for nic in spec.nics:
        if nic.type not in features.netdevs:
            raise Unavailable(f"this QEMU has no network of type {nic.type}", remedy=remedy)


def _quote(value: Path | str) -> str:
    """A value within a QEMU option list, where a comma is written twice."""
    return str(value).replace(",", ",,")


def _console(files: VmFiles) -> list[str]:
    chardev = f"socket,id=console,path={_quote(files.console)},server=on,wait=off"
    chardev += f",logfile={_quote(files.console_log)},logappend=on"
    return ["-chardev", chardev, "-serial", "chardev:console"]


def _boot(spec: VmSpec) -> list[str]:
    argv = ["-bios", str(spec.firmware)] if spec.firmware else []
    if spec.kernel:
        argv += ["-kernel", str(spec.kernel)]
    if spec.initrd:
        argv += ["-initrd", str(spec.initrd)]
    if spec.cmdline:
        argv += ["-append", spec.cmdline]
    return argv


def _disks(spec: VmSpec, features: Features, sockets: Mapping[str, Path]) -> list[str]:
    argv = []
    # Whole seconds are all that QEMU before 8.2 can wait.
    again = (
        f"reconnect-ms={RECONNECT_MS}"
        if "reconnect-ms" in features.chardev_options
        else "reconnect=1"
    )
    for index, disk in enumerate(spec.disks):
        name = f"disk-{disk.name}"
        socket = _quote(sockets[disk.name])
        argv += ["-chardev", f"socket,id=char-{name},path={socket},server=off,{again}"]
        device = f"vhost-user-blk-pci,id={name},chardev=char-{name},num-queues={disk.queues}"
        device += f",queue-size={disk.queue_size}"
        if spec.kernel is None:
            device += f",bootindex={index}"
        argv += ["-device", device]
    return argv


def _nic(index: int, nic: NicSpec, mac: str) -> list[str]:
    backend = "user" if nic.tap is None else f"tap,ifname={_quote(nic.tap)},script=no,downscript=no"
    kind, _, options = backend.partition(",")
    netdev = f"{kind},id=net{index}" + (f",{options}" if options else "")
    # An empty romfile: nothing boots from the network, and the ROM may not be installed.
    return ["-netdev", netdev, "-device", f"virtio-net-pci,netdev=net{index},mac={mac},romfile="]


def _channels(spec: VmSpec, files: VmFiles) -> list[str]:
    if not spec.channels:
        return []
    argv = ["-device", "virtio-serial-pci,id=channels"]
    for index, channel in enumerate(spec.channels):
        path = _quote(files.channel(channel))
        argv += ["-chardev", f"socket,id=channel{index},path={path},server=on,wait=off"]
        argv += [
            "-device",
            f"virtserialport,bus=channels.0,chardev=channel{index},name={channel.name}",
        ]
    return argv
