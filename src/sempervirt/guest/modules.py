"""The kernel modules of the image: which, in which order to load, and for which devices.

Everything is read from the modules themselves (the section .modinfo), so no index of depmod is
needed. The guest gets plain modules and one list; its format is described in the probe's source,
`crates/probe/src/modules.rs`.
"""

from __future__ import annotations

import lzma
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, NotFound

# Drivers of the devices that a test may give to the guest.
WANTED = (
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng",
    "virtio_scsi", "sd_mod", "nvme", "vmgenid",
)  # fmt: skip
# Each of these must be there, built in or as a module: without them the guest cannot be talked to.
NEEDED = ("virtio_pci", "virtio_blk", "virtio_console")


@dataclass(frozen=True)
class Module:
    """One module: its plain contents, and what it says of itself."""

    name: str
    contents: bytes
    needs: tuple[str, ...]
    drives: tuple[str, ...]


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _name_of(file: str) -> str:
    return _canonical(Path(file).name.split(".ko")[0])


def _plain(path: Path) -> bytes:
    """The contents of a module file, decompressed."""
    match path.suffix:
        case ".ko":
            return path.read_bytes()
        case ".xz":
            return lzma.decompress(path.read_bytes())
        case ".zst":
            command = ["zstd", "--quiet", "--decompress", "--stdout", str(path)]
            return subprocess.run(command, check=True, capture_output=True).stdout
        case other:
            raise InvalidRequest(f"{path}: a module compressed as {other} cannot be read")


def _values(contents: bytes, key: str) -> list[str]:
    """All values of a key in .modinfo, where each entry is `key=value` and a zero byte."""
    pattern = rb"\0" + key.encode() + rb"=([\x20-\x7e]*)(?=\0)"
    return [value.decode() for value in re.findall(pattern, contents)]


def read_module(path: Path) -> Module:
    """Reads one module file."""
    contents = _plain(path)
    needs = [name for line in _values(contents, "depends") for name in line.split(",") if name]
    for line in _values(contents, "softdep"):
        # "pre: a b post: c": only what must come first matters here.
        before = line.partition("pre:")[2].partition("post:")[0]
        needs += before.split()
    drives = tuple(sorted({alias for alias in _values(contents, "alias") if ":" in alias}))
    return Module(_name_of(path.name), contents, tuple(map(_canonical, needs)), drives)


def _in_order(name: str, found: dict[str, Module], order: list[str]) -> None:
    """Appends a module to `order`, after the modules that must be loaded first."""
    if name in order or name not in found:
        return
    for need in found[name].needs:
        _in_order(need, found, order)
    order.append(name)


def choose_modules(tree: Path, more: tuple[str, ...] = ()) -> list[Module]:
    """The wanted modules of a kernel's module tree with their dependencies, in order of loading.

    `more` are wanted beside WANTED. Built-in drivers are left out, and so are soft dependencies
    that this kernel lacks. Raises NotFound when the kernel lacks a driver that the guest cannot do
    without.
    """
    built_in = {_name_of(line) for line in (tree / "modules.builtin").read_text().splitlines()}
    files = {_name_of(path.name): path for path in sorted(tree.rglob("*.ko*"))}
    for name in NEEDED:
        if name not in files and name not in built_in:
            raise NotFound(
                f"{tree}: this kernel has no driver {name}",
                remedy="choose a kernel made for virtual machines",
            )
    found: dict[str, Module] = {}
    wanted = (*WANTED, *more)
    queue = [name for name in wanted if name in files]
    while queue:
        name = queue.pop()
        found[name] = read_module(files[name])
        queue += [need for need in found[name].needs if need in files and need not in found]
    order: list[str] = []
    for name in wanted:
        _in_order(name, found, order)
    return [found[name] for name in order]


def module_list(modules: list[Module]) -> str:
    """The list for the guest: file, files needed first, patterns of the devices it drives."""
    found = {module.name: module for module in modules}
    lines = []
    for module in modules:
        order: list[str] = []
        _in_order(module.name, found, order)
        needs = " ".join(f"{name}.ko" for name in order[:-1]) or "-"
        drives = " ".join(module.drives) if module.name in WANTED else ""
        lines.append(f"{module.name}.ko\t{needs}\t{drives}\n")
    return "".join(lines)
