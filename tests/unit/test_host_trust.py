"""Whom the agent believes: directories that others cannot change, and the process that is meant."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sempervirt.agent.lock import LOCK_FILE, agent_lock
from sempervirt.core.errors import CommandFailed, OutcomeUnknown, StateConflict, Unavailable
from sempervirt.disk.program import Programs
from sempervirt.host import process
from sempervirt.host.control import ControlSocket
from sempervirt.host.directories import make_private
from sempervirt.host.peers import peer_pid, write_peers
from sempervirt.host.procfs import ProcessId
from sempervirt.qemu.qmp import Monitor

DEADLINE_S = 90.0
LISTEN = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1]); listener.listen(); print(flush=True)
for answer in sys.argv[2:]:
    connection, _ = listener.accept()
    connection.sendall(answer.encode() + b"\\n"); connection.recv(1000)
sys.stdin.read()
"""


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        yield Path(directory)


def test_a_directory_is_made_for_its_owner_only(short: Path) -> None:
    made = short / "a" / "b"
    make_private(made, "VARIABLE", linked=False)
    assert made.stat().st_mode & 0o777 == 0o700
    make_private(made, "VARIABLE", linked=False)


def test_a_directory_that_others_can_change_is_refused(short: Path) -> None:
    place = short / "run"
    place.mkdir()
    place.chmod(0o770)
    with pytest.raises(Unavailable, match=r"can be changed by others \(mode 0770\).*chmod go-w"):
        make_private(place, "VARIABLE", linked=False)
    place.chmod(0o755)
    make_private(place, "VARIABLE", linked=False)  # readable harms nobody
    short.chmod(0o777)
    with pytest.raises(Unavailable, match=r"can be replaced by anybody.*chmod \+t"):
        make_private(place, "VARIABLE", linked=False)
    short.chmod(0o1777)
    make_private(place, "VARIABLE", linked=False)


def test_a_link_leads_to_records_and_never_to_sockets(short: Path) -> None:
    (short / "real").mkdir(mode=0o700)
    link = short / "link"
    link.symlink_to(short / "real")
    make_private(link, "VARIABLE", linked=True)
    with pytest.raises(Unavailable, match=r"is a symbolic link, to .*/real; .*VARIABLE"):
        make_private(link, "VARIABLE", linked=False)
    (short / "file").touch()
    with pytest.raises(Unavailable, match=r"cannot make .*/file"):
        make_private(short / "file", "VARIABLE", linked=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(short: Path) -> None:
    theirs = short / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(Unavailable, match=r"belongs to user 65534, and not to user 0"):
        make_private(theirs, "VARIABLE", linked=False)
    short.chmod(0o1777)
    (theirs / "mine").mkdir(mode=0o700)
    with pytest.raises(Unavailable, match=r"theirs belongs to user 65534, who could replace"):
        make_private(theirs / "mine", "VARIABLE", linked=False)


def test_two_agents_with_one_run_directory(short: Path) -> None:
    state, other, run = short / "s", short / "o", short / "r"
    for directory in (state, other, run):
        directory.mkdir()
    with agent_lock(state, run):
        with (
            pytest.raises(StateConflict, match=rf"\(pid {os.getpid()}\) works on .*/r"),
            agent_lock(other, run),
        ):
            pass
        with agent_lock(other):  # which was let go of
            pass
    with agent_lock(run, run):
        pass


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_stands_in_the_place_of_the_lock_file_does_not_matter(
    short: Path, make: object
) -> None:
    assert callable(make)
    make(short / LOCK_FILE)
    with agent_lock(short), pytest.raises(StateConflict), agent_lock(short):
        pass


def test_peers_are_replaced_whole(short: Path) -> None:
    path = short / "qemu.peers"
    write_peers(path, [ProcessId(7, 8, "boot"), ProcessId(9, 10, "boot")])
    assert path.read_text() == "7 8\n9 10\n"
    write_peers(path, [])
    assert path.read_text() == ""
    assert [entry.name for entry in short.iterdir()] == ["qemu.peers"]


def test_who_is_at_the_other_end() -> None:
    mine, _theirs = socket.socketpair()
    assert peer_pid(mine) == os.getpid()


async def test_control_socket_and_monitor_of_another_process(short: Path) -> None:
    path = short / "s"
    hello = '{"QMP": {"version": {"qemu": {"major": 9}}, "capabilities": []}}'
    argv = [sys.executable, "-c", LISTEN, str(path), '{"id": 1, "ok": {}}', "", hello]
    other = subprocess.Popen(  # noqa: ASYNC220
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert await ControlSocket(path, "semper-blkd", other.pid).ask("status") == {}
        said = rf"at .*/s listens pid {other.pid} \(python.*\), and not pid {os.getpid()}"
        with pytest.raises(OutcomeUnknown, match=said):
            await ControlSocket(path, "semper-blkd", os.getpid()).ask("status")
        with pytest.raises(OutcomeUnknown, match=said):
            await Monitor.connect(path, "web", DEADLINE_S, os.getpid())
    finally:
        other.kill()
        other.communicate()


async def test_a_message_names_what_failed(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(argv: list[str], log: Path) -> None:
        process.spawn(argv, log=log, on_exit=lambda _end: None)

    log = short / "log"
    with pytest.raises(CommandFailed, match=r"cannot start /no-such-program.*is installed"):
        spawn(["/no-such-program"], log)
    (short / "text").write_text("#")
    with pytest.raises(CommandFailed, match=r"cannot start .*/text: Perm.*make the file exec"):
        spawn([str(short / "text")], log)
    with pytest.raises(CommandFailed, match=r"its log .*/gone/log cannot be opened.*was removed"):
        spawn(["true"], short / "gone" / "log")
    with pytest.raises(Unavailable, match=r"cannot open the program /no-such.*is installed"):
        Programs().hold("/no-such-program")

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(subprocess, "Popen", none_left)
    with pytest.raises(CommandFailed, match=r"Too many open files.*LimitNOFILE="):
        spawn(["true"], log)
