"""The unit of semperd: what it leaves, and why."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sempervirt.cli.program import app

PACKAGING = Path(__file__).parents[2] / "packaging"
UNIT = PACKAGING / "semperd.service"
GUESTS = PACKAGING / "sempervirt-guests.service"
# Of 100, as `systemd-analyze security` has it; 96 without any of it.
EXPOSURE = 50


def test_each_capability_that_is_kept_has_its_reason() -> None:
    text = UNIT.read_text()
    kept = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    reasons = re.findall(r"^#   (CAP_\w+) +\w", text, re.MULTILINE)
    assert [name for line in kept for name in line.split()] == reasons != []


def test_the_guards_drop_in_says_why_it_adds_capabilities_and_leaves_reboot_refused() -> None:
    text = (UNIT.parent / "semperd-guard.conf").read_text()
    (added,) = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    reasons = re.findall(r"^#   (CAP_\w+) +\w", text, re.MULTILINE)
    assert added.split() == reasons
    assert "SystemCallFilter" not in [line.partition("=")[0] for line in text.splitlines()]
    (refused,) = re.findall(r"^SystemCallFilter=(~.*)$", UNIT.read_text(), re.MULTILINE)
    assert {"@reboot", "@module"} <= {word.lstrip("~") for word in refused.split()}


def is_within(unit: Path) -> bool:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}"]
    ended = subprocess.run([*command, str(unit)], capture_output=True, text=True, check=False)
    assert "Overall exposure" in ended.stdout, ended.stderr
    return ended.returncode == 0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (systemd)")
def test_systemd_sees_little_that_is_left_open(tmp_path: Path) -> None:
    assert is_within(UNIT)
    # The control: without what holds it back.
    bare = tmp_path / UNIT.name
    bare.write_text(UNIT.read_text().partition("# What follows holds")[0])
    assert not is_within(bare)


def understood(command: str) -> bool:
    """Whether `semper` knows all the options of a command, which is not carried out."""
    words = shlex.split(command)
    ended = CliRunner().invoke(app, [*words[1:], "--help"])
    return ended.exit_code == 0


def test_the_commands_of_the_guests_unit_are_ones_that_semper_knows() -> None:
    text = GUESTS.read_text()
    commands = re.findall(r"^Exec(?:Start|Stop)=-(.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    assert all(understood(command) for command in commands)
    # The control.
    assert not understood(commands[1].replace("--grace", "--graze"))


def test_the_vms_are_out_before_the_agent_ends_and_do_not_end_with_it() -> None:
    """Units are stopped in the reverse order of `After`; a restart of semperd stops no other."""
    text = GUESTS.read_text()
    after = re.findall(r"^After=(.*)$", text, re.MULTILINE)
    # A store on this host is needed for what moves as well.
    assert {"semperd.service", "etcd.service"} <= {*after[0].split()}
    assert not re.search(r"^(Requires|BindsTo|PartOf)=", text, re.MULTILINE)


def test_the_agent_waits_for_images_and_network_and_is_watched() -> None:
    text = UNIT.read_text()
    (after,) = re.findall(r"^After=(.*)$", text, re.MULTILINE)
    assert {"remote-fs.target", "network-online.target"} <= {*after.split()}
    for line in (
        "TasksMax=infinity",
        "LimitNOFILE=",
        "OOMScoreAdjust=-",
        "WatchdogSec=",
        "StartLimitIntervalSec=0",
    ):
        assert re.search(rf"^{line}", text, re.MULTILINE), line


@pytest.mark.parametrize("name", ["semper-disk@.service", "semper-disk-spare@.service"])
def test_a_disk_without_an_agent_is_there_until_other_peoples_vms_have_ended(name: str) -> None:
    (before,) = re.findall(r"^Before=(.*)$", (PACKAGING / name).read_text(), re.MULTILINE)
    assert {"libvirtd.service", "libvirt-guests.service", "pve-guests.service"} <= {*before.split()}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (systemd)")
def test_systemd_understands_the_units_as_shipped(tmp_path: Path) -> None:
    assert len(units()) > 5
    for unit in units():
        assert verified(unit, tmp_path) == ""
    assert "Unknown" in verified(GUESTS, tmp_path, "TimeoutStopSec", "TimeoutStopsSec")


def verified(unit: Path, place: Path, word: str = "", other: str = "") -> str:
    """What systemd complains about, of copies of all units with programs that are there."""
    programs = r"/usr/local/bin/semper(d|-blkd)?\b|/sbin/modprobe"
    for one in units():
        text = re.sub(programs, "/bin/true", one.read_text())
        changed = text.replace(word, other) if word and one == unit else text
        (place / one.name).write_text(changed)
        (place / one.name.replace("@.", "@x.")).write_text(changed)
    name = unit.name.replace("@.", "@x.")
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(place / name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{place}:"},
    )
    return "\n".join(line for line in ended.stderr.splitlines() if name in line)


def units() -> list[Path]:
    return sorted(path for path in PACKAGING.iterdir() if path.suffix in (".service", ".socket"))
