"""The QEMU command line of a VM: a pure function of its description and QEMU's features."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.core.queue_map import DevicePlan, counted
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import DiskSpec, NicSpec, PassthroughSpec, PciSpec, VmSpec

# How long QEMU waits before it connects to a disk's socket again. The socket stays open while
# backends change, so the first try succeeds, and this is the whole of the delay that QEMU
# adds to a take-over; 1 ms is the least that the option can say.
RECONNECT_MS = 1

# Where QEMU finds descriptors that it does not open anew: the mode of the file says nothing then.
FDSET = "/dev/fdset"
NOTHING_GIVEN: Mapping[Path, Path] = {}

# The property that binds queues of a device to several iothreads.
MAPPING = "iothread-vq-mapping"

# Both machines have 32 slots on their first PCI bus, and keep two for the chipset.
PCI_SLOTS = 30
# Of the passed-through devices, which need to be found again: from here downwards, each with its
# shim below it. QEMU gives the others the lowest that are free.
FIRST_PASSTHROUGH_SLOT = 30
# By itself QEMU waits for 5 s, and goes on as if it had been answered.
LOCKING_MS = 120_000

# The first QEMU whose messages for DMA have the lengths that semper-vfiod uses. Nothing that QEMU
# tells about itself differs, so here the version counts.
VFIO_USER_VERSION = (11, 1)

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Features:
    """What the installed QEMU can do; see `features`.

    `mapped_devices` are the types of disk whose queues can be bound to several threads, `aio`
    the ways in which QEMU itself does I/O.
    """

    version: str
    machines: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    disk_properties: frozenset[str] = frozenset()
    mapped_devices: frozenset[str] = frozenset()
    aio: frozenset[str] = frozenset()
    chardev_options: frozenset[str] = frozenset()
    netdevs: frozenset[str] = frozenset()
    sandbox: bool = False

    @property
    def passes_through(self) -> bool:
        """Whether QEMU can hand a device of semper-vfiod to its guest."""
        digits = self.version.split(".")[:2]
        if "vfio-user-pci" not in self.devices or not all(part.isdigit() for part in digits):
            return False
        return tuple(map(int, digits)) >= VFIO_USER_VERSION


@dataclass(frozen=True)
class DeviceSockets:
    """Where the mediator of a passed-through device listens: for the device, and for its shim."""

    device: Path
    shim: Path


@dataclass(frozen=True)
class Incoming:
    """The state of another QEMU that this one is to take over: its machine, by its versioned
    name.
    """

    machine: str


def build(
    spec: VmSpec,
    features: Features,
    *,
    qemu: str,
    accel: str,
    files: VmFiles,
    disk_sockets: Mapping[str, Path],
    plans: Mapping[str, DevicePlan],
    memory_fd: int,
    block_devices: Collection[Path] = (),
    incoming: Incoming | None = None,
    tap_files: Mapping[int, Sequence[int]] | None = None,
    absent: Collection[str] = (),
    isolated: bool = False,
    device_sockets: Mapping[str, DeviceSockets] | None = None,
    given: Mapping[Path, Path] = NOTHING_GIVEN,
) -> list[str]:
    """The argument vector. Raises Unavailable when this QEMU lacks something needed.

    `memory_fd` is the file with the guest's memory, inherited by QEMU; `plans` says how each
    device's queues are served, by QEMU's id: "disk-NAME", "net0", …;
    `block_devices` are the images that are no files; `tap_files` are open files of
    /dev/net/tun, one for each pair of queues, for the networks (by position) whose taps QEMU is
    not to open by itself. The disks `absent` are plugged in later, by `plug`; an `isolated` guest
    reaches nobody through user-mode networking. `device_sockets` are those of the passed-through
    devices, by name. `given` are paths that QEMU opens in the place of others: of descriptors.
    """
    machine = incoming.machine if incoming else spec.machine
    _require(spec, features, machine)
    size_mib = spec.memory >> 20
    argv = [qemu, "-name", f"guest={spec.name},debug-threads=on"]
    argv += ["-no-user-config", "-nodefaults", "-display", "none", "-msg", "timestamp=on"]
    if features.sandbox:
        argv += ["-sandbox", SANDBOX]
    flash = ",pflash0=firmware-code,pflash1=firmware-vars" if spec.firmware_vars else ""
    argv += ["-machine", f"{machine},memory-backend=memory{flash}"]
    argv += ["-accel", "tcg,thread=multi" if accel == "tcg" else accel]
    argv += ["-cpu", spec.cpu or ("host" if accel == "kvm" else "max")]
    argv += ["-smp", str(spec.vcpus), "-m", f"{size_mib}M"]
    if spec.uuid is not None:
        argv += ["-uuid", str(spec.uuid)]
    # Shared, because the backends read and write the guest's memory directly.
    memory = f"memory-backend-file,id=memory,size={size_mib}M,share=on"
    argv += ["-object", f"{memory},mem-path=/proc/self/fd/{memory_fd}"]
    panic = "pause" if spec.on_crash == "pause" else "shutdown"
    reboot = "reset" if spec.on_reboot == "reset" else "shutdown"
    argv += ["-action", f"reboot={reboot},panic={panic},shutdown=poweroff"]
    argv += ["-chardev", f"socket,id=monitor,path={_quote(files.monitor)},server=on,wait=off"]
    argv += ["-mon", "chardev=monitor,mode=control"]
    argv += _console(files)
    argv += _firmware(spec, files, given)
    argv += _boot(spec, given)
    argv += _descriptors(given)
    for index, disk in enumerate(spec.disks):
        boot = index if spec.kernel is None else None
        plan = plans[disk_id(disk)]
        if disk.backend == "qemu":
            image = given.get(disk.image, disk.image)
            argv += _own_disk(disk, plan, boot, image, block_device=disk.image in block_devices)
        else:
            argv += _port(index, disk)
            if disk.name not in absent:
                argv += _disk(disk, plan, features, disk_sockets[disk.name], boot)
    for index, nic in enumerate(spec.nics):
        files_of_tap = (tap_files or {}).get(index, ())
        argv += _nic(
            index, nic, spec.mac(index), plans[nic_id(index)], files_of_tap, isolated=isolated
        )
    for index, device in enumerate(spec.passthrough):
        argv += passthrough_arguments(index, device, (device_sockets or {})[device.name])
    argv += _channels(spec, files)
    if "virtio-rng-pci" in features.devices:
        argv += ["-device", "virtio-rng-pci"]
    if "pvpanic" in features.devices:
        argv += ["-device", "pvpanic"]
    if spec.generation_id is not None:
        argv += ["-device", f"vmgenid,guid={spec.generation_id},id=generation"]
    if incoming is not None:
        argv += ["-S", "-incoming", "defer"]
    return argv


def _descriptors(given: Mapping[Path, Path]) -> list[str]:
    sets = [path.name for path in given.values() if str(path.parent) == FDSET]
    return [word for number in sets for word in ("-add-fd", f"fd={number},set={number}")]


def _require(spec: VmSpec, features: Features, machine: str) -> None:
    remedy = "install a QEMU that has it"
    served = any(disk.backend == "blkd" for disk in spec.disks)
    if served and not features.disk_properties:
        raise Unavailable("this QEMU has no device vhost-user-blk-pci", remedy=remedy)
    if served and not features.chardev_options & {"reconnect-ms", "reconnect"}:
        raise Unavailable("this QEMU cannot reconnect a socket", remedy=remedy)
    if features.machines and machine not in features.machines:
        raise InvalidRequest(f'this QEMU has no machine "{machine}"', remedy='choose "q35" or "pc"')
    for nic in spec.nics:
        if nic.type not in features.netdevs:
            raise Unavailable(f"this QEMU has no network of type {nic.type}", remedy=remedy)
    if spec.generation_id is not None and "vmgenid" not in features.devices:
        raise Unavailable("this QEMU has no device vmgenid, and the guest has one", remedy=remedy)
    if spec.passthrough and not features.passes_through:
        wanted = ".".join(map(str, VFIO_USER_VERSION))
        raise Unavailable(
            f"QEMU {features.version} cannot hand the device {spec.passthrough[0].name} to its "
            f"guest: that needs vfio-user-pci as QEMU {wanted} has it",
            remedy=f"install QEMU {wanted} or newer (Debian 13: from trixie-backports)",
        )
    _require_slots(spec, features)


def _require_slots(spec: VmSpec, features: Features) -> None:
    """Every device takes a slot of the PCI bus; QEMU itself ends at the first that has none."""
    others = bool(spec.channels) + ("virtio-rng-pci" in features.devices)
    room = PCI_SLOTS - others
    passed = len(spec.passthrough)
    if len(spec.disks) + len(spec.nics) + 2 * passed > room:
        devices = f" and {counted(passed, 'passed-through device')}" if passed else ""
        raise InvalidRequest(
            f"VM {spec.name} has {len(spec.disks)} disks and {len(spec.nics)} network cards"
            f"{devices}; "
            f"{room} fit, for the machine has {PCI_SLOTS} free PCI slots and {others} "
            f"{'is' if others == 1 else 'are'} taken by channels and the random number generator",
            remedy="put several file systems on one disk, or spread them over several VMs",
        )


def _quote(value: Path | str) -> str:
    """A value within a QEMU option list, where a comma is written twice."""
    return str(value).replace(",", ",,")


def _console(files: VmFiles) -> list[str]:
    chardev = f"socket,id=console,path={_quote(files.console)},server=on,wait=off"
    chardev += f",logfile={_quote(files.console_log)},logappend=on"
    return ["-chardev", chardev, "-serial", "chardev:console"]


def _firmware(spec: VmSpec, files: VmFiles, given: Mapping[Path, Path]) -> list[str]:
    if spec.firmware is None:
        return []
    firmware = given.get(spec.firmware, spec.firmware)
    if spec.firmware_vars is None:
        return ["-bios", str(firmware)]
    code = _flash("firmware-code", firmware, read_only=True)
    variables = given.get(files.vars, files.vars)
    return [*code, *_flash("firmware-vars", variables, read_only=False)]


def _flash(name: str, path: Path, *, read_only: bool) -> list[str]:
    """What stands in a flash memory of the machine."""
    file = {"driver": "file", "filename": str(path)}
    image = {"driver": "raw", "node-name": name, "read-only": read_only, "file": file}
    return ["-blockdev", json.dumps(image)]


def _boot(spec: VmSpec, given: Mapping[Path, Path]) -> list[str]:
    argv = []
    if spec.kernel:
        argv += ["-kernel", str(given.get(spec.kernel, spec.kernel))]
    if spec.initrd:
        argv += ["-initrd", str(given.get(spec.initrd, spec.initrd))]
    if spec.cmdline:
        argv += ["-append", spec.cmdline]
    return argv


def disk_id(disk: DiskSpec) -> str:
    """What QEMU calls a disk."""
    return f"disk-{disk.name}"


def nic_id(index: int) -> str:
    """What QEMU calls a network."""
    return f"net{index}"


def device_id(device: PassthroughSpec | PciSpec) -> str:
    """What QEMU calls a passed-through device."""
    return f"device-{device.name}"


def device_slot(index: int) -> int:
    """The slot of the passed-through device at that position of the VM file, on bus 0."""
    return FIRST_PASSTHROUGH_SLOT - 2 * index


def shim_slot(index: int) -> int:
    """The slot of that device's shim."""
    return device_slot(index) - 1


