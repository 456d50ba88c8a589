"""A program that is started with fewer privileges than whoever starts it."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Collection
from pathlib import Path

import pytest

from sempervirt.core.errors import CommandFailed
from sempervirt.host import process
from sempervirt.host.confinement import Confinement, confinement_of
from sempervirt.host.privileges import with_capabilities


def started_with(kept: Collection[str] | None) -> Confinement:
    def start() -> subprocess.Popen[bytes]:
        # The kernel sets what a program has when whoever started it goes on already.
        return subprocess.Popen(["sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)

    with start() if kept is None else with_capabilities(kept, start) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            found = confinement_of(child.pid)
        finally:
            child.kill()
    assert found is not None
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose")
def test_it_has_what_is_named_and_nothing_else() -> None:
    held = started_with(("dac_override", "net_admin"))
    assert held.capabilities == held.obtainable == ("dac_override", "net_admin")
    assert not held.new_privileges
    assert started_with(()).capabilities == ()


def test_whoever_starts_it_keeps_everything() -> None:
    before = confinement_of(os.getpid())
    with_capabilities((), threading.get_ident)
    assert confinement_of(os.getpid()) == before
    # The control: without the thread a program has what this one has.
    held = started_with(None)
    assert before is not None
    assert (held.capabilities, held.new_privileges) == (before.capabilities, before.new_privileges)


def test_one_that_gives_way_does_so_alone() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    before = nice()
    assert with_capabilities((), nice, nice=19) == 19
    assert with_capabilities((), nice) == before, "the control"
    said = subprocess.PIPE
    with with_capabilities((), lambda: subprocess.Popen("nice", stdout=said), nice=19) as child:
        assert child.communicate()[0] == b"19\n"
    assert nice() == before


async def test_a_program_that_is_not_there_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="absent"):
        process.spawn(
            [str(tmp_path / "absent")],
            log=tmp_path / "log",
            on_exit=lambda _end: None,
            capabilities=(),
        )
