"""Domains that are broken in one way each, what is said of them, and the lines that are printed."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest
from sempervirt.vm.libvirt import (
    Found,
    Node,
    Served,
    User,
    adopted,
    check,
    domain_xml,
    parse,
    sockets,
)

SOCKET = Path("/run/sempervirt/disks/web/vda.sock")
DISK = Served("web/vda", Path("/srv/web.raw"), SOCKET, queues=4)
QEMU = User("libvirt-qemu", 64055, frozenset({108}))
SOUND = "<domain><devices/></domain>".replace(  # as it is printed, put into a domain
    "<devices/>",
    "{}<devices>{}</devices>".format(*domain_xml([DISK]).split("<!-- in <devices> -->")),
)


def way(socket_mode: int = 0o660, group: int = 108, directory: int = 0o711) -> list[Node]:
    places = [Node(path, stat.S_IFDIR, 0, 0, directory) for path in reversed(SOCKET.parents)]
    return [*places, Node(SOCKET, stat.S_IFSOCK, 0, group, socket_mode)]


def look(
    text: str = SOUND, disk: Served = DISK, nodes: list[Node] | str | None = None
) -> list[Found]:
    ways = {SOCKET: way() if nodes is None else nodes}
    return check(parse(text), [disk], QEMU, ways)


def test_nothing_is_wrong_with_what_is_printed() -> None:
    assert look() == []
    assert sockets(parse(SOUND)) == [SOCKET]


IMAGE = "<disk type='file'><source file='/srv/web.raw'/><target dev='vdb' bus='virtio'/></disk>"
BROKEN = {
    "private memory": (("mode='shared'", "mode='private'"), "not shared", "mode='shared'"),
    "a cell of its own": (
        ("<devices>", "<cpu><numa><cell id='0' memAccess='private'/></numa></cpu><devices>"),
        "NUMA cell 0",
        "memAccess='shared'",
    ),
    "never connects again": (("enabled='yes'", "enabled='no'"), "connect again", "enabled='yes'"),
    "a timeout of none": (("timeout='1'", "timeout='0'"), "never connects", "timeout='1'"),
    "another format": (("type='raw'", "type='qcow2'"), "no effect", "qemu-img convert"),
    "more queues": (("queues='4'", "queues='8'"), "has 4", "queues='4'"),
    "another bus": (("bus='virtio'", "bus='scsi'"), "virtio-blk", "bus='virtio'"),
    "another socket": (("vda.sock", "vdb.sock"), "nothing of ours", "semper disk guard"),
    "no socket": (("path=", "file="), "names no socket", "path="),
    "its image as well": (("</devices>", f"{IMAGE}</devices>"), "also has", "leave"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_in_the_domain_is_named_with_its_remedy(kind: str) -> None:
    (before, after), what, remedy = BROKEN[kind]
    assert SOUND.count(before) >= 1
    found = [one for one in look(SOUND.replace(before, after)) if not one.hint]
    assert found
    assert what in found[0].what
    assert remedy in found[0].remedy


@pytest.mark.parametrize(
    ("nodes", "what", "remedy"),
    [
        (way(socket_mode=0o600), "may not open", "--group"),
        (way(group=0), "may not open", "--group"),
        (way(directory=0o700), "may not enter /", "chmod o+x"),
        ("No such file or directory", "cannot be looked at", "semper disk show"),
        ([*way()[:-1], Node(SOCKET, stat.S_IFREG, 0, 108, 0o660)], "is no socket", "disk show"),
    ],
)
def test_a_socket_that_qemu_may_not_open_is_named_before_the_start_hangs(
    nodes: list[Node] | str, what: str, remedy: str
) -> None:
    (found,) = look(nodes=nodes)
    assert what in found.what
    assert remedy in found.remedy
    assert "hangs" in found.what or what == "is no socket"


def test_a_disk_that_is_not_served_and_one_that_is_still_a_file() -> None:
    ailing = Served(DISK.name, DISK.image, SOCKET, 4, ailment="web/vda is failing: no space")
    assert "failing" in look(disk=ailing)[0].what
    still = f"<domain><devices>{IMAGE}</devices></domain>"
    (found,) = look(still)
    assert "semper libvirt xml web" in found.remedy
    (found,) = look("<domain><devices/></domain>")
    assert "semper disk guard" in found.remedy


def test_what_only_costs_something_is_a_hint() -> None:
    (found,) = look(SOUND.replace("<source type='memfd'/>", ""))
    assert found.hint
    (found,) = look(SOUND.replace("<target", "<iotune/><target"))
    assert found.hint


def test_what_is_no_domain_is_refused() -> None:
    for text in ("", "<volume/>", "<domain", '<!DOCTYPE d [<!ENTITY a "b">]><domain>&a;</domain>'):
        with pytest.raises(InvalidRequest):
            parse(text)


def test_rights_are_looked_up_as_the_kernel_does(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o706)
        node = Node.of(path)
        owner = User("owner", node.owner, frozenset())
        member = User("member", node.owner + 1, frozenset({node.group}))
        other = User("other", node.owner + 1, frozenset({node.group + 1}))
        assert node.kind == stat.S_IFSOCK
        assert owner.uid == 0 or node.allows(owner, 2)
        assert not node.allows(member, 2)  # the group's bits count for a member, and no others
        assert node.allows(other, 2)


def test_targets_are_the_names_of_disks_where_they_can_be() -> None:
    disks = [Served(f"web/{name}", Path("/i"), Path("/s"), 1) for name in ("root", "vda", "vda2")]
    found = [line for line in domain_xml(disks).splitlines() if "<target" in line]
    assert [line.split("'")[1] for line in found] == ["vdb", "vda", "vdc"]


PLAIN = (
    "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web</name>"
    "<memory>64</memory><devices><disk type='file'><driver name='qemu' type='raw' cache='none'/>"
    "<source file='/srv/web.raw'/><target dev='vdb' bus='virtio'/><boot order='2'/></disk>"
    "<disk type='file'><source file='/srv/other.raw'/><target dev='vdc'/></disk></devices>"
    "<qemu:commandline><qemu:arg value='-S'/></qemu:commandline></domain>"
)


def test_a_domain_that_is_adopted_is_sound_and_keeps_the_rest() -> None:
    assert [one.what for one in look(PLAIN)] != []  # the control
    text, disks = adopted(parse(PLAIN), [DISK])
    assert disks == [DISK]
    assert look(text) == []
    for kept in ("/srv/other.raw", 'dev="vdb"', 'order="2"', '<qemu:arg value="-S" />'):
        assert kept in text
    assert "/srv/web.raw" not in text
    assert text.index("<memory>") < text.index("memoryBacking") < text.index("<devices>")


def test_memory_that_is_shared_already_stays_as_it_is() -> None:
    backing = "<memoryBacking><hugepages/><access mode='private'/></memoryBacking><devices>"
    text, _ = adopted(parse(PLAIN.replace("<devices>", backing)), [DISK])
    assert text.count("<memoryBacking>") == 1
    assert "memfd" not in text
    assert 'mode="shared"' in text


def test_what_is_not_guarded_is_not_touched() -> None:
    text, disks = adopted(parse(PLAIN.replace("web.raw", "third.raw")), [DISK])
    assert disks == []
    assert "memoryBacking" not in text
    assert "vhostuser" not in text


@pytest.mark.parametrize(
    ("before", "after", "remedy"),
    [
        ("type='raw'", "type='qcow2'", "convert"),
        ("bus='virtio'", "bus='sata'", "driver first"),
        ("<boot order='2'/>", "<encryption format='luks'/>", "leave the disk"),
        ("web.raw'/>", "web.raw'><slices/></source>", "leave the disk"),
        ("<boot order='2'/>", "<transient/>", "leave the disk"),
        ("<boot order='2'/>", "<blockio logical_block_size='4096'/>", "leave the disk"),
        ("<boot order='2'/>", "<serial>a</serial>", "leave the disk"),
        ("<boot order='2'/>", "<iotune/>", "leave the disk"),
    ],
)
def test_a_disk_that_cannot_become_one_is_refused(before: str, after: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        adopted(parse(PLAIN.replace(before, after)), [DISK])
    assert remedy in refused.value.remedy
