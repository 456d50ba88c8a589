"""The owner of a VM's standbys: what it begins it also ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from sempervirt.standby import decide
from sempervirt.standby.driver import StandbyDriver
from sempervirt.standby.ports import Ports, Snapshot
from sempervirt.standby.state import First, FirstSeen
from sempervirt.standby.values import Policy


class Slow:
    """Generations of which a boot takes for ever, and does not like to be disturbed."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.booting = asyncio.Event()

    async def copy(self, *_: object) -> tuple[str, ...]:
        """At once."""
        return ()

    async def boot(self, _number: int) -> float:
        """Until it is cancelled; that takes a moment as well."""
        self.booting.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # a process that ends
            self.said.append("boot ended")
        return 0.0

    async def remove(self, number: int) -> None:
        """At once."""
        self.said.append(f"removed {number}")


async def _take() -> Snapshot:
    return Snapshot(5.0, (("root", 7),), "crash")


async def test_a_standby_that_is_being_made_has_ended_before_it_is_removed() -> None:
    """Else a QEMU that starts while its files are removed is nobody's, and runs on."""
    slow = Slow()
    first: Any = SimpleNamespace(take=_take, let_go=lambda: None)
    record: Any = SimpleNamespace(write=lambda _state: None)
    ports = Ports(first, cast("Any", slow), record)
    driver = StandbyDriver(decide.begin("web", Policy()), ports)
    driver.start()
    driver.post(FirstSeen(First.RUNNING))
    async with asyncio.timeout(90):
        await slow.booting.wait()
        await driver.disable()
    assert slow.said == ["boot ended", "removed 1"]
    assert driver.state.over
    await driver.detach()
