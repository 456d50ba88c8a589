"""Records, sockets, conditions."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host.changes import Changes
from sempervirt.host.records import RecordDamaged, read_record, remove_record, write_record
from sempervirt.host.sockets import (
    PATH_MAX_BYTES,
    borrow_listener,
    check_socket_path,
    listen_tcp,
    listen_unix,
)


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as directory:
        yield Path(directory)


def test_records_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert read_record(path, 1) is None
    write_record(path, 1, {"a": [1, 2]})
    write_record(path, 1, {"a": [3]})
    assert read_record(path, 1) == {"version": 1, "a": [3]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
    remove_record(path)
    remove_record(path)
    assert read_record(path, 1) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 0}', '{"version": 2}', "\0"])
def test_a_record_that_is_not_ours_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordDamaged, match=r"record\.json"):
        read_record(path, 1)
    assert path.read_text() == text


def test_a_listening_socket_replaces_an_old_one(short: Path) -> None:
    path = short / "s"
    listen_unix(path).close()
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_written_to_a_connection_is_sent_at_once() -> None:
    """Answers to other hosts came 44 ms late, each."""
    with (
        listen_tcp("127.0.0.1:0") as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # the control


def test_socket_paths_have_a_limit(short: Path) -> None:
    longest = short / ("x" * (PATH_MAX_BYTES - len(str(short)) - 1))
    assert check_socket_path(longest) == longest
    listen_unix(longest).close()
    with pytest.raises(InvalidRequest, match="SEMPERVIRT_RUN_DIR"):
        listen_unix(longest.with_name(longest.name + "x"))
    with pytest.raises(Unavailable, match="cannot listen"):
        listen_unix(short / "absent" / "s")


def test_a_listener_can_be_taken_back_by_its_number(short: Path) -> None:
    path = short / "s"
    with listen_unix(path) as held:
        borrowed = borrow_listener(os.getpid(), held.fileno(), path)
        assert borrowed is not None
        with borrowed, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert borrowed.accept()[0].fileno() >= 0


def test_what_is_no_listener_at_that_path_is_not_taken(short: Path) -> None:
    path = short / "s"
    with listen_unix(path) as held, listen_unix(short / "other") as other:
        mine = os.getpid()
        assert borrow_listener(mine, other.fileno(), path) is None
        assert borrow_listener(mine, 9999, path) is None
        assert borrow_listener(1 << 22, held.fileno(), path) is None  # no such process
        with socket.socket(socket.AF_UNIX) as client, (short / "file").open("w") as file:
            assert borrow_listener(mine, client.fileno(), path) is None
            assert borrow_listener(mine, file.fileno(), path) is None
        path.unlink()  # nobody could connect to it
        assert borrow_listener(mine, held.fileno(), path) is None


async def test_waiting_for_a_condition() -> None:
    changes, seen = Changes(), [0]

    async def count() -> None:
        for _ in range(5):
            seen[0] += 1
            changes.notify()
            await asyncio.sleep(0)  # poll interval

    counting = asyncio.create_task(count())
    await changes.wait_until(lambda: seen[0] >= 3, timeout_s=90, what="three")
    await changes.wait_until(lambda: True, timeout_s=0, what="nothing")
    await counting
    with pytest.raises(Unavailable, match=r"waited 0\.01 s for ten"):
        await changes.wait_until(lambda: seen[0] >= 10, timeout_s=0.01, what="ten")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a socket away")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
def test_a_socket_is_given_away_with_the_capabilities_of_the_unit(short: Path) -> None:
    path = short / "s"
    unit = (Path(__file__).parents[2] / "packaging" / "semperd.service").read_text()
    (line,) = [one for one in unit.splitlines() if one.startswith("CapabilityBoundingSet=")]
    kept = ",".join("+" + name.removeprefix("CAP_").lower() for name in line.split("=")[1].split())
    give = (
        "import sys; from pathlib import Path; from sempervirt.host.sockets import *; "
        "held = listen_unix(Path(sys.argv[1])); "
        "Access('65534', '1', 0o606).give(Path(sys.argv[1]))"
    )
    argv = ["setpriv", f"--bounding-set=-all,{kept}", "--no-new-privs"]
    ended = subprocess.run(
        [*argv, sys.executable, "-c", give, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 1, 0o606)