def passthrough_arguments(
    index: int, device: PassthroughSpec | PciSpec, sockets: DeviceSockets
) -> list[str]:
    """A passed-through device, and the shim that takes its doorbells over during a move."""
    argv = []
    for name, slot, path in (
        (device_id(device), device_slot(index), sockets.device),
        (f"shim-{device.name}", shim_slot(index), sockets.shim),
    ):
        properties: dict[str, object] = {
            "driver": "vfio-user-pci",
            "id": name,
            "bus": "pcie.0",
            "addr": f"{slot:x}.0",
            "socket": {"type": "unix", "path": str(path)},
        }
        if isinstance(device, PciSpec):
            # All of the guest's memory is locked before the mediator answers.
            properties["x-msg-timeout"] = LOCKING_MS
        argv += ["-device", json.dumps(properties)]
    return argv


def _disk(
    disk: DiskSpec, plan: DevicePlan, features: Features, socket: Path, boot: int | None
) -> list[str]:
    """A disk that semper-blkd serves."""
    # Whole seconds are all that QEMU before 8.2 can wait.
    again = (
        f"reconnect-ms={RECONNECT_MS}"
        if "reconnect-ms" in features.chardev_options
        else "reconnect=1"
    )
    name = disk_id(disk)
    chardev = f"socket,id={_chardev_id(disk)},path={_quote(socket)},server=off,{again}"
    device = f"vhost-user-blk-pci,id={name},chardev={_chardev_id(disk)}"
    device += f",num-queues={plan.binding.queues},queue-size={disk.queue_size}"
    if _has_port(disk):
        device += f",bus={_port_id(disk)},addr=0x0"
    if boot is not None:
        device += f",bootindex={boot}"
    return ["-chardev", chardev, "-device", device]


