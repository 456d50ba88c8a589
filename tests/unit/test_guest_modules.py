"""Choosing the guest's kernel modules from a made-up kernel."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from sempervirt.core.errors import InvalidRequest, NotFound
from sempervirt.guest.modules import choose_modules, module_list, read_module


def module(
    tree: Path, name: str, *, depends: str = "", softdep: str = "", aliases: tuple[str, ...] = ()
) -> Path:
    """Writes a file that looks like a module to whoever reads its .modinfo."""
    entries = [f"name={name}", f"depends={depends}", *(f"alias={alias}" for alias in aliases)]
    if softdep:
        entries.append(f"softdep={softdep}")
    path = tree / f"kernel/drivers/{name}.ko"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\0".join(["\x7fELF", *entries, ""])
    path.write_bytes(text.encode("latin-1") + b"\0more")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "modules.builtin").write_text("kernel/drivers/nvme/nvme.ko\n")
    module(tmp_path, "virtio_ring")
    module(tmp_path, "virtio", depends="virtio_ring")
    module(tmp_path, "virtio_pci", depends="virtio,virtio_ring", aliases=("pci:v00001AF4d*",))
    module(tmp_path, "virtio_blk", depends="virtio-ring,virtio", aliases=("virtio:d00000002v*",))
    module(tmp_path, "virtio_console", depends="virtio", aliases=("virtio:d00000003v*",))
    module(tmp_path, "sound", depends="virtio", aliases=("pci:v00001234d*",))
    return tmp_path


def test_each_module_comes_after_what_it_needs(tree: Path) -> None:
    names = [chosen.name for chosen in choose_modules(tree)]
    assert names == ["virtio_ring", "virtio", "virtio_pci", "virtio_blk", "virtio_console"]


def test_the_list_tells_the_guest_everything(tree: Path) -> None:
    lines = module_list(choose_modules(tree)).splitlines()
    assert lines[0] == "virtio_ring.ko\t-\t"
    assert "virtio_blk.ko\tvirtio_ring.ko virtio.ko\tvirtio:d00000002v*" in lines


def test_soft_dependencies_come_first_if_the_kernel_has_them(tree: Path) -> None:
    module(tree, "crc")
    module(tree, "virtio_blk", depends="virtio", softdep="pre: crc absent post: sound")
    names = [chosen.name for chosen in choose_modules(tree)]
    assert names.index("crc") < names.index("virtio_blk")
    assert "sound" not in names


def test_a_kernel_without_the_disk_driver_is_refused(tree: Path) -> None:
    (tree / "kernel/drivers/virtio_blk.ko").unlink()
    with pytest.raises(NotFound, match="no driver virtio_blk; choose"):
        choose_modules(tree)
    (tree / "modules.builtin").write_text("kernel/drivers/block/virtio_blk.ko\n")
    assert "virtio_blk" not in [chosen.name for chosen in choose_modules(tree)]


def test_compressed_modules_are_read(tree: Path) -> None:
    path = tree / "kernel/drivers/virtio_blk.ko"
    plain = read_module(path)
    packed = path.with_name("virtio_blk.ko.xz")
    packed.write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    assert read_module(packed) == plain
    assert "virtio_blk" in [chosen.name for chosen in choose_modules(tree)]


def test_an_unknown_compression_is_named(tree: Path) -> None:
    path = tree / "kernel/drivers/x.ko.lzo"
    path.write_bytes(b"")
    with pytest.raises(InvalidRequest, match=r"\.lzo"):
        read_module(path)
