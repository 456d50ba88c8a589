"""What libvirt's description of a domain has to say so that QEMU can use a guarded disk, and what
is wrong with one. Pure: what is on the host comes in as values.

libvirt itself starts such a domain and, where something is missing, hangs, or has a disk that is
gone for ever with the first death of its backend; it refuses little of it.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from sempervirt.core.errors import InvalidRequest

# More of it is not a domain; the parser bounds nothing by itself.
XML_MAX_BYTES = 4 << 20
# As libvirt writes it, where something is given to QEMU as it is.
ElementTree.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")
QUEUES = 4
MEMORY = """<memoryBacking>
  <source type='memfd'/>
  <access mode='shared'/>
</memoryBacking>"""


@dataclass(frozen=True)
class Served:
    """A guarded disk: `ailment` is why it is not served, "" where it is."""

    name: str
    image: Path
    socket: Path
    queues: int
    ailment: str = ""


@dataclass(frozen=True)
class Node:
    """A directory on the way to a socket, or the socket."""

    path: Path
    kind: int
    owner: int
    group: int
    mode: int

    @classmethod
    def of(cls, path: Path) -> Node:
        """As it is now. Raises OSError."""
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        return cls(path, stat.S_IFMT(found.st_mode), found.st_uid, found.st_gid, mode)

    def allows(self, user: User, wanted: int) -> bool:
        """Whether `user` has the rights `wanted`, of 4, 2 and 1."""
        if user.uid == 0:
            return True
        if self.owner == user.uid:
            return self.mode >> 6 & wanted == wanted
        shift = 3 if self.group in user.gids else 0
        return self.mode >> shift & wanted == wanted


@dataclass(frozen=True)
class User:
    """Whom libvirt runs QEMU as."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True)
class Found:
    """What is wrong, and what to do. `hint`: it works, and not as well as it could."""

    what: str
    remedy: str
    hint: bool = False


def disk_xml(disk: Served, target: str) -> str:
    """The element of a disk."""
    return f"""<disk type='vhostuser' device='disk'>
  <driver name='qemu' type='raw' queues='{min(QUEUES, disk.queues)}'/>
  <source type='unix' path={quoteattr(str(disk.socket))}>
    <reconnect enabled='yes' timeout='1'/>
  </source>
  <target dev='{target}' bus='virtio'/>
</disk>"""


def domain_xml(disks: Iterable[Served]) -> str:
    """All that a domain needs for these disks."""
    disks = list(disks)
    own = [disk.name.partition("/")[2] for disk in disks]
    free = (name for letter in "abcdefghijklmnopqrstuvwxyz" if (name := f"vd{letter}") not in own)
    elements = []
    for disk, name in zip(disks, own, strict=True):
        target = name if re.fullmatch(r"vd[a-z]", name) else next(free)
        elements.append(f"<!-- instead of the disk that has {disk.image} -->\n")
        elements.append(disk_xml(disk, target) + "\n")
    return (
        f"<!-- in <domain>, before <os> -->\n{MEMORY}\n<!-- in <devices> -->\n{''.join(elements)}"
    )


def parse(text: str) -> ElementTree.Element:
    """A domain. Raises InvalidRequest."""
    if len(text) > XML_MAX_BYTES or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InvalidRequest("this is no description of a domain")
    try:
        domain = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InvalidRequest(
            f"this is no XML: {error}", remedy="write it anew: virsh dumpxml DOMAIN"
        ) from error
    if domain.tag != "domain":
        raise InvalidRequest(f"this describes no domain, but a {domain.tag}")
    return domain


# What changes the meaning of a disk's bytes, its name in the guest, or what becomes of writes.
_KEPT_BY_LIBVIRT = (
    "encryption",
    "source/encryption",
    "source/slices",
    "transient",
    "shareable",
    "blockio",
    "serial",
    "iotune",
)


def adopted(domain: ElementTree.Element, served: Iterable[Served]) -> tuple[str, list[Served]]:
    """The description with each disk whose image is guarded as that guarded disk, and which those
    are. Place, name and order of boot of a disk stay. Raises InvalidRequest for a disk that cannot
    become one.
    """
    by_image = {disk.image: disk for disk in served}
    changed = ElementTree.fromstring(ElementTree.tostring(domain))
    devices = changed.find("devices")
    taken: list[Served] = []
    for number, disk in enumerate(devices if devices is not None else ()):
        guarded = by_image.get(_image(disk) or Path())
        if disk.tag != "disk" or guarded is None or disk.find("readonly") is not None:
            continue
        _require_adoptable(disk)
        ours = ElementTree.fromstring(disk_xml(guarded, _target(disk)))
        ours.extend(part for name in ("boot", "alias", "address") for part in disk.findall(name))
        assert devices is not None
        devices[number] = ours
        taken.append(guarded)
    if taken:
        _share_memory(changed)
    ElementTree.indent(changed)
    return ElementTree.tostring(changed, encoding="unicode") + "\n", taken


