"""The routes of passed-through devices."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from sempervirt.api.routes import AgentHere
from sempervirt.api.schemas import DeviceView
from sempervirt.core.errors import NotFound, SempervirtError
from sempervirt.core.names import suggest
from sempervirt.host.http import ErrorView
from sempervirt.passthrough.device import Device
from sempervirt.passthrough.mediator import DeviceOptions, PciOptions
from sempervirt.vm.vm import Vm

router = APIRouter(prefix="/v1", responses={"default": {"model": ErrorView}}, tags=["passthrough"])

# How long a mediator may take to answer whoever looks at its device.
ANSWER_S = 2.0


@router.get("/passthrough")
async def list_devices(agent: AgentHere) -> list[DeviceView]:
    """The passed-through devices of all running VMs."""
    found = [
        _view(vm, device)
        for vm in agent.vms.values()
        if not vm.freed
        for device in vm.devices.values()
    ]
    return sorted(await asyncio.gather(*found), key=lambda view: view.name)


@router.get("/passthrough/{vm}/{device}")
async def get_device(agent: AgentHere, vm: str, device: str) -> DeviceView:
    """One passed-through device."""
    owner = agent.vm(vm)
    if owner.freed or device not in owner.devices:
        raise NotFound(
            f"VM {vm} has no passed-through device {device}", remedy=suggest(device, owner.devices)
        )
    return await _view(owner, owner.devices[device])


async def _view(vm: Vm, device: Device) -> DeviceView:
    """A device; its mediator is asked now, and what it does not answer is told as such."""
    silence, status = "", None
    if not device.ailment:
        try:
            status = await device.client.status(ANSWER_S)
        except SempervirtError as error:
            silence = error.message
    options = device.setup.options
    return DeviceView(
        name=device.name,
        kind=options.kind,
        image=options.image if isinstance(options, DeviceOptions) else None,
        pci=options.pci if isinstance(options, PciOptions) else None,
        read_only=options.read_only,
        slot=device.setup.slot,
        pid=device.pid,
        state=status.state if status else None,
        spare=status.spare if status else None,
        takeovers=device.takeovers,
        ailment=device.ailment,
        failing=device.failing,
        obstacles=_obstacles(vm, device, silence),
        mediator=status.model_dump(mode="json") if status else None,
        silence=silence,
    )


def _obstacles(vm: Vm, device: Device, silence: str) -> list[str]:
    """What this host knows that would keep the device from being moved."""
    found = [device.ailment, device.failing, silence]
    if isinstance(device.setup.options, PciOptions):
        found.append(
            f"it is the PCI device {device.setup.options.pci} of this host, which stays here"
        )
    elif vm.record.claim is None:
        found.append(f"VM {vm.name} belongs to no cluster: there is no other host")
    return [reason for reason in found if reason]
