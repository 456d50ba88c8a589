"""A host in a machine of its own that has an IOMMU and two NVMe controllers, bound to vfio-pci.

    QEMU (q35, intel-iommu) ── Debian's kernel ── vfio-pci ── semper-vfiod ── a guest
         └ nvme, nvme: two ports of one subsystem, so both lead to the same namespace

The controllers have no doorbells in memory (`dbcs=off`), as those that are made of silicon.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from sempervirt.guest.cpio import Archive
from sempervirt.guest.initramfs import BUSYBOX
from sempervirt.guest.modules import read_module
from tests.guard.machine import KERNELS, ROOT, Image, Machine

SERIES = "6.12"
MODULES = ("irqbypass", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci")
CMDLINE = "console=ttyS0 panic=-1 loglevel=4 intel_iommu=on no_timer_check"
# On PCI bus 0, each in an IOMMU group of its own.
CONTROLLERS = ("0000:00:04.0", "0000:00:05.0")
INIT = ROOT / "tests/guard/init.sh"
_LIBRARY = re.compile(r"(/\S+)")


def libraries(program: Path) -> set[Path]:
    """The shared libraries of a program, with its loader."""
    said = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return {Path(found[1]) for line in said.splitlines() if (found := _LIBRARY.search(line))}


def build(
    folder: Path,
    programs: Iterable[Path],
    *,
    modules: tuple[str, ...] = (),
    files: Mapping[str, Path] | None = None,
) -> Image:
    """The image: busybox, `init.sh`, modules of vfio-pci and further ones, these programs with
    their libraries, and `files` by their place.
    """
    archive = Archive()
    for directory in ("dev", "bin", "sbin", "lib", "modules"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    archive.file("init", INIT.read_bytes(), executable=True)
    tree = KERNELS / SERIES / "modules"
    for name in (*MODULES, *modules):
        archive.file(f"modules/{name}.ko", read_module(next(tree.rglob(f"{name}.ko*"))).contents)
    programs = list(programs)
    for program in programs:
        archive.file(f"bin/{program.name}", program.read_bytes(), executable=True)
    made = {"lib"}
    for library in sorted(set[Path]().union(*map(libraries, programs))):
        for parent in reversed(library.relative_to("/").parents[:-1]):
            if str(parent) not in made:
                made.add(str(parent))
                archive.directory(str(parent))
        archive.file(str(library.relative_to("/")), library.read_bytes(), executable=True)
    for place, file in (files or {}).items():
        directory = str(Path(place).parent)
        if directory not in made:
            made.add(directory)
            archive.directory(directory)
        archive.file(place, file.read_bytes(), executable=True)
    initrd = folder / "vfio.img"
    initrd.write_bytes(archive.to_bytes())
    return Image(KERNELS / SERIES / "vmlinuz", initrd)


class Outer(Machine):
    """One boot, with the controllers bound."""

    def __init__(
        self, image: Image, folder: Path, *, options: tuple[str, ...] = (), memory: str = "384M"
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder / "namespace.raw"
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        super().__init__(
            image,
            folder,
            (
                # MSI-X of the controllers by the IOMMU, which the kernel then calls safe.
                "-machine", "q35",
                "-device", "intel-iommu,intremap=on,caching-mode=off,aw-bits=48",
                "-device", "nvme-subsys,id=sub0,nqn=sv",
                "-device", "nvme,id=n0,serial=one,subsys=sub0,addr=4,dbcs=off",
                "-device", "nvme,id=n1,serial=one,subsys=sub0,addr=5,dbcs=off",
                "-drive", f"file={disk},if=none,id=d0,format=raw,cache=unsafe",
                "-device", "nvme-ns,drive=d0,bus=n0,nsid=1,shared=on",
                *options,
            ),
            cmdline=CMDLINE,
            memory=memory,
        )  # fmt: skip

    def bind(self) -> None:
        """Hands the controllers from the kernel's own driver to vfio-pci, as an operator does."""
        for name in MODULES:
            self.do(f"insmod /modules/{name}.ko")
        for address in CONTROLLERS:
            at = f"/sys/bus/pci/devices/{address}"
            self.do(
                f"if [ -e {at}/driver ]; then echo {address} >{at}/driver/unbind; fi; "
                f"echo vfio-pci >{at}/driver_override && echo {address} >/sys/bus/pci/drivers_probe"
            )
