"""The epoch record of an image: its bytes, its rule, and what a crash may leave of it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sempervirt.core.errors import Unavailable
from sempervirt.host.records import RecordDamaged, RecordNewer
from sempervirt.store import epoch
from sempervirt.store.epoch import (
    FILE_BYTES,
    SLOT_BYTES,
    Admission,
    EpochRecord,
    admit,
    decode,
    encode,
)
from sempervirt.store.registry import Claim, StaleClaim

C1, C2 = "11" * 16, "22" * 16
IMAGE = "0123456789abcdef" * 2


def claim(number: int, identifier: str = C1, host: str = "a") -> Claim:
    return Claim("web", host, number, identifier)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.raw"
    image.touch()
    return epoch.record_path(image)


def test_the_layout_is_the_one_that_is_drawn() -> None:
    """By hand, without the code under test: semper-blkd reads the same bytes."""
    record = EpochRecord(IMAGE, sequence=3, epoch=7, claim=C2, holder="höst", released=True)
    expected = bytearray(512)
    expected[0:8] = b"SVEPOCH1"
    struct.pack_into("<I", expected, 8, 1)
    struct.pack_into("<QQ", expected, 16, 3, 7)
    expected[32:48] = bytes.fromhex(IMAGE)
    expected[48:64] = bytes.fromhex(C2)
    struct.pack_into("<II", expected, 64, 1, 5)
    expected[72:77] = "höst".encode()
    struct.pack_into("<I", expected, 12, zlib.crc32(expected))
    assert encode(record) == bytes(expected)
    assert decode(bytes(expected)) == record


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_slot_with_any_wrong_byte_is_no_record(place: int, change: int) -> None:
    slot = bytearray(encode(EpochRecord(IMAGE, epoch=7, claim=C1, holder="a")))
    slot[place] ^= change
    assert decode(bytes(slot)) is None


def test_an_image_with_layers_keeps_the_version_that_earlier_releases_refuse(path: Path) -> None:
    layered = EpochRecord(IMAGE, epoch=7, claim=C1, layered=True)
    assert encode(layered)[8] == 2
    path.write_bytes(bytes(SLOT_BYTES) + encode(layered))
    assert epoch.advance(path, claim(9)).layered
    assert epoch.read_epoch(path) == epoch.advance(path, claim(9))
    epoch.release(path, claim(9))
    assert decode(path.read_bytes()[SLOT_BYTES:]) is not None
    released = epoch.read_epoch(path)
    assert released is not None
    assert (released.layered, released.released) == (True, True)


def test_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    slot = bytearray(encode(EpochRecord(IMAGE, epoch=7, claim=C1)))
    struct.pack_into("<I", slot, 8, 3)
    struct.pack_into("<I", slot, 12, 0)
    struct.pack_into("<I", slot, 12, zlib.crc32(slot))
    path.write_bytes(bytes(SLOT_BYTES) + slot)
    before = path.read_bytes()
    with pytest.raises(RecordNewer, match="version 3"):
        epoch.read_epoch(path)
    with pytest.raises(RecordNewer, match="version 3"):
        epoch.advance(path, claim(9))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (claim(8, C2), Admission.ADVANCED),
        (claim(8, C1), Admission.ADVANCED),
        (claim(7, C1), Admission.RENEWED),
        (claim(7, C2), Admission.STALE),  # a store that was restored gave the epoch again
        (claim(6, C1), Admission.STALE),
        (claim(0, C1), Admission.STALE),
    ],
)
def test_the_rule(asked: Claim, expected: Admission) -> None:
    assert admit(EpochRecord(IMAGE, epoch=7, claim=C1, holder="a"), asked) is expected


def test_an_image_gets_its_id_once(path: Path) -> None:
    assert epoch.read_epoch(path) is None
    first = epoch.identify(path)
    assert epoch.identify(path) == first
    epoch.advance(path, claim(3))
    assert epoch.identify(path) == first
    assert path.stat().st_size == FILE_BYTES
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_record_stands_once_whatever_link_leads_to_the_image(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    image = tmp_path / "real" / "disk.raw"
    image.touch()
    (tmp_path / "link.raw").symlink_to(image)
    assert epoch.record_path(tmp_path / "link.raw") == epoch.record_path(image)


def test_epochs_only_grow(path: Path) -> None:
    epoch.advance(path, claim(3))
    assert epoch.advance(path, claim(3)).sequence == epoch.advance(path, claim(3)).sequence
    later = epoch.advance(path, claim(5, C2, "b"))
    assert (later.epoch, later.claim, later.holder) == (5, C2, "b")
    with pytest.raises(StaleClaim, match="held by b under epoch 5; the claim of a has epoch 3"):
        epoch.advance(path, claim(3))
    with pytest.raises(StaleClaim):
        epoch.release(path, claim(3))
    epoch.release(path, claim(5, C2, "b"))
    released = epoch.read_epoch(path)
    assert released is not None
    assert (released.epoch, released.released) == (5, True)
    with pytest.raises(StaleClaim):  # released is not forgotten
        epoch.advance(path, claim(4))
    assert not epoch.advance(path, claim(6)).released


def test_a_torn_write_leaves_the_record_before_it(path: Path) -> None:
    """Every length of a write that was cut off: never a claim that was not finished."""
    epoch.advance(path, claim(3))
    before = path.read_bytes()
    epoch.advance(path, claim(4, C2))
    after = path.read_bytes()
    changed = [
        place
        for place in range(len(after))
        if before[place : place + 1] != after[place : place + 1]
    ]
    start = changed[0] // SLOT_BYTES * SLOT_BYTES
    for length in range(SLOT_BYTES + 1):
        torn = bytearray(before.ljust(len(after), b"\0"))
        torn[start : start + length] = after[start : start + length]
        path.write_bytes(torn)
        found = epoch.read_epoch(path)
        assert found is not None
        assert found.epoch == (4 if bytes(torn) == after else 3)


def test_a_record_that_says_nothing_refuses_the_image(path: Path) -> None:
    path.write_bytes(b"SVEPOCH1 but no more")
    with pytest.raises(RecordDamaged, match="make sure that no host uses the image"):
        epoch.read_epoch(path)
    with pytest.raises(RecordDamaged):
        epoch.advance(path, claim(9))
    path.write_bytes(b"")  # a creation that was interrupted
    assert epoch.read_epoch(path) is None
    assert epoch.advance(path, claim(1)).epoch == 1


def test_no_link_is_followed_and_a_missing_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "disk.raw.epoch").symlink_to(tmp_path / "other")
    with pytest.raises(Unavailable, match="cannot use"):
        epoch.advance(tmp_path / "disk.raw.epoch", claim(1))
    with pytest.raises(Unavailable, match="cannot use"):
        epoch.advance(tmp_path / "absent" / "disk.raw.epoch", claim(1))


RACER = """
import sys
from pathlib import Path
from sempervirt.store import epoch
from sempervirt.store.registry import Claim, StaleClaim

