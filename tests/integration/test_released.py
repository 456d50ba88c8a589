"""What a released semper-blkd cannot be told, whoever reaches its control socket."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sempervirt.core.errors import InvalidRequest, Unavailable
from sempervirt.disk.backend import PROGRAM, Blkd
from sempervirt.host.control import ControlSocket
from tests.faults import trial_backend

pytestmark = pytest.mark.timeout(700)  # the trial programs may have to be built
START_S = 90.0
FAULT = {"op": "write", "errno": "OK"}
# What only builds for tests hold: errors and lost writes on demand, and death on demand.
FOR_TESTS = (b"fault injection", b"FaultEngine", b"SEMPER_DIE_AT", b"SEMPER_DIE_IN")


@asynccontextmanager
async def backend(program: Path, place: Path) -> AsyncIterator[ControlSocket]:
    """A backend of an image of its own, which listens."""
    image, control = place / "disk.raw", place / "control"
    image.write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "front"))
        listener.listen()
        process = subprocess.Popen(  # noqa: ASYNC220
            [
                program,
                f"--fd={listener.fileno()}",
                f"--blk-file={image}",
                f"--control-socket={control}",
            ],
            pass_fds=[listener.fileno()],
        )
        try:
            async with asyncio.timeout(START_S):
                while not await _listens(ControlSocket(control, PROGRAM)):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # poll interval
            yield ControlSocket(control, PROGRAM)
        finally:
            process.kill()
            process.wait()


async def _listens(control: ControlSocket) -> bool:
    try:
        await control.ask("status")
    except Unavailable:
        return False
    return True


async def refusal(control: ControlSocket, **arguments: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await control.ask("fault", **arguments)
    return caught.value.message


async def test_a_released_backend_fails_no_request_on_demand(place: Path) -> None:
    """Beside it the control: one that is built for trials takes the command, and says what is
    wrong with another.
    """
    async with backend(Path(Blkd().binary()), place) as control:
        said = await refusal(control, rule=FAULT)
        assert 'unknown command "fault"; known are "status"' in said
        assert said.count("fault") == 1
        assert await refusal(control, rule={"op": "sing"}) == said  # not even looked at
    (place / "trial").mkdir()
    async with backend(await asyncio.to_thread(trial_backend), place / "trial") as control:
        assert await control.ask("fault", rule=FAULT) == {}
        assert "unknown operation" in await refusal(control, rule={"op": "sing"})


def test_a_released_backend_holds_nothing_of_what_tests_need() -> None:
    released, trial = Path(Blkd().binary()).read_bytes(), trial_backend().read_bytes()
    assert [text for text in FOR_TESTS if text in released] == []
    assert [text for text in FOR_TESTS if text in trial] == [*FOR_TESTS]