def _chardev_id(disk: DiskSpec) -> str:
    return f"char-{disk_id(disk)}"


def _has_port(disk: DiskSpec) -> bool:
    """Whether the disk is behind a port of its own: into such a one it can be plugged later."""
    return disk.keep == "latest"


def _port_id(disk: DiskSpec) -> str:
    return f"port-{disk.name}"


def _port(index: int, disk: DiskSpec) -> list[str]:
    if not _has_port(disk):
        return []
    number = index + 1
    return ["-device", f"pcie-root-port,id={_port_id(disk)},chassis={number},slot={number}"]


def plug(
    disk: DiskSpec, plan: DevicePlan, features: Features, socket: Path
) -> list[tuple[str, dict[str, Any]]]:
    """The monitor's commands that plug in a disk which was `absent`, one after the other."""
    again = "reconnect-ms" if "reconnect-ms" in features.chardev_options else "reconnect"
    address = {"type": "unix", "data": {"path": str(socket)}}
    backend = {
        "type": "socket",
        "data": {"addr": address, "server": False, again: RECONNECT_MS},
    }
    device = {
        "driver": "vhost-user-blk-pci",
        "id": disk_id(disk),
        "chardev": _chardev_id(disk),
        "num-queues": plan.binding.queues,
        "queue-size": disk.queue_size,
        "bus": _port_id(disk),
        "addr": "0x0",
    }
    return [
        ("chardev-add", {"id": _chardev_id(disk), "backend": backend}),
        ("device_add", device),
    ]