path, host, first, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for number in range(first, first + 200 * step, step):
    try:
        epoch.advance(path, Claim("web", host, number, f"{number:032x}"))
        print(number)
    except StaleClaim:
        pass
"""


def test_two_processes_that_race_never_lower_an_epoch(path: Path) -> None:
    def race(host: str, first: int) -> list[int]:
        command = [sys.executable, "-c", RACER, str(path), host, str(first), "2"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        return [int(line) for line in done.stdout.split()]

    with ThreadPoolExecutor() as pool:
        racers = [pool.submit(race, "a", 1), pool.submit(race, "b", 2)]
        won = [racer.result() for racer in racers]
    last = epoch.read_epoch(path)
    assert last is not None
    # Each sequence is one admitted claim, and the first write gave the id: none was lost.
    assert last.sequence == 1 + len(won[0]) + len(won[1])
    assert last.epoch == max(won[0] + won[1]) == 400


def test_a_full_medium_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch.advance(path, claim(3))

    def refuse(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(Unavailable, match="No space left"):
        epoch.advance(path, claim(4))
    monkeypatch.undo()
    kept = epoch.read_epoch(path)
    assert kept == replace(
        EpochRecord(IMAGE),
        image=kept.image if kept else "",
        sequence=2,
        epoch=3,
        claim=C1,
        holder="a",
    )
