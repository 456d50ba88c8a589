"""Every reason that would stop a migration: a pure function of what both hosts say.

All of them are found, not the first one: whoever reads the list mends everything at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator

from sempervirt.core.sizes import format_size
from sempervirt.qemu.accel import AcceleratorKind
from sempervirt.qemu.spec import DiskSpec, PassthroughSpec, PciSpec, VmSpec
from sempervirt.qemu.state import Runstate


@dataclass(frozen=True)
class Obstacle:
    """A reason against a move, and a remedy as an imperative."""

    what: str
    remedy: str = ""


@dataclass(frozen=True)
class ImageSeen:
    """What a host sees where an image should be; `problem` is "" when it could be used."""

    id: str = ""
    block_device: bool = False
    problem: str = ""


@dataclass(frozen=True)
class HostSide:
    """A host as source or destination of a move.

    `images` are by the name of the disk, `missing` are paths and taps, `memory_available` is in
    bytes; `passes_through`: its QEMU can take passed-through devices; `vm_state` is that of a VM of
    the same name there, None when there is none. A host of an earlier release says "" for None, and
    does not tell its `processors`: 0.
    """

    name: str
    accelerator: AcceleratorKind
    qemu_version: str
    cpu_model: str = ""
    cpu_flags: frozenset[str] = frozenset()
    memory_available: int = 0
    processors: int = 0
    vm_state: Annotated[Runstate | None, BeforeValidator(lambda said: said or None)] = None
    images: dict[str, ImageSeen] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    passes_through: bool = False


def obstacles(
    spec: VmSpec, accelerator: AcceleratorKind, source: HostSide, destination: HostSide
) -> list[Obstacle]:
    """All obstacles; none: the move may begin. `accelerator` is what the VM runs with."""
    return [
        *_vm(spec, source, destination),
        *_processor(spec, accelerator, source, destination),
        *(
            obstacle
            for disk in spec.imaged
            for obstacle in _disk(
                disk, source.images.get(disk.name), destination.images.get(disk.name), destination
            )
        ),
        *_passthrough(spec, destination),
        *_network(spec),
        *_missing(destination),
    ]


def obstacles_to_start(
    spec: VmSpec, accelerator: AcceleratorKind, here: HostSide, there: HostSide
) -> list[Obstacle]:
    """All that keeps a VM, which ends with its host, from being started elsewhere. Memory is not
    looked at, for several VMs share it.
    """
    found = [*_name_taken(spec, there), *_accelerator(accelerator, there)]
    for disk in spec.imaged:
        own, seen = here.images.get(disk.name), there.images.get(disk.name)
        if seen is None or seen.problem:
            problem = seen.problem if seen else "nothing is known of it"
            found.append(Obstacle(f"disk {disk.name}, on {there.name}: {problem}"))
        elif own is not None and own.id and not disk.read_only and own.id != seen.id:
            what = f"disk {disk.name}: {disk.image} on {there.name} is another image"
            found.append(Obstacle(what, "the hosts have to share the storage"))
    return [*found, *_passthrough(spec, there), *_missing(there)]


def _vm(spec: VmSpec, source: HostSide, destination: HostSide) -> Iterator[Obstacle]:
    if source.vm_state not in (Runstate.RUNNING, Runstate.PAUSED):
        yield Obstacle(
            f"VM {spec.name} is {source.vm_state.value if source.vm_state else 'not there'}",
            "start it, or resume it: only a VM that runs or is paused can move",
        )
    yield from _name_taken(spec, destination)
    if destination.memory_available < spec.memory:
        yield Obstacle(
            f"{destination.name} has {format_size(destination.memory_available)} of memory "
            f"available, and the VM has {format_size(spec.memory)}",
            "make room there",
        )


def _name_taken(spec: VmSpec, destination: HostSide) -> Iterator[Obstacle]:
    if destination.vm_state is not None and not destination.vm_state.is_end:
        yield Obstacle(
            f"{destination.name} has a VM {spec.name} of its own, "
            f"which is {destination.vm_state.value}",
            f"end it there: semper vm stop {spec.name}",
        )


def _accelerator(accelerator: AcceleratorKind, destination: HostSide) -> Iterator[Obstacle]:
    if accelerator != destination.accelerator and accelerator == "kvm":
        yield Obstacle(
            f"the VM runs with kvm, and {destination.name} offers {destination.accelerator}",
            f"see there: semper host show, on {destination.name}",
        )


def _missing(destination: HostSide) -> Iterator[Obstacle]:
    for thing in destination.missing:
        remedy = "it is needed there under the same name"
        yield Obstacle(f"{destination.name} has no {thing}", remedy)


def _processor(
    spec: VmSpec, accelerator: AcceleratorKind, source: HostSide, destination: HostSide
) -> Iterator[Obstacle]:
    yield from _accelerator(accelerator, destination)
    if accelerator == "kvm" and (spec.cpu or "host").startswith(("host", "max")):
        lost = sorted(source.cpu_flags - destination.cpu_flags)
        if lost:
            some = ", ".join(lost[:6]) + (" …" if len(lost) > 6 else "")
            yield Obstacle(
                f"the processor of {destination.name} ({destination.cpu_model}) lacks {some}",
                "give the VM a CPU model that both have, and start it again with it",
            )
    if _version(destination.qemu_version) < _version(source.qemu_version):
        yield Obstacle(
            f"{destination.name} has QEMU {destination.qemu_version}, older than "
            f"{source.qemu_version} here",
            "install the same QEMU there, or a newer one",
        )


def _disk(
    disk: DiskSpec | PassthroughSpec,
    here: ImageSeen | None,
    there: ImageSeen | None,
    destination: HostSide,
) -> Iterator[Obstacle]:
    if isinstance(disk, DiskSpec) and disk.backend == "qemu":
        yield Obstacle(
            f"disk {disk.name} is served by QEMU itself, whose image cannot be handed over",
            'backend = "blkd"',
        )
        return
    for where, seen in (("here", here), (f"on {destination.name}", there)):
        if seen is None or seen.problem:
            yield Obstacle(
                f"disk {disk.name}, {where}: {seen.problem if seen else 'nothing is known of it'}",
                "both hosts have to see the image at the same path",
            )
            return
    assert here is not None
    assert there is not None
    if here.block_device:
        yield Obstacle(
            f"disk {disk.name} is a block device: nothing keeps two hosts from writing to it",
            "put it on a shared file system",
        )
    elif not disk.read_only and here.id != there.id:
        yield Obstacle(
            f"disk {disk.name}: {disk.image} on {destination.name} is another image",
            "the hosts have to share the storage; a copy is not enough",
        )


def _passthrough(spec: VmSpec, destination: HostSide) -> Iterator[Obstacle]:
    if spec.passthrough and not destination.passes_through:
        yield Obstacle(
            f"QEMU {destination.qemu_version} of {destination.name} cannot take the passed-through "
            f"device {spec.passthrough[0].name}",
            "install QEMU 11.1 or newer there (Debian 13: from trixie-backports)",
        )
    for device in spec.passthrough:
        if isinstance(device, PciSpec):
            yield Obstacle(
                f"device {device.name} is the PCI device {device.pci} of this host, and stays",
                f"stop the VM, and run it on {destination.name} with the address that the device "
                "has there",
            )


def _network(spec: VmSpec) -> Iterator[Obstacle]:
    if any(nic.type == "user" for nic in spec.nics):
        yield Obstacle(
            "user-mode networking ends with its QEMU: connections of the guest would break",
            'type = "tap", on a bridge that both hosts have',
        )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
