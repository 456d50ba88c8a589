"""What Ctrl-C does to a VM that a terminal follows, when its guest cannot be asked to power off."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sempervirt.cli import foreground
from sempervirt.core.errors import NotFound, OutcomeUnknown, StateConflict, Unavailable


class FakeClient:
    """An agent whose `stop` raises `error`, if there is one."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.asked: list[str] = []

    async def stop_vm(self, name: str, grace_s: float) -> None:
        self.asked.append(f"stop {name} {grace_s}")
        if self.error is not None:
            raise self.error

    async def kill_vm(self, name: str) -> None:
        self.asked.append(f"kill {name}")


@pytest.mark.parametrize(
    "error",
    [
        StateConflict("VM web is paused"),
        OutcomeUnknown("the monitor did not answer system_powerdown within 3 s"),
        Unavailable("the monitor of web is not connected"),
    ],
)
async def test_a_vm_that_cannot_be_asked_is_ended_at_once(error: Exception) -> None:
    client = FakeClient(error)
    await foreground._stop(cast(Any, client), "web", 0.5)
    assert client.asked == ["stop web 0.5", "kill web"]


async def test_a_vm_that_powers_off_is_not_killed_and_another_error_is_told() -> None:
    client = FakeClient(None)
    await foreground._stop(cast(Any, client), "web", 0.5)
    assert client.asked == ["stop web 0.5"]
    with pytest.raises(NotFound):
        await foreground._stop(cast(Any, FakeClient(NotFound("no VM web"))), "web", 0.5)