def _own_disk(
    disk: DiskSpec, plan: DevicePlan, boot: int | None, image: Path, *, block_device: bool
) -> list[str]:
    """A disk that QEMU itself serves: threads, image, and the device with its queues."""
    name = disk_id(disk)
    argv = []
    poll = "" if plan.poll_us is None else f",poll-max-ns={plan.poll_us * 1000}"
    for thread in range(plan.binding.threads):
        argv += ["-object", f"iothread,id={_thread_id(name, thread)}{poll}"]
    argv += ["-blockdev", json.dumps(_image(disk, plan, image, block_device))]
    properties: dict[str, Any] = {"drive": name, "serial": disk.serial}
    # The guest is told of every error, as by semper-blkd; by itself QEMU pauses it at some.
    properties |= {"rerror": "report", "werror": "report"}
    if disk.block_size is not None:
        properties |= {"logical_block_size": disk.block_size}
        properties |= {"physical_block_size": disk.block_size}
    if boot is not None:
        properties |= {"bootindex": boot}
    if disk.bus == "virtio-scsi":
        controller = {
            "driver": "virtio-scsi-pci",
            "id": f"{name}-bus",
            "num_queues": plan.binding.queues,
            "virtqueue_size": disk.queue_size,
            **_threads(name, plan),
        }
        unit = {"driver": "scsi-hd", "id": name, "bus": f"{name}-bus.0", **properties}
        return [*argv, "-device", json.dumps(controller), "-device", json.dumps(unit)]
    device = {
        "driver": "virtio-blk-pci",
        "id": name,
        "num-queues": plan.binding.queues,
        "queue-size": disk.queue_size,
        **_threads(name, plan),
        **properties,
    }
    return [*argv, "-device", json.dumps(device)]


def _image(disk: DiskSpec, plan: DevicePlan, image: Path, block_device: bool) -> dict[str, Any]:
    """The raw image; QEMU locks it, against semper-blkd too."""
    cache = {"direct": disk.direct, "no-flush": False}
    return {
        "driver": "raw",
        "node-name": disk_id(disk),
        "read-only": disk.read_only,
        "discard": "unmap",
        "cache": cache,
        "file": {
            "driver": "host_device" if block_device else "file",
            "filename": str(image),
            "aio": plan.engine.value,
            "discard": "unmap",
            "cache": cache,
        },
    }


def _threads(name: str, plan: DevicePlan) -> dict[str, Any]:
    """The device's threads; every QEMU can give it one."""
    thread_map = plan.binding.map
    if plan.binding.threads == 1:
        return {"iothread": _thread_id(name, 0)}
    return {
        MAPPING: [
            {
                "iothread": _thread_id(name, thread),
                "vqs": [queue for queue, at in enumerate(thread_map) if at == thread],
            }
            for thread in range(plan.binding.threads)
        ]
    }


def _thread_id(name: str, thread: int) -> str:
    return f"{name}-thread-{thread}"


def _nic(
    index: int,
    nic: NicSpec,
    mac: str,
    plan: DevicePlan,
    tap_files: Sequence[int],
    *,
    isolated: bool,
) -> list[str]:
    name = nic_id(index)
    netdev = f"user,id={name}" + (",restrict=on" if isolated else "")
    # An empty romfile: nothing boots from the network, and the ROM may not be installed.
    device = f"virtio-net-pci,netdev={name},mac={mac},romfile="
    pairs = plan.binding.queues
    if nic.tap is not None:
        netdev = f"tap,id={name},ifname={_quote(nic.tap)},script=no,downscript=no"
        if tap_files:
            option = "fds" if pairs > 1 else "fd"
            netdev = f"tap,id={name},{option}={':'.join(map(str, tap_files))}"
        if plan.engine.value == "vhost":
            netdev += ",vhost=on"
    if pairs > 1:
        netdev += "" if tap_files else f",queues={pairs}"
        # An interrupt for each queue, one for control and one for changes of configuration.
        device += f",mq=on,vectors={2 * pairs + 2}"
    return ["-netdev", netdev, "-device", device]


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
