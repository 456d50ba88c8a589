"""Programs that stay startable when their file is replaced or removed."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from sempervirt.core.errors import Unavailable
from sempervirt.disk.program import Programs, is_installed, path_of


def program(path: Path, says: str) -> str:
    path.write_text(f"#!/bin/sh\necho {says}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def run(programs: Programs, token: str) -> str:
    executable, descriptors = programs.executable(token)
    done = subprocess.run(
        ["name"], executable=executable, pass_fds=descriptors, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


def test_a_replaced_or_removed_program_is_still_started(tmp_path: Path) -> None:
    path = tmp_path / "p"
    programs = Programs()
    old = programs.hold(program(path, "old"))
    assert path_of(old) == str(path)
    assert programs.executable(old) == (str(path), ())
    program(tmp_path / "q", "new")
    (tmp_path / "q").replace(path)
    assert not is_installed(old, str(path))
    assert run(programs, old) == "old"
    new = programs.hold(str(path))
    assert new != old
    assert run(programs, new) == "new"
    path.unlink()
    assert (run(programs, old), run(programs, new)) == ("old", "new")
    programs.keep_only([new])
    assert programs.executable(old) == (str(path), ())
    assert run(programs, new) == "new"
    programs.keep_only(())


def test_a_program_is_held_once(tmp_path: Path) -> None:
    path = program(tmp_path / "p", "x")
    programs = Programs()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert programs.hold(path) == programs.hold(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208
    programs.keep_only(())


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    programs = Programs()
    with pytest.raises(Unavailable, match="cannot open the program"):
        programs.hold(str(tmp_path / "absent"))
    token = programs.hold_if_there(str(tmp_path / "absent"))
    assert programs.executable(token) == (str(tmp_path / "absent"), ())
    assert path_of("/a/b") == "/a/b"
    assert not is_installed(token, str(tmp_path / "absent"))
