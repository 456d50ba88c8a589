"""`semper libvirt adopt`: a domain gets its guarded disk, and its former description back.

libvirt is a script here that keeps one description; `make libvirt` asks the real one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.semper_tries import Said, Tries, tries

Semperd = Callable[[], AbstractAsyncContextManager["subprocess.Popen[bytes]"]]
MIB = 1 << 20
DOMAIN = """<domain type='qemu'>
  <name>web</name>
  <memory unit='MiB'>64</memory>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{image}'/>
      <target dev='vdb' bus='virtio'/>
      <boot order='1'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x05' function='0x0'/>
    </disk>
  </devices>
</domain>
"""
VIRSH = """#!/bin/sh
here={here}
[ -e $here/fails ] && [ "$3" = "$(cat $here/fails)" ] && echo "error: it fails" >&2 && exit 1
for last; do :; done
case $3 in
dumpxml) cat $here/defined.xml ;;
domstate) cat $here/state ;;
define) cp "$last" $here/defined.xml ;;
esac
"""


@dataclass
class Host:
    """A host with a libvirt that has one domain."""

    place: Path
    semper: Tries

    @property
    def defined(self) -> Path:
        """What libvirt has."""
        return self.place / "defined.xml"

    @property
    def kept(self) -> list[str]:
        """What is kept of former descriptions."""
        return sorted(path.name for path in (self.place / "s/libvirt").glob("*"))

    def __call__(self, *words: str) -> Said:
        directories = {"SEMPERVIRT_STATE_DIR": "s", "SEMPERVIRT_RUN_DIR": "r"}
        own = {name: str(self.place / directory) for name, directory in directories.items()}
        path = f"{self.place}/bin:{os.environ['PATH']}"
        return self.semper(*words, variables={**own, "PATH": path})


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    (place / "web.raw").write_bytes(bytes(MIB))
    (place / "defined.xml").write_text(DOMAIN.format(image=place / "web.raw"))
    (place / "state").write_text("shut off\n\n")
    (place / "bin").mkdir()
    (place / "bin/virsh").write_text(VIRSH.format(here=place))
    (place / "bin/virsh").chmod(0o755)
    with tries(place) as semper:
        yield Host(place, semper)


ADOPT = ("libvirt", "adopt", "web", "--user", "root")


async def test_a_domain_is_adopted_and_given_back(host: Host, semperd: Semperd) -> None:
    before = host.defined.read_text()
    async with semperd():
        none = host(*ADOPT)
        assert (none.code, "no disk of domain web is guarded" in none.err) == (4, True)
        assert host("disk", "guard", "web.raw", "--name", "web/vda").code == 0
        adopted = host(*ADOPT)
        assert adopted.code == 0, adopted
        text = host.defined.read_text()
        assert "vhostuser" in text
        assert 'slot="0x05"' in text
        assert 'order="1"' in text
        assert host("libvirt", "check", "web", "--user", "root").code == 0
        twice = host(*ADOPT)
        assert (twice.code, "--undo" in twice.err) == (5, True)
        # A change by somebody else is not lost unasked.
        host.defined.write_text(text.replace("64", "65"))
        changed = host("libvirt", "adopt", "web", "--undo")
        assert (changed.code, "changed since" in changed.err) == (5, True)
        host.defined.write_text(text)
        assert host("libvirt", "adopt", "web", "--undo").code == 0
        assert host.defined.read_text() == before
        assert host.kept == []
        assert host("libvirt", "adopt", "web", "--undo").code == 4
        assert host("disk", "unguard", "web/vda").code == 0


async def test_what_fails_changes_nothing_and_stops_nothing(host: Host, semperd: Semperd) -> None:
    before = host.defined.read_text()
    async with semperd():
        assert host("disk", "guard", "web.raw", "--name", "web/vda", "--mode", "0600").code == 0
        found = host("libvirt", "adopt", "web", "--user", "nobody")
        assert (found.code, "QEMU runs as nobody" in found.err) == (5, True)
        (host.place / "state").write_text("running\n")
        running = host(*ADOPT)
        assert (running.code, "virsh shutdown web" in running.err) == (5, True)
        (host.place / "state").write_text("shut off\n")
        for word in ("dumpxml", "domstate", "define"):
            (host.place / "fails").write_text(word)
            failed = host(*ADOPT)
            assert (failed.code, "it fails" in failed.err) == (6, True)
            assert host.kept == []
        (host.place / "fails").unlink()
        assert host.defined.read_text() == before
        assert host(*ADOPT).code == 0
        (host.place / "fails").write_text("define")
        assert host("libvirt", "adopt", "web", "--undo").code == 6
        (host.place / "fails").unlink()
        assert host("libvirt", "adopt", "web", "--undo").code == 0
        assert host.defined.read_text() == before
        assert host("disk", "unguard", "web/vda").code == 0
