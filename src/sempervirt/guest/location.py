"""Where the guest image is."""

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
    """A kernel, the initramfs to boot it with, and the kernel's release (`6.1.0-…`)."""

    kernel: Path
    initrd: Path
    release: str
    cmdline: str = CMDLINE


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


def image() -> GuestImage:
    """The first complete image of `places()`.

    Raises NotFound, with the remedy, when there is none.
    """
    for folder in places():
        files = [folder / name for name in (KERNEL, INITRD, RELEASE)]
        if all(file.is_file() for file in files):
            return GuestImage(files[0], files[1], files[2].read_text().strip())
    looked = ", ".join(str(folder) for folder in places())
    raise NotFound(
        f"no guest image (looked in {looked})",
        remedy="run `make guest`, or set SEMPERVIRT_GUEST_DIR",
    )
