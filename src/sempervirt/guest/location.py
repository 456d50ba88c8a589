"""Where the guest images are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import NotFound

# What the guest's kernel should be told. Most of it is for speed under emulation: no calibration,
# no measurement of one clock by another, no self-tests of ciphers. A panic reboots at once.
CMDLINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t tsc=reliable tsc=nowatchdog no_timer_check "
    "mitigations=off cryptomgr.notests random.trust_cpu=on audit=0"
)

KERNEL = "vmlinuz"
INITRD = "initrd.img"
RELEASE = "release"


@dataclass(frozen=True)
class GuestImage:
    """A kernel, an initramfs for that kernel, and the kernel's release (`6.1.0-…`)."""

    kernel: Path
    initrd: Path
    release: str
    cmdline: str = CMDLINE


ROOT = "root.raw"


@dataclass(frozen=True)
class DebianImage(GuestImage):
    """A guest with systemd. `root` is the disk to copy: its first disk, which it writes to."""

    root: Path = Path()


def places() -> list[Path]:
    """Directories that may hold the image, best first.

    SEMPERVIRT_GUEST_DIR, if set, is the only one.
    """
    if named := os.environ.get("SEMPERVIRT_GUEST_DIR"):
        return [Path(named)]
    checkout = Path(__file__).resolve().parents[3]
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    installed = [
        home / "sempervirt/guest",
        Path("/usr/local/share/sempervirt/guest"),
        Path("/usr/share/sempervirt/guest"),
    ]
    if (checkout / "pyproject.toml").is_file():
        return [checkout / ".cache/guest", *installed]
    return [Path(".cache/guest"), *installed]


def _complete(folders: list[Path], names: tuple[str, ...], what: str, target: str) -> list[Path]:
    for folder in folders:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    looked = ", ".join(str(folder) for folder in folders)
    raise NotFound(
        f"no {what} (looked in {looked})",
        remedy=f"run `make {target}`, or set SEMPERVIRT_GUEST_DIR",
    )


def image() -> GuestImage:
    """The first complete image of `places()`.

    Raises NotFound, with the remedy, when there is none.
    """
    files = _complete(places(), (KERNEL, INITRD, RELEASE), "guest image", "guest")
    return GuestImage(files[0], files[1], files[2].read_text().strip())


def debian() -> DebianImage:
    """The first complete image of a Debian guest, in `debian` beside one of `places()`.

    Raises NotFound, with the remedy, when there is none.
    """
    folders = [place.parent / "debian" for place in places()]
    names = (KERNEL, INITRD, RELEASE, ROOT)
    files = _complete(folders, names, "Debian guest", "debian-guest")
    return DebianImage(files[0], files[1], files[2].read_text().strip(), root=files[3])
