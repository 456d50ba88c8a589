"""The unit of semperd: what it leaves, and why."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "packaging/semperd.service"
# Of 100, as `systemd-analyze security` has it; 96 without any of it.
EXPOSURE = 50


def test_each_capability_that_is_kept_has_its_reason() -> None:
    text = UNIT.read_text()
    kept = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    reasons = re.findall(r"^#   (CAP_\w+) +\w", text, re.MULTILINE)
    assert [name for line in kept for name in line.split()] == reasons != []


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
