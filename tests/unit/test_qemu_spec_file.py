"""VM files: what they mean, and errors that name file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, SpecError
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.spec_file import load_spec, parse_spec
from sempervirt.qemu.toml_lines import find_line

FILE = Path("/vms/web.toml")

GOOD = """\
# A web server
name = "web"
memory = "2G"
vcpus = 2
kernel = "vmlinuz"
cmdline = "console=ttyS0"

[[disks]]
name = "root"
image = "root.raw"
queues = 2

[[disks]]
name = "data"
image = "/data/web.raw"
read_only = true

[[nics]]
type = "tap"
tap = "tap0"

[[channels]]
name = "org.sempervirt.probe"
"""


def test_a_good_file() -> None:
    spec = parse_spec(GOOD, FILE)
    assert (spec.name, spec.memory, spec.vcpus) == ("web", 2 << 30, 2)
    assert spec.kernel == Path("/vms/vmlinuz")
    assert [disk.image for disk in spec.disks] == [Path("/vms/root.raw"), Path("/data/web.raw")]
    assert spec.disk("data").read_only
    assert spec.channels[0].socket_name == "probe"
    assert (spec.on_reboot, spec.accel, spec.machine) == ("reset", "auto", "q35")
    with pytest.raises(KeyError):
        spec.disk("absent")


def test_a_spec_survives_json() -> None:
    spec = parse_spec(GOOD, FILE)
    assert VmSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("keys", "vcpus", "count"),
    [
        ("", 1, 1),
        ("", 6, 6),
        ("", 64, 16),
        ('queues = "auto"', 3, 3),
        ("queues = 40", 2, 40),
        ("thread_map = [0, 1, 0]", 2, 3),
    ],
)
def test_the_number_of_queues(keys: str, vcpus: int, count: int) -> None:
    text = GOOD.replace("queues = 2", keys).replace("vcpus = 2", f"vcpus = {vcpus}")
    spec = parse_spec(text, FILE)
    assert spec.disk("root").queue_count(spec.vcpus) == count
    assert VmSpec.model_validate_json(spec.model_dump_json()) == spec


def test_the_default_mac_is_stable_and_local() -> None:
    text = GOOD.replace('type = "tap"\ntap = "tap0"', "") + "[[nics]]\n"
    spec = parse_spec(text, FILE)
    assert spec.mac(0) == parse_spec(text, FILE).mac(0)
    assert spec.mac(0) != spec.mac(1)
    assert spec.mac(0).startswith("52:54:00:")


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ('memory = "2G"', 'memroy = "2G"', 3, 'memroy: there is no such key; did you mean "mem'),
        ('memory = "2G"', 'memory = "2X"', 3, 'memory: "X" is not a unit of size'),
        ('memory = "2G"', "memory = 1000", 1, "a whole number of MiB"),
        ("vcpus = 2", "vcpus = 0", 4, "vcpus: input should be greater than or equal to 1"),
        ("vcpus = 2", 'machine = "q36"', 4, "machine: input should be 'q35' or 'pc'"),
        ('name = "web"', "", 0, "name: is missing"),
        ('name = "web"', 'name = "we b"', 2, 'name: "we b" is not a name'),
        ('image = "root.raw"', "", 8, "disks[0].image: is missing"),
        ("queues = 2", "quues = 2", 11, 'disks[0].quues: there is no such key; did you mean "que'),
        ("read_only = true", 'engine = "fast"', 16, "disks[1].engine: input should be 'auto'"),
        ("read_only = true", "queue_size = 100", 16, "disks[1].queue_size: input should be 32"),
        ("queues = 2", "queues = 65", 11, 'queues: write "auto" or a number from 1 to 64'),
        ("queues = 2", "queues = true", 11, 'queues: write "auto" or a number from 1 to 64'),
        ("queues = 2", "queues_per_thread = 0", 11, 'queues_per_thread: write "auto" or a numb'),
        ("queues = 2", "thread_map = [0, 2]", 11, "disks[0].thread_map: threads are numbered f"),
        ("queues = 2", "thread_map = []", 11, "thread_map: a map names a thread for each queue"),
        ("queues = 2", "queues = 2\nthread_map = [0]", 12, "the map is for 1 queue, and the dev"),
        ("queues = 2", "queues_per_thread = 1\nthread_map = [0]", 12, "thread_map or queues_per"),
        ("queues = 2", 'bus = "virtio-scsi"', 11, 'disks[0].bus: "virtio-scsi" needs backend'),
        ("queues = 2", 'backend = "qemu"\nengine = "mmap"', 12, 'engine: QEMU has no engine "mmap'),
        ("queues = 2", "poll_us = -1", 11, "disks[0].poll_us: input should be greater than or eq"),
        ('type = "tap"\ntap = "tap0"', "queues = 2", 18, "queues and vhost belong to type"),
        ('name = "data"', 'name = "root"', 1, 'two disks are called "root"'),
        ("/data/web.raw", "root.raw", 1, ""),
        ('tap = "tap0"', "", 18, 'tap = "…" belongs to type = "tap"'),
        ("org.sempervirt.probe", "org.sempervirt.qmp", 22, "is taken by the VM itself"),
        ("vcpus = 2", "vcpus = ", 4, "not TOML"),
        ("[[nics]]", "[[nics", 18, "not TOML"),
        ('kernel = "vmlinuz"', "", 1, "initrd and cmdline need a kernel"),
        ('kernel = "vmlinuz"', 'kernel = "vm\\u0000linuz"', 1, "holds a NUL"),
    ],
)
def test_errors_name_file_line_and_key(before: str, after: str, line: int, message: str) -> None:
    assert before in GOOD
    text = GOOD.replace(before, after)
    if not message:  # a second, read-only user of an image is allowed
        parse_spec(text, FILE)
        return
    with pytest.raises(SpecError) as caught:
        parse_spec(text, FILE)
    place = f"{FILE}:{line}: " if line > 1 else f"{FILE}: "
    assert str(caught.value).startswith(place), str(caught.value)
    assert message in str(caught.value)


def test_all_errors_are_told_at_once() -> None:
    text = GOOD.replace("vcpus = 2", "vcpsu = 2").replace("queues = 2", "queues = 0")
    with pytest.raises(SpecError, match=r"web\.toml:11.*line 4: vcpsu|web\.toml:4.*line 11"):
        parse_spec(text, FILE)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_spec(tmp_path / "absent.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_spec(binary)


LINES = '''\
a = """
b = 1
[c]
"""
list = [
  { d = 1 },
  "]",  # ]
]
"quoted key" = 2
x.y = 3

[t]
u = 1
[t.v]
w = 2
[[l]]
m = 1
[[l]]
  n = 2
[[l.o]]
p = 1
[l.q]
r = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("list", 0, "d"), 5),
        (("b",), 0),
        (("c",), 0),
        (("quoted key",), 9),
        (("x", "y"), 10),
        (("t", "u"), 13),
        (("t", "v", "w"), 15),
        (("l", 0, "m"), 17),
        (("l", 1), 18),
        (("l", 1, "n"), 19),
        (("l", 1, "missing"), 18),
        (("l", 1, "o", 0, "p"), 21),
        (("l", 1, "q", "r"), 23),
        (("l", 0, "n"), 16),
        ((), 0),
    ],
)
def test_lines_of_keys(path: tuple[str | int, ...], line: int) -> None:
    assert find_line(LINES, path) == line
