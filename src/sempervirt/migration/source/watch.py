"""What the source is told without asking: by the destination, by QEMU, by its disks and the wire.

Each watch turns what it sees into events; none decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from sempervirt.core.errors import NotFound, SempervirtError
from sempervirt.migration import stream
from sempervirt.migration.events import Loaded, StreamFailed
from sempervirt.migration.messages import ArrivalAnswer
from sempervirt.migration.peer import DestinationPeer
from sempervirt.migration.source.adapters import SourceDevices, SourceDisks, SourceGuest
from sempervirt.migration.source.convergence import GiveUp, GoPostcopy, RaiseLimit, Sample, Throttle
from sempervirt.migration.source.driver import SourceDriver
from sempervirt.migration.source.figures import Figures
from sempervirt.migration.source.state import (
    DestinationEnded,
    DestinationGone,
    Drained,
    GuestStopped,
    Hopeless,
    PostcopyChosen,
    SourceEnded,
    SourceEvent,
)
from sempervirt.migration.source.steering import LOOK_S
from sempervirt.vm.phases import Arrival, Mode, Phase
from sempervirt.vm.vm import Vm

log = logging.getLogger(__name__)

DISKS_S = 0.1
# Between two rounds of register writes of the passed-through devices.
ROUND_S = 0.2
# The destination answers at the latest then, also if nothing has changed.
ASK_WAIT_S = 1.0
ASK_AGAIN_S = 0.2
GONE_S = 10.0
STREAMING = (Phase.PRECOPY, Phase.SWITCHOVER, Phase.POSTCOPY)


async def watch_qemu(driver: SourceDriver, vm: Vm) -> None:
    """Posts the end of QEMU."""
    await vm.machine.wait_ended()
    driver.post(SourceEnded(vm.state.why or "QEMU ended"))


async def watch_disks(driver: SourceDriver, disks: SourceDisks) -> None:
    """Posts that a backend ended. Not by way of QEMU, which may be silent while a disk is not
    served.
    """
    while not driver.over:
        await asyncio.sleep(DISKS_S)
        disk = disks.ended()
        if disk is not None and driver.state.phase in (Phase.PRECOPY, Phase.SWITCHOVER):
            driver.post(StreamFailed(f"the backend of disk {disk} ended"))


async def follow_devices(driver: SourceDriver, devices: SourceDevices) -> None:
    """Sends what the guest writes to the registers of its devices while its memory goes, and posts
    that a mediator ended.
    """
    while not driver.over:
        phase = driver.state.phase
        gone = devices.ended()
        if gone is not None and phase in (Phase.PRECOPY, Phase.SWITCHOVER):
            driver.post(StreamFailed(f"the mediator of device {gone} ended"))
        elif phase is Phase.PRECOPY:
            try:
                await devices.send_round()
            except SempervirtError as error:
                # The state that is sent at last has every register; a round may be missing.
                log.info("migrate vm=%s a round of its devices: %s", driver.name, error)
        await asyncio.sleep(ROUND_S)


async def watch_destination(driver: SourceDriver, peer: DestinationPeer, host: str) -> None:
    """Asks the destination how far it is, once it has prepared."""
    await driver.changes.wait_until(
        lambda: driver.state.phase is not Phase.PREPARE, timeout_s=None, what="the destination"
    )
    seen, heard = Arrival.INCOMING, time.monotonic()
    while not driver.state.phase.is_end:
        try:
            answer = await peer.look(seen, ASK_WAIT_S)
        except NotFound:
            driver.post(DestinationEnded(f"{host} knows nothing of it"))
            return
        except SempervirtError as error:
            if time.monotonic() - heard > GONE_S:
                driver.post(DestinationGone(f"{host} is silent: {error}"))
                heard = time.monotonic()
            await asyncio.sleep(ASK_AGAIN_S)
            continue
        heard = time.monotonic()
        for event in answered(answer, seen, host):
            driver.post(event)
        seen = answer.phase
        if seen is Arrival.PROMISED and driver.state.mode is Mode.PRECOPY:
            return  # from now on the store decides


def answered(answer: ArrivalAnswer, seen: Arrival, host: str) -> list[SourceEvent]:
    """What an answer of the destination means, if the one before told the phase `seen`."""
    events: list[SourceEvent] = []
    if answer.phase is not seen:
        match answer.phase:
            case Arrival.PROMISED:
                events.append(Loaded())
            case Arrival.ABORTED | Arrival.LOST:
                events.append(DestinationEnded(f"{host}: {answer.why}"))
            case Arrival.PREPARING | Arrival.INCOMING | Arrival.RUNNING:
                pass
    if answer.drained:
        events.append(Drained())
    return events


class StreamWatch:
    """QEMU's events, which come at once, and its figures, which are asked for."""

    def __init__(self, driver: SourceDriver, vm: Vm, guest: SourceGuest, figures: Figures) -> None:
        self._driver = driver
        self._vm = vm
        self._guest = guest
        self._figures = figures

    def heard(self, name: str, data: Mapping[str, Any]) -> None:
        """An event of QEMU; `run` finds the same later."""
        if name == "MIGRATION":
            self._judge(str(data.get("status", "")), "")
        elif name == "RESUME" and self._guest.started:
            self._driver.post(StreamFailed("QEMU lets the guest run on by itself"))

    async def run(self) -> None:
        """Follows QEMU's figures until they are not needed any more, and steers QEMU by them."""
        driver = self._driver
        while not driver.state.phase.is_end:
            # In other phases QEMU has nothing to tell, and may be suspended.
            if driver.state.phase in STREAMING:
                try:
                    await self._look()
                except SempervirtError as error:
                    text = f"QEMU does not tell how far it is: {error.message}"
                    driver.post(StreamFailed(text))
            await asyncio.sleep(LOOK_S)

    def _judge(self, status: str, error: str) -> None:
        if status in stream.STOPPED:
            self._driver.post(GuestStopped())
        elif status in stream.FAILED and error:
            self._driver.post(StreamFailed(error))

    async def _look(self) -> None:
        told = await stream.look(self._vm.machine.execute)
        self._figures.told = told
        self._figures.memory = told.total_bytes or self._figures.memory
        await self._guest.wire.ask()
        failure = self._guest.wire.failure
        state = self._driver.state
        if state.phase is Phase.POSTCOPY:
            if told.status == stream.BROKEN and not state.recovering:
                self._driver.post(StreamFailed(failure or "the connection broke"))
        elif state.phase in STREAMING and self._guest.started:
            self._judge(told.status, failure or told.error or "QEMU says no more")
            if state.phase is Phase.PRECOPY and told.status == "active" and told.sample:
                await self._steer(told.sample)

    async def _steer(self, sample: Sample) -> None:
        guest = self._guest
        decision = await guest.steering.steer(
            self._vm.machine.execute, sample, guest.wire.bandwidth
        )
        match decision:
            case GoPostcopy():
                self._driver.post(PostcopyChosen())
            case GiveUp(reason):
                self._driver.post(Hopeless(reason))
            case RaiseLimit() | Throttle() | None:
                pass
        if decision is not None:
            log.info("migrate vm=%s %s", self._driver.name, decision)
