"""The devices of a VM that leaves this host (US patent 10963286).

    arm ──► rounds while the guest runs ──► move: stand still, touch, export, let the image go
     └──────────────┴────────────────────────┴──► take_back: the guest goes on here, directly again

While a device is armed, QEMU does its DMA and so sees every page that it writes. The shim, a second
device of one page, is laid over the page with the doorbells: of two that overlap, QEMU takes the
one that was added last. So no doorbell passes by unseen, and the guest notices nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.passthrough.answers import Configured, MediatorState
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.ports import Execute, PortSpace, Write

log = logging.getLogger(__name__)

_COMMAND, _BAR0 = 0x04, 0x10
_MEMORY = 0x02
_BELOW_4G = 1 << 32
SHIM_OFF: Sequence[Write] = ((_COMMAND, 2, 0),)


@dataclass(frozen=True)
class Moved:
    """What the destination's mediator needs of one device: configuration, the last round of
    register writes, and the state that the mediator here has exported.
    """

    configuration: Configured
    writes: str
    state: str


class LeavingDevices:
    """All passed-through devices of one VM, on its way away. `execute` is of QEMU's monitor."""

    def __init__(self, devices: Sequence[Device], execute: Execute) -> None:
        self._devices = devices
        self._space = PortSpace(execute)
        # Of an arming that is given up, the last thing is that the guest runs, and uses the ports.
        self._ports = asyncio.Lock()
        self.pages_touched = 0

    async def configurations(self) -> dict[str, Configured]:
        """As the guest has set them by now, by name. Raises Unavailable, OutcomeUnknown."""
        return {device.short_name: await device.client.configuration() for device in self._devices}

    async def arm(self) -> None:
        """Before QEMU sends its first page: from now on QEMU sees what the devices write, and their
        mediators see every doorbell. Raises Unavailable, OutcomeUnknown.
        """
        if not self._devices:
            return
        async with self._ports, self._space.standing_still():
            for device in self._devices:
                captured = await device.client.capture(on=True)
                await self._lay_shim(device, captured.page)

    async def rounds(self) -> dict[str, str]:
        """Register writes since the last call, by device; those without any are left out.

        Raises Unavailable, OutcomeUnknown.
        """
        taken = {device.short_name: await device.client.round() for device in self._devices}
        return {name: one.writes for name, one in taken.items() if one.count}

    async def move(self) -> dict[str, Moved]:
        """When the guest stands still, and before QEMU sends the rest: has the devices stand still
        as well, and gives what the destination needs. From then on nothing here writes the images.

        Raises Unavailable, OutcomeUnknown: `take_back` follows.
        """
        moved = {}
        for device in self._devices:
            client = device.client
            await client.quiesce()
            self.pages_touched += (await client.touch()).pages
            last = await client.round()
            configuration = await client.configuration()
            exported = await client.export()
            if (await client.release()).owns_image and not device.setup.options.read_only:
                raise Unavailable(f"the mediator of device {device.name} keeps the image")
            moved[device.short_name] = Moved(configuration, last.writes, exported.state)
        return moved

    async def take_back(self) -> None:
        """Has the devices go on here, before the guest does; undoes all that was done, or nothing.

        A device whose mediator has ended is gone, and the guest has to go on without it. Raises
        Unavailable, OutcomeUnknown: it has to be tried again.
        """
        there = [device for device in self._devices if device.pid is not None]
        if not there:
            return
        async with self._ports, self._space.standing_still():
            for device in there:
                await self._space.write(device.setup.shim_slot, SHIM_OFF)
                try:
                    await device.client.resume()
                    await device.client.capture(on=False)
                    await self._require_running(device)
                except SempervirtError:
                    if device.pid is not None:
                        raise

    def ended(self) -> str | None:
        """A device whose mediator has ended."""
        return next((device.name for device in self._devices if device.pid is None), None)

    async def _require_running(self, device: Device) -> None:
        """A question of a move that was given up may come to the mediator after those of the way
        back, each on a connection of its own: the guest would wait for ever. Raises Unavailable.
        """
        state = (await device.client.status()).state
        if state is not MediatorState.RUNNING:
            raise Unavailable(f"the mediator of device {device.name} is {state.value} again")

    async def _lay_shim(self, device: Device, page: int | None) -> None:
        """Over the page with the doorbells, if the guest has placed that."""
        if page is None:
            return
        if page >= _BELOW_4G:
            log.warning(
                "device name=%s has its doorbells at %#x, where no shim reaches: they are not "
                "captured, and go with the rest of the registers",
                device.name,
                page,
            )
            return
        writes = ((_COMMAND, 2, 0), (_BAR0, 4, page), (_COMMAND, 2, _MEMORY))
        await self._space.write(device.setup.shim_slot, writes)
