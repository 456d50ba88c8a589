"""A real PCI device: `semper-vfiod` has an NVMe controller from vfio-pci, a guest works with it,
and its state moves to a second one.

In an emulated host (`tests/vfio/outer.py`) a program plays QEMU and the guest's driver
(`crates/vfiod/examples/vfio_guest.rs`), so that this takes seconds; with a
QEMU and a Linux in it: `make passthrough-nested`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sempervirt.demo.guard.emulated import NoAnswerError
from sempervirt.host.programs import find_program
from tests.guard.machine import ROOT, available
from tests.vfio.outer import CONTROLLERS, SERIES, Outer, build

FIRST, SECOND = CONTROLLERS
GUEST = f"vfio_guest /bin/semper-vfiod {FIRST} {SECOND}"
# Of an emulated machine, on a processor with other work.
LONG_S = 300.0


def _player() -> Path:
    """The player of QEMU and driver, which `cargo test` builds as well."""
    player = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "debug/examples/vfio_guest"
    source = ROOT / "crates/vfiod/examples/vfio_guest.rs"
    if not player.exists() or player.stat().st_mtime < source.stat().st_mtime:
        build = "cargo build --quiet --package semper-vfiod --example vfio_guest"
        subprocess.run(["bash", "-c", f". scripts/toolchain && {build}"], cwd=ROOT, check=True)
    return player


class Host:
    """An emulated host with the controllers bound. When its emulator falls over, there is another
    one, once, and the command is asked again.
    """

    def __init__(self, folder: Path) -> None:
        programs = [Path(find_program("semper-vfiod")), _player()]
        self._image = build(folder, programs)
        self._folder = folder
        self._again = 1
        self._machine = self._booted()

    def _booted(self) -> Outer:
        machine = Outer(self._image, self._folder / f"host{self._again}")
        try:
            machine.bind()
        except BaseException:
            machine.close()
            raise
        return machine

    def close(self) -> None:
        self._machine.close()

    def ask(self, command: str, deadline_s: float = LONG_S) -> tuple[int, str]:
        """See `EmulatedMachine.ask`."""
        try:
            return self._machine.ask(command, deadline_s)
        except NoAnswerError:
            if not self._again or not self._machine.fell_over():
                raise
            self.close()
            self._again -= 1
            self._machine = self._booted()
            return self._machine.ask(command, deadline_s)

    def do(self, command: str) -> str:
        """The same of a command that must succeed."""
        status, said = self.ask(command)
        assert status == 0, said
        return said


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    assert SERIES in available(), "no kernel; run scripts/guard-kernels"
    found = Host(tmp_path_factory.mktemp("vfio"))
    yield found
    found.close()


def test_a_guest_works_with_the_device_and_both_move_to_another_and_back(host: Host) -> None:
    said = host.do(f"{GUEST} --moves=2 2>&1")
    assert said.splitlines()[-1] == "verified", said
    assert len(re.findall("^move", said, re.MULTILINE)) == 2
    # Every wall stands around who has the device.
    assert '"missing":""' in said, said


def test_pages_that_are_not_shipped_are_found_to_be_missing(host: Host) -> None:
    status, said = host.ask(f"{GUEST} --control=unshipped 2>&1")
    assert status != 0
    assert "pages are not what the device has written there" in said, said


def test_a_group_that_somebody_has_and_a_device_elsewhere_are_refused(host: Host) -> None:
    group = host.do(f"basename $(readlink /sys/bus/pci/devices/{FIRST}/iommu_group)").strip()
    status, said = host.ask(f"exec 5<>/dev/vfio/{group}; {GUEST} 2>&1")
    assert status != 0
    assert "busy" in said
    with_files = f"3<>/dev/vfio/{group} 4<>/dev/vfio/vfio"
    status, said = host.ask(
        f"semper-vfiod --kind=pci --pci={SECOND} --vfio-group-fd=3 --vfio-container-fd=4 "
        f"--socket-path=/tmp/s {with_files} 2>&1"
    )
    assert status == 4
    assert f"{SECOND} is not in this group" in said


def test_an_emulator_that_falls_over_is_begun_anew_once(host: Host) -> None:
    host._again = 1
    host._machine.process.send_signal(signal.SIGABRT)
    assert host.do("echo $((1 + 1))").strip() == "2"
    host._machine.process.kill()
    with pytest.raises(NoAnswerError):
        host.ask("true")
