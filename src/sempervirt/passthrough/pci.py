"""Real PCI devices of this host: whether one can be handed to a guest, and the handles of it.

The kernel hands on whole IOMMU groups, to whoever has opened the group's file. Binding a device to
vfio-pci takes it from the host, so that is the operator's to do; nothing here changes a device. The
mediator gets opened files and no path: with them it can use this one device, and no other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import EBUSY
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, NotFound, StateConflict, Unavailable

DEVICES = Path("/sys/bus/pci/devices")
VFIO = Path("/dev/vfio")
DRIVER = "vfio-pci"
# Of other devices in a group: these leave the group to its user (Linux, vfio.rst).
_HARMLESS = (DRIVER, "pci-stub", "pcieport")


def group_of(address: str, devices: Path = DEVICES) -> str:
    """The IOMMU group of a device that can be handed on.

    Raises NotFound when there is no such device, Unavailable without an IOMMU, InvalidRequest when
    it or another device of its group is still the host's.
    """
    device = devices / address
    if not device.exists():
        raise NotFound(f"this host has no PCI device {address}", remedy="see there: lspci -D")
    link = device / "iommu_group"
    if not link.exists():
        raise Unavailable(
            f"PCI device {address} has no IOMMU group, so nothing keeps its DMA within a guest",
            remedy="switch the IOMMU on in the firmware (VT-d, AMD-Vi), and for an Intel processor "
            "with intel_iommu=on on the kernel's command line",
        )
    driver = _driver(device)
    if driver != DRIVER:
        raise InvalidRequest(
            f"PCI device {address} is not bound to {DRIVER}, but to {driver or 'no driver'}",
            remedy=f"take it from the host, if nothing uses it: modprobe {DRIVER}; driverctl "
            f"set-override {address} {DRIVER}",
        )
    for other in sorted((link / "devices").iterdir()):
        kept_by = _driver(other)
        if other.name != address and kept_by and kept_by not in _HARMLESS:
            raise InvalidRequest(
                f"PCI device {address} shares its IOMMU group with {other.name}, which the host's "
                f"driver {kept_by} has",
                remedy=f"bind {other.name} to {DRIVER} as well, or put the device into a slot that "
                "has a group of its own",
            )
    return link.resolve().name


def _driver(device: Path) -> str:
    link = device / "driver"
    return link.resolve().name if link.exists() else ""


@contextmanager
def open_device(
    address: str, devices: Path = DEVICES, vfio: Path = VFIO
) -> Iterator[Sequence[int]]:
    """Descriptors of a device's group and of a new container, closed with the block.

    Raises as `group_of`; StateConflict when another process has the group, Unavailable when the
    files are not there or not ours to open.
    """
    group = group_of(address, devices)
    with ExitStack() as stack:
        opened = []
        for path in (vfio / group, vfio / "vfio"):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == EBUSY:
                    raise StateConflict(
                        f"PCI device {address} is in use by another process",
                        remedy=f"see who has {path} open: fuser -v {path}",
                    ) from error
                raise Unavailable(
                    f"PCI device {address}: cannot open {path}: {error.strerror}",
                    remedy=f"modprobe {DRIVER}; {path} has to be the agent's to read and write",
                ) from error
            stack.callback(os.close, descriptor)
            opened.append(descriptor)
        yield opened
