"""Images that are the whole disk, and those above which layers stand (docs/design/snapshots.md)."""

from __future__ import annotations

from pathlib import Path

from sempervirt.core.errors import StateConflict
from sempervirt.host.storage_call import call_storage
from sempervirt.store.epoch import read_epoch, record_path


async def require_whole(image: Path, what: str, record: Path | None = None) -> None:
    """For whoever reads or writes an image by itself: `what` completes "cannot be …", `record` is
    the image's epoch record, if that does not stand beside the image's path.

    Raises StateConflict when layers stand above the image: the newest blocks of the disk are in
    those. Raises what `read_epoch` raises, and Unavailable when the storage does not answer.
    """

    def layered() -> bool:
        found = read_epoch(record or record_path(image))
        return found is not None and found.layered

    if await call_storage(image, layered):
        raise StateConflict(
            f"the image {image} cannot be {what}: layers stand above it, and it is not the whole "
            "disk",
            remedy='serve it by backend = "blkd", which reads them; semper disk export makes one '
            "image of a snapshot",
        )
