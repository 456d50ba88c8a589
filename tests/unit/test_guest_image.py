"""Finding and building the guest image."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.errors import NotFound
from sempervirt.guest import debian, image
from sempervirt.guest.__main__ import main
from sempervirt.guest.initramfs import Recipe, build

RELEASE = "6.1.0-99-cloud-amd64"


SCRIPT = b"#!/bin/busybox sh\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tree = tmp_path / "kernel"
    drivers = tree / "modules/kernel/drivers"
    drivers.mkdir(parents=True)
    (tree / "vmlinuz").write_bytes(b"kernel")
    (tree / "release").write_text(f"{RELEASE}\n")
    (tree / "modules/modules.builtin").write_text("")
    for name in ("virtio_pci", "virtio_blk", "virtio_console"):
        (drivers / f"{name}.ko").write_bytes(b"\0depends=\0alias=virtio:x\0")
    probe = Path("/bin/true")
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"busybox")
    return Recipe(tree, probe, busybox)


def test_an_image_is_built_once(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made, built = build(recipe, output)
    assert built
    assert made.release == RELEASE
    assert made.kernel.read_bytes() == b"kernel"
    archive = gzip.decompress(made.initrd.read_bytes())
    for name in (b"init\0", b"bin/busybox\0", b"lib/modules-sv/list\0", b"virtio_blk.ko\0"):
        assert name in archive
    before = made.initrd.stat().st_mtime_ns
    assert build(recipe, output) == (made, False)
    assert made.initrd.stat().st_mtime_ns == before
    assert sorted(path.name for path in output.iterdir()) == [
        ".initrd-stamp", "initrd.img", "release", "vmlinuz",
    ]  # fmt: skip


def test_a_change_or_a_missing_file_builds_it_again(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made, _ = build(recipe, output)
    recipe.busybox.write_bytes(b"another")
    assert build(recipe, output)[1]
    made.kernel.unlink()
    assert build(recipe, output)[1]
    assert not build(recipe, output)[1]


def test_a_missing_ingredient_is_named(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.kernel_tree / "vmlinuz").unlink()
    with pytest.raises(NotFound, match="vmlinuz is missing; run `make guest`"):
        build(recipe, tmp_path / "out")
    arguments = ["build", "--kernel-tree", str(recipe.kernel_tree), "--init", str(recipe.init)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 4
    assert "sempervirt.guest: error: " in capsys.readouterr().err


def test_the_named_folder_is_the_only_place(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMPERVIRT_GUEST_DIR", str(tmp_path / "out"))
    with pytest.raises(NotFound, match="run `make guest`"):
        image()
    made, _ = build(recipe, tmp_path / "out")
    assert image() == made


def test_an_installed_package_looks_in_the_home(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEMPERVIRT_GUEST_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    site = tmp_path / "lib/site-packages/sempervirt/guest/location.py"
    monkeypatch.setattr("sempervirt.guest.location.__file__", str(site))
    monkeypatch.chdir(tmp_path)
    made, _ = build(recipe, tmp_path / "share/sempervirt/guest")
    assert image() == made


def test_a_script_may_be_the_first_process_and_have_more_drivers(
    recipe: Recipe, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_bytes(SCRIPT)
    ext4 = recipe.kernel_tree / "modules/kernel/drivers/ext4.ko"
    ext4.write_bytes(b"\0depends=\0")
    plain, _ = build(replace(recipe, init=script), tmp_path / "out")
    without = gzip.decompress(plain.initrd.read_bytes())
    more = replace(recipe, init=script, modules=("ext4", "absent"))
    made, built = build(more, tmp_path / "out")
    assert built
    archive = gzip.decompress(made.initrd.read_bytes())
    assert SCRIPT in archive
    assert b"ext4.ko\0" in archive
    assert b"ext4.ko\0" not in without


def test_the_debian_guest_stands_beside_the_small_one(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMPERVIRT_GUEST_DIR", str(tmp_path / "guest"))
    build(recipe, tmp_path / "debian")
    with pytest.raises(NotFound, match="run `make debian-guest`"):
        debian()
    (tmp_path / "debian/root.raw").write_bytes(b"disk")
    assert debian().root == tmp_path / "debian/root.raw"
    assert debian().kernel.read_bytes() == b"kernel"