def _require_adoptable(disk: ElementTree.Element) -> None:
    driver, target = disk.find("driver"), disk.find("target")
    kind = driver.get("type", "raw") if driver is not None else "raw"
    bus = target.get("bus", "virtio") if target is not None else "virtio"
    if kind != "raw":
        raise InvalidRequest(
            f"disk {_target(disk)} has an image of type {kind}",
            remedy="convert it (qemu-img convert -O raw), and guard what came of it",
        )
    if bus != "virtio":
        raise InvalidRequest(
            f"disk {_target(disk)} is on the bus {bus}, and a backend is virtio-blk",
            remedy="virsh edit: bus='virtio', without <address>; the guest needs the driver first",
        )

    for what in _KEPT_BY_LIBVIRT:
        if disk.find(what) is not None:
            tag = what.split("/")[-1]
            raise InvalidRequest(
                f"disk {_target(disk)} has <{tag}>, which a guarded disk does not have",
                remedy="virsh edit: without it, if the guest can do without; "
                "otherwise leave the disk to libvirt",
            )


def _share_memory(domain: ElementTree.Element) -> None:
    backing = domain.find("memoryBacking")
    if backing is None:
        backing = ElementTree.Element("memoryBacking")
        before = domain.find("currentMemory")
        before = before if before is not None else domain.find("memory")
        places = list(domain)
        domain.insert(places.index(before) + 1 if before is not None else len(places), backing)
    wanted = [("access", "mode", "shared")]
    if backing.find("hugepages") is None:
        wanted.insert(0, ("source", "type", "memfd"))
    for tag, key, value in wanted:
        found = backing.find(tag)
        found = found if found is not None else ElementTree.SubElement(backing, tag)
        found.set(key, value)


def _image(disk: ElementTree.Element) -> Path | None:
    source = disk.find("source")
    text = (source.get("file") or source.get("dev")) if source is not None else None
    return Path(text) if text else None


def check(
    domain: ElementTree.Element,
    served: Iterable[Served],
    user: User,
    ways: Mapping[Path, list[Node] | str],
) -> list[Found]:
    """What is wrong with a domain. `ways` has, for each socket that the domain names, the
    directories from / on and the socket itself, or why they cannot be looked at.
    """
    by_socket = {disk.socket: disk for disk in served}
    disks = domain.findall("./devices/disk")
    ours = [disk for disk in disks if disk.get("type") == "vhostuser"]
    found = _memory(domain) if ours else []
    for disk in ours:
        found += _disk(disk, by_socket, user, ways)
    found += _images(disks, by_socket.values(), {_path(disk) for disk in ours})
    if not ours and not found:
        found.append(
            Found(
                "the domain has no disk of type vhostuser",
                "guard one: semper disk guard IMAGE --name DOMAIN/vda --group kvm; "
                "then: semper libvirt xml DOMAIN",
            )
        )
    return found


def sockets(domain: ElementTree.Element) -> list[Path]:
    """Where QEMU would connect."""
    disks = domain.findall("./devices/disk[@type='vhostuser']")
    return [path for disk in disks if (path := _path(disk)) is not None]


def _path(disk: ElementTree.Element) -> Path | None:
    source = disk.find("source")
    text = source.get("path") if source is not None else None
    return Path(text) if text else None


def _target(disk: ElementTree.Element) -> str:
    target = disk.find("target")
    return (target.get("dev") if target is not None else None) or "?"


def _memory(domain: ElementTree.Element) -> list[Found]:
    backing = domain.find("memoryBacking")
    access = backing.find("access") if backing is not None else None
    source = backing.find("source") if backing is not None else None
    found = []
    cells = domain.findall("./cpu/numa/cell")
    private = [cell for cell in cells if cell.get("memAccess") not in (None, "shared")]
    if private:
        found.append(
            Found(
                f"the memory of NUMA cell {private[0].get('id', '?')} is not shared "
                f"(memAccess='{private[0].get('memAccess')}'), so the backend cannot reach it",
                "write memAccess='shared' for each <cell>, or leave memAccess out",
            )
        )
    if access is None or access.get("mode") != "shared":
        found.append(
            Found(
                "the memory of the domain is not shared, so the backend cannot reach it",
                f"in <domain>: {' '.join(MEMORY.split())}",
            )
        )
    huge = backing is not None and backing.find("hugepages") is not None
    if not huge and (source is None or source.get("type") != "memfd"):
        found.append(
            Found(
                "the memory of the domain is no memfd: libvirt puts it into a file below "
                "/var/lib/libvirt/qemu/ram, on that disk",
                "in <memoryBacking>: <source type='memfd'/>",
                hint=True,
            )
        )
    return found


