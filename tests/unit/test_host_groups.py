"""Where control groups are made, and what is written there: in directories that look like the
kernel's. What the kernel does with it: `integration/test_vm_groups.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sempervirt.host import groups
from sempervirt.host.groups import Controller, Groups, Limits, find_base, is_of_a_vm, tag_of

LIMITS = Limits(weight=300, memory_bytes=(5 << 30) + 1, tasks=4096)
MOUNT = "31 23 0:28 / {point} rw,relatime - {kind} {kind} rw{options}\n"


@pytest.fixture(autouse=True)
def given_away(monkeypatch: pytest.MonkeyPatch) -> set[Path]:
    """The groups that systemd has given away."""
    given: set[Path] = set()
    monkeypatch.setattr(groups, "_is_delegated", given.__contains__)
    return given


def system(tmp_path: Path, mounts: dict[str, tuple[str, str]], own: str) -> Path:
    """A /proc of a process in the groups `own`; `mounts` are type and options, by directory."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    lines = [
        MOUNT.format(point=tmp_path / name, kind=kind, options=f",{options}" if options else "")
        for name, (kind, options) in mounts.items()
    ]
    (proc / "self/mountinfo").write_text("".join(lines))
    (proc / "self/cgroup").write_text(own)
    return proc


def first_version(tmp_path: Path) -> Path:
    mounts = {name: ("cgroup", name) for name in ("cpu", "memory", "pids")}
    for name, files in {
        "cpu/own": ("cpu.shares",),
        "memory/own": ("memory.limit_in_bytes",),
        "pids/own": ("pids.max",),
    }.items():
        group = tmp_path / name
        group.mkdir(parents=True)
        for file in ("cgroup.procs", *files):
            (group / file).write_text("")
    return system(tmp_path, mounts, "2:cpu:/own\n3:memory:/own\n4:pids:/own\n0::/\n")


def second_version(tmp_path: Path) -> Path:
    unit = tmp_path / "unified/semperd.service"
    for group in (unit, unit / "agent"):
        group.mkdir(parents=True)
        (group / "cgroup.controllers").write_text("cpu memory pids io\n")
        for name in ("cgroup.procs", "cgroup.subtree_control", "cpu.weight"):
            (group / name).write_text("")
    return system(tmp_path, {"unified": ("cgroup2", "")}, "0::/semperd.service/agent\n")


def make_files(group: Path, *names: str) -> None:
    """As the kernel does it in a group that is made."""
    group.mkdir(exist_ok=True)
    for name in ("cgroup.procs", *names):
        (group / name).write_text("")


def test_version_1_has_a_group_for_each_controller(tmp_path: Path) -> None:
    base = find_base(first_version(tmp_path))
    assert base.places == {one: tmp_path / one.value / "own" for one in Controller}
    assert not base.missing
    assert not base.unified
    held = Groups(base, "0123456789")
    names = {
        "cpu": "cpu.shares",
        "memory": "memory.limit_in_bytes",
        "pids": "pids.max",
    }
    for controller, file in names.items():
        for whose in ("agent", "vm-web", "io-web"):
            make_files(tmp_path / controller / f"own/semper-0123456789-{whose}", file)
    held.enter(10_000)
    held.hold("web", [10], [11], LIMITS)
    agent, vm = (tmp_path / "cpu/own" / f"semper-0123456789-{one}" for one in ("agent", "vm-web"))
    assert (agent / "cgroup.procs").read_text() == str(os.getpid())
    assert (agent / "cpu.shares").read_text() == str(100 * 1024)
    assert (vm / "cpu.shares").read_text() == str(3 * 1024)
    assert (vm / "cgroup.procs").read_text() == "10"
    served = tmp_path / "cpu/own/semper-0123456789-io-web"
    assert (served / "cgroup.procs").read_text() == "11"
    assert (served / "cpu.shares").read_text() == str(3 * 1024)
    unlimited = tmp_path / "memory/own/semper-0123456789-io-web"
    assert (unlimited / "cgroup.procs").read_text() == ""
    limit = tmp_path / "memory/own/semper-0123456789-vm-web/memory.limit_in_bytes"
    assert limit.read_text() == str(5 << 30)
    assert (tmp_path / "pids/own/semper-0123456789-vm-web/pids.max").read_text() == "4096"
    assert held.missing == ""


