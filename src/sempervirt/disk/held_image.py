"""The image of a running disk, as its agent holds it: see `disk.image`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.disk import image
from sempervirt.disk.image import SOUND, Finding, Identity, ImageFile, ImageState, Sight
from sempervirt.host.storage_call import DEADLINE_S, call_storage

# How often it is looked at; a few system calls.
LOOK_S = 5.0
# While an agent looks for an image nobody supervises the backends of its VM.
ADOPTION_DEADLINE_S = 1.0


class HeldImage:
    """The image of the disk `disk` (VM/DISK) whose path is `path`.

    `identity` is None for a moment only: where an earlier agent did not write it down, and the
    storage does not answer. Without a `file` nothing can be started from it.
    """

    def __init__(self, disk: str, path: Path, file: ImageFile | None, identity: Identity | None):
        self.path = path
        self.file = file
        self.identity = file.identity if file else identity
        self.finding = SOUND
        self._disk = disk
        self._closed = False
        if file is None:
            self._not_found()

    @classmethod
    async def begin(cls, disk: str, path: Path) -> HeldImage:
        """What is at `path` now. Raises InvalidRequest, and Unavailable for silent storage."""
        try:
            return cls(disk, path, await call_storage(path, partial(ImageFile.open, path)), None)
        except OSError as error:
            raise InvalidRequest(
                f"disk {disk}: the image {path} cannot be opened: {error.strerror}",
                remedy="correct the path or its permissions",
            ) from error

    @classmethod
    async def adopt(
        cls, disk: str, path: Path, identity: Identity | None, pids: list[int]
    ) -> HeldImage:
        """The image that a VM was started with, from its path or from a backend (`pids`, the active
        one first). Without an `identity` on record it is what the active backend has locked.
        """
        found = cls(disk, path, None, identity)
        await found._search(pids, ADOPTION_DEADLINE_S)
        return found

    def require(self) -> ImageFile:
        """The image, to start a process from. Raises Unavailable when there is none."""
        if self.file is None:
            raise Unavailable(self.finding.cause, remedy=self.finding.remedy)
        return self.file

    async def look(self, pids: list[int], served_bytes: Callable[[], int | None]) -> bool:
        """Looks what has become of it, and whether that is another finding than before."""
        before = self.finding
        if self.file is None:
            await self._search(pids, DEADLINE_S)
        sight = await self._sight()
        if sight is not None:
            self.finding = image.judge(self._disk, self.path, sight, served_bytes())
        return self.finding != before

    async def _sight(self) -> Sight | None:
        """What is seen of it now; None when the storage does not answer."""
        if self.file is None:
            return None
        # A copy, so that the number cannot be another file's before a slow call ends.
        copy = os.dup(self.file.descriptor)

        def look() -> Sight:
            try:
                return ImageFile(copy).look(self.path)
            finally:
                os.close(copy)

        try:
            return await call_storage(self.path, look)
        except (OSError, Unavailable):
            return None

    async def _search(self, pids: Iterable[int], timeout_s: float) -> None:
        identity, path = self.identity, self.path

        def find() -> ImageFile | None:
            if identity is not None:
                return image.find(identity, path, pids)
            locked = (image.locked_by(pid) for pid in pids)
            return next((file for file in locked if file is not None), None) or ImageFile.open(path)

        try:
            found = await call_storage(path, find, timeout_s)
        except (OSError, Unavailable) as error:
            said = error.message if isinstance(error, Unavailable) else error.strerror
            cause = f"disk {self._disk}: the image {path} is not to be had: {said}"
            self.finding = Finding(ImageState.GONE, cause, "it is looked for again all the time")
            return
        if found is None:
            self._not_found()
        elif self._closed:
            found.close()
        else:
            self.file, self.identity, self.finding = found, found.identity, SOUND

    def _not_found(self) -> None:
        if self.identity is not None:
            self.finding = image.gone(self._disk, self.path, self.identity)

    def close(self) -> None:
        """Lets go of it."""
        self._closed = True
        if self.file is not None:
            self.file.close()
            self.file = None