def _disk(
    disk: ElementTree.Element,
    by_socket: Mapping[Path, Served],
    user: User,
    ways: Mapping[Path, list[Node] | str],
) -> list[Found]:
    name, path = _target(disk), _path(disk)
    if path is None:
        return [Found(f"disk {name} names no socket", "in <source>: type='unix' path='…'")]
    found = _options(disk, name)
    served = by_socket.get(path)
    if served is None:
        found.append(
            Found(
                f"disk {name}: nothing of ours serves {path}",
                "which there are: semper disk list; serve one: semper disk guard IMAGE --name "
                "DOMAIN/vda --group kvm",
            )
        )
    elif served.ailment:
        found.append(
            Found(
                f"disk {name}: {served.ailment}; the guest would wait",
                f"look at it: semper disk show {served.name}",
            )
        )
    else:
        driver = disk.find("driver")
        queues = driver.get("queues", "1") if driver is not None else "1"
        if queues.isdecimal() and int(queues) > served.queues:
            found.append(
                Found(
                    f"disk {name} asks for {queues} queues, and {served.name} has {served.queues}: "
                    "QEMU refuses to start",
                    f"queues='{served.queues}', or: semper disk unguard, and guard with --queues",
                )
            )
    return found + _way(name, path, user, ways.get(path, "it was not looked at"))


def _options(disk: ElementTree.Element, name: str) -> list[Found]:
    found = []
    source, driver, target = disk.find("source"), disk.find("driver"), disk.find("target")
    reconnect = source.find("reconnect") if source is not None else None
    if reconnect is None or reconnect.get("enabled") != "yes":
        found.append(
            Found(
                f"disk {name}: QEMU does not connect again. A spare goes on with the connection; "
                "where it cannot, and after an upgrade from an older backend, the disk is gone",
                "in <source>: <reconnect enabled='yes' timeout='1'/>",
            )
        )
    elif reconnect.get("timeout", "0") == "0":
        found.append(
            Found(
                f"disk {name}: timeout='0' means to libvirt that QEMU never connects again",
                "timeout='1'; libvirt knows whole seconds only",
            )
        )
    if driver is not None and driver.get("type", "raw") != "raw":
        found.append(
            Found(
                f"disk {name}: type='{driver.get('type')}' has no effect: the guest would see the "
                "file as it is",
                "convert the image (qemu-img convert -O raw), guard that, and write type='raw'",
            )
        )
    if target is not None and target.get("bus", "virtio") != "virtio":
        found.append(
            Found(
                f"disk {name}: bus='{target.get('bus')}' cannot be served, a backend is virtio-blk",
                "bus='virtio'; a Windows guest needs its driver (viostor) first",
            )
        )
    if disk.find("iotune") is not None:
        found.append(
            Found(
                f"disk {name}: <iotune> has no effect on a disk that QEMU does not serve",
                "leave it out",
                hint=True,
            )
        )
    return found


def _way(name: str, path: Path, user: User, way: list[Node] | str) -> list[Found]:
    """Whether QEMU gets to the socket."""
    hangs = "the start of the domain hangs until it can"
    if isinstance(way, str):
        return [
            Found(
                f"disk {name}: {path} cannot be looked at: {way}; {hangs}",
                "is the disk guarded, and the path the one of semper disk show? Ask as root",
            )
        ]
    *directories, socket = way
    for directory in directories:
        if not directory.allows(user, 1):
            return [
                Found(
                    f"disk {name}: QEMU runs as {user.name}, who may not enter {directory.path}; "
                    f"{hangs}",
                    f"chmod o+x {directory.path}; or guard the disk with --socket elsewhere",
                )
            ]
    if socket.kind != stat.S_IFSOCK:
        return [Found(f"disk {name}: {path} is no socket", "name the one of semper disk show")]
    if not socket.allows(user, 2):
        return [
            Found(
                f"disk {name}: QEMU runs as {user.name}, who may not open {path} (mode "
                f"{socket.mode:04o}, user {socket.owner}, group {socket.group}); {hangs}",
                f"semper disk unguard, then guard it with --group of {user.name}, as kvm",
            )
        ]
    return []


def _images(
    disks: Iterable[ElementTree.Element], served: Iterable[Served], used: set[Path | None]
) -> list[Found]:
    """Disks that open an image which is guarded."""
    by_image = {disk.image: disk for disk in served}
    found = []
    for disk in disks:
        source = disk.find("source")
        text = (source.get("file") or source.get("dev")) if source is not None else None
        guarded = by_image.get(Path(text)) if text else None
        if guarded is None or disk.find("readonly") is not None:
            continue
        if guarded.socket in used:
            found.append(
                Found(
                    f"disk {_target(disk)} is {text}, which the domain also has from "
                    f"{guarded.socket}: one of them is refused",
                    "leave the former disk out",
                )
            )
        else:
            found.append(
                Found(
                    f"disk {_target(disk)} is {text} itself, which {guarded.name} serves: the "
                    "domain does not start while that is so",
                    f"instead of this <disk>: semper libvirt xml {guarded.name.partition('/')[0]}",
                )
            )
    return found