def test_what_has_real_time_priority_stays_where_it_may(tmp_path: Path) -> None:
    base = find_base(first_version(tmp_path))
    (tmp_path / "cpu/own/cpu.rt_runtime_us").write_text("950000")
    for whose in ("agent", "vm-web", "io-web"):
        group = tmp_path / f"cpu/own/semper-0123456789-{whose}"
        make_files(group, "cpu.shares")
        (group / "cpu.rt_runtime_us").write_text("0")
        for controller, file in (("memory", "memory.limit_in_bytes"), ("pids", "pids.max")):
            make_files(tmp_path / controller / f"own/semper-0123456789-{whose}", file)
    held = Groups(base, "0123456789")
    held.enter(10_000)
    own = tmp_path / "cpu/own/semper-0123456789-agent"
    assert (own / "cpu.rt_runtime_us").read_text() == "95000"
    held.hold("web", [10], [11], LIMITS)
    assert (tmp_path / "cpu/own/semper-0123456789-vm-web/cgroup.procs").read_text() == "10"
    assert (tmp_path / "cpu/own/semper-0123456789-io-web/cgroup.procs").read_text() == ""
    assert (tmp_path / "pids/own/semper-0123456789-io-web/cgroup.procs").read_text() == "11"


def test_version_2_uses_what_a_unit_gives_away(tmp_path: Path, given_away: set[Path]) -> None:
    proc = second_version(tmp_path)
    unit = tmp_path / "unified/semperd.service"
    given_away.add(unit)
    base = find_base(proc)
    assert set(base.places.values()) == {unit}
    assert base.unified == set(Controller)
    vm, served = (unit / f"semper-0123456789-{kind}-web" for kind in ("vm", "io"))
    for group in (vm, served):
        make_files(group, "cpu.weight", "memory.max", "pids.max")
    held = Groups(base, "0123456789")
    held.enter(10_000)
    assert (unit / "agent/cpu.weight").read_text() == "10000"
    told = set((unit / "cgroup.subtree_control").read_text().split())
    assert told == {"+cpu", "+memory", "+pids"}
    held.hold("web", [10], [11], LIMITS)
    assert (vm / "cgroup.procs").read_text() == "10"
    assert (served / "cgroup.procs").read_text() == "11"
    assert (served / "memory.max").read_text() == ""
    assert (vm / "cpu.weight").read_text() == "300"
    assert (vm / "memory.max").read_text() == str(5 << 30)
    held.remove_all_but(["web"])
    held.leave()
    assert (unit / "agent").is_dir()


def test_a_unit_that_gives_nothing_away_is_left_alone(tmp_path: Path) -> None:
    base = find_base(second_version(tmp_path))
    assert not base.places
    assert all("Delegate=" in why for why in base.missing.values())


def test_a_group_of_systemd_is_left_alone_in_version_1(tmp_path: Path) -> None:
    proc = first_version(tmp_path)
    unit = tmp_path / "cpu/semperd.service"
    unit.mkdir()
    text = (proc / "self/cgroup").read_text()
    (proc / "self/cgroup").write_text(text.replace("cpu:/own", "cpu:/semperd.service"))
    base = find_base(proc)
    assert set(base.places) == {Controller.MEMORY, Controller.TASKS}
    assert "Delegate=" in base.missing[Controller.CPU]


def test_a_host_without_control_groups_is_told(tmp_path: Path) -> None:
    base = find_base(system(tmp_path, {}, "0::/\n"))
    assert not base.places
    assert set(base.missing) == set(Controller)


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        (f"2:cpu:/own/semper-{tag_of(Path('/run/x'))}-vm-web", True),
        ("0::/system.slice/semperd.service/semper-0123456789-vm-web", True),
        ("0::/system.slice/semperd.service/semper-0123456789-io-web", True),
        ("0::/semper-0123456789-agent", False),
        ("0::/semper-0123456789-vm-web/other", False),
        ("0::/", False),
    ],
)
def test_the_group_of_a_vm_is_known_by_its_name(line: str, is_one: bool) -> None:
    assert is_of_a_vm(line) is is_one
