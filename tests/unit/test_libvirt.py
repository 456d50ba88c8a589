"""Domains that are broken in one way each, what is said of them, and the lines that are printed."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest
from sempervirt.vm.libvirt import Found, Node, Served, User, check, domain_xml, parse, sockets

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
