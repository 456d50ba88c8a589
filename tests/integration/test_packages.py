"""The Debian packages: what is in one, and that it is the same bytes when it is built again.

`make deb-trial` builds all of them, and installs, upgrades, removes and purges them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sempervirt import __version__

ROOT = Path(__file__).parents[2]
NAMES = ("sempervirt-blkd", "sempervirt-dkms")
VERSION = f"{__version__}~test1"
TOOLS = ("dh", "dh_dkms", "help2man", "dpkg-deb")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not os.environ.get("CI") and not all(map(shutil.which, TOOLS)),
        reason="needs debhelper, dh-dkms and help2man: scripts/system-packages, as make deb has it",
    ),
]


def run(*words: str | Path, **variables: str) -> str:
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=240, cwd=ROOT,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("packages")
    run("scripts/deb", "--output", output, "--version", VERSION, *NAMES)
    return {path.name.partition("_")[0]: path for path in output.iterdir()}


def files(package: Path) -> dict[str, str]:
    """Every file of a package, with its rights."""
    found = {}
    for line in run("dpkg-deb", "--contents", package).splitlines():
        rights, owner, *_, name = line.partition(" -> ")[0].split()
        assert owner == "root/root"
        if not name.endswith("/"):
            found[name.removeprefix(".")] = rights
    return found


def test_a_host_of_libvirt_gets_programs_and_units_and_no_python(built: dict[str, Path]) -> None:
    package = built["sempervirt-blkd"]
    found = files(package)
    assert found.pop("/usr/bin/semper-blkd") == "-rwxr-xr-x"
    units = {"semper-disk@.service", "semper-disk-spare@.service", "semper-disk@.socket"}
    assert units <= {Path(name).name for name in found if "/systemd/system/" in name}
    assert "/usr/share/qemu/vhost-user/50-semper-blkd.json" in found
    assert "/usr/share/man/man8/semper-blkd.8.gz" in found
    assert set(found.values()) <= {"-rw-r--r--"}
    assert not [name for name in found if name.endswith(".py") or name.startswith("/lib/")]
    depends = run("dpkg-deb", "--field", package, "Depends")
    assert "python" not in depends
    assert "libc6" in depends


def test_its_program_is_hardened_as_it_was_linked(built: dict[str, Path], tmp_path: Path) -> None:
    run("dpkg-deb", "--extract", built["sempervirt-blkd"], tmp_path)
    packaged = run("readelf", "-lW", "-dW", "-n", tmp_path / "usr/bin/semper-blkd")
    assert "GNU_RELRO" in packaged
    assert "BIND_NOW" in packaged
    assert "Build ID: " + "0" * 40 in packaged


def test_the_module_is_where_dkms_looks(built: dict[str, Path]) -> None:
    found = files(built["sempervirt-dkms"])
    place = f"/usr/src/semper_guard-{__version__}"
    assert {f"{place}/dkms.conf", f"{place}/Kbuild", f"{place}/guard.c"} <= set(found)
    assert "dkms" in run("dpkg-deb", "--info", built["sempervirt-dkms"], "postinst")
    assert "/usr/lib/systemd/system/semper-guard.service" in found


def test_the_units_start_the_programs_of_the_package(
    built: dict[str, Path], tmp_path: Path
) -> None:
    for package in built.values():
        run("dpkg-deb", "--extract", package, tmp_path)
    units = [path for path in tmp_path.rglob("*.service") if path.is_file()]
    assert len(units) == 3
    for unit in units:
        assert "/usr/local" not in unit.read_text()
        (started,) = re.findall(r"^ExecStart=(\S+)", unit.read_text(), re.MULTILINE)
        assert (tmp_path / started.lstrip("/")).exists() or started == "/sbin/modprobe"


def test_the_same_tree_gives_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    """In another place, time zone and language, and by somebody with other habits."""
    run("sh", "-c", 'umask 077; exec scripts/deb --output "$0" --version "$@"', tmp_path / "again",
        VERSION, *NAMES, TZ="Asia/Tokyo", LC_ALL="C", TMPDIR=str(tmp_path))  # fmt: skip
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == {path.name: path.read_bytes() for path in built.values()}
    # The control: another version is another package.
    run(
        "scripts/deb", "--output", tmp_path / "other", "--version", f"{VERSION}b", "sempervirt-dkms"
    )
    (other,) = (tmp_path / "other").iterdir()
    assert other.read_bytes() != built["sempervirt-dkms"].read_bytes()
