"""What holds a process back, read of real ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from sempervirt.host.confinement import Confinement, Seccomp, confinement_of

# Sleeps behind a filter that allows everything.
FILTERED = """
import ctypes, struct, time
libc = ctypes.CDLL(None)
allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(allow)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
print(flush=True)
time.sleep(60)
"""


@contextmanager
def started(argv: Sequence[str]) -> Iterator[int]:
    """The pid of a process that has said a line."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child.pid
        finally:
            child.kill()


def held(argv: Sequence[str]) -> Confinement:
    with started(argv) as pid:
        found = confinement_of(pid)
    assert found is not None
    return found


def test_a_program_that_nothing_holds_back() -> None:
    found = held(["sh", "-c", "echo; sleep 60"])
    assert found.system_calls is Seccomp.ANY
    assert found.new_privileges
    assert not found.own_network
    assert "every system call is open to it" in found.findings
    if os.geteuid() == 0:
        assert found.user == "root"
        assert {"sys_admin", "dac_override"} <= set(found.capabilities)
        assert "it is root" in found.findings


def test_a_filter_for_system_calls() -> None:
    found = held(["python3", "-c", FILTERED])
    assert found.system_calls is Seccomp.FILTERED
    assert not found.new_privileges


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give rights up that it has")
def test_a_program_that_has_nothing() -> None:
    confined = "setpriv --reuid 65534 --clear-groups --bounding-set -all --no-new-privs"
    found = held(["unshare", "--net", *confined.split(), "/usr/bin/python3", "-c", FILTERED])
    assert found.findings == ["it may take all processors and memory (it is in no group of a VM)"]
    assert (found.user, found.obtainable) == ("nobody", ())


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert confinement_of(child.pid) is None
