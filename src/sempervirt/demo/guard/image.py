"""What host a runs on: this machine's own Python, QEMU and libraries, on a disk; and what changes
from run to run, in the initramfs.

No package is fetched: host a gets the same files as this machine has. The disk is made once
(`.cache/guard/host.raw`) and made anew when a file of it has changed; nothing writes to it.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from py_compile import PycInvalidationMode

import sempervirt
from sempervirt.core.errors import NotFound
from sempervirt.guest.cpio import Archive
from sempervirt.guest.initramfs import BUSYBOX, stripped
from sempervirt.guest.modules import choose_modules
from sempervirt.host.programs import find_program

PAYLOAD = "payload"
# Where the initramfs stands in host a.
HERE = Path("/opt/semper")
SITE = Path("/opt/site")
PROGRAMS = ("semper-blkd", "semper-wired")
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_net", "ext4")
# Parts of Python's library that no server needs.
LEFT_OUT = {
    "test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages",
    "pydoc_data", "distutils",
}  # fmt: skip
FIRMWARE = ("bios-256k.bin", "bios.bin", "kvmvapic.bin")
FIRMWARE_PLACES = ("/usr/share/qemu", "/usr/share/seabios")
ELF = b"\x7fELF"


def _tools() -> dict[str, str]:
    found = {}
    for name, package in (
        ("mke2fs", "e2fsprogs"),
        ("ldd", "libc-bin"),
        ("setpriv", "util-linux"),
    ):
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            raise NotFound(f"{name} is not installed", remedy=f"apt-get install {package}")
        found[name] = path
    return found


def disk(target: Path, qemu: str) -> Path:
    """The disk of host a, made if it is not there or not current. Raises NotFound."""
    tools = _tools()
    # Its QEMUs have users of their own, which BusyBox's program of that name cannot make them.
    files = _files(Path(qemu)) | {Path("/bin/setpriv"): Path(tools["setpriv"]).resolve()}
    key = _digest(files)
    stamp = target.with_suffix(".key")
    if target.exists() and stamp.exists() and stamp.read_text() == key:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="guard-host-") as name:
        root = Path(name) / "root"
        for inside, source in files.items():
            _copy(source, root / inside.relative_to("/"))
        for library in _libraries(tools["ldd"], files.values()):
            _copy(library.resolve(), root / library.relative_to("/"))
        for folder in (
            "proc",
            "sys",
            "dev",
            "run",
            "tmp",
            "etc",
            "var/lib",
            "var/tmp",
            "opt/semper",
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\n")
        scratch = Path(name) / "host.raw"
        with scratch.open("wb") as file:
            file.truncate(1 << 30)
        subprocess.run(
            [tools["mke2fs"], "-q", "-t", "ext4", "-m", "0", "-E",
             "lazy_itable_init=0,lazy_journal_init=0", "-d", root, scratch],
            check=True,
        )  # fmt: skip
        # On another file system, perhaps: a copy beside the target, then the rename.
        beside = target.with_suffix(".new")
        subprocess.run(["cp", "--sparse=always", scratch, beside], check=True)
        beside.replace(target)
    stamp.write_text(key)
    return target


def _files(qemu: Path) -> dict[Path, Path]:
    """Where each file stands in host a, and which file of this machine that is."""
    files = {Path("/bin/busybox"): BUSYBOX, Path("/usr/bin") / qemu.name: qemu.resolve()}
    for name in FIRMWARE:
        for place in map(Path, FIRMWARE_PLACES):
            if (place / name).exists():
                files[Path("/usr/share/qemu") / name] = (place / name).resolve()
    for folder in Path("/usr/lib").glob("*/qemu"):
        # QEMU's own parts: accelerators, for one, which Debian ships as modules.
        files |= {path: path.resolve() for path in folder.glob("accel-*.so")}
    files |= _python()
    for name in _distributions("sempervirt"):
        for part in metadata.distribution(name).files or ():
            source = Path(str(part.locate()))
            if ".." not in part.parts and source.is_file():
                files[SITE / part] = source
    return files


def _python() -> dict[Path, Path]:
    program = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    files = {program: program}
    for path in library.rglob("*"):
        inside = path.relative_to(library)
        first = inside.parts[0]
        if first not in LEFT_OUT and not first.startswith("config-") and path.is_file():
            files[path] = path.resolve()
    return files


def _distributions(name: str) -> set[str]:
    """The packages that one needs, without what is optional, and without itself."""
    found: set[str] = set()
    queue = [name]
    while queue:
        for requirement in metadata.requires(queue.pop()) or ():
            wanted, _, condition = requirement.partition(";")
            needed = re.split(r"[^A-Za-z0-9._-]", wanted.strip(), maxsplit=1)[0]
            if "extra" in condition or needed in found:
                continue
            try:
                metadata.distribution(needed)
            except metadata.PackageNotFoundError:  # for another Python or another system
                continue
            found.add(needed)
            queue.append(needed)
    return found


def _digest(files: Mapping[Path, Path]) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for inside, source in sorted(files.items()):
        status = source.stat()
        digest.update(f"{inside} {source} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _libraries(ldd: str, files: Iterable[Path]) -> set[Path]:
    """The shared libraries of all programs and modules among the files, by the names they ask
    for.
    """
    binaries = []
    for path in files:
        with path.open("rb") as file:
            if file.read(4) == ELF:
                binaries.append(str(path))
    done = subprocess.run([ldd, *binaries], capture_output=True, text=True, check=False)
    return {
        Path(found)
        for found in re.findall(r"(?:=> |^\t)(/\S+) \(0x", done.stdout, re.MULTILINE)
        if Path(found).exists()
    }


def initramfs(
    tree: Path, init: Path, files: Mapping[str, bytes], programs: Mapping[str, bytes] | None = None
) -> bytes:
    """The archive that host a boots: drivers, `init`, and the payload: our package, our programs,
    and `files`, by their paths below the payload.

    `tree` holds the kernel's `modules/`.
    """
    archive = Archive()
    for folder in ("dev", "bin", "lib", "proc", "sys", "root"):
        archive.directory(folder)
    archive.character_device("dev/console", 5, 1)
    archive.character_device("dev/null", 1, 3)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), executable=True)
    archive.file("init", init.read_bytes(), executable=True)
    modules = [
        module
        for module in choose_modules(tree / "modules", DRIVERS)
        if module.name in _closure(tree)
    ]
    for module in modules:
        archive.file(f"lib/{module.name}.ko", module.contents)
    archive.file("lib/list", "".join(f"{module.name}.ko\n" for module in modules).encode())
    payload = {f"src/{name}": content for name, content in _package().items()}
    payload |= files
    folders = {str(parent) for name in payload for parent in Path(name).parents} - {"."}
    archive.directory(PAYLOAD)
    archive.directory(f"{PAYLOAD}/bin")
    for folder in sorted(folders):
        archive.directory(f"{PAYLOAD}/{folder}")
    for name, content in payload.items():
        archive.file(f"{PAYLOAD}/{name}", content)
    ours = {name: stripped(Path(find_program(name))) for name in PROGRAMS}
    for name, content in {**ours, **(programs or {})}.items():
        archive.file(f"{PAYLOAD}/bin/{name}", content, executable=True)
    return archive.to_bytes()


def _closure(tree: Path) -> set[str]:
    """The drivers that are wanted, and what they need; what is built in is in no file."""
    found = {module.name: module for module in choose_modules(tree / "modules", DRIVERS)}
    names: set[str] = set()
    queue = [name for name in DRIVERS if name in found]
    while queue:
        name = queue.pop()
        names.add(name)
        queue += [need for need in found[name].needs if need in found and need not in names]
    return names


def _package() -> dict[str, bytes]:
    """The package of this process, compiled: an emulated host takes seconds to do that."""
    source = Path(sempervirt.__file__).parent
    with tempfile.TemporaryDirectory(prefix="guard-package-") as name:
        copied = Path(name) / "sempervirt"
        shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__", "demo"))
        compileall.compile_dir(
            copied, quiet=2, stripdir=name, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
        )
        return {
            str(path.relative_to(name)): path.read_bytes()
            for path in sorted(copied.rglob("*"))
            if path.is_file()
        }
