"""What take-overs have lost is on record for a week."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sempervirt.host.records import RecordDamaged
from sempervirt.standby.lost import KEPT_S, LOSSES_MAX, Loss, LostDisk, drop_lost, losses_of


def loss(number: int) -> Loss:
    """Of one take-over, at `number` seconds."""
    disk = LostDisk("root", Path(f"/srv/web.raw.standby-{number}"))
    return Loss(number, float(number) - 0.5, float(number), (disk,))


def test_losses_are_remembered_for_a_week(tmp_path: Path) -> None:
    record = losses_of(tmp_path, "web")
    assert record.read() == ()
    for number in (1, 2, 2):  # by an agent that does not know that another one has noted it
        record.add(loss(number))
    assert losses_of(tmp_path, "web").read() == (loss(1), loss(2))
    record.drop([loss(1)])
    assert record.read() == (loss(2),)
    record.drop([loss(2)])
    assert not record.path.exists()


@pytest.mark.parametrize("kept", ["", "used", "written since", "too early", "another clock"])
async def test_what_was_lost_goes_after_a_week(tmp_path: Path, kept: str) -> None:
    """Also of standbys that were forgotten; and nothing of a VM that is there."""
    own, image = tmp_path / "web.raw", tmp_path / "web.raw.standby-2"
    disks = (LostDisk("root", own), LostDisk("root", image))
    for path in (own, image):
        path.touch()
        os.utime(path, (100.0, 100.0 if kept != "written since" else 9000.0))
    losses_of(tmp_path, "web").add(Loss(3, 50.0, 100.0, disks))
    now = {"too early": 99.0 + KEPT_S, "another clock": 1e10}.get(kept, 101.0 + KEPT_S)
    await drop_lost(tmp_path, {image} if kept == "used" else (), now)
    assert own.exists(), "what a VM had before any standby is its owner's"
    assert image.exists() == bool(kept)
    assert bool(losses_of(tmp_path, "web").read()) == (kept in ("too early", "another clock"))


def test_the_newest_are_kept_when_there_are_many(tmp_path: Path) -> None:
    record = losses_of(tmp_path, "web")
    for number in range(LOSSES_MAX + 3):
        record.add(loss(number))
    numbers = [one.standby for one in record.read()]
    assert numbers == list(range(3, LOSSES_MAX + 3))


@pytest.mark.parametrize("text", ['{"version": 1}', '{"version": 1, "losses": [{}]}', "{"])
def test_a_damaged_record_is_told_and_left(tmp_path: Path, text: str) -> None:
    record = losses_of(tmp_path, "web")
    record.path.parent.mkdir()
    record.path.write_text(text)
    with pytest.raises(RecordDamaged):
        record.add(loss(1))
    assert record.path.read_text() == text
