"""An image that was claimed, as agent and backend see it: what one writes the other reads."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import ImageLocked, InvalidRequest, Unavailable
from sempervirt.disk.backend import PROGRAM, Blkd, DiskOptions, ImageTitle, Launch
from sempervirt.host.control import ControlSocket
from sempervirt.host.process import Exit
from sempervirt.host.refusals import refusal
from sempervirt.store import epoch
from sempervirt.store.registry import Claim, StaleClaim

START_S = 90.0
C7, C8 = "77" * 16, "88" * 16


class Backend:
    """A process of semper-blkd, and its control socket."""

    def __init__(self, process: subprocess.Popen[str], control: Path) -> None:
        self.process = process
        self._control = ControlSocket(control, PROGRAM)

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Asks, as soon as it listens. Raises ImageLocked when it would not serve."""
        async with asyncio.timeout(START_S):
            while True:
                try:
                    return await self._control.ask(command, **arguments)
                except Unavailable:
                    if (code := self.process.poll()) is not None:
                        assert self.process.stderr is not None
                        words = self.process.stderr.read().strip().splitlines()[-1]
                        raise refusal("disk d", "the backend", Exit(code=code), words) from None
                    await asyncio.sleep(0.01)  # poll interval

    async def state(self) -> str:
        """What it says of its claim."""
        return str((await self.ask("status"))["claim"]["state"])


@asynccontextmanager
async def backend(image: Path, number: int, title: ImageTitle | None) -> AsyncIterator[Backend]:
    """A backend of the image; killed in the end."""
    command = Blkd()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(image.with_name(f"disk-{number}")))
        listener.listen()
        control = image.with_name(f"control-{number}")
        launch = Launch(command.binary(), DiskOptions(image), listener.fileno(), control,
                        wait_for_lock=False, title=title)  # fmt: skip
        process = subprocess.Popen(  # noqa: ASYNC220
            command.argv(launch),
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Backend(process, control)
        finally:
            process.kill()
            process.communicate()


async def test_what_the_agent_claims_the_backend_holds(disk_image: Path) -> None:
    record = epoch.record_path(disk_image)
    seven = ImageTitle(record, "a", 7, C7)
    eight = ImageTitle(record, "b", 8, C8)
    image_id = epoch.identify(record)
    async with backend(disk_image, 1, eight) as newer:
        assert await newer.state() == "admitted"
    # It was killed, which releases nothing.
    held = epoch.read_epoch(record)
    assert held is not None
    assert (held.image, held.epoch, held.claim, held.holder) == (image_id, 8, C8, "b")
    assert not held.released
    for number, title, words in [
        (2, seven, "held by b under epoch 8; the claim of a has epoch 7"),
        (3, None, "held by b under epoch 8, and no claim was given"),
    ]:
        async with backend(disk_image, number, title) as late:
            with pytest.raises(ImageLocked, match=words):
                await late.ask("status")
    with pytest.raises(StaleClaim):
        epoch.advance(record, Claim("web", "a", 7, C7))
    async with backend(disk_image, 4, eight) as again:
        assert await again.state() == "admitted"
        again.process.terminate()
        again.process.wait(START_S)
    held = epoch.read_epoch(record)
    assert held is not None
    assert held.released


async def test_an_awaited_claim_is_taken_on_command(disk_image: Path) -> None:
    record = epoch.record_path(disk_image)
    epoch.advance(record, Claim("web", "a", 7, C7))
    async with backend(disk_image, 1, ImageTitle(record, "b")) as ready:
        assert await ready.state() == "awaited"
        with pytest.raises(InvalidRequest, match="32 hexadecimal digits"):
            await ready.ask("claim", epoch=8, claim="8")
        taken = await ready.ask("claim", epoch=8, claim=C8)
        assert taken["claim"] == {"state": "given", "epoch": 8, "id": C8, "holder": "b"}
    held = epoch.read_epoch(record)
    assert held is not None
    assert held.epoch == 7  # no queue was started
