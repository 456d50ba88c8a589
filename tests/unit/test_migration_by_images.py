"""A VM that changes hands by its images: of all who may want it one has it, whatever fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sempervirt.core.errors import OutcomeUnknown, StateConflict, Unavailable
from sempervirt.migration import by_images
from sempervirt.migration.by_images import ImageTransfer, ImageWord
from sempervirt.migration.events import Side
from sempervirt.qemu.spec import VmSpec
from sempervirt.store import epoch
from sempervirt.store.records import Custody
from sempervirt.store.registry import Claim, Registry, StaleClaim
from sempervirt.store.sqlite import SqliteStore
from sempervirt.vm.work import Arriving


class Moving:
    """A VM with two images that a has under epoch 7, and what both hosts do with it."""

    def __init__(self, place: Path) -> None:
        self.paths = [place / f"{name}.raw" for name in ("root", "data")]
        for path in self.paths:
            path.touch()
        self.records = [epoch.record_path(path) for path in self.paths]
        images = tuple(epoch.identify(record) for record in self.records)
        self.claim = Claim("web", "a", 7, "1" * 32, images)
        for record in self.records:
            epoch.advance(record, self.claim)
        disks = [{"name": path.stem, "image": str(path)} for path in self.paths]
        vm: Any = SimpleNamespace(
            name="web", spec=VmSpec.model_validate({"name": "web", "disks": disks})
        )
        self.source = ImageTransfer(vm, self.claim, "b")
        work = Arriving("0" * 32, "a", True, 7, images, by_images=True)
        self.destination = ImageWord(vm, "b", work)
        self.elsewhere = ImageWord(vm, "c", work)

    def on_record(self) -> list[tuple[str, int]]:
        """Whose each image is."""
        found = [epoch.read_epoch(record) for record in self.records]
        return [(one.holder, one.epoch) for one in found if one is not None]


@pytest.fixture
def moving(tmp_path: Path) -> Moving:
    return Moving(tmp_path)


async def test_a_hand_over_is_seen_by_both_and_ends_the_claim_before(moving: Moving) -> None:
    await moving.source.begin()
    seen = await moving.destination.look()
    assert (seen.owner, seen.moving) == (Side.SOURCE, True)
    given = await moving.source.hand_over()
    assert moving.on_record() == [("b", 8)] * 2
    seen = await moving.destination.look()
    assert (seen.owner, seen.claim) == (Side.DESTINATION, given)
    assert await moving.source.make_certain() == given
    # What the store has given meanwhile is refused by the images, as is the claim before.
    for stale in (moving.claim, Claim("web", "c", 8, "3" * 32, moving.claim.images)):
        with pytest.raises(StaleClaim):
            epoch.advance(moving.records[0], stale)
    # Nor is it given twice.
    with pytest.raises(StaleClaim):
        await moving.source.hand_over()
    with pytest.raises(StaleClaim):
        await moving.source.withdraw()
    assert (await moving.elsewhere.look()).owner is Side.SOURCE


async def test_a_move_that_was_given_up_is_not_handed_over_by_a_late_answer(
    moving: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage hangs in the midst of the hand-over: its outcome is unknown, until the source
    gives up, which is certain whatever comes later.
    """
    await moving.source.begin()
    monkeypatch.setattr(by_images, "RECORD_S", 0.3)
    with epoch.held(moving.records[0], moving.claim):  # as a storage that does not answer
        with pytest.raises(OutcomeUnknown):
            await moving.source.hand_over()
        with pytest.raises(Unavailable):
            await moving.source.withdraw()
        assert moving.on_record() == [("a", 7)] * 2
    # The hand-over still waits for the lock, or has got it by now; one of the two wins.
    monkeypatch.setattr(by_images, "RECORD_S", 90.0)
    try:
        await moving.source.withdraw()
        expected = [("a", 7)] * 2
    except StaleClaim:
        expected = [("b", 8)] * 2
    await asyncio.sleep(0.3)  # poll interval
    assert moving.on_record() == expected


async def test_who_was_overtaken_cannot_give_the_vm_away(moving: Moving) -> None:
    """An operator has given the VM to c, whose claim is on record already."""
    await moving.source.begin()
    epoch.advance(moving.records[0], Claim("web", "c", 8, "3" * 32, moving.claim.images))
    with pytest.raises(StaleClaim):
        await moving.source.hand_over()
    seen = await moving.destination.look()
    assert (seen.owner, seen.moving) == (Side.SOURCE, False)
    assert await moving.source.make_certain() is None


async def test_an_image_whose_record_is_another_ones_says_nothing(moving: Moving) -> None:
    moving.records[0].unlink()
    with pytest.raises(Unavailable, match="gone"):
        await moving.destination.look()
    epoch.identify(moving.records[0])  # another id
    with pytest.raises(Unavailable, match="another image"):
        await moving.destination.look()


async def test_a_vm_that_writes_no_image_waits_for_the_store() -> None:
    vm: Any = SimpleNamespace(name="web", spec=VmSpec.model_validate({"name": "web"}))
    with pytest.raises(StateConflict, match="writes no image"):
        await ImageTransfer(vm, Claim("web", "a", 7, "1" * 32), "b").begin()


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    store = SqliteStore.open(tmp_path / "store.db")
    yield Registry(store)
    await store.close()


async def test_the_store_learns_of_it_afterwards(registry: Registry) -> None:
    images = ("9" * 32,)
    first = await registry.claim("web", "a", images)
    newer = Claim("web", "b", first.epoch + 1, "2" * 32, images)
    await registry.settle(newer)
    await registry.settle(newer)  # may be repeated
    found = await registry.find("web")
    assert (found.owner, found.epoch, found.custody) == ("b", newer.epoch, Custody.OWNED)
    with pytest.raises(StaleClaim):
        await registry.release(first)
    # The control: an older one, or one for another VM's image, changes nothing.
    for stale in (first, Claim("other", "c", newer.epoch + 1, "3" * 32, images)):
        with pytest.raises(StaleClaim):
            await registry.settle(stale)
    assert (await registry.find("web")) == found
    await registry.release(newer)
    assert (await registry.claim("web", "a", images)).epoch == newer.epoch + 1
