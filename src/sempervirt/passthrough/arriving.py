"""The devices of a VM that comes to this host (US patent 10963286).

    prepare: the configuration as the guest has set it ──► replay: rounds of register writes
        ──► receive: the last configuration and state, before the memory is complete
        ──► claim, resume: the VM is this host's

The mediators keep what they were told. So an agent that begins anew after `receive` has only to
resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sempervirt.core.errors import InvalidRequest
from sempervirt.passthrough.answers import Configured
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.leaving import Moved
from sempervirt.passthrough.ports import ConfigSpace


class ArrivingDevices:
    """All passed-through devices of one VM, on its way here."""

    def __init__(self, devices: Sequence[Device], space: ConfigSpace) -> None:
        self._devices = {device.short_name: device for device in devices}
        self._space = space
        self._configured: dict[str, Configured] = {}

    async def prepare(self, configurations: Mapping[str, Configured]) -> None:
        """Places the devices where the guest has them, while QEMU waits for the memory.

        Raises InvalidRequest when that is not about these devices, Unavailable, OutcomeUnknown.
        """
        if configurations.keys() != self._devices.keys():
            raise InvalidRequest(
                f"told of the devices {sorted(configurations)}, and the VM has "
                f"{sorted(self._devices)}",
                remedy="both hosts have to run releases that know passed-through devices",
            )
        for name, configured in configurations.items():
            await self._configure(self._devices[name], configured)

    async def replay(self, rounds: Mapping[str, str]) -> None:
        """Sets registers as the guest has set them at the source. Raises as `prepare`."""
        for name, writes in rounds.items():
            await self._device(name).client.replay(writes)

    async def receive(self, moved: Mapping[str, Moved]) -> None:
        """The last configuration and all registers of every device. Raises as `prepare`."""
        if moved.keys() != self._devices.keys():
            raise InvalidRequest(f"the state of {sorted(moved)} is not that of all devices")
        for name, one in moved.items():
            device = self._device(name)
            if self._configured.get(name) != one.configuration:
                await self._configure(device, one.configuration)
            await device.client.replay(one.writes)
            await device.client.import_state(one.state)

    async def claim(self, epoch: int, claim: str) -> None:
        """From now on the mediators may write. Raises Unavailable, OutcomeUnknown."""
        for device in self._there():
            if not device.setup.options.read_only:
                await device.client.give_claim(epoch, claim)

    async def resume(self) -> None:
        """Has the devices go on, just before the guest does. Raises Unavailable, OutcomeUnknown."""
        for device in self._there():
            await device.client.resume()

    def ended(self) -> str | None:
        """A device whose mediator has ended."""
        return next((one.name for one in self._devices.values() if one.pid is None), None)

    def _there(self) -> list[Device]:
        """A device whose mediator has ended is gone; once the VM is this host's, the guest has to
        run without it.
        """
        return [device for device in self._devices.values() if device.pid is not None]

    def _device(self, name: str) -> Device:
        if name not in self._devices:
            raise InvalidRequest(f"the VM has no device {name[:80]}")
        return self._devices[name]

    async def _configure(self, device: Device, configured: Configured) -> None:
        slot, table = device.setup.slot, configured.msix_table
        await self._space.write(slot, configured.before)
        if table.address is not None and table.table is not None:
            await device.client.write_table(table.address, table.table)
        await self._space.write(slot, configured.after)
        self._configured[device.short_name] = configured
