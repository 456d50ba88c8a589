"""An image above which layers stand is not the whole disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sempervirt.core.errors import StateConflict
from sempervirt.qemu.spec import VmSpec
from sempervirt.store.epoch import EpochRecord, encode
from sempervirt.store.whole import require_whole
from sempervirt.vm.setup import inspect_images


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    return image


def put(path: Path, *, layered: bool) -> None:
    path.write_bytes(bytes(512) + encode(replace(EpochRecord("1" * 32), layered=layered)))


async def test_nobody_copies_a_part_of_a_disk_for_the_disk(image: Path, tmp_path: Path) -> None:
    await require_whole(image, "copied")
    record = Path(f"{image}.epoch")
    put(record, layered=False)
    await require_whole(image, "copied")
    put(record, layered=True)
    with pytest.raises(StateConflict, match="cannot be copied: layers stand above it"):
        await require_whole(image, "copied")
    elsewhere = tmp_path / "other.epoch"
    put(elsewhere, layered=False)
    await require_whole(image, "copied", elsewhere)


@pytest.mark.parametrize("backend", ["blkd", "qemu"])
async def test_qemu_does_not_serve_an_image_with_layers(image: Path, backend: str) -> None:
    put(Path(f"{image}.epoch"), layered=True)
    disk = {"name": "root", "image": str(image), "backend": backend}
    spec = VmSpec.model_validate({"name": "web", "disks": [disk]})
    if backend == "blkd":
        assert (await inspect_images(spec, used=True)).keys() == {"root"}
        return
    with pytest.raises(StateConflict, match="served by QEMU itself"):
        await inspect_images(spec, used=True)
