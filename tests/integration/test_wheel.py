"""The wheel as a user gets it: built, installed into an empty environment, each program started."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from sempervirt import __version__

PROJECT = Path(__file__).resolve().parents[2]
VERSIONS = (
    ("semper", "version"),
    ("semperd", "--version"),
    ("semper-blkd", "--version"),
    ("semper-load", "--version"),
    ("semper-saved", "--version"),
    ("semper-vfiod", "--version"),
    ("semper-wired", "--version"),
    ("semper-probe", "--version"),
)

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    shown = " ".join(str(word) for word in command)
    assert done.returncode == 0, f"{shown}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dist")
    run(PROJECT / "scripts/wheel", output)
    (built,) = output.glob("sempervirt-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that holds the wheel.

    What the wheel depends on is lent from this environment by path: its .pth files, and with them
    the editable installation of this tree, do not come along.
    """
    root = tmp_path_factory.mktemp("venv")
    venv.create(root, symlinks=True, with_pip=False)
    scheme = sysconfig.get_paths(scheme="venv", vars={"base": str(root), "platbase": str(root)})
    Path(scheme["purelib"], "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", root / "bin/python", "install", "--quiet",
        "--no-deps", "--no-index", wheel)  # fmt: skip
    return root / "bin"


def test_wheel_serves_every_python_on_this_architecture(wheel: Path) -> None:
    assert wheel.name.startswith(f"sempervirt-{__version__}-py3-none-linux_"), wheel.name


def test_wheel_carries_licence_and_type_marker(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "sempervirt/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)


@pytest.mark.parametrize(("program", "question"), VERSIONS)
def test_program_tells_its_version(installed: Path, program: str, question: str) -> None:
    assert __version__ in run(installed / program, question)


def test_package_is_the_installed_one(installed: Path) -> None:
    where = run(installed / "python", "-c", "import sempervirt; print(sempervirt.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_probe_needs_no_library(installed: Path) -> None:
    """The kernel starts it as a guest's first process, where there is no dynamic loader."""
    image = (installed / "semper-probe").read_bytes()
    assert image[:4] == b"\x7fELF"
    assert b"/ld-linux" not in image[:4096], "asks for a dynamic loader"
    assert os.access(installed / "semper-probe", os.X_OK)
