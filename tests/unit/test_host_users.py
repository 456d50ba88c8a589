"""Numbers of users that belong to VMs, and what they may reach of the agent's."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.host import lending, users
from sempervirt.host.confinement import CAPABILITIES
from sempervirt.host.device_access import admit
from sempervirt.host.exposure import ACCESS_LIST
from sempervirt.host.privileges import with_capabilities
from sempervirt.host.users import FIRST, OFF, VARIABLE, UserPool, has_processes, pool_of
from sempervirt.qemu.files import VmFiles
from sempervirt.qemu.spec import VmSpec
from sempervirt.vm.user import VmUser, renew_run_dir

GROUP = FIRST + 3
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def pool(tmp_path: Path) -> UserPool:
    """One without a VM."""
    return UserPool(tmp_path / "users")


def test_a_vm_keeps_its_number_and_no_other_gets_it(pool: UserPool, tmp_path: Path) -> None:
    first = pool.take(Path("/vms/a"))
    assert pool.take(Path("/vms/a")) == first
    assert pool.take(Path("/vms/b")) != first
    assert first not in (pool.accelerators, pool.page_faults)
    assert UserPool(pool.registry).number_of(Path("/vms/a")) == first  # the next agent's
    left = tmp_path / "left"
    left.touch()
    pool.release(Path("/vms/a"), [left])
    assert pool.number_of(Path("/vms/a")) == first
    left.unlink()
    pool.release(Path("/vms/a"), [left])
    assert pool.number_of(Path("/vms/a")) is None


def test_a_range_that_is_used_up_is_told(tmp_path: Path) -> None:
    pool = UserPool(tmp_path, FIRST, 18)
    numbers = {pool.take(Path(f"/vms/{name}")) for name in "ab"}
    assert len(numbers) == 2
    with pytest.raises(Unavailable, match="no user is free"):
        pool.take(Path("/vms/c"))


def test_the_last_free_number_is_found(tmp_path: Path) -> None:
    pool = UserPool(tmp_path, FIRST, 16 + 200)
    numbers = {pool.take(Path(f"/vms/{n}")) for n in range(200)}
    assert len(numbers) == 200
    with pytest.raises(Unavailable, match="no user is free"):
        pool.take(Path("/vms/one-more"))


def test_a_number_that_is_given_back_meanwhile_keeps_nobody_from_its_own(pool: UserPool) -> None:
    kept = pool.take(Path("/vms/b"))
    (pool.registry / str(FIRST + 99)).symlink_to("gone")  # listed, and not there any more
    assert pool.take(Path("/vms/b")) == kept


def test_what_cannot_be_written_down_takes_no_number(
    pool: UserPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.write", full)
        with pytest.raises(Unavailable, match="No space"):
            pool.take(Path("/vms/a"))
    assert not [*pool.registry.iterdir()]


def test_a_number_of_a_process_is_not_given_away() -> None:
    assert has_processes(os.getuid())
    assert not has_processes(FIRST + 7)


@as_root
def test_the_setting(tmp_path: Path) -> None:
    assert pool_of(tmp_path, {VARIABLE: OFF}) == f"{VARIABLE}={OFF}"
    assert pool_of(tmp_path, {}) == UserPool(tmp_path / "users")
    chosen = pool_of(tmp_path, {VARIABLE: "100000:1000"})
    assert chosen == UserPool(tmp_path / "users", 100_000, 1000)
    for wrong in ("0:1000", "100000:16", "100000", "2147483000:1000000", "on"):
        with pytest.raises(InvalidRequest):
            pool_of(tmp_path, {VARIABLE: wrong})


@as_root
@pytest.mark.parametrize("name", ["dac_override", "setpcap", "sys_ptrace"])
def test_an_agent_that_could_not_serve_such_a_vm_gives_it_no_user(
    tmp_path: Path, name: str
) -> None:
    """As in a container; the control is `test_the_setting`."""
    kept = [one for one in CAPABILITIES if one != name]
    said = with_capabilities(kept, partial(_pool_elsewhere, [], tmp_path, {}))
    assert said.startswith(f"the agent has no {name}")


def _pool_elsewhere(within: Sequence[str], state_dir: Path, setting: Mapping[str, str]) -> str:
    """What another process is told, or why there is none."""
    program = (
        "from pathlib import Path; from sempervirt.host.users import pool_of; "
        f"print(pool_of(Path({str(state_dir)!r}), {setting!r}))"
    )
    argv = [*within, sys.executable, "-c", program]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    return ended.stdout or ended.stderr


@as_root
def test_numbers_that_a_user_name_space_does_not_have_are_not_given(tmp_path: Path) -> None:
    chosen = {VARIABLE: "100000:1000"}
    for text, has in (("0 0 4294967295", True), ("0 1000 1\n1 100000 65536", False)):
        assert users._is_mapped(text, 100_000, 100_999) is has
    said = _pool_elsewhere(["unshare", "--user", "--map-root-user"], tmp_path, chosen)
    if said.startswith("unshare"):
        pytest.skip(said)
    assert said.startswith("this user name space has no 100000 to 100999")


@as_root
def test_what_was_removed_under_a_vm_is_made_again_for_its_user(tmp_path: Path) -> None:
    files = VmFiles(tmp_path / "run/vm/web")
    renew_run_dir(files, VmUser(GROUP), 3, tmp_path / "run")
    for directory in (tmp_path / "run", tmp_path / "run/vm"):
        assert stat.S_IMODE(directory.stat().st_mode) & 0o011 == 0o011
    assert lending.group_of(files.directory) == GROUP
    made = files.successor(3).directory.stat()
    assert (made.st_gid, stat.S_IMODE(made.st_mode)) == (GROUP, 0o1770)
    files.console_log.write_text("said")
    renew_run_dir(files, VmUser(GROUP), 3, tmp_path / "run")
    assert files.console_log.read_text() == "said"  # and where it was removed a QEMU can write it
    log = files.console_log.stat()
    assert (log.st_uid, log.st_gid, stat.S_IMODE(log.st_mode)) == (0, GROUP, 0o660)


@as_root
def test_the_group_of_a_vm_is_that_of_its_run_directory(tmp_path: Path) -> None:
    directory = tmp_path / "web"
    lending.open_way(directory.parent, tmp_path)
    lending.make_passage(directory, GROUP)
    assert lending.group_of(directory) == GROUP
    assert lending.group_of(tmp_path) is None
    assert lending.group_of(directory / "absent") is None
    lending.make_workplace(directory / "q1", GROUP)
    assert stat.S_IMODE((directory / "q1").stat().st_mode) == 0o1770


@as_root
def test_what_is_lent_is_a_new_file_and_never_what_a_link_leads_to(tmp_path: Path) -> None:
    secret, lent = tmp_path / "secret", tmp_path / "lent"
    secret.write_text("secret")
    secret.chmod(0o600)
    lent.symlink_to(secret)
    lending.lend(lent, None, make=True)
    assert lent.is_symlink()
    with pytest.raises(OSError):  # noqa: PT011 - the kernel's choice among several
        lending.lend(lent, GROUP)
    lending.lend(lent, GROUP, make=True)
    assert not lent.is_symlink()
    assert (lent.stat().st_gid, stat.S_IMODE(lent.stat().st_mode)) == (GROUP, 0o660)
    assert (secret.stat().st_gid, stat.S_IMODE(secret.stat().st_mode)) == (0, 0o600)


@as_root
def test_what_a_qemu_has_put_in_the_place_of_its_own_is_not_lent(tmp_path: Path) -> None:
    host, foreign, own = tmp_path / "host.sock", tmp_path / "foreign", tmp_path / "own"
    for path in (host, foreign, own):
        path.touch(mode=0o600)
    (tmp_path / "stream.sock").hardlink_to(host)
    os.chown(foreign, GROUP + 1, GROUP + 1)
    os.chown(own, GROUP, GROUP)
    for path in (tmp_path / "stream.sock", foreign):
        with pytest.raises(PermissionError):
            lending.lend(path, GROUP)
    assert (host.stat().st_gid, stat.S_IMODE(host.stat().st_mode)) == (0, 0o600)
    lending.lend(own, GROUP)
    assert (own.stat().st_uid, own.stat().st_gid) == (0, GROUP)


def test_only_a_socket_of_a_qemu_is_put_where_everybody_looks(tmp_path: Path) -> None:
    files, spec = VmFiles(tmp_path), VmSpec(name="web")
    made = files.successor(1)
    made.directory.mkdir()
    other = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as another:
        listener.bind(str(made.monitor))
        another.bind(str(other))
        made.console.symlink_to(other)
        files.take_sockets(made, spec)
        assert files.monitor.is_socket()
        assert not os.path.lexists(files.console)
        assert other.is_socket()


@pytest.fixture
def device() -> Iterator[Path]:
    """As /dev/null, and closed to others. Of this test alone."""
    path = Path(f"/dev/sv-test-{os.getpid()}")
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    try:
        yield path
    finally:
        path.unlink()


@as_root
def test_a_group_is_put_into_the_list_of_a_device_once_and_the_owner_stays(device: Path) -> None:
    try:
        admit(device, GROUP)
    except OSError as error:
        pytest.skip(f"/dev has no access lists here: {error}")
    held = os.getxattr(device, ACCESS_LIST)
    admit(device, GROUP)
    assert os.getxattr(device, ACCESS_LIST) == held
    entries = {(tag, who): may for tag, may, who in struct.iter_unpack("<HHI", held[4:])}
    assert entries[8, GROUP] == 6
    assert (entries[1, 0xFFFF_FFFF], entries[4, 0xFFFF_FFFF], entries[32, 0xFFFF_FFFF]) == (6, 0, 0)
    admit(device, GROUP + 1)
    entries = {
        (tag, who): may
        for tag, may, who in struct.iter_unpack("<HHI", os.getxattr(device, ACCESS_LIST)[4:])
    }
    assert (entries[8, GROUP], entries[8, GROUP + 1], entries[16, 0xFFFF_FFFF]) == (6, 6, 6)
    assert device.stat().st_uid == device.stat().st_gid == 0
