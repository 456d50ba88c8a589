"""Building a guest image: a kernel's tree and a first process in, three files out.

The first process of the small guest is the probe; that of the Debian guest is a script which mounts
a disk and hands over to what is there.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import CommandFailed, NotFound
from sempervirt.guest.cpio import Archive
from sempervirt.guest.location import INITRD, KERNEL, RELEASE, GuestImage
from sempervirt.guest.modules import choose_modules, module_list

BUSYBOX = Path("/bin/busybox")
STAMP = ".initrd-stamp"
FOLDERS = ("bin", "dev", "etc", "lib", "lib/modules-sv", "proc", "root", "sys", "tmp")
APPLETS = (
    "cat", "dd", "df", "dmesg", "echo", "free", "grep", "head", "hexdump", "insmod", "ip", "kill",
    "less", "ls", "lsmod", "mount", "ping", "poweroff", "ps", "reboot", "sh", "sleep",
    "switch_root", "tail", "top", "umount", "uname", "vi", "wget",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The parts of a guest image.

    `kernel_tree` holds `vmlinuz`, `release` and `modules/` (the content of /lib/modules/RELEASE);
    `init` is the first process, a static program or a script of busybox; `modules` are wanted
    beside the usual ones, if the kernel has them.
    """

    kernel_tree: Path
    init: Path
    busybox: Path = BUSYBOX
    modules: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises NotFound for the first ingredient that is missing."""
        for path, remedy in [
            (self.kernel_tree / "vmlinuz", "run `make guest`"),
            (self.kernel_tree / "release", "run `make guest`"),
            (self.kernel_tree / "modules/modules.builtin", "run `make guest`"),
            (self.init, "run `make setup`"),
            (self.busybox, "install the package busybox-static"),
        ]:
            if not path.is_file():
                raise NotFound(f"{path} is missing", remedy=remedy)

    def digest(self) -> str:
        """Changes whenever the image would."""
        digest = hashlib.sha256()
        sources = sorted(Path(__file__).parent.glob("*.py"))
        kernel = self.kernel_tree / "vmlinuz"
        for path in [*sources, self.init, self.busybox, self.kernel_tree / "release", kernel]:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
        digest.update(" ".join(self.modules).encode())
        return digest.hexdigest()


def stripped(program: Path) -> bytes:
    """A program without symbols, where `strip` is installed: a quarter of the size to load."""
    contents = program.read_bytes()
    if shutil.which("strip") is None or not contents.startswith(b"\x7fELF"):
        return contents
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / program.name
        command = ["strip", "--strip-all", "-o", str(target), str(program)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            tail = done.stderr.splitlines()
            raise CommandFailed(" ".join(command), done.returncode, tail)
        return target.read_bytes()


def make_initramfs(recipe: Recipe) -> bytes:
    """The archive that the kernel unpacks and whose /init it runs."""
    archive = Archive()
    for folder in FOLDERS:
        archive.directory(folder)
    # The kernel opens the console for /init before /dev is mounted.
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("init", stripped(recipe.init), executable=True)
    archive.file("bin/busybox", recipe.busybox.read_bytes(), executable=True)
    for applet in APPLETS:
        archive.symlink(f"bin/{applet}", "busybox")
    modules = choose_modules(recipe.kernel_tree / "modules", recipe.modules)
    for module in modules:
        archive.file(f"lib/modules-sv/{module.name}.ko", module.contents)
    archive.file("lib/modules-sv/list", module_list(modules).encode())
    return archive.to_bytes()


def _replace(target: Path, contents: bytes) -> None:
    """Writes a file so that a reader sees the old one or the whole new one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def build(recipe: Recipe, output: Path) -> tuple[GuestImage, bool]:
    """Builds the image into `output`, unless what is there was made of the same things.

    Returns the image, and whether anything was built. Raises NotFound for a missing ingredient.
    """
    recipe.check()
    output.mkdir(parents=True, exist_ok=True)
    release = (recipe.kernel_tree / "release").read_text().strip()
    image = GuestImage(output / KERNEL, output / INITRD, release)
    stamp = output / STAMP
    digest = recipe.digest()
    complete = image.kernel.is_file() and image.initrd.is_file() and (output / RELEASE).is_file()
    if complete and stamp.is_file() and stamp.read_text() == digest:
        return image, False
    stamp.unlink(missing_ok=True)
    _replace(image.initrd, gzip.compress(make_initramfs(recipe), 6, mtime=0))
    _replace(image.kernel, (recipe.kernel_tree / "vmlinuz").read_bytes())
    _replace(output / RELEASE, f"{release}\n".encode())
    _replace(stamp, digest.encode())
    return image, True
