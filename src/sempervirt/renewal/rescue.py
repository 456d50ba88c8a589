"""A copy of a running disk's image, while the guest stands still.

    hold ──► on record ──► pause: every write is drained ──► copy ──► the guest runs on
                                                             └── fails: nothing is left of the copy

A guest that was paused stays paused. If the agent dies meanwhile, the next one lets the guest run
on (`renewal.recovery`); what was copied is not at its place then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from sempervirt.core.errors import (
    InvalidRequest,
    OutcomeUnknown,
    RollbackFailed,
    SempervirtError,
    Unavailable,
)
from sempervirt.disk import rescue
from sempervirt.disk.driver import Disk
from sempervirt.disk.image import ImageFile
from sempervirt.disk.rescue import Made
from sempervirt.host import background
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.state import Request, Runstate
from sempervirt.renewal.guest import HeldGuest
from sempervirt.store.whole import require_whole
from sempervirt.vm.vm import LongWork, Progress, Vm
from sempervirt.vm.work import Rescuing

T = TypeVar("T")

# For copying an image; whoever waits longer has a storage problem.
COPY_DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Rescued:
    """What was made, and how long the guest stood still for it; None: it did not run."""

    made: Made
    paused_ms: float | None


async def rescue_disk(vm: Vm, disk: Disk, target: Path) -> Rescued:
    """Puts a copy of a disk's image at `target`; or the image itself, if that was renamed and
    `target` is its path.

    Raises InvalidRequest, StateConflict or Unavailable: the VM is as it was, and nothing is at
    `target`. Raises RollbackFailed when the guest stays paused.
    """
    vm.ledger.require_idle()
    image = disk.image.require()
    await _call(target, partial(rescue.check, image, target))
    if target == disk.image.path:
        made = await _call(target, partial(rescue.link, image, target))
        if made is not None:
            await disk.look_at_image()
            return Rescued(made, None)
    title = disk.setup.title
    record = None if title is None else title.epoch_file
    await require_whole(disk.image.path, "copied", record)
    work = _Copying(vm, disk, image, target)
    vm.employ(work)
    return await work.run()


async def _call(target: Path, call: Callable[[], T]) -> T:
    try:
        return await call_storage(target, call)
    except OSError as error:
        raise InvalidRequest(
            f"{target} cannot be used: {error.strerror}", remedy="name another path"
        ) from error


class _Copying(HeldGuest):
    """One copy: a `Renewal`, for as long as it goes on."""

    def __init__(self, vm: Vm, disk: Disk, image: ImageFile, target: Path) -> None:
        super().__init__(vm, Request.RESCUE, target)
        self.over = False
        self._disk = disk
        self._image = image
        self._target = target
        self._stop = threading.Event()
        self._task: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[Rescued] = asyncio.get_running_loop().create_future()

    @property
    def doing(self) -> str:
        """The work, in plain words."""
        return f"a rescue of disk {self._disk.name}"

    def shown(self) -> tuple[Runstate, str] | None:
        """The guest stands still on purpose."""
        return Runstate.PAUSED, f"{self.doing} is under way"

    async def run(self) -> Rescued:
        """To the end, also when whoever asked does not wait for it any more."""
        self._task = background.start(self._work(), self.doing)
        return await asyncio.shield(self._answer)

    async def detach(self) -> None:
        """Gives the copy up, and lets the guest run on."""
        self._stop.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        try:
            done = await self._rescue()
        except SempervirtError as error:
            self._note(f"not copied: {error.message}", logging.WARNING)
            ended = self.ended()
            self._end(Unavailable(f"the VM has ended meanwhile: {ended}") if ended else error)
        except OSError as error:
            self._end(Unavailable(f"{self._target}: {error.strerror}", remedy="see that medium"))
        else:
            self._note(f"{done.made.how.value} to {self._target}", logging.INFO)
            self.over = True
            self._answer.set_result(done)
        finally:
            if not self._answer.done():
                self._end(OutcomeUnknown(f"{self.doing} has failed"))
            self._vm.progress = None

    def _end(self, error: SempervirtError) -> None:
        self.over = True
        self._answer.set_exception(error)
        self._answer.exception()  # nobody may wait for it any more

    async def _rescue(self) -> Rescued:
        running = await self.hold()
        try:
            self._vm.begin(Rescuing(self._disk.setup.short_name, resume=running))
        except SempervirtError:
            self.release(running=running)
            raise
        began = time.monotonic()
        try:
            await self.stop(pause=running)
            made = await self._copy()
        finally:
            await self._go_on(running=running)
        return Rescued(made, (time.monotonic() - began) * 1000 if running else None)

    async def _copy(self) -> Made:
        def progress(done: int, total: int) -> None:
            self._vm.progress = Progress(LongWork.RESCUING, done, total)

        # Of its own, so that its number cannot be another file's before a slow copy ends.
        image = ImageFile(os.dup(self._image.descriptor))

        def copy() -> Made:
            try:
                return rescue.copy(image, self._target, progress, self._stop)
            finally:
                image.close()

        copying = asyncio.ensure_future(call_storage(self._target, copy, COPY_DEADLINE_S))
        ended = asyncio.ensure_future(self._wait_ended())
        try:
            await asyncio.wait([copying, ended], return_when=asyncio.FIRST_COMPLETED)
            if not copying.done():  # nothing writes any more, and nothing of it is counted on
                self._stop.set()
            return await copying
        finally:
            self._stop.set()
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ended

    async def _wait_ended(self) -> None:
        await self._machine.changes.wait_until(
            lambda: bool(self.ended()), timeout_s=None, what="the end of the VM"
        )

    async def _go_on(self, *, running: bool) -> None:
        try:
            if running and not self.ended():
                await self.cont()
        except SempervirtError as error:
            running = False
            raise RollbackFailed(
                f"VM {self._vm.name} stays paused after {self.doing}: {error.message}",
                remedy=f"let it run on: semper vm resume {self._vm.name}",
            ) from error
        finally:
            self._vm.end_work()
            self.release(running=running)

    def _note(self, text: str, level: int) -> None:
        self._disk.history.rescued(text, level)
