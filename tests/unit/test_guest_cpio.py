"""The archive that the kernel unpacks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sempervirt.guest.cpio import Archive


def parse(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """Reads newc as the kernel does: name, mode, data, device numbers of each entry."""
    entries: list[tuple[str, int, bytes, tuple[int, int]]] = []
    at = 0
    while True:
        header = data[at : at + 110]
        assert header[:6] == b"070701"
        values = [int(header[6 + 8 * index : 14 + 8 * index], 16) for index in range(13)]
        mode, size, name_size = values[1], values[6], values[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            return entries
        contents = data[start : start + size]
        entries.append((name[:-1].decode(), mode, contents, (values[9], values[10])))
        at = (start + size + 3) & ~3


def sample() -> Archive:
    archive = Archive()
    archive.directory("bin")
    archive.file("bin/a", b"hello", executable=True)
    archive.file("plain", b"")
    archive.symlink("bin/b", "a")
    archive.character_device("console", 5, 1)
    return archive


def test_what_went_in_comes_out() -> None:
    assert parse(sample().to_bytes()) == [
        ("bin", 0o040755, b"", (0, 0)),
        ("bin/a", 0o100755, b"hello", (0, 0)),
        ("plain", 0o100644, b"", (0, 0)),
        ("bin/b", 0o120777, b"a", (0, 0)),
        ("console", 0o020600, b"", (5, 1)),
    ]


def test_the_same_files_give_the_same_archive() -> None:
    assert sample().to_bytes() == sample().to_bytes()


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio, the second opinion, is not there")
def test_cpio_agrees(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("bin")
    archive.file("bin/a", b"hello", executable=True)
    archive.symlink("bin/b", "a")
    command = ["cpio", "--extract", "--quiet"]
    subprocess.run(command, input=archive.to_bytes(), cwd=tmp_path, check=True)
    assert (tmp_path / "bin/b").read_bytes() == b"hello"
