"""What has to outlive a power cut was flushed, and its name as well.

The medium keeps what `fsync` was called for, and nothing else: of a file its content, of a
directory its names. Real files; only the calls are watched.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from sempervirt.host import records
from sempervirt.host.records import make_directory, write_record
from sempervirt.store import epoch
from sempervirt.store.registry import Claim
from sempervirt.trust.authority import Authority
from sempervirt.trust.keyfiles import write_private, write_public

CLAIM = Claim("web", "aachen", 3, "ab" * 16, ())


class Medium:
    """What a power cut would leave of the files below `root`, which was flushed when empty."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._names: dict[int, dict[str, int]] = {root.stat().st_ino: {}}
        self._data: dict[int, bytes] = {}
        self.flushes = 0
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        """As os.fsync."""
        self._fsync(descriptor)
        self.flushes += 1
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            self._names[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self._data[inode] = path.read_bytes()

    def left(self, path: Path) -> bytes | None:
        """The content of a file, None when its name is not there."""
        inode = self._root.stat().st_ino
        for name in path.relative_to(self._root).parts:
            found = self._names.get(inode, {}).get(name)
            if found is None:
                return None
            inode = found
        return self._data.get(inode, b"")


@pytest.fixture
def medium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Medium:
    return Medium(tmp_path, monkeypatch)


def _record(root: Path) -> Path:
    make_directory(root / "state" / "deep", 0o700)
    path = root / "state" / "deep" / "cluster.json"
    write_record(path, 1, {"a": 1}, durable=True)
    return path


def _key(root: Path) -> Path:
    write_private(root / "trust" / "host.key", ec.generate_private_key(ec.SECP256R1()))
    return root / "trust" / "host.key"


def _certificate(root: Path) -> Path:
    write_public(root / "trust" / "host.crt", "text")
    return root / "trust" / "host.crt"


def _authority(root: Path) -> Path:
    Authority.create(root / "trust" / "authority", "cluster")
    return root / "trust" / "authority" / "authority.key"


def _claim(root: Path) -> Path:
    epoch.advance(root / "disk.raw.epoch", CLAIM)
    return root / "disk.raw.epoch"


WRITERS = [_record, _key, _certificate, _authority, _claim]


@pytest.mark.parametrize("write", WRITERS)
def test_what_was_written_is_left_after_a_power_cut(
    tmp_path: Path, medium: Medium, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    assert medium.left(path) == path.read_bytes()


@pytest.mark.parametrize("write", WRITERS)
def test_a_directory_that_is_not_flushed_is_noticed(
    tmp_path: Path, medium: Medium, write: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("host.records", "trust.keyfiles", "store.epoch"):
        monkeypatch.setattr(f"sempervirt.{module}.flush_directory", lambda _directory: None)
    assert medium.left(write(tmp_path)) is None


def test_a_file_that_is_not_flushed_is_noticed(tmp_path: Path, medium: Medium) -> None:
    path = tmp_path / "record.json"
    write_record(path, 1, {"a": 1})
    records.flush_directory(tmp_path)
    assert medium.left(path) == b""


def test_a_claim_that_stands_on_record_is_flushed_before_it_is_admitted(
    tmp_path: Path, medium: Medium, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw.epoch"

    class Died(Exception):
        pass

    def die(_descriptor: int) -> None:
        raise Died

    epoch.identify(path)  # another wrote the first record
    before = medium.left(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", die)
        with pytest.raises(Died):
            epoch.advance(path, CLAIM)
    assert path.read_bytes() != medium.left(path) == before
    epoch.advance(path, CLAIM)
    assert medium.left(path) == path.read_bytes()
