"""Where a VM can have a user of its own (`vm.user`)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sempervirt.vm import user


def test_the_setpriv_of_util_linux_makes_another_user() -> None:
    assert user._why_none_becomes(shutil.which("setpriv")) == ""


def test_without_one_the_reason_is_told() -> None:
    assert "not installed" in user._why_none_becomes(None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/bin/sh\necho BusyBox v1.35.0 >&2; exit 1\n", "is not the one of util-linux"),
        ("no program", "does not answer"),
    ],
)
def test_another_program_of_that_name_makes_nobody_another_user(
    text: str, why: str, tmp_path: Path
) -> None:
    other = tmp_path / "setpriv"
    other.write_text(text)
    other.chmod(0o755)
    assert why in user._why_none_becomes(str(other))
